//! Folders as they come, and hostile ones: each is an error of one line that names the file.

use std::fs;

use serde_json::{Value, json};

use super::*;

fn byte_level() -> Value {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let vocab: serde_json::Map<_, _> = alphabet.iter().zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 256, "content": "<|eot_id|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    })
}

/// Loads a folder of these files.
fn folder(files: &[(&str, String)]) -> Result<(Tokenizer, Profile), String> {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    load(folder.path()).map_err(|e| {
        let message = e.to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    })
}

/// Loads a folder of one `tokenizer.json` and checks that its refusal says `named`.
fn check(description: &Value, named: &str) {
    let refusal = folder(&[("tokenizer.json", description.to_string())]).unwrap_err();
    assert!(refusal.contains(named), "{refusal:?} does not say {named:?}");
}

/// The sound description with one value replaced.
fn with(pointer: &str, value: Value) -> Value {
    let mut description = byte_level();
    *description.pointer_mut(pointer).unwrap() = value;
    description
}

#[test]
fn files_beside_the_tokenizer_say_what_a_prompt_needs() {
    let (tokenizer, profile) = folder(&[
        ("tokenizer.json", byte_level().to_string()),
        (
            "tokenizer_config.json",
            json!({
                "bos_token": {"content": "a", "special": true}, "eos_token": "b", "model_max_length": 1e30,
                "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
            })
            .to_string(),
        ),
        ("generation_config.json", r#"{"eos_token_id": [7, 3, 9999], "temperature": 0.6, "do_sample": true}"#.into()),
        ("config.json", r#"{"max_position_embeddings": 512, "vocab_size": 300, "eos_token_id": 5}"#.into()),
    ])
    .unwrap();
    let id = |text| tokenizer.token_id(text).unwrap();
    assert_eq!((profile.bos_token_id, profile.eos_token_id), (Some(id("a")), Some(id("b"))));
    let mut eos = vec![id("b"), 7, 3, 5, 256];
    eos.sort_unstable();
    eos.dedup();
    assert_eq!(profile.eos_token_ids, eos);
    assert_eq!((profile.context_length, tokenizer.vocab_size()), (512, 300));
    assert_eq!(profile.chat_template, "D");
    assert_eq!((profile.generation.temperature, profile.generation.do_sample), (Some(0.6), Some(true)));
    assert_eq!(profile.generation.top_k, None);
}

#[test]
fn a_template_file_wins_over_the_configured_one() {
    let (_, profile) = folder(&[
        ("tokenizer.json", byte_level().to_string()),
        ("tokenizer_config.json", r#"{"chat_template": "old"}"#.into()),
        ("chat_template.jinja", "new".into()),
    ])
    .unwrap();
    assert_eq!(profile.chat_template, "new");
}

#[test]
fn truncation_of_a_training_run_is_not_applied() {
    let (tokenizer, _) = folder(&[("tokenizer.json", byte_level().to_string())]).unwrap();
    assert_eq!(tokenizer.encode("abcdef", &crate::tokenizer::Breaks::NONE, false).unwrap().len(), 6);
}

#[test]
fn a_missing_or_torn_file_is_named() {
    let refusal = folder(&[]).unwrap_err();
    assert!(refusal.contains("tokenizer.json") && refusal.contains("cannot read"), "{refusal}");
    let sound = byte_level().to_string();
    for cut in [0, 1, 100, sound.len() / 2, sound.len() - 1] {
        // The alphabet comes in any order, so a cut may fall within a character.
        let torn = String::from_utf8_lossy(&sound.as_bytes()[..cut]).into_owned();
        let refusal = folder(&[("tokenizer.json", torn)]).unwrap_err();
        assert!(refusal.contains("tokenizer.json: "), "{refusal}");
    }
    let refusal = folder(&[("tokenizer.json", sound), ("config.json", "{\"vocab_size\": -1}".into())]).unwrap_err();
    assert!(refusal.contains("config.json: "), "{refusal}");
}

#[test]
fn hostile_descriptions_are_errors_and_never_panics() {
    check(&json!([]), "tokenizer.json: ");
    check(&with("/model", json!({"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0})), "other than BPE");
    check(&with("/model", json!({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]})), "tokenizer.json: ");
    check(&with("/model/vocab", json!({"a": 4_294_967_295_u32})), "the vocabulary size (ids) is");
    check(&with("/model/vocab", json!({"a": 5_000_000_000_u64})), "tokenizer.json: ");
    check(&with("/decoder", Value::Null), "the tokenizer's decoder (null) is not supported");
    check(
        &with("/decoder", json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true})),
        "CTC",
    );
    let long = "x".repeat(5000);
    check(&with("/added_tokens/0/content", json!(long)), "the length of an added token (bytes) is 5000");
    let pattern = json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false});
    check(&with("/pre_tokenizer", pattern), "tokenizer.json: ");
    let mut dropout = byte_level();
    dropout["model"]["dropout"] = json!(0.5);
    check(&dropout, "dropout");
}

#[test]
fn a_description_that_panics_the_library_is_an_error() {
    // The prefix is longer than the second half of the merge, which the library subtracts without a look.
    let description = with(
        "/model",
        json!({"type": "BPE", "continuing_subword_prefix": "######", "vocab": {"a": 0, "b": 1, "ab": 2},
               "merges": [["a", "b"]]}),
    );
    check(&description, "the tokenizer's description is malformed: ");
}
