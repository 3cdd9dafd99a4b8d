//! Guides on their threads.

use super::*;
use crate::constraint::grammar::Grammars;

/// Long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn compiled(constraint: &Constraint) -> Compiled {
    let grammars = Grammars::of_bytes(256, Vec::new()).unwrap();
    let (matcher, first) = Matcher::new(&grammars, constraint, &[]).unwrap();
    Compiled::new(constraint, matcher, first, MaskThreads::spawn().unwrap())
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

#[track_caller]
fn check_allows(guide: &mut Guide, byte: u8) {
    let next = guide.next(soon()).unwrap();
    assert!(matches!(next, Next::Tokens(mask) if mask.allows(byte.into())), "{byte}: {next:?}");
}

#[test]
fn each_choice_has_its_own_way() {
    let compiled = compiled(&Constraint::Regex("ax|by".into()));
    let (mut first, mut second) = (compiled.guide(), compiled.guide());
    first.advance(b'a'.into());
    second.advance(b'b'.into());
    check_allows(&mut first, b'x');
    check_allows(&mut second, b'y');
    first.advance(b'x'.into());
    assert_eq!(first.next(soon()), Ok(&Next::Nothing));
}

#[test]
fn a_token_that_is_not_allowed_ends_the_choice_and_names_the_field() {
    let mut guide = compiled(&Constraint::Regex("ab".into())).guide();
    guide.advance(b'x'.into());
    let error = guide.next(soon()).unwrap_err();
    assert!(error.to_string().starts_with("sampling.constraint.regex: "), "{error}");
    guide.advance(b'a'.into());
    assert_eq!(guide.next(soon()).unwrap_err(), error, "and it stays so");
}

#[test]
fn nobody_waits_longer_than_said_and_the_thread_is_free_again() {
    // Each mask of an ambiguous grammar takes longer than the one before.
    let slow = compiled(&Constraint::Lark("start: e\ne: e e | e e e | \"a\"".into()));
    let mut guide = slow.guide();
    let is_late = |guide: &mut Guide| {
        guide.advance(b'a'.into());
        guide.next(Instant::now() + Duration::from_millis(1)).is_err()
    };
    let n_tokens = (0..100_000).position(|_| is_late(&mut guide)).expect("it gets slower without end");
    let error = guide.next(soon()).unwrap_err().to_string();
    assert!(error.contains("takes over"), "after {n_tokens} tokens: {error}");
    // More than there are threads.
    for _ in 0..2 * MAX_THREADS {
        let mut quick = slow.guide();
        quick.advance(b'a'.into());
        check_allows(&mut quick, b'a');
    }
}
