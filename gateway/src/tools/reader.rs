//! A reader splits what a model writes into text for the client and calls of tools, as it comes. Pure.
//!
//! ```text
//! text ── opening ──► between ── `{` ──► a call ── `}` ──► between ── closing, or other text ──► text
//!                                          └─ not a call of a known tool ──► it was text after all
//! ```
//!
//! What is not a call of a tool that the conversation has is text, and nothing of it is lost but blanks before a call and
//! the punctuation between calls.

use std::{collections::BTreeSet, sync::Arc};

use lockstep_proto::v1::ToolCallDelta;

use super::{Convention, Format, call::Scanner};

/// Most calls of one answer, as the contract states it.
const MAX_CALLS: u32 = 128;

/// What a reader must know of a request.
#[derive(Debug, Clone)]
pub struct Rules {
    /// How the model calls tools.
    pub convention: Convention,
    /// The tools that there are.
    pub names: Arc<BTreeSet<String>>,
    /// Whether one call ends the answer.
    pub single: bool,
    /// Whether the answer is nothing but calls.
    pub forced: bool,
}

/// Reads one answer.
#[derive(Debug)]
pub struct Reader {
    rules: Rules,
    place: Place,
    /// Text that is not read yet, as it might be the beginning of something.
    held: String,
    /// What was read since the opening and might turn out to be text.
    doubtful: String,
    /// Calls that have begun.
    n_calls: u32,
    /// Whether one has since the last text.
    in_calls: bool,
}

#[derive(Debug)]
enum Place {
    /// Nothing but blanks has come.
    Start,
    Text,
    Between,
    Call {
        scanner: Box<Scanner>,
        /// Whether the client has been told of it.
        begun: bool,
    },
    /// The answer is complete.
    End,
}

/// What became known.
#[derive(Debug, Default, PartialEq)]
pub struct Read {
    /// Text for the client.
    pub text: String,
    /// Pieces of calls, in order.
    pub calls: Vec<ToolCallDelta>,
}

/// What a step came to.
enum Step {
    /// Something was read, and there may be more.
    On,
    /// More text is needed.
    Wait,
}

// === impl Reader ===

impl Reader {
    /// A reader of an answer from its beginning.
    pub fn new(rules: Rules) -> Self {
        let place = if rules.forced { Place::Between } else { Place::Start };
        Self { rules, place, held: String::new(), doubtful: String::new(), n_calls: 0, in_calls: false }
    }

    /// Whether the answer has called a tool.
    pub fn has_called(&self) -> bool {
        self.n_calls > 0
    }

    /// Whether the one call of an answer that may have one is complete.
    pub fn ended(&self) -> bool {
        matches!(self.place, Place::End)
    }

    /// Whether the token begins calls; see [`Reader::mark`].
    pub fn is_mark(&self, id: u32) -> bool {
        self.rules.convention.mark == Some(id)
    }

    /// Reads text.
    pub fn push(&mut self, text: &str) -> Read {
        self.held.push_str(text);
        self.run(false)
    }

    /// The control token that begins calls has come.
    pub fn mark(&mut self) -> Read {
        let mut read = self.run(true);
        if !self.ended() {
            self.flush(&mut read);
            self.place = Place::Between;
        }
        read
    }

    /// The answer has ended: what is still held is text.
    pub fn end(&mut self) -> Read {
        let mut read = self.run(true);
        self.flush(&mut read);
        read
    }

    fn flush(&mut self, read: &mut Read) {
        self.give_up(read);
        read.text.push_str(&std::mem::take(&mut self.held));
    }

    fn run(&mut self, last: bool) -> Read {
        let mut read = Read::default();
        while let Step::On = self.step(last, &mut read) {}
        read
    }

    fn step(&mut self, last: bool, read: &mut Read) -> Step {
        match &mut self.place {
            Place::Start => self.start(),
            Place::Text => self.text(last, read),
            Place::Between => self.between(last, read),
            Place::Call { .. } => self.call(read),
            Place::End => {
                self.held.clear();
                Step::Wait
            }
        }
    }

