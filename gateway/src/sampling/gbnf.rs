//! GBNF is llama.cpp's form of grammars (`grammars/README.md` there): rules of characters. It becomes Lark, whose rules are
//! made of *terminals*, each of which is a regular expression.
//!
//! Where one terminal of a rule may be followed by another, Lark takes the longest; GBNF knows no such thing. So
//! terminals are made as large as they can be: a rule that never comes back to itself is one terminal, whatever it
//! refers to, and means exactly what it did. Of other rules (a JSON value within a value) the text that the grammar
//! allows is allowed as long as no part of it begins another part in its place.

mod parser;

use parser::{Expression, Rule};

use super::constraint::lark_string;

/// The grammar in llguidance's form of Lark.
///
/// # Errors
/// What is wrong with the grammar, in one line.
pub(super) fn to_lark(grammar: &str) -> Result<String, String> {
    let rules = parser::parse(grammar)?;
    let root = rules.iter().position(|rule| rule.name == "root").ok_or("there is no rule `root`")?;
    let terminal = terminals(&rules);
    let names: Vec<String> = (0..).zip(&rules).map(|(idx, rule)| name(idx, rule, terminal[idx])).collect();
    let mut lark = format!("start: {}\n", names[root]);
    for (rule, name) in rules.iter().zip(&names) {
        lark.push_str(name);
        lark.push_str(": ");
        write(&rule.expression, &names, &mut lark);
        lark.push('\n');
    }
    Ok(lark)
}

/// Lark tells terminals from rules by their letters. The number keeps names apart.
fn name(idx: usize, rule: &Rule, is_terminal: bool) -> String {
    match is_terminal {
        true => format!("T{idx}-{}", rule.name.to_ascii_uppercase()),
        false => format!("r{idx}-{}", rule.name.to_ascii_lowercase()),
    }
}

/// Which rules are terminals: those that refer to nothing but terminals. Kahn's algorithm: a rule is settled when all
/// that it refers to is.
fn terminals(rules: &[Rule]) -> Vec<bool> {
    let mut n_open: Vec<usize> = vec![0; rules.len()];
    let mut referred_by: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    for (idx, rule) in rules.iter().enumerate() {
        rule.expression.visit(&mut |part| match part {
            Expression::Reference(to) => {
                n_open[idx] += 1;
                referred_by[*to].push(idx);
            }
            // A control token is no text, so nothing settles a rule that has one.
            Expression::Token(_) => n_open[idx] += 1,
            _ => {}
        });
    }
    let mut settled: Vec<usize> = (0..rules.len()).filter(|&idx| n_open[idx] == 0).collect();
    let mut is_terminal = vec![false; rules.len()];
    while let Some(idx) = settled.pop() {
        is_terminal[idx] = true;
        for &user in &referred_by[idx] {
            n_open[user] -= 1;
            if n_open[user] == 0 {
                settled.push(user);
            }
        }
    }
    is_terminal
}

/// Appends an expression as Lark writes it.
fn write(expression: &Expression, names: &[String], lark: &mut String) {
    match expression {
        Expression::Text(text) => lark.push_str(&lark_string(text)),
        Expression::Class { negated, ranges } => {
            lark.push_str(if *negated { "/[^" } else { "/[" });
            for (first, last) in ranges {
                lark.push_str(&format!("\\x{{{:x}}}-\\x{{{:x}}}", *first as u32, *last as u32));
            }
            lark.push_str("]/");
        }
        Expression::Any => lark.push_str("/./s"),
        Expression::Token(token) => lark.push_str(token),
        Expression::Reference(to) => lark.push_str(&names[*to]),
        Expression::Sequence(parts) => write_all(parts, " ", names, lark),
        Expression::Choice(parts) => write_all(parts, " | ", names, lark),
        Expression::Repeat { part, min, max } => {
            lark.push('(');
            write(part, names, lark);
            lark.push(')');
            lark.push_str(&match (min, max) {
                (0, None) => "*".to_owned(),
                (1, None) => "+".to_owned(),
                (0, Some(1)) => "?".to_owned(),
                (min, None) => format!("{{{min},}}"),
                (min, Some(max)) => format!("{{{min},{max}}}"),
            });
        }
    }
}

