//! Grammars: what llguidance makes of a constraint and a vocabulary.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use llguidance::{
    ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use lockstep_checkpoint::Vocabulary;

use serde_json::{Map, Value, json};

use super::{Constraint, one_line};

/// What may stand between the parts of a JSON value: none, a blank, or an end of line and what indents the next. It is
/// llama.cpp's choice (`common/json-schema-to-grammar.cpp`); without a bound, small models go on with blanks for ever.
const BLANKS: &str = r" |\n{1,2}[ \t]{0,20}";

/// Compiles constraints for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    n_ids: usize,
    control_tokens: Vec<(u32, String)>,
}

impl Grammars {
    /// For a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// If the bytes of its tokens are not known.
    pub fn new(vocabulary: &Vocabulary, vocab_size: usize) -> Result<Self, String> {
        if vocabulary.tokens.is_empty() {
            return Err("its files have no vocabulary".into());
        }
        let spelling = vocabulary.spelling.as_ref().map_err(ToString::to_string)?;
        let mut control_tokens = Vec::new();
        let words = (0..).zip(vocabulary.tokens.iter().take(vocab_size)).map(|(id, token)| {
            let mut bytes = Vec::new();
            if token.is_reserved {
                bytes = control_token(&token.text);
                control_tokens.push((id, token.text.clone()));
            } else {
                spelling.append(&token.text, &mut bytes);
            }
            bytes
        });
        let mut words: Vec<Vec<u8>> = words.collect();
        // A model may have rows without a token; nothing is made of those.
        words.resize(vocab_size, Vec::new());
        Self::of_words(words, control_tokens)
    }

    /// For a vocabulary of `n_ids` ids or more, which has these control tokens and all bytes: constraints that compile
    /// with it compile with any such vocabulary.
    ///
    /// # Errors
    /// If llguidance cannot do with it.
    pub fn of_bytes(n_ids: usize, control_tokens: Vec<(u32, String)>) -> Result<Self, String> {
        let mut words = vec![Vec::new(); n_ids];
        for (id, name) in &control_tokens {
            *words.get_mut(*id as usize).ok_or("a control token is out of range")? = control_token(name);
        }
        let mut bytes = (0..=u8::MAX).map(|byte| vec![byte]);
        for word in words.iter_mut().filter(|word| word.is_empty()) {
            let Some(byte) = bytes.next() else { break };
            *word = byte;
        }
        words.extend(bytes);
        Self::of_words(words, control_tokens)
    }

    /// Adds a token that no model has, by which llguidance says where the text may end: end-of-turn tokens differ from
    /// request to request, and a vocabulary is made once.
    fn of_words(mut words: Vec<Vec<u8>>, control_tokens: Vec<(u32, String)>) -> Result<Self, String> {
        let n_ids = words.len();
        let end = u32::try_from(n_ids).map_err(|_| "its vocabulary is too large")?;
        words.push(Vec::new());
        let build = || {
            let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&env)
        };
        // Some of what llguidance asks of a vocabulary, it asserts.
        let factory = catch_unwind(AssertUnwindSafe(build)).map_err(|_| "its vocabulary is none for llguidance")?;
        let mut factory = factory.map_err(|error| one_line(&error))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self { factory, n_ids, control_tokens })
    }

    /// Ids are below this.
    pub fn n_ids(&self) -> usize {
        self.n_ids
    }

    /// Control tokens, which grammars may mention by name or by id.
    pub fn control_tokens(&self) -> &[(u32, String)] {
        &self.control_tokens
    }

    /// Compiles a constraint.
    ///
    /// # Errors
    /// What is wrong with it, in one line.
    pub(super) fn compile(&self, constraint: &Constraint) -> Result<llguidance::Matcher, String> {
        let grammar = match constraint {
            Constraint::JsonSchema(schema) => {
                let schema = serde_json::from_str(schema).map_err(|error| format!("no JSON: {error}"))?;
                TopLevelGrammar::from_json_schema(with_few_blanks(schema))
            }
            Constraint::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Constraint::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| one_line(&format!("{error:#}")))?;
        Ok(llguidance::Matcher::new(Ok(parser)).into_cancellable())
    }

    /// The token by which llguidance says that the text may end.
    pub(super) fn end(&self) -> u32 {
        self.factory.tok_env().eos_token()
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("end", &self.end()).finish_non_exhaustive()
    }
}

/// llguidance's defaults, but for lexer states, of which its own would take 500 MB, and the time that large regular
/// expressions are compared with a vocabulary of any size in advance.
fn limits() -> ParserLimits {
    ParserLimits {
        max_lexer_states: 16_384,
        precompute_large_lexemes: false,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Bounds the blanks between the parts of a JSON value, unless the schema says something about them itself
/// (`x-guidance`).
fn with_few_blanks(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => Map::new(),
        Value::Object(schema) => schema,
        // None, or no schema: llguidance says so.
        other => return other,
    };
    schema.entry("x-guidance").or_insert_with(|| json!({ "whitespace_pattern": BLANKS }));
    Value::Object(schema)
}

/// A control token as llguidance wants it: not to be taken for text.
fn control_token(name: &str) -> Vec<u8> {
    [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
}
