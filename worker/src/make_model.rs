//! A made model: a GGUF file in the shape of a real model, with random weights. Speed and memory depend on shapes and
//! encodings alone, so an engine can be measured at full size without a download; the text it writes means nothing.

pub mod llama;
pub mod vocabulary;
mod weights;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use lockstep_checkpoint::{Encoding, GgufHeader};

use self::{
    llama::{LlamaShape, LlamaTensor, Part},
    vocabulary::Vocabulary,
    weights::Weights,
};

/// Bytes that are drawn and written at a time, roughly.
const PIECE_BYTES: usize = 1 << 20;

/// Writes a model of random weights.
#[derive(Clone, Debug, clap::Args)]
pub struct MakeModel {
    /// Whose shape it has
    #[arg(long)]
    shape: Shape,
    /// How its weights are stored
    #[arg(long, default_value = "q4_0")]
    encoding: Mix,
    /// Layers, if not as many as the real model has
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    layers: Option<u32>,
    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,
    /// GGUF file to write
    out: PathBuf,
}

/// Models whose shape can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// Llama-3-8B
    #[value(name = "llama-3-8b")]
    Llama3_8B,
    /// Llama-3.2-1B, without its frequency factors
    #[value(name = "llama-3.2-1b")]
    Llama3_2_1B,
    /// SmolLM2-135M
    #[value(name = "smollm2-135m")]
    SmolLm2_135M,
    /// No real model: two narrow layers, for tests
    #[value(name = "tiny")]
    Tiny,
}

/// Which tensors have which encoding, as llama.cpp's quantizer has it (`llama_tensor_get_type` in `llama-quant.cpp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
#[allow(non_camel_case_types, reason = "the names by which llama.cpp's users know them")]
enum Mix {
    /// Q4_0, the output matrix Q6_K
    Q4_0,
    /// Q4_1, the output matrix Q6_K
    Q4_1,
    /// Q8_0 throughout
    Q8_0,
    /// Q4_K; Q6_K for the output matrix and in half of the layers for v and down
    Q4_K_M,
    /// Q6_K throughout
    Q6_K,
    /// IQ4_XS; Q6_K for the output matrix, Q5_K for v if four query heads share it and for down in the first layers
    IQ4_XS,
    /// F16 throughout
    F16,
}

// === impl MakeModel ===

impl MakeModel {
    /// Writes the file: under another name at first, so that a file of its name is whole.
    ///
    /// # Errors
    /// A file that is there already, or that cannot be written.
    pub fn run(&self) -> Result<()> {
        let there = || format!("{} is there already; --force replaces it", self.out.display());
        ensure!(self.force || !self.out.exists(), there());
        let mut partial = self.out.clone().into_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let written = self.write(&partial).and_then(|()| Ok(fs::rename(&partial, &self.out)?));
        if written.is_err() {
            // What it was that failed matters more than whether anything is left of it.
            let _ = fs::remove_file(&partial);
        }
        written.with_context(|| format!("cannot write {}", self.out.display()))
    }

    fn write(&self, path: &Path) -> Result<()> {
        let real = self.shape.llama();
        let shape = LlamaShape { n_layers: self.layers.map_or(real.n_layers, |layers| layers as usize), ..real };
        let mut header = GgufHeader::default();
        header.string("general.name", &format!("{} with random weights", self.shape.name()));
        header.u32("general.file_type", self.encoding.file_type());
        header.u32("general.quantization_version", 2);
        shape.write_metadata(&mut header);
        Vocabulary::new(shape.vocab_size).write(&mut header);
        let tensors: Vec<(LlamaTensor, Encoding)> = shape
            .tensors()
            .into_iter()
            .map(|tensor| {
                let encoding = self.encoding.of(&tensor, &shape);
                header.tensor(&tensor.name, &tensor.shape, encoding);
                (tensor, encoding)
            })
            .collect();
        let mut data = header.write(File::create(path)?)?;
        let mut weights = Weights::new();
        for (tensor, encoding) in tensors {
            let n_bytes = tensor.shape.iter().product::<usize>() / encoding.block_len() * encoding.block_bytes();
            let mut piece = vec![0; n_bytes.min(PIECE_BYTES / encoding.block_bytes() * encoding.block_bytes())];
            let mut written = 0;
            while written < n_bytes {
                piece.truncate(n_bytes - written);
                match tensor.part {
                    Part::Norm => weights.draw_norm(&mut piece),
                    part => weights.draw(encoding, part.deviation(tensor.n_cols()), &mut piece),
                }
                data.write(&piece)?;
                written += piece.len();
            }
        }
        data.finish()?;
        Ok(())
    }
}

