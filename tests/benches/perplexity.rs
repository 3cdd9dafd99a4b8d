//! What running each encoding with 8-bit activations costs in accuracy: `cargo bench --workspace --bench perplexity --
//! [n_windows] [encoding]`.
//!
//! The demo model is encoded anew in every encoding, plainly, so that the files themselves are worse than real ones: GGUF
//! files, and folders for what only those hold, with embeddings as half floats. One line an encoding: the perplexity of the `reference` backend, which computes the same weights in float32, that of the
//! `cpu` backend, and the ratio. Tokens are those of `tests/data/perplexity.json`, by windows.

use std::{fs::File, io::Write as _, path::Path};

use anyhow::{Context, Result};
use lockstep_checkpoint::{Checkpoint, Encoding, GgufHeader, Tensor, Value};
use lockstep_kernels::{KvEncoding, dequantize};
use lockstep_tests::{
    cluster::{demo_model, repository},
    ranks::{Ranks, perplexity},
    tiny_model::{self, Container, TinyModel, quantize},
};
use lockstep_worker::{device::Device, model::config::ModelConfig};
use serde::Deserialize;

/// What matrices get whose rows are no whole number of blocks: the demo model's rows of 576 in the K-quants.
const FALLBACK: Encoding = Encoding::Q8_0;

#[derive(Deserialize)]
struct Text {
    window: usize,
    ids: Vec<u32>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let n_windows = args.first().map(|arg| arg.parse()).transpose()?.unwrap_or(usize::MAX);
    let is_asked = |encoding: &Encoding| args.get(1).is_none_or(|name| encoding.name() == name);
    let text = std::fs::read_to_string(repository().join("tests/data/perplexity.json"))?;
    let text: Text = serde_json::from_str(&text)?;
    let demo = Checkpoint::open(&demo_model()).context("run `make fetch` first")?;
    println!("{:<8} {:>10} {:>10} {:>10}", "encoding", "reference", "cpu", "ratio");
    for encoding in Encoding::ALL.into_iter().filter(is_asked) {
        let folder = tempfile::tempdir()?;
        let path = match encoding.ggml_type() {
            Some(_) => {
                let path = folder.path().join("model.gguf");
                write_gguf(&demo, encoding, File::create(&path)?)?;
                path
            }
            None => {
                write_folder(&demo, encoding, folder.path())?;
                folder.path().to_owned()
            }
        };
        let windows = || text.ids.chunks_exact(text.window).take(n_windows);
        let measure = |device| -> Result<f64> {
            let mut ranks = Ranks::load(&path, device, KvEncoding::F16, 1, 2, 1024)?;
            Ok(perplexity(&ranks.logprobs(windows())?))
        };
        let (reference, cpu) = (measure(&Device::Reference)?, measure(&Device::Cpu)?);
        println!("{:<8} {reference:>10.4} {cpu:>10.4} {:>10.5}", encoding.to_string(), cpu / reference);
    }
    Ok(())
}

/// Writes `model` as a folder whose layers have their matrices in `encoding`, but for rows that are no whole number of
/// blocks: those stay half floats.
fn write_folder(model: &Checkpoint, encoding: Encoding, folder: &Path) -> Result<()> {
    let config = ModelConfig::from_checkpoint(model)?;
    let description = TinyModel {
        container: Container::Folder,
        n_layers: config.n_layers,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        head_dim: config.head_dim,
        hidden_dim: config.hidden_dim,
        ffn_dim: config.ffn_dim,
        vocab_size: config.vocab_size,
        encoding,
        embedding_encoding: Encoding::F16,
        tied: model.find("output.weight").is_none(),
        rope_base: config.rope_base,
        rope_dim: config.rope_dim,
        context_length: config.context_length,
        ..TinyModel::default()
    };
    let weights = description.shape().tensors().into_iter().map(|tensor| {
        let stored = model.tensor(&tensor.name)?;
        let mut values = vec![0.0; stored.shape.iter().product()];
        dequantize(stored.encoding, &stored.bytes()?, &mut values);
        Ok((tensor, values))
    });
    let weights = weights.collect::<Result<Vec<_>>>()?;
    tiny_model::write_folder(&description, weights.into_iter(), folder)
}

/// Writes `model` as a GGUF file with every matrix in `encoding`.
fn write_gguf(model: &Checkpoint, encoding: Encoding, mut file: impl std::io::Write) -> Result<()> {
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
