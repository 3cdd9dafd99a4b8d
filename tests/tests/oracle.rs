//! The oracle itself against an independent float32 run of the demo model (`tests/reference/make_reference.py`).

use std::path::Path;

use lockstep_checkpoint::Checkpoint;
use lockstep_tests::oracle::{log_softmax, logits};
use serde::Deserialize;

/// The reference's own distance from a float64 run of its code is at most 1.6e-5 (`rounding` in the file); another
/// order of summation may double it, and six decimals are stored.
const TOLERANCE: f64 = 5e-5;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    top: Vec<Vec<(u32, f64)>>,
}

/// Compares the oracle's five likeliest ids at the first `n_steps` steps of a prompt.
fn check(name: &str, n_steps: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let model = Checkpoint::open(&root.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
        .expect("deploy/fetch_demo_model.py fetches the demo model");
    let reference: Reference = serde_json::from_str(include_str!("../data/smollm2_reference.json"))
        .expect("the reference file is what make_reference.py writes");
    let prompt = reference.prompts.into_iter().find(|prompt| prompt.name == name).expect("the prompt is in the file");

    let forced = [&prompt.prompt_ids[..], &prompt.ids[..n_steps - 1]].concat();
    let rows = logits(&model, &forced).expect("the oracle runs the demo model");
    let steps = &rows[prompt.prompt_ids.len() - 1..];
    assert_eq!(steps.len(), n_steps);
    for (step, (row, top)) in steps.iter().zip(&prompt.top).enumerate() {
        let logprobs = log_softmax(row);
        for &(id, expected) in top {
            let found = logprobs[id as usize];
            assert!((found - expected).abs() < TOLERANCE, "{name}, step {step}, id {id}: {found}, not {expected}");
        }
        let fifth = top[4].1;
        let n_likelier = logprobs.iter().filter(|&&logprob| logprob > fifth + TOLERANCE).count();
        assert!(n_likelier <= 4, "{name}, step {step}: {n_likelier} ids are likelier than the fifth");
    }
}

#[test]
fn the_oracle_agrees_with_the_reference_on_raw_text() {
    check("capital", 16);
}

#[test]
fn the_oracle_agrees_with_the_reference_on_a_conversation() {
    check("chat unicode", 2);
}