// === impl Shape ===

impl Shape {
    fn name(self) -> &'static str {
        match self {
            Shape::Llama3_8B => "Llama-3-8B",
            Shape::Llama3_2_1B => "Llama-3.2-1B",
            Shape::SmolLm2_135M => "SmolLM2-135M",
            Shape::Tiny => "A tiny Llama",
        }
    }

    fn llama(self) -> LlamaShape {
        match self {
            Shape::Llama3_8B => LlamaShape {
                n_layers: 32,
                hidden_dim: 4096,
                ffn_dim: 14_336,
                n_heads: 32,
                n_kv_heads: 8,
                head_dim: 128,
                rope_dim: 128,
                vocab_size: 128_256,
                tied: false,
                rope_base: 500_000.0,
                context_length: 8192,
            },
            Shape::Llama3_2_1B => LlamaShape {
                n_layers: 16,
                hidden_dim: 2048,
                ffn_dim: 8192,
                n_heads: 32,
                n_kv_heads: 8,
                head_dim: 64,
                rope_dim: 64,
                vocab_size: 128_256,
                tied: true,
                rope_base: 500_000.0,
                context_length: 131_072,
            },
            Shape::SmolLm2_135M => LlamaShape {
                n_layers: 30,
                hidden_dim: 576,
                ffn_dim: 1536,
                n_heads: 9,
                n_kv_heads: 3,
                head_dim: 64,
                rope_dim: 64,
                vocab_size: 49_152,
                tied: true,
                rope_base: 100_000.0,
                context_length: 8192,
            },
            Shape::Tiny => LlamaShape {
                n_layers: 2,
                hidden_dim: 256,
                ffn_dim: 512,
                n_heads: 8,
                n_kv_heads: 2,
                head_dim: 64,
                rope_dim: 64,
                vocab_size: 512,
                tied: false,
                rope_base: 10_000.0,
                context_length: 512,
            },
        }
    }
}

// === impl Mix ===

impl Mix {
    /// The encoding of one tensor of a model.
    fn of(self, tensor: &LlamaTensor, shape: &LlamaShape) -> Encoding {
        // llama.cpp names the layers "that get more bits": the first and last eighth, and every third between.
        let eighth = shape.n_layers / 8;
        let more_bits = tensor
            .layer
            .is_some_and(|layer| layer < eighth || layer >= 7 * shape.n_layers / 8 || (layer - eighth) % 3 == 2);
        let is_output = tensor.part == Part::Output || tensor.part == Part::Embedding && shape.tied;
        let wanted = match (self, tensor.part) {
            (_, Part::Norm) => return Encoding::F32,
            (Mix::F16, _) => Encoding::F16,
            (Mix::Q8_0, _) => Encoding::Q8_0,
            _ if is_output => Encoding::Q6K,
            (Mix::Q4_0, _) => Encoding::Q4_0,
            (Mix::Q4_1, _) => Encoding::Q4_1,
            (Mix::Q4_K_M, Part::Value | Part::Down) if more_bits => Encoding::Q6K,
            (Mix::Q4_K_M, _) => Encoding::Q4K,
            (Mix::Q6_K, _) => Encoding::Q6K,
            (Mix::IQ4_XS, Part::Value) if shape.n_heads >= 4 * shape.n_kv_heads => Encoding::Q5K,
            (Mix::IQ4_XS, Part::Down) if tensor.layer.is_some_and(|layer| layer < eighth) => Encoding::Q5K,
            (Mix::IQ4_XS, _) => Encoding::IQ4_XS,
        };
        // Where rows are no whole super-blocks, the next larger encoding with blocks of 32 takes their place.
        match wanted {
            Encoding::Q4K if !tensor.n_cols().is_multiple_of(256) => Encoding::Q5_0,
            Encoding::Q6K if !tensor.n_cols().is_multiple_of(256) => Encoding::Q8_0,
            Encoding::IQ4_XS if !tensor.n_cols().is_multiple_of(256) => Encoding::IQ4_NL,
            fits => fits,
        }
    }

