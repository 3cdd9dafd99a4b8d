//! Python's notions of text, where Rust's differ: what white space is, and how a number is written.

/// Whether `str.isspace` holds: Unicode's white space, and four separators of ASCII that Rust does not count.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

pub(super) fn lstrip(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

pub(super) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

pub(super) fn strip(text: &str) -> &str {
    lstrip(rstrip(text))
}

/// A message on one line, however a template wrote it.
pub(super) fn one_line(message: &str) -> String {
    message.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// How `json.dumps` writes a float.
pub(super) fn float_json(value: f64) -> String {
    match value {
        _ if value.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => float_str(value),
    }
}

/// `str(float)`: the shortest digits that read back the same, in scientific notation below 1e-4 and from 1e16 on.
pub(super) fn float_str(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string().to_lowercase();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) && value != 0.0 => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_separators_of_ascii_are_white_space() {
        assert_eq!(strip("\u{1c}\u{1f} \u{3000}a\u{200b}\n"), "a\u{200b}");
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (value, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float_str(value), text);
        }
        assert_eq!([f64::NAN, f64::NEG_INFINITY, 2.0].map(float_json), ["NaN", "-Infinity", "2.0"]);
    }
}