    fn start(&mut self) -> Step {
        let format = self.rules.convention.format;
        let Some(first) = self.held.chars().find(|c| !c.is_whitespace()) else { return Step::Wait };
        let bare = format.may_be_bare() && (first == '{' || (first == '[' && format.may_be_listed()));
        self.place = if bare { Place::Between } else { Place::Text };
        Step::On
    }

    /// Gives text up to the opening, or to what may become one.
    fn text(&mut self, last: bool, read: &mut Read) -> Step {
        let opening = self.opening();
        if let Some(at) = opening.and_then(|opening| self.held.find(opening)) {
            let before = self.held.get(..at).unwrap_or_default().trim_end().len();
            read.text.extend(self.held.drain(..before));
            self.doubtful = self.held.drain(..at - before + opening.map_or(0, str::len)).collect();
            self.place = Place::Between;
            return Step::On;
        }
        let sure = if last { self.held.len() } else { self.held.len() - opening_len(&self.held, opening) };
        // Blanks may turn out to stand before a call.
        let sure = if last { sure } else { self.held.get(..sure).unwrap_or_default().trim_end().len() };
        read.text.extend(self.held.drain(..sure));
        Step::Wait
    }

    /// A model that has a control token for it does not spell it.
    fn opening(&self) -> Option<&'static str> {
        self.rules.convention.format.opening().filter(|_| self.rules.convention.mark.is_none())
    }

    fn between(&mut self, last: bool, read: &mut Read) -> Step {
        let format = self.rules.convention.format;
        let Some(c) = self.held.chars().next() else { return Step::Wait };
        let listed = format.may_be_listed() && matches!(c, '[' | ']' | ',');
        if c.is_whitespace() || listed || (c == ';' && format == Format::Llama) {
            self.skip(c.len_utf8());
            return Step::On;
        }
        if c == '{' && self.n_calls < MAX_CALLS {
            self.place = Place::Call { scanner: Box::default(), begun: false };
            return Step::On;
        }
        // A grammar that makes the model call spells the opening even where it is a control token.
        let opening = if self.rules.forced { format.opening() } else { self.opening() };
        for (word, place) in [(format.closing(), Place::Text), (opening, Place::Between)] {
            let Some(word) = word else { continue };
            if self.held.starts_with(word) {
                self.skip(word.len());
                if let Place::Text = place {
                    self.give_up(read);
                }
                return Step::On;
            }
            if word.starts_with(self.held.as_str()) && !last {
                return Step::Wait;
            }
        }
        self.give_up(read);
        Step::On
    }

    /// Passes over what stands around calls. Before the first one it may yet turn out to be text.
    fn skip(&mut self, n_bytes: usize) {
        let skipped = self.held.drain(..n_bytes);
        if !self.in_calls {
            self.doubtful.extend(skipped);
        }
    }

    fn call(&mut self, read: &mut Read) -> Step {
        let Place::Call { scanner, begun } = &mut self.place else { return Step::Wait };
        let mut n_bytes = 0;
        let mut outcome = Ok(());
        for c in self.held.chars() {
            outcome = scanner.read(c);
            if outcome.is_err() || scanner.closed() {
                n_bytes += if outcome.is_ok() { c.len_utf8() } else { 0 };
                break;
            }
            n_bytes += c.len_utf8();
        }
        let taken = self.held.drain(..n_bytes);
        if !*begun {
            self.doubtful.extend(taken);
        } else {
            drop(taken);
        }
        let known = scanner.called().map(|name| self.rules.names.contains(name));
        if outcome.is_err() || known == Some(false) {
            self.give_up(read);
            return Step::On;
        }
        if known == Some(true) {
            let mut piece = ToolCallDelta { arguments_json: scanner.take_arguments(), ..ToolCallDelta::default() };
            if !*begun {
                (piece.id, piece.name) = (call_id(), scanner.called().unwrap_or_default().to_owned());
                self.n_calls += 1;
                (*begun, self.in_calls) = (true, true);
                self.doubtful.clear();
            }
            piece.index = self.n_calls - 1;
            if !piece.arguments_json.is_empty() || !piece.name.is_empty() {
                read.calls.push(piece);
            }
        }
        if !scanner.closed() {
            return Step::Wait;
        }
        self.place = if self.rules.single { Place::End } else { Place::Between };
        Step::On
    }

    /// What was taken for the beginning of a call was text.
    fn give_up(&mut self, read: &mut Read) {
        read.text.push_str(&std::mem::take(&mut self.doubtful));
        self.in_calls = false;
        self.place = Place::Text;
    }
}

