//! The parser: a GBNF text becomes rules. It follows `src/llama-grammar.cpp` of llama.cpp, which is the only definition.

use std::collections::HashMap;

/// Deepest nesting of parentheses: each level is one of the parser's own calls.
const MAX_DEPTH: usize = 64;
/// Most repetitions of one part, one of another: they are walked by recursion, too.
const MAX_STACKED: usize = 16;
/// Largest number of repetitions.
const MAX_REPETITIONS: u32 = 65_536;

/// What a rule stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    /// These characters.
    Text(String),
    /// One character of these ranges, or, if negated, of none of them.
    Class { negated: bool, ranges: Vec<(char, char)> },
    /// Any character.
    Any,
    /// A control token, as `<|name|>` or `<[id]>`.
    Token(String),
    /// The rule of this index.
    Reference(usize),
    /// One after another.
    Sequence(Vec<Expression>),
    /// One of them.
    Choice(Vec<Expression>),
    /// One, so many times.
    Repeat { part: Box<Expression>, min: u32, max: Option<u32> },
}

/// A named expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) expression: Expression,
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    depth: usize,
    /// Rules in the order of their first mention, each with its line.
    names: Vec<(String, usize)>,
    idx_of: HashMap<&'a str, usize>,
}

/// Reads the rules of a grammar, in the order in which they are mentioned first.
pub(super) fn parse(grammar: &str) -> Result<Vec<Rule>, String> {
    let mut parser = Parser { rest: grammar, line: 1, depth: 0, names: Vec::new(), idx_of: HashMap::new() };
    let mut defined = HashMap::new();
    parser.skip_blanks(true);
    while !parser.rest.is_empty() {
        let (idx, expression) = parser.rule(&defined)?;
        defined.insert(idx, expression);
        parser.skip_blanks(true);
    }
    let mut rules = Vec::with_capacity(parser.names.len());
    for (idx, (name, line)) in parser.names.into_iter().enumerate() {
        let expression = defined.remove(&idx).ok_or_else(|| format!("line {line}: there is no rule `{name}`"))?;
        rules.push(Rule { name, expression });
    }
    Ok(rules)
}

// === impl Expression ===

impl Expression {
    /// Calls `see` with it and with every part of it.
    pub(super) fn visit(&self, see: &mut impl FnMut(&Self)) {
        see(self);
        match self {
            Self::Sequence(parts) | Self::Choice(parts) => parts.iter().for_each(|part| part.visit(see)),
            Self::Repeat { part, .. } => part.visit(see),
            _ => {}
        }
    }
}

// === impl Parser ===

impl<'a> Parser<'a> {
    /// `name ::= choice`.
    fn rule(&mut self, defined: &HashMap<usize, Expression>) -> Result<(usize, Expression), String> {
        let name = self.name().ok_or_else(|| self.error("expected a rule's name"))?;
        let idx = self.reference(name);
        if defined.contains_key(&idx) {
            return Err(self.error(format!("the rule `{name}` is there already")));
        }
        self.skip_blanks(false);
        self.expect("::=")?;
        self.skip_blanks(true);
        Ok((idx, self.choice()?))
    }

    /// Sequences with `|` between them.
    fn choice(&mut self) -> Result<Expression, String> {
        let mut parts = vec![self.sequence()?];
        while self.take("|") {
            self.skip_blanks(true);
            parts.push(self.sequence()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expression::Choice(parts) })
    }

