//! The `{% generation %}` block marks what an assistant wrote, for training; a rendering shows its body as it is.
//!
//! `transformers` adds the tag to Jinja; the engine here takes no new tags. So it becomes a `{% with %}` block, which
//! likewise shows its body and keeps the variables that are set in it to itself. White-space control stays where it
//! is, and so do line numbers.

/// The template with `with` for `generation`, outside of comments, expressions, strings and raw blocks.
pub(super) fn strip(source: &str) -> String {
    if !source.contains("generation") {
        return source.to_owned();
    }
    let mut stripped = String::with_capacity(source.len());
    let (mut rest, mut is_raw) = (source, false);
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        stripped.push_str(before);
        let length = if is_raw && !tag.starts_with("{%") { 1 } else { tag_length(tag) };
        let (tag, after) = tag.split_at(length);
        let name = tag_name(tag);
        match name {
            "generation" | "endgeneration" if !is_raw => {
                stripped.push_str(&tag.replacen("generation", "with", 1));
            }
            _ => stripped.push_str(tag),
        }
        is_raw = if is_raw { name != "endraw" } else { name == "raw" };
        rest = after;
    }
    stripped.push_str(rest);
    stripped
}

/// Bytes of the tag, expression or comment that `text` starts with; 1 for any other brace.
fn tag_length(text: &str) -> usize {
    let close = match text.as_bytes() {
        [b'{', b'#', ..] => return text.find("#}").map_or(text.len(), |at| at + 2),
        [b'{', b'%', ..] => "%}",
        [b'{', b'{', ..] => "}}",
        _ => return 1,
    };
    let (mut quote, mut is_escaped) = (None, false);
    for (at, character) in text.char_indices().skip(2) {
        match quote {
            Some(_) if is_escaped => is_escaped = false,
            Some(_) if character == '\\' => is_escaped = true,
            Some(open) if character == open => quote = None,
            Some(_) => {}
            None if text[at..].starts_with(close) => return at + close.len(),
            None if character == '"' || character == '\'' => quote = Some(character),
            None => {}
        }
    }
    text.len()
}

/// What stands alone between `{%` and `%}`, such as `generation`; empty for all else.
fn tag_name(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")).unwrap_or_default();
    inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, stripped: &str) {
        assert_eq!(strip(source), stripped);
    }

    #[test]
    fn the_tag_becomes_a_with_block_and_keeps_its_white_space_control() {
        check("a{%- generation -%}b{% endgeneration +%}c", "a{%- with -%}b{% endwith +%}c");
        check("{%generation%}{{ x }}{%endgeneration%}", "{%with%}{{ x }}{%endwith%}");
    }

    #[test]
    fn what_only_looks_like_the_tag_stays() {
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{{ '{% endraw %}",
            "{% set x = \"\\\"{% generation %}\" %}",
            "{% if add_generation_prompt %}{% endif %}",
            "generation { % generation %}",
        ] {
            check(source, source);
        }
    }

    #[test]
    fn a_template_that_ends_within_a_tag_stays_as_it_is() {
        for source in ["{% generation", "{{ generation '", "{# generation", "generation {"] {
            check(source, source);
        }
    }
}
