//! Inspection of a model: what it is, how it is encoded, and what each rank of a group would hold.

use std::{collections::BTreeMap, fmt::Write as _, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use lockstep_checkpoint::{Checkpoint, Tensor};
use lockstep_kernels::KvEncoding;

use crate::model::{config::ModelConfig, load::Source};

/// Describes a model.
#[derive(Clone, Debug, clap::Args)]
pub struct Inspect {
    /// GGUF file or Hugging Face folder
    model: PathBuf,
    /// Ranks that would share it
    #[arg(long, default_value_t = 1)]
    world_size: usize,
}

impl Inspect {
    /// Reads the model's files and prints what it is.
    ///
    /// # Errors
    /// A model that is damaged or that Lockstep does not run.
    #[allow(clippy::print_stdout, reason = "the description is the program's output")]
    pub fn run(&self) -> Result<()> {
        let checkpoint = Arc::new(Checkpoint::open(&self.model)?);
        let mut text = String::new();
        let sources =
            (0..self.world_size.max(1)).map(|rank| Source::open(Arc::clone(&checkpoint), rank, self.world_size));
        let sources = sources.collect::<Result<Vec<_>, _>>().with_context(|| self.model.display().to_string())?;
        describe_config(&mut text, &checkpoint, sources[0].config())?;
        describe_tensors(&mut text, &checkpoint)?;
        for source in &sources {
            describe_rank(&mut text, source)?;
        }
        print!("{text}");
        Ok(())
    }
}

fn describe_config(text: &mut String, checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    let name = checkpoint.metadata().opt_str("general.name")?.unwrap_or("(no name)");
    writeln!(text, "file          {}", checkpoint.path().display())?;
    writeln!(text, "model         {name}, architecture llama")?;
    let ModelConfig { n_layers, hidden_dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, .. } = *config;
    writeln!(text, "layers        {n_layers} of hidden {hidden_dim}, ffn {ffn_dim}")?;
    writeln!(text, "attention     {n_heads} query heads, {n_kv_heads} KV heads of {head_dim}")?;
    writeln!(text, "vocabulary    {vocab_size}")?;
    writeln!(text, "context       {} tokens, rope base {}", config.context_length, config.rope_base)?;
    Ok(())
}

fn describe_tensors(text: &mut String, checkpoint: &Checkpoint) -> Result<()> {
    let mut by_encoding: BTreeMap<&str, (usize, usize, usize)> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        let entry = by_encoding.entry(tensor.encoding.name()).or_default();
        entry.0 += 1;
        entry.1 += tensor.n_rows() * tensor.n_cols();
        entry.2 += tensor.size_bytes();
    }
    for (encoding, (n_tensors, n_values, n_bytes)) in by_encoding {
        let millions = n_values as f64 / 1e6;
        writeln!(text, "tensors       {encoding:6} {n_tensors:4}  {millions:9.2} M values  {}", mib(n_bytes))?;
    }
    Ok(())
}

fn describe_rank(text: &mut String, source: &Source) -> Result<()> {
    let plan = source.plan();
    let config = source.config();
    let part = |tensor: &Tensor<'_>| source.held_bytes(tensor);
    let held: usize = source.checkpoint().tensors().map(|tensor| part(&tensor)).sum();
    let kv_kib = |encoding: KvEncoding| {
        let bytes = config.n_layers * plan.kv_heads.len() * encoding.head_bytes(config.head_dim);
        bytes as f64 / 1024.0
    };
    writeln!(
        text,
        "rank {}        heads {:?}, KV heads {:?}, ffn columns {:?}: weights {}, KV cache {:.1} KiB a token, {:.1} as int8",
        plan.rank,
        plan.heads,
        plan.kv_heads,
        plan.ffn,
        mib(held),
        kv_kib(KvEncoding::F16),
        kv_kib(KvEncoding::Int8)
    )?;
    Ok(())
}

fn mib(bytes: usize) -> String {
    format!("{:9.1} MiB", bytes as f64 / f64::from(1 << 20))
}
