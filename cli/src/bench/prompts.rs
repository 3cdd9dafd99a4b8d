//! [`Prompts`] are what a load asks: random tokens, or what stands in a file of JSON lines.

use std::{fs::File, io::Read as _, path::Path, sync::Arc};

use lockstep_proto::v1::{
    ContentPart, Conversation, Message, RawPrompt, Role, SamplingParams, StreamChatRequest, StreamGenerateRequest,
    TokenIds, content_part, raw_prompt,
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use crate::failure::Failure;

/// Largest file of prompts. Unit: bytes.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// What a load asks.
#[derive(Debug, Clone)]
pub(super) enum Prompts {
    /// So many random tokens each, so that no prefix is in a cache.
    Random { tokens: u32, vocab_size: u32, seed: u64 },
    /// These in turn.
    File(Arc<[Prompt]>),
}

/// A line of a file.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    /// A text to continue.
    Raw(Raw),
    /// A conversation to answer.
    Chat(Chat),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    prompt: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Chat {
    messages: Vec<Turn>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    role: Speaker,
    content: String,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Speaker {
    System,
    User,
    Assistant,
}

/// A request of a load, answered greedily.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Call {
    Generate(StreamGenerateRequest),
    Chat(StreamChatRequest),
}

// === impl Prompts ===

impl Prompts {
    /// Reads a file of JSON lines: `{"prompt": "..."}` or `{"messages": [{"role": "user", "content": "..."}]}`.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |problem: String| Failure::Usage(format!("--prompts {}: {problem}", path.display()));
        let file = File::open(path).map_err(|error| failed(error.to_string()))?;
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(failed(format!("is larger than {MAX_FILE_BYTES} bytes")));
        }
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let prompts: Vec<Prompt> = lines
            .map(|(number, line)| serde_json::from_str(line).map_err(|error| failed(format!("line {number}: {error}"))))
            .collect::<Result<_, _>>()?;
        if prompts.is_empty() {
            return Err(failed("holds no prompt".into()));
        }
        Ok(Self::File(prompts.into()))
    }

    /// Requests that a load has unless it is told: a file's once.
    pub(super) fn default_requests(&self) -> u32 {
        match self {
            Self::Random { .. } => 256,
            Self::File(prompts) => u32::try_from(prompts.len()).unwrap_or(u32::MAX),
        }
    }

    /// The request of this index. Random tokens have no end to come to, so they are continued past the end of a turn.
    pub(super) fn call(&self, index: u32, model: &str, max_new_tokens: u32) -> Call {
        let sampling = SamplingParams {
            max_new_tokens: Some(max_new_tokens),
            do_sample: Some(false),
            ignore_eos: Some(matches!(self, Self::Random { .. })),
            ..SamplingParams::default()
        };
        let generate = |prompt| {
            let prompt = Some(RawPrompt { prompt: Some(prompt) });
            Call::Generate(StreamGenerateRequest {
                model: model.into(),
                prompt,
                sampling: Some(sampling.clone()),
                output: None,
            })
        };
        match self {
            Self::Random { tokens, vocab_size, seed } => {
                generate(raw_prompt::Prompt::TokenIds(TokenIds { ids: random_ids(*tokens, *vocab_size, *seed, index) }))
            }
            Self::File(prompts) => match &prompts[index as usize % prompts.len()] {
                Prompt::Raw(Raw { prompt }) => generate(raw_prompt::Prompt::Text(prompt.clone())),
                Prompt::Chat(Chat { messages }) => {
                    let messages = messages.iter().map(Turn::message).collect();
                    Call::Chat(StreamChatRequest {
                        model: model.into(),
                        conversation: Some(Conversation { messages, ..Conversation::default() }),
                        sampling: Some(sampling),
                        output: None,
                    })
                }
            },
        }
    }
}

/// Random ids from the middle of the vocabulary, as control tokens stand at its ends.
fn random_ids(tokens: u32, vocab_size: u32, seed: u64, index: u32) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(u64::from(index) + 1);
    let eighth = vocab_size / 8;
    let ids = eighth..(vocab_size - eighth).max(eighth + 1);
    (0..tokens).map(|_| random.random_range(ids.clone())).collect()
}

// === impl Turn ===

impl Turn {
    fn message(&self) -> Message {
        let role = match self.role {
            Speaker::System => Role::System,
            Speaker::User => Role::User,
            Speaker::Assistant => Role::Assistant,
        };
        let part = ContentPart { part: Some(content_part::Part::Text(self.content.clone())) };
        Message { role: role.into(), content: vec![part], ..Message::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn ids(seed: u64, vocab_size: u32, index: u32) -> Vec<u32> {
        match (Prompts::Random { tokens: 50, vocab_size, seed }).call(index, "m", 3) {
            Call::Generate(StreamGenerateRequest {
                prompt: Some(RawPrompt { prompt: Some(raw_prompt::Prompt::TokenIds(ids)) }),
                ..
            }) => ids.ids,
            other => panic!("{other:?}"),
        }
    }

    fn read(text: &str) -> Result<Prompts, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        Prompts::read(file.path()).map_err(|failure| failure.to_string())
    }

    #[test]
    fn random_prompts_differ_by_index_and_repeat_by_seed() {
        assert_eq!(ids(9, 1000, 0), ids(9, 1000, 0));
        assert_ne!(ids(9, 1000, 0), ids(9, 1000, 1));
        assert_ne!(ids(9, 1000, 0), ids(8, 1000, 0));
    }

    #[test]
    fn random_prompts_keep_to_the_middle_of_any_vocabulary() {
        for vocab_size in [1, 2, 7, 8, 9, 1000] {
            let eighth = vocab_size / 8;
            assert!(ids(9, vocab_size, 0).iter().all(|id| (eighth..vocab_size - eighth).contains(id)));
        }
    }

    #[test]
    fn a_files_lines_are_asked_in_turn_up_to_the_end_of_a_turn() {
        let chat = r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}"#;
        let prompts = read(&format!("{{\"prompt\": \"once\"}}\n\n{chat}\n")).unwrap();
        assert_eq!(prompts.default_requests(), 2);
        let Call::Generate(raw) = prompts.call(2, "m", 3) else { panic!("the first line is no conversation") };
        assert_eq!(raw.prompt.unwrap().prompt, Some(raw_prompt::Prompt::Text("once".into())));
        assert_eq!(raw.sampling.unwrap().ignore_eos, Some(false));
        let Call::Chat(chat) = prompts.call(1, "m", 3) else { panic!("the second one is") };
        let roles: Vec<Role> = chat.conversation.unwrap().messages.iter().map(Message::role).collect();
        assert_eq!(roles, [Role::System, Role::User]);
    }

    #[test]
    fn a_file_that_holds_something_else_is_refused_with_the_line() {
        for (text, problem) in [
            ("\n", "holds no prompt"),
            ("{\"prompt\": \"once\"}\n{\"promt\": 1}", "line 2"),
            (r#"{"messages": [{"role": "tool", "content": ""}]}"#, "line 1"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