fn write_all(parts: &[Expression], between: &str, names: &[String], lark: &mut String) {
    if parts.is_empty() {
        lark.push_str("\"\"");
    }
    for (idx, part) in parts.iter().enumerate() {
        lark.push_str(if idx == 0 { "" } else { between });
        let is_choice = matches!(part, Expression::Choice(_));
        lark.push_str(if is_choice { "(" } else { "" });
        write(part, names, lark);
        lark.push_str(if is_choice { ")" } else { "" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(grammar: &str, lark: &str) {
        assert_eq!(to_lark(grammar).as_deref(), Ok(lark));
    }

    #[track_caller]
    fn check_refused(grammar: &str, why: &str) {
        assert_eq!(to_lark(grammar).unwrap_err(), why);
    }

    #[test]
    fn repetitions_are_stacked_only_so_high() {
        check("root ::= \"a\"?*", "start: T0-ROOT\nT0-ROOT: ((\"a\")?)*\n");
        let refused = to_lark(&format!("root ::= \"a\"{}", "*".repeat(60_000))).unwrap_err();
        assert!(refused.contains("a part has over 16 repetitions"), "{refused}");
    }

    #[test]
    fn a_grammar_without_recursion_is_terminals_alone() {
        check(
            "# an answer\nroot ::= yes-no \".\"? # and its end\nyes-no ::= \"yes\" |\n  \"no\"\n",
            "start: T0-ROOT\nT0-ROOT: T1-YES-NO (\".\")?\nT1-YES-NO: \"yes\" | \"no\"\n",
        );
    }

    #[test]
    fn rules_that_come_back_to_themselves_and_their_users_are_rules() {
        check(
            "root ::= list \"!\"\nlist ::= \"[\" (item (\",\" item)*)? \"]\"\nitem ::= list | [0-9]+\n",
            "start: r0-root\nr0-root: r1-list \"!\"\n\
             r1-list: \"[\" (r2-item (\",\" r2-item)*)? \"]\"\nr2-item: r1-list | (/[\\x{30}-\\x{39}]/)+\n",
        );
        check("root ::= <|call|> [^\\n]{2,}", "start: r0-root\nr0-root: <|call|> (/[^\\x{a}-\\x{a}]/){2,}\n");
    }

    #[test]
    fn characters_are_what_they_were() {
        check(
            r#"root ::= "a\"\\\n\x41é" [^"\\\]a-f-] . ("x" | "y"){2} "z"{1,3}"#,
            "start: T0-ROOT\nT0-ROOT: \"a\\\"\\\\\\nAé\" \
             /[^\\x{22}-\\x{22}\\x{5c}-\\x{5c}\\x{5d}-\\x{5d}\\x{61}-\\x{66}\\x{2d}-\\x{2d}]/ /./s \
             (\"x\" | \"y\"){2,2} (\"z\"){1,3}\n",
        );
        check(r#"root ::= "x" ("a" | )"#, "start: T0-ROOT\nT0-ROOT: \"x\" (\"a\" | \"\")\n");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        check_refused("", "there is no rule `root`");
        check_refused("start ::= \"a\"", "there is no rule `root`");
        check_refused("root ::= \"a\"\nb = \"c\"", "line 2: expected `::=`");
        check_refused("root ::= \"a\n\"", "line 1: a text does not end");
        check_refused("root ::= [a-z", "line 1: a class does not end");
        check_refused("root ::= [z-a]", "line 1: a range ends before it begins");
        check_refused("root ::= []", "line 1: a class of nothing");
        check_refused("root ::= \"a\" other", "line 1: there is no rule `other`");
        check_refused("root ::= \"a\"\nroot ::= \"b\"", "line 2: the rule `root` is there already");
        check_refused("root ::= (\"a\"", "line 1: expected `)`");
        check_refused("root ::= \"a\" )", "line 1: expected a rule's name");
        check_refused("root ::= *", "line 1: nothing to repeat");
        check_refused("root ::= \"a\"{3,2}", "line 1: {3,2} repeats nothing");
        check_refused("root ::= \"a\"{9999999999}", "line 1: a number over 65536");
        check_refused("root ::= \"\\q\"", "line 1: `\\q` is no escape");
        check_refused("root ::= \"\\xD\"", "line 1: `\\x` needs 2 digits");
        check_refused("root ::= \"\\uD800\"", "line 1: `\\uD800` is no character");
        check_refused(&format!("root ::= {}", "(".repeat(1000)), "line 1: parentheses are nested over 64 deep");
    }
}