    /// llama.cpp's number for files of this kind (`enum llama_ftype`).
    fn file_type(self) -> u32 {
        match self {
            Mix::F16 => 1,
            Mix::Q4_0 => 2,
            Mix::Q4_1 => 3,
            Mix::Q8_0 => 7,
            Mix::Q4_K_M => 15,
            Mix::Q6_K => 18,
            Mix::IQ4_XS => 30,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::ValueEnum;
    use lockstep_checkpoint::{Checkpoint, Encoding};
    use lockstep_kernels::dequantize;

    use super::{MakeModel, Mix, Shape, llama::Part};
    use crate::model::load::Source;

    fn made(shape: Shape, encoding: Mix) -> (tempfile::TempDir, Arc<Checkpoint>) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("made.gguf");
        MakeModel { shape, encoding, layers: None, force: false, out: out.clone() }.run().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        let checkpoint = Arc::new(Checkpoint::open(&out).unwrap());
        (folder, checkpoint)
    }

    #[test]
    fn every_mix_is_a_model_whose_weights_have_the_size_they_should() {
        for mix in Mix::value_variants() {
            let (_folder, checkpoint) = made(Shape::Tiny, *mix);
            let source = Source::open(Arc::clone(&checkpoint), 0, 1).unwrap();
            assert_eq!(
                source.config().vocab_size,
                checkpoint.metadata().strings("tokenizer.ggml.tokens").unwrap().len()
            );
            for described in Shape::Tiny.llama().tensors() {
                let tensor = checkpoint.tensor(&described.name).unwrap();
                let mut values = vec![0.0; tensor.n_rows() * tensor.n_cols()];
                dequantize(tensor.encoding, &tensor.bytes().unwrap(), &mut values);
                let mean = values.iter().sum::<f32>() / values.len() as f32;
                let deviation = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
                if described.part == Part::Norm {
                    assert!((0.98..1.02).contains(&mean), "{}: a mean of {mean}", described.name);
                    continue;
                }
                let wanted = described.part.deviation(described.n_cols());
                assert!(mean.abs() < wanted / 20.0, "{mix:?} {}: a mean of {mean}", described.name);
                let ratio = deviation / wanted;
                assert!((0.93..1.07).contains(&ratio), "{mix:?} {}: {deviation} for {wanted}", described.name);
            }
        }
    }

    #[test]
    fn encodings_are_mixed_as_llama_cpp_mixes_them() {
        let shape = Shape::Llama3_8B.llama();
        let check = |mix: Mix, part: Part, encoding: Encoding, n: usize| {
            let is_it = |tensor: &&super::LlamaTensor| tensor.part == part && mix.of(tensor, &shape) == encoding;
            assert_eq!(shape.tensors().iter().filter(is_it).count(), n, "{mix:?} {part:?} {encoding}");
        };
        check(Mix::Q4_K_M, Part::Value, Encoding::Q6K, 16);
        check(Mix::Q4_K_M, Part::Down, Encoding::Q6K, 16);
        check(Mix::Q4_K_M, Part::Query, Encoding::Q4K, 32);
        check(Mix::Q4_K_M, Part::Embedding, Encoding::Q4K, 1);
        check(Mix::Q4_K_M, Part::Output, Encoding::Q6K, 1);
        check(Mix::IQ4_XS, Part::Value, Encoding::Q5K, 32);
        check(Mix::IQ4_XS, Part::Down, Encoding::Q5K, 4);
        check(Mix::IQ4_XS, Part::Down, Encoding::IQ4_XS, 28);
        check(Mix::IQ4_XS, Part::Embedding, Encoding::IQ4_XS, 1);
        check(Mix::IQ4_XS, Part::Output, Encoding::Q6K, 1);
    }

    #[test]
    fn rows_that_are_no_super_blocks_take_small_ones() {
        let shape = Shape::SmolLm2_135M.llama();
        for tensor in shape.tensors().iter().filter(|tensor| tensor.part != Part::Norm) {
            for mix in Mix::value_variants() {
                let encoding = mix.of(tensor, &shape);
                assert!(encoding.row_bytes(tensor.n_cols()).is_some(), "{mix:?} {}: {encoding}", tensor.name);
            }
        }
    }

    #[test]
    fn a_file_is_replaced_only_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("made.gguf");
        std::fs::write(&out, "mine").unwrap();
        let make = |force| {
            MakeModel { shape: Shape::Tiny, encoding: Mix::Q4_0, layers: Some(1), force, out: out.clone() }.run()
        };
        let error = format!("{:#}", make(false).unwrap_err());
        assert_eq!(error, format!("{} is there already; --force replaces it", out.display()));
        assert_eq!(std::fs::read(&out).unwrap(), b"mine");
        make(true).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.metadata().u32("llama.block_count").unwrap(), 1, "one layer was asked for");
        assert!(checkpoint.find("blk.0.attn_q.weight").is_some() && checkpoint.find("blk.1.attn_q.weight").is_none());
    }
}
