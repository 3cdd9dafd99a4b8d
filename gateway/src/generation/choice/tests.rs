//! What a choice makes of ids, their text and their end.

use lockstep_proto::worker::v1::Logprob;

use super::*;

const STOP_TOKEN: u32 = 99;

fn rules(stop: &[&str]) -> TextRules {
    let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
    TextRules {
        stop_token_ids: HashSet::from([STOP_TOKEN]),
        stop: StopStrings::new(&stop),
        skip_special_tokens: true,
        logprobs: false,
        tools: None,
    }
}

fn tokens(position: u32, ids: &[u32]) -> Tokens {
    Tokens { choice: 0, position, token_ids: ids.to_vec(), logprobs: Vec::new() }
}

fn answer(text: &str, ends: &[u32]) -> StreamDecodeResponse {
    StreamDecodeResponse { choice: 0, text: text.into(), ends: ends.to_vec() }
}

fn worker_finish(reason: worker::FinishReason, stop_token_id: Option<u32>) -> worker::ChoiceFinish {
    worker::ChoiceFinish { choice: 0, reason: reason.into(), stop_token_id }
}

/// Drives a choice with ids whose texts are given, then with the worker's end; answers ids, text and how it ended.
fn drive(
    rules: &TextRules,
    messages: &[&[(u32, &str)]],
    end: &worker::ChoiceFinish,
) -> (Vec<u32>, String, v1::ChoiceFinish) {
    let mut choice = Choice::new(0, rules);
    let (mut ids, mut text, mut position) = (Vec::new(), String::new(), 0);
    let mut take = |piece: Piece| {
        ids.extend(piece.ids);
        text.push_str(&piece.text);
    };
    for message in messages {
        let all: Vec<u32> = message.iter().map(|(id, _)| *id).collect();
        let Some((pending, asked)) = choice.read(tokens(position, &all), rules).unwrap() else { continue };
        position += u32::try_from(all.len()).unwrap();
        let (mut decoded, mut ends) = (String::new(), Vec::new());
        for (_, piece) in &message[..asked.token_ids.len()] {
            decoded.push_str(piece);
            ends.push(u32::try_from(decoded.len()).unwrap());
        }
        take(choice.decoded(pending, &answer(&decoded, &ends)).unwrap());
    }
    if let Some((pending, asked)) = choice.finish_reading(end).unwrap() {
        assert!(asked.end);
        take(choice.decoded(pending, &answer("", &[])).unwrap());
    }
    let finish = choice.finish().expect("the choice has ended");
    assert_eq!(usize::try_from(choice.generated()).unwrap(), ids.len());
    (ids, text, finish)
}

fn length() -> worker::ChoiceFinish {
    worker_finish(worker::FinishReason::Length, None)
}

#[test]
fn a_choice_is_its_ids_and_their_text() {
    let (ids, text, finish) = drive(&rules(&[]), &[&[(1, "a"), (2, "b")], &[(3, "c")]], &length());
    assert_eq!((ids, text.as_str()), (vec![1, 2, 3], "abc"));
    assert_eq!((finish.reason(), finish.matched_stop), (v1::FinishReason::Length, None));
}

#[test]
fn a_constraint_that_allows_nothing_more_stops_a_choice() {
    let end = worker_finish(worker::FinishReason::Complete, None);
    let (ids, text, finish) = drive(&rules(&[]), &[&[(1, "a"), (2, "b")]], &end);
    assert_eq!((ids, text.as_str()), (vec![1, 2], "ab"));
    assert_eq!((finish.reason(), finish.matched_stop), (v1::FinishReason::Stop, None));
}

#[test]
fn a_stop_token_counts_but_is_not_shown() {
    let end = worker_finish(worker::FinishReason::StopToken, Some(STOP_TOKEN));
    let (ids, text, finish) = drive(&rules(&[]), &[&[(1, "a"), (STOP_TOKEN, "\n")]], &end);
    assert_eq!((ids, text.as_str()), (vec![1, STOP_TOKEN], "a"));
    assert_eq!(finish.matched_stop, Some(MatchedStop::TokenId(STOP_TOKEN)));
    let shown = TextRules { skip_special_tokens: false, ..rules(&[]) };
    assert_eq!(drive(&shown, &[&[(1, "a"), (STOP_TOKEN, "\n")]], &end).1, "a\n");
}

#[test]
fn a_stop_string_ends_the_choice_at_the_id_that_completed_it_however_ids_were_cut() {
    let pieces = [(1, "one "), (2, "S"), (3, "TO"), (4, "P!"), (5, "more")];
    for cut in 0..pieces.len() {
        let (head, tail) = pieces.split_at(cut);
        let (ids, text, finish) = drive(&rules(&["STOP"]), &[head, tail], &length());
        assert_eq!((ids, text.as_str()), (vec![1, 2, 3, 4], "one "), "cut at {cut}");
        assert_eq!(finish.reason(), v1::FinishReason::Stop);
        assert_eq!(finish.matched_stop, Some(MatchedStop::Stop("STOP".into())));
    }
}

