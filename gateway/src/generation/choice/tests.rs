//! What a choice makes of ids, their text and their end.

use lockstep_proto::{
    tokenizer::v1::{GetTokenizerResponse, GetVocabularyResponse},
    worker::v1::Logprob,
};

use super::*;
use crate::tokenizer::Vocabulary;

/// Texts of the ids from 0 on.
const TOKENS: [&[u8]; 11] = [b"\n", b"a", b"b", b"c", b"one ", b"S", b"TO", b"P!", b"more", b"a ST", b"a\xc3"];
const STOP_TOKEN: u32 = 0;

fn facts() -> Arc<Facts> {
    let raw = TOKENS.concat();
    let ends = (1..=TOKENS.len()).map(|n| u32::try_from(TOKENS[..n].concat().len()).unwrap()).collect();
    let vocabulary = GetVocabularyResponse { raw, ends, ..GetVocabularyResponse::default() };
    Arc::new(Facts::new("m", GetTokenizerResponse::default(), Vocabulary::new(vocabulary, 11).unwrap()))
}

fn rules(stop: &[&str]) -> TextRules {
    let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
    TextRules {
        facts: facts(),
        stop_token_ids: HashSet::from([STOP_TOKEN]),
        stop: StopStrings::new(&stop),
        skip_special_tokens: true,
        logprobs: false,
        tools: None,
    }
}

fn choice(rules: &TextRules) -> Choice {
    Choice::new(0, Detokenizer::new(&rules.facts, rules.skip_special_tokens), rules)
}

fn tokens(position: u32, ids: &[u32]) -> Tokens {
    Tokens { choice: 0, position, token_ids: ids.to_vec(), logprobs: Vec::new() }
}

fn worker_finish(reason: worker::FinishReason, stop_token_id: Option<u32>) -> worker::ChoiceFinish {
    worker::ChoiceFinish { choice: 0, reason: reason.into(), stop_token_id }
}

/// Drives a choice with ids, then with the worker's end; answers ids, text and how it ended.
fn drive(rules: &TextRules, messages: &[&[u32]], end: &worker::ChoiceFinish) -> (Vec<u32>, String, v1::ChoiceFinish) {
    let mut choice = choice(rules);
    let (mut ids, mut text, mut position) = (Vec::new(), String::new(), 0);
    let mut take = |piece: Piece| {
        ids.extend(piece.ids);
        text.push_str(&piece.text);
    };
    for message in messages {
        take(choice.read(tokens(position, message), rules).unwrap());
        position += u32::try_from(message.len()).unwrap();
    }
    take(choice.finish_reading(end).unwrap());
    let finish = choice.finish().expect("the choice has ended");
    assert_eq!(usize::try_from(choice.generated()).unwrap(), ids.len());
    (ids, text, finish)
}

fn length() -> worker::ChoiceFinish {
    worker_finish(worker::FinishReason::Length, None)
}

#[test]
fn a_choice_is_its_ids_and_their_text() {
    let (ids, text, finish) = drive(&rules(&[]), &[&[1, 2], &[3]], &length());
    assert_eq!((ids, text.as_str()), (vec![1, 2, 3], "abc"));
    assert_eq!((finish.reason(), finish.matched_stop), (v1::FinishReason::Length, None));
}

#[test]
fn a_constraint_that_allows_nothing_more_stops_a_choice() {
    let end = worker_finish(worker::FinishReason::Complete, None);
    let (ids, text, finish) = drive(&rules(&[]), &[&[1, 2]], &end);
    assert_eq!((ids, text.as_str()), (vec![1, 2], "ab"));
    assert_eq!((finish.reason(), finish.matched_stop), (v1::FinishReason::Stop, None));
}

#[test]
fn a_stop_token_counts_but_is_not_shown() {
    let end = worker_finish(worker::FinishReason::StopToken, Some(STOP_TOKEN));
    let (ids, text, finish) = drive(&rules(&[]), &[&[1, STOP_TOKEN]], &end);
    assert_eq!((ids, text.as_str()), (vec![1, STOP_TOKEN], "a"));
    assert_eq!(finish.matched_stop, Some(MatchedStop::TokenId(STOP_TOKEN)));
    let shown = TextRules { skip_special_tokens: false, ..rules(&[]) };
    assert_eq!(drive(&shown, &[&[1, STOP_TOKEN]], &end).1, "a\n");
}

