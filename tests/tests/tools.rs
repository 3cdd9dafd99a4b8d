//! `lockstep inspect`, `make-model`, `bench engine` and `bench memory`, which the worker's program carries out: what they do with a
//! made model, what they refuse, and how.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::{Checkpoint, Encoding};
use lockstep_tests::{
    cluster::{binary, demo_model},
    oracle,
    tiny_model::{Container, TinyModel},
};

/// Runs a command that is to fail, and expects its status and one line that holds all of these.
fn check_refused(args: &[&str], status: i32, parts: &[&str]) -> Result<()> {
    let output = Command::new(binary("lockstep")?).args(args).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
    let line = text.lines().next().unwrap_or_default();
    for part in parts {
        assert!(line.contains(part), "{part} is not in the first line of: {text}");
    }
    Ok(())
}

/// Runs a command that is to succeed: what it prints.
fn output(args: &[&str]) -> Result<String> {
    let output = Command::new(binary("lockstep")?).args(args).output()?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_made_model_is_one_like_any_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for encoding in ["q4_0", "q4_1", "q8_0", "q4_k_m", "q6_k", "iq4_xs", "f16"] {
        let path = folder.path().join(format!("{encoding}.gguf"));
        let model = path.display().to_string();
        output(&["make-model", "--shape", "tiny", "--encoding", encoding, &model])?;
        let description = output(&["inspect", &model, "--world-size", "2"])?;
        assert!(description.contains("layers        2 of hidden 256"), "{description}");
        // Two layers, one KV head a rank.
        assert!(description.contains("KV cache 0.5 KiB a token, 0.3 as int8"), "{description}");
        let sizes = ["--prompt", "32", "--generate", "8", "--repeat", "1", "--kv-cache-encoding", "int8", "--profile"];
        let bench = [&["bench", "engine", &model, "--json"], &sizes[..]].concat();
        let report: serde_json::Value = serde_json::from_str(&output(&bench)?)?;
        assert_eq!(report["kv_cache_encoding"], "int8");
        assert!(report["decode_tokens_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
        let lines = report["decode_profile"].as_array().context("lines")?;
        let gated = lines.iter().find(|line| line["op"] == "gated 1024 x 256").context("a line for gate and up")?;
        assert!(gated["calls"] == 2.0 && gated["gb_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
        assert!(lines.last().is_some_and(|line| line["op"] == "all" && line["percent"] == 100.0), "{report}");

        let ids: Vec<u32> = (0..24).map(|i| 3 + i * 13 % 500).collect();
        let logits = oracle::logits(&Checkpoint::open(&path)?, &ids)?.concat();
        let mean = logits.iter().sum::<f64>() / logits.len() as f64;
        let deviation = (logits.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / logits.len() as f64).sqrt();
        assert!((1.5..6.0).contains(&deviation), "{encoding}: logits with a standard deviation of {deviation}");
    }
    Ok(())
}

#[test]
fn a_folder_is_a_model_like_any_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tiny");
    let (encoding, embedding_encoding) = (Encoding::U4_128, Encoding::BF16);
    TinyModel { container: Container::Folder, encoding, embedding_encoding, ..TinyModel::default() }.write(&path)?;
    let model = path.display().to_string();
    let description = output(&["inspect", &model, "--world-size", "2"])?;
    assert!(description.contains("tensors       U4_128   14"), "{description}");
    assert!(description.contains("rank 1        heads 8..16, KV heads 4..8"), "{description}");
    let sizes = ["--prompt", "32", "--generate", "8", "--repeat", "1", "--world-size", "2"];
    let report: serde_json::Value =
        serde_json::from_str(&output(&[&["bench", "engine", &model, "--json"], &sizes[..]].concat())?)?;
    assert!(report["decode_tokens_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");

    std::fs::remove_file(path.join("model-00002-of-00002.safetensors"))?;
    check_refused(&["inspect", &model], 1, &["model-00002-of-00002.safetensors", "No such file"])
}

#[test]
fn memory_is_measured_with_each_number_of_threads() -> Result<()> {
    let text = output(&["bench", "memory", "--threads", "3", "--size-mib", "8", "--json"])?;
    let readings: serde_json::Value = serde_json::from_str(&text)?;
    let column = |name: &str| readings.as_array().into_iter().flatten().map(|reading| reading[name].clone()).collect();
    let (threads, rates): (Vec<_>, Vec<_>) = (column("threads"), column("bytes_per_s"));
    assert_eq!(threads, [1, 1, 1, 2, 2, 2, 3, 3, 3]);
    assert!(rates.iter().all(|rate| rate.as_f64().is_some_and(|rate| rate > 0.0)), "{text}");
    Ok(())
}

#[test]
fn a_wrong_command_line_has_the_status_of_wrong_usage() -> Result<()> {
    check_refused(&["inspect"], 64, &["required arguments"])?;
    check_refused(&["inspect", "m.gguf", "--ranks", "2"], 64, &["--ranks"])?;
    check_refused(&["make-model", "--shape", "llama-9"], 64, &["llama-9"])?;
    check_refused(&["bench", "engine"], 64, &["required arguments"])?;
    check_refused(&["bench", "memory", "--threads", "0"], 1, &["--threads must be"])
}

#[test]
fn a_model_that_cannot_be_used_is_named_with_the_reason() -> Result<()> {
    let model = demo_model().display().to_string();
    let impossible = [model.as_str(), "world size 4 is not possible", "1 to 3 ranks"];
    check_refused(&["inspect", &model, "--world-size", "4"], 1, &impossible)?;
    check_refused(&["bench", "engine", &model, "--world-size", "4", "--threads", "4"], 1, &impossible)?;
    check_refused(&["inspect", "/nonexistent/m.gguf"], 1, &["/nonexistent/m.gguf", "No such file"])?;
    check_refused(&["make-model", "--shape", "tiny", &model], 1, &[&model, "is there already", "--force"])?;
    check_refused(
        &["make-model", "--shape", "tiny", "/nonexistent/m.gguf"],
        1,
        &["/nonexistent/m.gguf", "No such file"],
    )
}
