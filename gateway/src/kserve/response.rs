//! The responses to one request: what the pipeline answers, as the outputs that a client wants.

use lockstep_proto::{
    inference::{InferParameter, ModelInferResponse, infer_parameter::ParameterChoice},
    v1,
};
use serde_json::{Map, Value, json};

use super::{signature::VERSION, tensors::Outputs};
use crate::generation::{
    Event,
    collect::{Answer, AnswerChoice},
};

/// Marks the last response to a request of a stream.
const FINAL_RESPONSE: &str = "triton_final_response";

/// What makes the responses to a request.
#[derive(Debug)]
pub(super) struct Responses {
    id: String,
    outputs: Vec<&'static str>,
    model: String,
    prompt_tokens: u32,
    /// By choice, the sum of the log-probabilities so far.
    logprobs: Vec<f32>,
}

// === impl Responses ===

impl Responses {
    /// To a request of this id that wants these outputs for `n` choices.
    pub(super) fn new(id: String, outputs: Vec<&'static str>, n: u32) -> Self {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        Self { id, outputs, model: String::new(), prompt_tokens: 0, logprobs: vec![0.0; n] }
    }

    /// The only response.
    pub(super) fn whole(mut self, answer: Answer) -> ModelInferResponse {
        self.begin(answer.start);
        self.response(&answer.choices)
    }

    /// The response to one event of a stream, if there is any.
    pub(super) fn piece(&mut self, event: Event) -> Option<ModelInferResponse> {
        let mut choices = vec![AnswerChoice::default(); self.logprobs.len()];
        let mut set = |index: u32, news: AnswerChoice| {
            if let Some(choice) = usize::try_from(index).ok().and_then(|index| choices.get_mut(index)) {
                *choice = news;
            }
        };
        let last = match event {
            Event::Start(start) => {
                self.begin(start);
                return None;
            }
            Event::Chunk(v1::Chunk { choice, text, token_ids, logprobs, .. }) => {
                set(choice, AnswerChoice { text, token_ids, logprobs, ..AnswerChoice::default() });
                false
            }
            Event::Finish(finish) => {
                for end in finish.choices {
                    set(end.choice, AnswerChoice { finish: Some(end), ..AnswerChoice::default() });
                }
                true
            }
        };
        Some(marked(self.response(&choices), last))
    }

    fn begin(&mut self, start: v1::Start) {
        (self.model, self.prompt_tokens) = (start.model, start.prompt_tokens);
    }

    /// What is new in each choice.
    fn response(&mut self, choices: &[AnswerChoice]) -> ModelInferResponse {
        for (sum, choice) in self.logprobs.iter_mut().zip(choices) {
            *sum +=
                choice.logprobs.iter().filter_map(|entry| entry.token.as_ref()).map(|token| token.logprob).sum::<f32>();
        }
        let mut outputs = Outputs::default();
        for &name in &self.outputs {
            match name {
                "text_output" => outputs.texts(name, choices.iter().map(|choice| choice.text.as_str())),
                "finish_reason" => outputs.texts(name, choices.iter().map(finish_reason)),
                "cumulative_logprob" => outputs.floats(name, self.logprobs.iter().copied()),
                "logprobs" => {
                    let texts: Vec<_> = choices.iter().map(|choice| logprobs_json(&choice.logprobs)).collect();
                    outputs.texts(name, texts.iter().map(String::as_str));
                }
                "num_input_tokens" => outputs.counts(name, std::iter::once(self.prompt_tokens)),
                "num_output_tokens" => {
                    let n_tokens = |choice: &AnswerChoice| u32::try_from(choice.token_ids.len()).unwrap_or(u32::MAX);
                    outputs.counts(name, choices.iter().map(n_tokens));
                }
                _ => {}
            }
        }
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.to_owned(),
            id: self.id.clone(),
            outputs: outputs.tensors,
            raw_output_contents: outputs.raw,
            ..ModelInferResponse::default()
        }
    }
}

/// A response of a stream, and whether it is the last one to its request.
pub(super) fn marked(mut response: ModelInferResponse, last: bool) -> ModelInferResponse {
    let last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(last)) };
    response.parameters.insert(FINAL_RESPONSE.to_owned(), last);
    response
}

/// Why a choice ended, in vLLM's words; `None` is what its backend says of one that goes on.
fn finish_reason(choice: &AnswerChoice) -> &'static str {
    match choice.finish.as_ref().map(v1::ChoiceFinish::reason) {
        None => "None",
        Some(v1::FinishReason::Length | v1::FinishReason::Deadline) => "length",
        Some(v1::FinishReason::Stop | v1::FinishReason::ToolCalls | v1::FinishReason::Unspecified) => "stop",
    }
}