    fn sequence(&mut self) -> Result<Expression, String> {
        let mut parts = Vec::new();
        loop {
            let part = match self.rest.chars().next() {
                Some('"') => self.text()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.bump(1);
                    Expression::Any
                }
                Some('<') => self.token()?,
                Some('(') => self.group()?,
                Some('*' | '+' | '?' | '{') => return Err(self.error("nothing to repeat")),
                _ => match self.name() {
                    Some(name) => Expression::Reference(self.reference(name)),
                    None => break,
                },
            };
            self.skip_blanks(self.depth > 0);
            parts.push(self.repeated(part)?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expression::Sequence(parts) })
    }

    fn group(&mut self) -> Result<Expression, String> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(format!("parentheses are nested over {MAX_DEPTH} deep")));
        }
        self.bump(1);
        self.depth += 1;
        self.skip_blanks(true);
        let inside = self.choice()?;
        self.depth -= 1;
        self.expect(")")?;
        Ok(inside)
    }

    /// A part with the repetitions that follow it.
    fn repeated(&mut self, mut part: Expression) -> Result<Expression, String> {
        for _ in 0..=MAX_STACKED {
            let (min, max) = match self.rest.chars().next() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => self.braces()?,
                _ => return Ok(part),
            };
            self.bump(1);
            part = Expression::Repeat { part: Box::new(part), min, max };
            self.skip_blanks(self.depth > 0);
        }
        Err(self.error(format!("a part has over {MAX_STACKED} repetitions")))
    }

    /// `{n}`, `{min,}`, `{,max}` or `{min,max}`, up to the closing brace.
    fn braces(&mut self) -> Result<(u32, Option<u32>), String> {
        self.bump(1);
        let min = self.number()?;
        let max = if self.take(",") { self.number()? } else { min };
        let min = min.unwrap_or(0);
        if !self.rest.starts_with('}') {
            return Err(self.error("expected `}`"));
        }
        match max {
            Some(max) if max < min || max == 0 => Err(self.error(format!("{{{min},{max}}} repeats nothing"))),
            max => Ok((min, max)),
        }
    }

    fn number(&mut self) -> Result<Option<u32>, String> {
        let digits = self.run(|character| character.is_ascii_digit());
        if digits.is_empty() {
            return Ok(None);
        }
        let number = digits.parse().ok().filter(|number| *number <= MAX_REPETITIONS);
        number.map(Some).ok_or_else(|| self.error(format!("a number over {MAX_REPETITIONS}")))
    }

    fn token(&mut self) -> Result<Expression, String> {
        let end = self.rest.find('>').ok_or_else(|| self.error("a control token does not end"))?;
        let token = self.rest[..=end].to_owned();
        if token.contains(char::is_whitespace) || token == "<>" {
            return Err(self.error(format!("`{token}` is no control token")));
        }
        self.bump(end + 1);
        Ok(Expression::Token(token))
    }

    fn text(&mut self) -> Result<Expression, String> {
        self.bump(1);
        let mut text = String::new();
        while !self.take("\"") {
            if self.is_at_line_end() {
                return Err(self.error("a text does not end"));
            }
            text.push(self.character()?);
        }
        Ok(Expression::Text(text))
    }

    fn class(&mut self) -> Result<Expression, String> {
        self.bump(1);
        let negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            if self.is_at_line_end() {
                return Err(self.error("a class does not end"));
            }
            let first = self.character()?;
            let is_range = self.rest.starts_with('-') && !self.rest.starts_with("-]");
            let last = if is_range {
                self.bump(1);
                self.character()?
            } else {
                first
            };
            if last < first {
                return Err(self.error("a range ends before it begins"));
            }
            ranges.push((first, last));
        }
        if ranges.is_empty() {
            return Err(self.error("a class of nothing"));
        }
        Ok(Expression::Class { negated, ranges })
    }

    /// A character of a text or a class, which may be escaped.
    fn character(&mut self) -> Result<char, String> {
        let character = self.next_char()?;
        if character != '\\' {
            return Ok(character);
        }
        let escaped = self.next_char()?;
        match escaped {
            'n' => Ok('\n'),
            'r' => Ok('\r'),
            't' => Ok('\t'),
            '\\' | '"' | '[' | ']' | '-' | '^' => Ok(escaped),
            'x' => self.code_point('x', 2),
            'u' => self.code_point('u', 4),
            'U' => self.code_point('U', 8),
            _ => Err(self.error(format!("`\\{escaped}` is no escape"))),
        }
    }

    fn code_point(&mut self, letter: char, n_digits: usize) -> Result<char, String> {
        let digits = self.rest.get(..n_digits).filter(|digits| digits.chars().all(|digit| digit.is_ascii_hexdigit()));
        let digits = digits.ok_or_else(|| self.error(format!("`\\{letter}` needs {n_digits} digits")))?;
        let character = u32::from_str_radix(digits, 16).ok().and_then(char::from_u32);
        let character = character.ok_or_else(|| self.error(format!("`\\{letter}{digits}` is no character")))?;
        self.bump(n_digits);
        Ok(character)
    }

    // === characters ===

    fn error(&self, what: impl Into<String>) -> String {
        format!("line {}: {}", self.line, what.into())
    }

    fn is_at_line_end(&self) -> bool {
        self.rest.is_empty() || self.rest.starts_with(['\r', '\n'])
    }

    /// Goes on by so many bytes.
    fn bump(&mut self, n_bytes: usize) {
        let (skipped, rest) = self.rest.split_at(n_bytes);
        self.line += skipped.matches('\n').count();
        self.rest = rest;
    }

    /// Skips blanks and comments, and the ends of lines where a rule may go on after them.
    fn skip_blanks(&mut self, across_lines: bool) {
        loop {
            match self.rest.chars().next() {
                Some(' ' | '\t') => self.bump(1),
                Some('\r' | '\n') if across_lines => self.bump(1),
                Some('#') => self.bump(self.rest.find(['\r', '\n']).unwrap_or(self.rest.len())),
                _ => return,
            }
        }
    }

    fn take(&mut self, token: &str) -> bool {
        let is_there = self.rest.starts_with(token);
        if is_there {
            self.bump(token.len());
        }
        is_there
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(self.error(format!("expected `{token}`"))) }
    }

    fn next_char(&mut self) -> Result<char, String> {
        let character = self.rest.chars().next().ok_or_else(|| self.error("the grammar ends in a text or a class"))?;
        self.bump(character.len_utf8());
        Ok(character)
    }

    /// Takes characters of a kind as long as they come.
    fn run(&mut self, is_of_it: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest;
        let end = rest.find(|character| !is_of_it(character)).unwrap_or(rest.len());
        self.bump(end);
        &rest[..end]
    }

    fn name(&mut self) -> Option<&'a str> {
        let name = self.run(|character| character.is_ascii_alphanumeric() || character == '-');
        (!name.is_empty()).then_some(name)
    }

    /// The index of a rule, defined or not.
    fn reference(&mut self, name: &'a str) -> usize {
        let Self { names, idx_of, line, .. } = self;
        *idx_of.entry(name).or_insert_with(|| {
            names.push((name.to_owned(), *line));
            names.len() - 1
        })
    }
}