/// Bytes at the end of the text that may be the beginning of the opening.
fn opening_len(text: &str, opening: Option<&str>) -> usize {
    let Some(opening) = opening else { return 0 };
    let begins = |n: &usize| opening.get(..*n).is_some_and(|beginning| text.ends_with(beginning));
    (1..opening.len()).rev().find(begins).unwrap_or(0)
}

/// Names a call. Mistral's templates take nine letters and digits, and nothing else.
fn call_id() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(9).collect()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn reader(format: Format, single: bool) -> Reader {
        let names = Arc::new(["f", "get_weather"].map(str::to_owned).into());
        Reader::new(Rules {
            convention: Convention { format, mark: None, shown_by_template: true },
            names,
            single,
            forced: false,
        })
    }

    /// Text and calls of an answer that comes in pieces, which end at these bytes.
    fn read(mut reader: Reader, answer: &str, ends: &[usize]) -> (String, Vec<(String, String)>) {
        let (mut text, mut calls) = (String::new(), Vec::new());
        let mut take = |read: Read| {
            text += &read.text;
            for piece in read.calls {
                if !piece.name.is_empty() {
                    assert_eq!((piece.index as usize, piece.id.len()), (calls.len(), 9));
                    calls.push((piece.name, String::new()));
                }
                calls[piece.index as usize].1 += &piece.arguments_json;
            }
        };
        let mut from = 0;
        for &end in ends.iter().chain([&answer.len()]) {
            take(reader.push(&answer[from..end]));
            from = end;
        }
        take(reader.end());
        (text, calls)
    }

    fn check(format: Format, answer: &str, text: &str, calls: &[(&str, &str)]) {
        let expected: Vec<_> = calls.iter().map(|&(name, arguments)| (name.to_owned(), arguments.to_owned())).collect();
        let every: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
        for at in &every {
            let found = read(reader(format, false), answer, &[*at]);
            assert_eq!(found, (text.to_owned(), expected.clone()), "{answer} cut at {at}");
        }
        assert_eq!(read(reader(format, false), answer, &every), (text.to_owned(), expected), "{answer} in pieces");
    }

    #[test]
    fn each_format_is_read() {
        let f = ("f", r#"{"a": "ü}"}"#);
        let call = r#"{"name": "f", "arguments": {"a": "ü}"}}"#;
        let wrapped = format!("<tool_call>\n{call}\n</tool_call>");
        check(Format::Hermes, &wrapped, "", &[f]);
        check(Format::Hermes, &format!("Let me see.\n\n{wrapped}\n{wrapped}"), "Let me see.", &[f, f]);
        check(Format::Hermes, &format!("<tool_call>{call}</tool_call> So."), " So.", &[f]);
        check(Format::Mistral, &format!("[TOOL_CALLS] [{call}, {call}]"), "", &[f, f]);
        check(Format::Llama, r#"{"name": "f", "parameters": {"a": "ü}"}}"#, "", &[f]);
        check(
            Format::Llama,
            r#" <|python_tag|>{"type": "function", "name": "f"}; {"name": "f"}"#,
            "",
            &[("f", "{}"); 2],
        );
        check(Format::Json, call, "", &[f]);
        check(Format::Json, &format!("[{call}, {call}]\n"), "", &[f, f]);
    }

    #[test]
    fn what_is_no_call_of_a_known_tool_is_text() {
        for (format, answer) in [
            (Format::Hermes, r#"{"name": "f", "arguments": {}}"#),
            (Format::Hermes, r#"<tool_call>{"name": "g", "arguments": {}}</tool_call>"#),
            (Format::Hermes, "a <tool_ca <tool_call> b </tool_call> c  "),
            (Format::Hermes, "<tool_call></tool_call>"),
            (Format::Mistral, r#"Here: [TOOL_CALLS"#),
            (Format::Mistral, r#"[TOOL_CALLS][1, 2]"#),
            (Format::Llama, r#"{"colour": "red", "name": "f"}"#),
            (Format::Llama, r#"{"name": "f", "param"#),
            (Format::Json, r#"[1, {"name": "f"}]"#),
            (Format::Json, r#"{"name": "f", "colour": {}}"#),
            (Format::Json, "  plain text\n"),
            (Format::Json, " \n"),
        ] {
            check(format, answer, answer, &[]);
        }
    }

    #[test]
    fn one_call_ends_an_answer_that_may_have_one() {
        let mut reader = reader(Format::Hermes, true);
        let call = r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#;
        let read = reader.push(&format!("{call} and {call}"));
        assert!(reader.ended());
        assert_eq!((read.text.as_str(), read.calls.len()), ("", 1));
        assert_eq!(reader.end(), Read::default());
    }

    #[test]
    fn a_mark_begins_calls_and_its_spelling_does_not() {
        let names = Arc::new(["f".to_owned()].into());
        let convention = Convention { format: Format::Mistral, mark: Some(9), shown_by_template: true };
        let mut reader = Reader::new(Rules { convention, names, single: false, forced: false });
        assert_eq!(reader.push("[TOOL_CALLS] is a word").text, "[TOOL_CALLS] is a word");
        assert_eq!(reader.mark(), Read::default());
        let read = reader.push(r#"[{"name": "f", "arguments": {}}]"#);
        assert_eq!((read.text.as_str(), read.calls.len()), ("", 1));
        assert!(reader.has_called());
    }

    #[test]
    fn an_answer_that_is_nothing_but_calls_needs_no_opening() {
        let names = Arc::new(["f".to_owned()].into());
        let convention = Convention { format: Format::Mistral, mark: Some(9), shown_by_template: true };
        let rules = Rules { convention, names, single: false, forced: true };
        let reader = Reader::new(rules.clone());
        let calls = vec![("f".to_owned(), "{}".to_owned())];
        assert_eq!(read(reader, r#"[{"name": "f", "arguments": {}}]"#, &[5, 20]), (String::new(), calls.clone()));
        // One that is spelled where it could be a control token is passed over.
        let convention = Convention { format: Format::Hermes, ..rules.convention.clone() };
        let reader = Reader::new(Rules { convention, ..rules });
        let spelled = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
        assert_eq!(read(reader, spelled, &[5, 20]), (String::new(), calls));
    }

    #[test]
    fn nothing_is_lost_wherever_it_is_cut() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let words =
            ["<tool_call>", "</tool_call>", "<tool", "{", "}", "\"name\"", ":", "\"f\"", ",", " ", "[", "]", "é", "\n"];
        for format in [Format::Hermes, Format::Mistral, Format::Llama, Format::Json] {
            for _ in 0..2_000 {
                let answer: String =
                    (0..random.random_range(0..12)).map(|_| words[random.random_range(0..words.len())]).collect();
                let whole = read(reader(format, false), &answer, &[]);
                let ends: Vec<usize> = answer.char_indices().map(|(at, _)| at).filter(|_| random.random()).collect();
                assert_eq!(read(reader(format, false), &answer, &ends), whole, "{format:?}: {answer:?} at {ends:?}");
                if whole.1.is_empty() {
                    assert_eq!(whole.0, answer, "{format:?}");
                }
            }
        }
    }
}