/// For each token an object of it and its alternatives, by id. A token's rank is known if it is among these.
fn logprobs_json(logprobs: &[v1::TokenLogprob]) -> String {
    let token = |entry: &v1::TokenLogprob| {
        let ranked = (1..).zip(&entry.top).map(|(rank, top)| (top, Some(rank)));
        let chosen = entry.token.iter().map(|token| (token, None::<u32>));
        // Where the token is one of the alternatives, that entry, which has a rank, replaces its own.
        let entries = chosen.chain(ranked).map(|(token, rank)| {
            let entry = json!({ "logprob": token.logprob, "rank": rank, "decoded_token": token.text });
            (token.token_id.to_string(), entry)
        });
        Value::Object(entries.collect::<Map<_, _>>())
    };
    Value::Array(logprobs.iter().map(token).collect()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logprob(token_id: u32, logprob: f32) -> v1::LogprobEntry {
        v1::LogprobEntry { token_id, text: format!("<{token_id}>"), logprob, ..v1::LogprobEntry::default() }
    }

    fn chunk(choice: u32, text: &str, token_id: u32) -> Event {
        let entry = v1::TokenLogprob { token: Some(logprob(token_id, -0.5)), top: vec![logprob(9, -0.25)] };
        Event::Chunk(v1::Chunk {
            choice,
            text: text.into(),
            token_ids: vec![token_id],
            logprobs: vec![entry],
            ..v1::Chunk::default()
        })
    }

    fn is_last(response: &ModelInferResponse) -> bool {
        response.parameters["triton_final_response"].parameter_choice == Some(ParameterChoice::BoolParam(true))
    }

    #[test]
    fn a_stream_says_what_is_new_and_ends_with_why() {
        let outputs =
            vec!["text_output", "finish_reason", "cumulative_logprob", "num_input_tokens", "num_output_tokens"];
        let mut responses = Responses::new("7".into(), outputs, 2);
        let start = v1::Start { model: "m".into(), prompt_tokens: 3, ..v1::Start::default() };
        assert_eq!(responses.piece(Event::Start(start)), None);

        let first = responses.piece(chunk(1, "Hi", 4)).unwrap();
        assert_eq!((first.id.as_str(), first.model_name.as_str(), first.model_version.as_str()), ("7", "m", "1"));
        assert!(!is_last(&first));
        assert_eq!(first.raw_output_contents[0], b"\0\0\0\0\x02\0\0\0Hi");
        assert_eq!(first.raw_output_contents[1], b"\x04\0\0\0None\x04\0\0\0None");
        let second = responses.piece(chunk(1, "!", 5)).unwrap();
        let sums = [0.0f32.to_le_bytes(), (-1.0f32).to_le_bytes()].concat();
        assert_eq!(second.raw_output_contents[2], sums);
        assert_eq!(second.raw_output_contents[3], [3, 0, 0, 0]);
        assert_eq!(second.raw_output_contents[4], [0, 0, 0, 0, 1, 0, 0, 0]);

        let end =
            |choice, reason: v1::FinishReason| v1::ChoiceFinish { choice, reason: reason.into(), matched_stop: None };
        let choices = vec![end(0, v1::FinishReason::Stop), end(1, v1::FinishReason::Length)];
        let last = responses.piece(Event::Finish(v1::Finish { choices, ..v1::Finish::default() })).unwrap();
        assert!(is_last(&last));
        assert_eq!(last.raw_output_contents[0], [0; 8]);
        assert_eq!(last.raw_output_contents[1], b"\x04\0\0\0stop\x06\0\0\0length");
        assert_eq!(last.raw_output_contents[2], sums);
        assert_eq!(last.raw_output_contents[4], [0; 8]);
    }

    #[test]
    fn log_probabilities_are_objects_by_token_and_ranked_where_the_rank_is_known() {
        let entries = [
            v1::TokenLogprob { token: Some(logprob(9, -0.25)), top: vec![logprob(9, -0.25), logprob(4, -0.5)] },
            v1::TokenLogprob { token: Some(logprob(5, -2.0)), top: vec![logprob(9, -0.25)] },
        ];
        let expected = json!([
            { "9": { "logprob": -0.25, "rank": 1, "decoded_token": "<9>" },
              "4": { "logprob": -0.5, "rank": 2, "decoded_token": "<4>" } },
            { "5": { "logprob": -2.0, "rank": null, "decoded_token": "<5>" },
              "9": { "logprob": -0.25, "rank": 1, "decoded_token": "<9>" } },
        ]);
        assert_eq!(serde_json::from_str::<Value>(&logprobs_json(&entries)).unwrap(), expected);
    }
}
