//! Opening files as a user would: the demo model, and what is not a model.

use std::path::{Path, PathBuf};

use lockstep_checkpoint::{Checkpoint, CheckpointError, Encoding, GgufHeader};

fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

#[test]
fn the_demo_model_opens() {
    let checkpoint = Checkpoint::open(&demo_model()).expect("deploy/fetch_demo_model.py fetches the demo model");
    assert_eq!(checkpoint.metadata().str("general.architecture").unwrap(), "llama");
    assert_eq!(checkpoint.metadata().u32("llama.block_count").unwrap(), 30);
    assert_eq!(checkpoint.metadata().strings("tokenizer.ggml.tokens").unwrap().len(), 49_152);
    assert_eq!(checkpoint.tensors().count(), 272);

    let embedding = checkpoint.tensor("token_embd.weight").unwrap();
    assert_eq!(embedding.shape, [49_152, 576]);
    assert_eq!(embedding.encoding, Encoding::Q8_0);
    assert_eq!((embedding.n_rows(), embedding.n_cols(), embedding.row_bytes()), (49_152, 576, 612));
    assert_eq!(embedding.size_bytes(), 49_152 * 612);

    let norm = checkpoint.tensor("output_norm.weight").unwrap();
    assert_eq!((norm.n_rows(), norm.n_cols(), norm.row_bytes()), (1, 576, 2304));

    let digest: String = checkpoint.digest().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = Checkpoint::open(&demo_model()).expect("deploy/fetch_demo_model.py fetches the demo model");
    assert!(checkpoint.find("output.weight").is_none());
    let error = checkpoint.tensor("output.weight").unwrap_err().to_string();
    assert!(error.ends_with("SmolLM2-135M-Instruct.Q4_1.gguf has no tensor \"output.weight\""), "{error}");
}

/// Memory of this process that holds bytes of the file. Unit: KiB.
#[cfg(target_os = "linux")]
fn resident_kib(file: &Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
    let file = file.display().to_string();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(&file));
    let line = lines.find(|line| line.starts_with("Rss:")).expect("the file is mapped");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number of KiB")
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_let_go_leaves_memory_and_can_be_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap().join("model.gguf");
    let mut header = GgufHeader::default();
    header.tensor("large", &[1 << 20], Encoding::F32);
    let mut data = header.write(Vec::new()).unwrap();
    data.write(&[7; 4 << 20]).unwrap();
    std::fs::write(&path, data.finish().unwrap()).unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    let is_whole = || checkpoint.tensor("large").unwrap().bytes().unwrap().iter().all(|byte| *byte == 7);
    assert!(is_whole());
    assert!(resident_kib(&path) >= 4 << 10);
    checkpoint.release("large");
    assert_eq!(resident_kib(&path), 0);
    assert!(is_whole());
    let digest = checkpoint.digest();
    assert_eq!(resident_kib(&path), 0);
    assert_eq!(digest, checkpoint.digest());
}

/// Opens what must be refused; the message names the path and says why.
#[track_caller]
fn check_refused(path: &Path, reason: &str) {
    let error = Checkpoint::open(path).expect_err("accepted").to_string();
    assert!(error.contains(&path.display().to_string()) && error.contains(reason), "{error}");
    assert!(!error.contains('\n'), "a message is one line");
}

#[test]
fn what_is_not_a_model_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    check_refused(folder.path(), "config.json: No such file or directory");
    check_refused(&folder.path().join("absent.gguf"), "No such file or directory");

    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    check_refused(&empty, "header: needs 4 bytes but the file has only 0 left (at byte 0)");
}

#[test]
fn the_demo_model_cut_short_is_refused() {
    let whole = std::fs::read(demo_model()).expect("deploy/fetch_demo_model.py fetches the demo model");
    let folder = tempfile::tempdir().unwrap();
    let cut = folder.path().join("cut.gguf");
    std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    check_refused(&cut, "ends beyond the file's");
    std::fs::write(&cut, &whole[..1_000_000]).unwrap();
    let error = Checkpoint::open(&cut).unwrap_err();
    assert!(matches!(error, CheckpointError::Format { .. }), "{error}");
}
