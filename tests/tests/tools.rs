//! `lockstep inspect` and `lockstep bench engine`, which the worker's program carries out: what they refuse, and how.

use std::process::Command;

use anyhow::Result;
use lockstep_tests::cluster::{binary, demo_model};

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

#[test]
fn a_wrong_command_line_has_the_status_of_wrong_usage() -> Result<()> {
    check_refused(&["inspect"], 64, &["required arguments"])?;
    check_refused(&["inspect", "m.gguf", "--ranks", "2"], 64, &["--ranks"])?;
    check_refused(&["bench", "engine"], 64, &["required arguments"])
}

#[test]
fn a_model_that_cannot_be_used_is_named_with_the_reason() -> Result<()> {
    let model = demo_model().display().to_string();
    let impossible = [model.as_str(), "world size 4 is not possible", "1 to 3 ranks"];
    check_refused(&["inspect", &model, "--world-size", "4"], 1, &impossible)?;
    check_refused(&["bench", "engine", &model, "--world-size", "4", "--threads", "4"], 1, &impossible)?;
    check_refused(&["inspect", "/nonexistent/m.gguf"], 1, &["/nonexistent/m.gguf", "No such file"])
}