#[test]
fn a_stop_string_ends_the_choice_at_the_id_that_completed_it_however_ids_were_cut() {
    // "one ", "S", "TO", "P!", "more"
    let all = [4, 5, 6, 7, 8];
    for cut in 0..all.len() {
        let (head, tail) = all.split_at(cut);
        let (ids, text, finish) = drive(&rules(&["STOP"]), &[head, tail], &length());
        assert_eq!((ids, text.as_str()), (vec![4, 5, 6, 7], "one "), "cut at {cut}");
        assert_eq!(finish.reason(), v1::FinishReason::Stop);
        assert_eq!(finish.matched_stop, Some(MatchedStop::Stop("STOP".into())));
    }
}

#[test]
fn text_that_might_have_become_a_stop_string_comes_out_at_the_end() {
    let (_, text, finish) = drive(&rules(&["STOP"]), &[&[9]], &length());
    assert_eq!((text.as_str(), finish.reason()), ("a ST", v1::FinishReason::Length));
}

#[test]
fn an_unfinished_character_comes_out_broken_at_the_end() {
    let (_, text, finish) = drive(&rules(&[]), &[&[10]], &length());
    assert_eq!((text.as_str(), finish.reason()), ("a\u{fffd}", v1::FinishReason::Length));
}

#[test]
fn a_stop_string_in_the_text_that_was_held_back_beats_the_workers_reason() {
    let (_, text, finish) = drive(&rules(&["\u{fffd}"]), &[&[10]], &length());
    assert_eq!(text, "a");
    assert_eq!(finish.matched_stop, Some(MatchedStop::Stop("\u{fffd}".into())));
}

#[test]
fn only_a_choice_that_has_ended_may_be_ended_by_request() {
    let ended = worker_finish(worker::FinishReason::Ended, None);
    let (_, text, finish) = drive(&rules(&["b"]), &[&[1, 2]], &ended);
    assert_eq!((text.as_str(), finish.matched_stop), ("a", Some(MatchedStop::Stop("b".into()))));
    let mut choice = choice(&rules(&["b"]));
    assert_eq!(choice.finish_reading(&ended).unwrap_err(), Breach::NoReason(0));
}

#[test]
fn an_expired_choice_keeps_what_it_has() {
    let rules = rules(&["b!"]);
    let mut choice = choice(&rules);
    assert_eq!(choice.read(tokens(0, &[1, 2]), &rules).unwrap().text, "a");
    assert_eq!(choice.expire().text, "b");
    assert_eq!(choice.finish().unwrap().reason(), v1::FinishReason::Deadline);
    assert_eq!(choice.expire(), Piece::default(), "it is closed once");
    assert_eq!(choice.finish_reading(&length()).unwrap_err(), Breach::NoSuchChoice(0));
}

#[test]
fn log_probabilities_end_where_the_ids_end() {
    let rules = TextRules { logprobs: true, ..rules(&["b"]) };
    let logprob = |token_id| TokenLogprobs { token: Some(Logprob { token_id, logprob: -1.0 }), top: Vec::new() };
    let read = Tokens { logprobs: vec![logprob(1), logprob(2), logprob(3)], ..tokens(0, &[1, 2, 3]) };
    let piece = choice(&rules).read(read, &rules).unwrap();
    assert_eq!((piece.ids, piece.logprobs), (vec![1, 2], vec![logprob(1), logprob(2)]));
}

#[test]
fn a_worker_that_breaks_its_contract_is_caught() {
    let plain = rules(&[]);
    let mut choice = choice(&plain);
    let gap = Breach::Gap { choice: 0, expected: 0, got: 1 };
    assert_eq!(choice.read(tokens(1, &[1]), &plain).unwrap_err(), gap);
    let unasked = Tokens { logprobs: vec![TokenLogprobs::default()], ..tokens(0, &[1]) };
    assert_eq!(choice.read(unasked, &plain).unwrap_err(), Breach::Logprobs { expected: 0, got: 1 });
    let no_reason = worker_finish(worker::FinishReason::Unspecified, None);
    assert_eq!(choice.finish_reading(&no_reason).unwrap_err(), Breach::NoReason(0));
    let unknown = UnknownToken { id: 11, n_ids: 11 };
    assert_eq!(choice.read(tokens(0, &[11]), &plain).unwrap_err(), unknown.into());
    choice.finish_reading(&length()).unwrap();
    assert_eq!(choice.read(tokens(1, &[1]), &plain).unwrap_err(), Breach::NoSuchChoice(0));
    assert_eq!(choice.finish_reading(&length()).unwrap_err(), Breach::NoSuchChoice(0));
}
