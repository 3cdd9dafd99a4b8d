//! What running each encoding with 8-bit activations costs in accuracy: `cargo bench --workspace --bench perplexity --
//! [n_windows]`.
//!
//! The demo model is encoded anew in every encoding, plainly, so that the files themselves are worse than real ones. One
//! line an encoding: the perplexity of the `reference` backend, which computes the same weights in float32, that of the
//! `cpu` backend, and the ratio. Tokens are those of `tests/data/perplexity.json`, by windows.

use std::io::Write as _;

use anyhow::{Context, Result};
use lockstep_checkpoint::{Checkpoint, Encoding, GgufHeader, Tensor, Value};
use lockstep_kernels::{KvEncoding, dequantize};
use lockstep_tests::{
    cluster::{demo_model, repository},
    ranks::{Ranks, perplexity},
    tiny_model::quantize,
};
use lockstep_worker::model_runner::BackendChoice;
use serde::Deserialize;

/// What matrices get whose rows are no whole number of blocks: the demo model's rows of 576 in the K-quants.
const FALLBACK: Encoding = Encoding::Q8_0;

#[derive(Deserialize)]
struct Text {
    window: usize,
    ids: Vec<u32>,
}

fn main() -> Result<()> {
    let n_windows = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(usize::MAX);
    let text = std::fs::read_to_string(repository().join("tests/data/perplexity.json"))?;
    let text: Text = serde_json::from_str(&text)?;
    let demo = Checkpoint::open(&demo_model()).context("run `make fetch` first")?;
    println!("{:<8} {:>10} {:>10} {:>10}", "encoding", "reference", "cpu", "ratio");
    for encoding in Encoding::ALL.into_iter().filter(|encoding| encoding.ggml_type().is_some()) {
        let file = tempfile::NamedTempFile::new()?;
        encode(&demo, encoding, &file)?;
        let windows = || text.ids.chunks_exact(text.window).take(n_windows);
        let measure = |backend| -> Result<f64> {
            let mut ranks = Ranks::load(file.path(), backend, KvEncoding::F16, 1, 2, 1024)?;
            Ok(perplexity(&ranks.logprobs(windows())?))
        };
        let (reference, cpu) = (measure(BackendChoice::Reference)?, measure(BackendChoice::Cpu)?);
        println!("{:<8} {reference:>10.4} {cpu:>10.4} {:>10.5}", encoding.to_string(), cpu / reference);
    }
    Ok(())
}

/// Writes `model` with every matrix in `encoding`.
fn encode(model: &Checkpoint, encoding: Encoding, mut file: impl std::io::Write) -> Result<()> {
    let encoding_of = |tensor: &Tensor<'_>| match tensor.shape.len() {
        1 => Encoding::F32,
        _ if encoding.row_bytes(tensor.n_cols()).is_some() => encoding,
        _ => FALLBACK,
    };
    let mut header = GgufHeader::default();
    for (key, value) in model.metadata().iter() {
        match value {
            Value::U32(value) => header.u32(key, *value),
            Value::F32(value) => header.f32(key, *value),
            Value::Bool(value) => header.bool(key, *value),
            Value::String(value) => header.string(key, value),
            // Vocabularies, which no worker reads.
            _ => {}
        }
    }
    let tensors: Vec<Tensor<'_>> = model.tensors().collect();
    for tensor in &tensors {
        header.tensor(tensor.name, tensor.shape, encoding_of(tensor));
    }
    let mut data = header.write(std::io::BufWriter::new(&mut file))?;
    for tensor in &tensors {
        let mut values = vec![0.0; tensor.shape.iter().product()];
        dequantize(tensor.encoding, &tensor.bytes()?, &mut values);
        data.write(&quantize(encoding_of(tensor), &values))?;
    }
    Ok(data.finish()?.flush()?)
}