#[test]
fn text_that_might_have_become_a_stop_string_comes_out_at_the_end() {
    let (_, text, finish) = drive(&rules(&["STOP"]), &[&[(1, "a ST")]], &length());
    assert_eq!((text.as_str(), finish.reason()), ("a ST", v1::FinishReason::Length));
}

#[test]
fn a_stop_string_in_the_text_that_was_held_back_beats_the_workers_reason() {
    let rules = rules(&["é"]);
    let mut choice = Choice::new(0, &rules);
    let (pending, _) = choice.read(tokens(0, &[1]), &rules).unwrap().unwrap();
    choice.decoded(pending, &answer("", &[0])).unwrap();
    let (pending, _) = choice.finish_reading(&length()).unwrap().unwrap();
    let piece = choice.decoded(pending, &answer("aé", &[])).unwrap();
    assert_eq!(piece.text, "a");
    assert_eq!(choice.finish().unwrap().matched_stop, Some(MatchedStop::Stop("é".into())));
}

#[test]
fn only_a_choice_that_has_ended_may_be_ended_by_request() {
    let ended = worker_finish(worker::FinishReason::Ended, None);
    let (_, text, finish) = drive(&rules(&["b"]), &[&[(1, "ab")]], &ended);
    assert_eq!((text.as_str(), finish.matched_stop), ("a", Some(MatchedStop::Stop("b".into()))));
    let mut choice = Choice::new(0, &rules(&["b"]));
    assert_eq!(choice.finish_reading(&ended).unwrap_err(), Breach::NoReason(0));
}

#[test]
fn an_expired_choice_keeps_what_it_has() {
    let rules = rules(&["b!"]);
    let mut choice = Choice::new(0, &rules);
    let (pending, _) = choice.read(tokens(0, &[1]), &rules).unwrap().unwrap();
    let piece = choice.decoded(pending, &answer("ab", &[2])).unwrap();
    assert_eq!(piece.text, "a");
    assert!(choice.expire().is_some());
    assert!(choice.expire().is_none(), "it is asked for its last text once");
    assert_eq!(choice.close().text, "b");
    assert_eq!(choice.finish().unwrap().reason(), v1::FinishReason::Deadline);
    assert_eq!(choice.close(), Piece::default(), "it is closed once");
}

#[test]
fn log_probabilities_end_where_the_ids_end() {
    let rules = TextRules { logprobs: true, ..rules(&["b"]) };
    let logprob = |token_id| TokenLogprobs { token: Some(Logprob { token_id, logprob: -1.0 }), top: Vec::new() };
    let mut choice = Choice::new(0, &rules);
    let read = Tokens { logprobs: vec![logprob(1), logprob(2), logprob(3)], ..tokens(0, &[1, 2, 3]) };
    let (pending, _) = choice.read(read, &rules).unwrap().unwrap();
    let piece = choice.decoded(pending, &answer("abc", &[1, 2, 3])).unwrap();
    assert_eq!((piece.ids, piece.logprobs), (vec![1, 2], vec![logprob(1), logprob(2)]));
}

#[test]
fn a_worker_that_breaks_its_contract_is_caught() {
    let plain = rules(&[]);
    let mut choice = Choice::new(0, &plain);
    let gap = Breach::Gap { choice: 0, expected: 0, got: 1 };
    assert_eq!(choice.read(tokens(1, &[1]), &plain).unwrap_err(), gap);
    let unasked = Tokens { logprobs: vec![TokenLogprobs::default()], ..tokens(0, &[1]) };
    assert_eq!(choice.read(unasked, &plain).unwrap_err(), Breach::Logprobs { expected: 0, got: 1 });
    let no_reason = worker_finish(worker::FinishReason::Unspecified, None);
    assert_eq!(choice.finish_reading(&no_reason).unwrap_err(), Breach::NoReason(0));
    choice.finish_reading(&length()).unwrap();
    assert_eq!(choice.read(tokens(0, &[1]), &plain).unwrap_err(), Breach::NoSuchChoice(0));
    assert_eq!(choice.finish_reading(&length()).unwrap_err(), Breach::NoSuchChoice(0));
}

#[test]
fn a_tokenizer_that_breaks_its_contract_is_caught() {
    let check = |wrong: StreamDecodeResponse| {
        let rules = rules(&[]);
        let mut choice = Choice::new(0, &rules);
        let (pending, _) = choice.read(tokens(0, &[1, 2]), &rules).unwrap().unwrap();
        assert_eq!(choice.decoded(pending, &wrong).unwrap_err(), Breach::Decoded(0), "{wrong:?}");
    };
    check(answer("ab", &[1]));
    check(answer("ab", &[2, 1]));
    check(answer("ab", &[1, 3]));
    check(answer("é", &[1, 2]));
    check(StreamDecodeResponse { choice: 1, ..answer("ab", &[1, 2]) });
}
