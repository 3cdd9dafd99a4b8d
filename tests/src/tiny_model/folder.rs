//! A folder: the files that `transformers` reads, quantized weights as the tools that make them lay them out.
//!
//! It is the model that a GGUF file of the same description holds: rows of q and k, which that has in pairs that turn
//! together, are put back to where `transformers` looks for them. Layouts are written with one index formula each, from
//! the tools' sources (`worker/checkpoint/src/folder` names them).

use std::path::Path;

use anyhow::{Result, ensure};
use half::f16;
use lockstep_checkpoint::Encoding;
use lockstep_worker::make_model::{
    llama::{LlamaTensor, Part},
    vocabulary::Vocabulary,
};
use serde_json::{Map, Value, json};

use super::{TinyModel, quantize};

/// Which output of eight AWQ has in each nibble of a word, from the lowest on.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// A safetensors file in the making.
#[derive(Default)]
struct File {
    header: Map<String, Value>,
    data: Vec<u8>,
}

/// A matrix taken apart: what its blocks say of each value.
struct Codes {
    n_rows: usize,
    n_cols: usize,
    /// Columns that share a scale.
    group_len: usize,
    /// `[n_rows, n_groups]`.
    scales: Vec<f16>,
    /// As `scales`.
    zeros: Vec<u8>,
    /// `[n_rows, n_cols]`.
    codes: Vec<u8>,
}

pub(super) fn write(model: &TinyModel, folder: &Path) -> Result<()> {
    model.check()?;
    write_folder(model, model.weights(), folder)?;
    let write = |name: &str, content: Value| std::fs::write(folder.join(name), content.to_string());
    write("tokenizer.json", tokenizer(model.vocab_size))?;
    let template = model.chat_template.as_ref();
    write("tokenizer_config.json", json!({ "eos_token": "<|im_end|>", "chat_template": template }))?;
    Ok(())
}

/// Writes the folder of a model of this description, whatever its weights, without a tokenizer. Matrices whose rows are
/// no whole number of blocks become half floats.
///
/// # Errors
/// An encoding that no tool writes, or a file that cannot be written.
pub fn write_folder(
    model: &TinyModel,
    weights: impl Iterator<Item = (LlamaTensor, Vec<f32>)>,
    folder: &Path,
) -> Result<()> {
    let mut files = [File::default(), File::default()];
    let mut weight_map = Map::new();
    for (i, (tensor, values)) in weights.enumerate() {
        // Two files, neither of them in any order that a reader could rely on.
        let file = &mut files[i % 2];
        let n_before = file.header.len();
        let values = match tensor.part {
            Part::Query | Part::Key => in_halves(&values, tensor.n_cols(), model.head_dim),
            _ => values,
        };
        let encoding = match model.encoding_of(&tensor) {
            encoding if encoding.row_bytes(tensor.n_cols()).is_some() => encoding,
            _ => Encoding::F16,
        };
        put(file, encoding, &tensor, &values)?;
        let name = format!("model-0000{}-of-00002.safetensors", i % 2 + 1);
        weight_map.extend(file.header.keys().skip(n_before).map(|tensor| (tensor.clone(), name.clone().into())));
    }
    std::fs::create_dir_all(folder)?;
    for (file, number) in files.into_iter().zip(1..) {
        std::fs::write(folder.join(format!("model-0000{number}-of-00002.safetensors")), file.bytes())?;
    }
    let write = |name: &str, content: Value| std::fs::write(folder.join(name), content.to_string());
    write("model.safetensors.index.json", json!({ "metadata": {}, "weight_map": weight_map }))?;
    write("config.json", config(model))?;
    Ok(())
}

fn config(model: &TinyModel) -> Value {
    let gptq = |bits| json!({ "quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq" });
    let awq = |group_size| json!({ "quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm" });
    let quantization = match model.encoding {
        Encoding::Q4_0 | Encoding::U4_32 => gptq(4),
        Encoding::Q8_0 | Encoding::I8_32 => gptq(8),
        Encoding::U4_64 => awq(64),
        Encoding::U4_128 => awq(128),
        Encoding::NF4 | Encoding::FP4 => json!({ "quant_method": "bitsandbytes" }),
        _ => Value::Null,
    };
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": model.n_layers + model.n_idle_layers,
        "hidden_size": model.hidden_dim,
        "intermediate_size": model.ffn_dim,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tied,
        "eos_token_id": 2,
        "quantization_config": quantization,
    })
}

/// Byte-level BPE, as [`Vocabulary::write`] describes it to GGUF readers.
fn tokenizer(vocab_size: usize) -> Value {
    let vocabulary = Vocabulary::new(vocab_size);
    let ids: Map<String, Value> =
        vocabulary.tokens().iter().zip(0..).map(|(text, id)| (text.clone(), id.into())).collect();
    let control = vocabulary.tokens()[..3].iter().zip(0..).map(|(text, id)| {
        json!({ "id": id, "content": text, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false })
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "added_tokens": control.collect::<Vec<_>>(),
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": ids, "merges": vocabulary.merges() },
    })
}

/// Rows of heads whose neighbours turn together, so that the halves of a head do.
fn in_halves(values: &[f32], n_cols: usize, head_dim: usize) -> Vec<f32> {
    let rows = (0..values.len() / n_cols).map(|row| {
        let (head, i) = (row / head_dim, row % head_dim);
        head * head_dim + i % (head_dim / 2) * 2 + i / (head_dim / 2)
    });
    rows.flat_map(|row| &values[row * n_cols..(row + 1) * n_cols]).copied().collect()
}

/// Adds what a tool makes of a weight.
fn put(file: &mut File, encoding: Encoding, tensor: &LlamaTensor, values: &[f32]) -> Result<()> {
    let bytes = quantize(encoding, values);
    let name = own_name(tensor);
    if let Some(dtype) = match encoding {
        Encoding::F32 => Some("F32"),
        Encoding::F16 => Some("F16"),
        Encoding::BF16 => Some("BF16"),
        _ => None,
    } {
        file.put(format!("{name}.weight"), dtype, &tensor.shape, bytes);
        return Ok(());
    }
    let codes = Codes::of(encoding, &bytes, tensor.shape[0], tensor.shape[1])?;
    match encoding {
        Encoding::Q4_0 | Encoding::U4_32 => codes.put_gptq(file, &name, 4),
        Encoding::Q8_0 | Encoding::I8_32 => codes.put_gptq(file, &name, 8),
        Encoding::U4_64 | Encoding::U4_128 => codes.put_awq(file, &name),
        Encoding::NF4 => codes.put_bitsandbytes(file, &name, "nf4"),
        _ => codes.put_bitsandbytes(file, &name, "fp4"),
    }
    Ok(())
}

fn own_name(tensor: &LlamaTensor) -> String {
    let part = match tensor.part {
        Part::Embedding => return "model.embed_tokens".to_owned(),
        Part::Output => return "lm_head".to_owned(),
        Part::Norm if tensor.layer.is_none() => return "model.norm".to_owned(),
        Part::Norm if tensor.name.contains("attn_norm") => "input_layernorm",
        Part::Norm => "post_attention_layernorm",
        Part::Query => "self_attn.q_proj",
        Part::Key => "self_attn.k_proj",
        Part::Value => "self_attn.v_proj",
        Part::AttentionOutput => "self_attn.o_proj",
        Part::Gate => "mlp.gate_proj",
        Part::Up => "mlp.up_proj",
        Part::Down => "mlp.down_proj",
    };
    format!("model.layers.{}.{part}", tensor.layer.unwrap_or_default())
}

fn bytes_of<const N: usize>(values: impl IntoIterator<Item = [u8; N]>) -> Vec<u8> {
    values.into_iter().flatten().collect()
}

// === impl File ===

impl File {
    fn put(&mut self, name: String, dtype: &str, shape: &[usize], bytes: Vec<u8>) {
        let begin = self.data.len();
        self.data.extend(bytes);
        let description = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, self.data.len()] });
        self.header.insert(name, description);
    }

    fn bytes(self) -> Vec<u8> {
        let header = Value::Object(self.header).to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &self.data].concat()
    }
}

// === impl Codes ===

impl Codes {
    fn of(encoding: Encoding, bytes: &[u8], n_rows: usize, n_cols: usize) -> Result<Self> {
        let group_len = encoding.block_len();
        let (mut scales, mut zeros, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        let nibbles = |bytes: &[u8]| -> Vec<u8> {
            let runs = bytes.chunks_exact(16).flat_map(|run| (0..32).map(|i| run[i % 16] >> (4 * (i / 16)) & 15));
            runs.collect()
        };
        for block in bytes.chunks_exact(encoding.block_bytes()) {
            scales.push(f16::from_le_bytes([block[0], block[1]]));
            let (zero, block_codes) = match encoding {
                Encoding::Q4_0 => (8, nibbles(&block[2..])),
                Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 => (block[2], nibbles(&block[3..])),
                Encoding::NF4 | Encoding::FP4 => (0, nibbles(&block[2..])),
                Encoding::Q8_0 => (128, block[2..].iter().map(|code| code ^ 0x80).collect()),
                Encoding::I8_32 => (block[2] ^ 0x80, block[3..].iter().map(|code| code ^ 0x80).collect()),
                _ => anyhow::bail!("no tool writes {encoding} to a folder"),
            };
            zeros.push(zero);
            codes.extend(block_codes);
        }
        ensure!(codes.len() == n_rows * n_cols, "{} codes for {n_rows} rows of {n_cols}", codes.len());
        Ok(Codes { n_rows, n_cols, group_len, scales, zeros, codes })
    }

    fn n_groups(&self) -> usize {
        self.n_cols / self.group_len
    }

    fn code(&self, row: usize, col: usize) -> u32 {
        self.codes[row * self.n_cols + col].into()
    }

    fn zero(&self, row: usize, group: usize) -> u32 {
        self.zeros[row * self.n_groups() + group].into()
    }

    /// Scales as `[n_groups, n_rows]`.
    fn put_scales(&self, file: &mut File, name: &str) {
        let transposed = (0..self.n_groups() * self.n_rows)
            .map(|i| self.scales[i % self.n_rows * self.n_groups() + i / self.n_rows].to_le_bytes());
        file.put(format!("{name}.scales"), "F16", &[self.n_groups(), self.n_rows], bytes_of(transposed));
    }

    fn put_gptq(&self, file: &mut File, name: &str, bits: u32) {
        let per_word = 32 / bits as usize;
        let shape = [self.n_cols / per_word, self.n_rows];
        let words = (0..shape[0] * shape[1]).map(|i| {
            let (first_col, row) = (i / self.n_rows * per_word, i % self.n_rows);
            let word = (0..per_word).map(|k| self.code(row, first_col + k) << (bits * k as u32)).sum::<u32>();
            word.to_le_bytes()
        });
        file.put(format!("{name}.qweight"), "I32", &shape, bytes_of(words));
        let shape = [self.n_groups(), self.n_rows / per_word];
        let zeros = (0..shape[0] * shape[1]).map(|i| {
            let (group, first_row) = (i / shape[1], i % shape[1] * per_word);
            let word = (0..per_word).map(|k| self.zero(first_row + k, group) << (bits * k as u32)).sum::<u32>();
            // Less one in each place; what is borrowed comes back when a reader adds it.
            word.wrapping_sub((0..per_word).map(|k| 1 << (bits * k as u32)).sum()).to_le_bytes()
        });
        file.put(format!("{name}.qzeros"), "I32", &shape, bytes_of(zeros));
        self.put_scales(file, name);
        let groups = (0..self.n_cols).map(|col| ((col / self.group_len) as u32).to_le_bytes());
        file.put(format!("{name}.g_idx"), "I32", &[self.n_cols], bytes_of(groups));
    }

    fn put_awq(&self, file: &mut File, name: &str) {
        let words_a_row = self.n_rows / 8;
        let word = |first_row: usize, code: &dyn Fn(usize) -> u32| {
            let nibbles = AWQ_ORDER.iter().enumerate().map(|(i, output)| code(first_row + output) << (4 * i));
            nibbles.sum::<u32>().to_le_bytes()
        };
        let codes =
            (0..self.n_cols * words_a_row).map(|i| word(i % words_a_row * 8, &|row| self.code(row, i / words_a_row)));
        file.put(format!("{name}.qweight"), "I32", &[self.n_cols, words_a_row], bytes_of(codes));
        let zeros = (0..self.n_groups() * words_a_row)
            .map(|i| word(i % words_a_row * 8, &|row| self.zero(row, i / words_a_row)));
        file.put(format!("{name}.qzeros"), "I32", &[self.n_groups(), words_a_row], bytes_of(zeros));
        self.put_scales(file, name);
    }

    fn put_bitsandbytes(&self, file: &mut File, name: &str, kind: &str) {
        let weight = format!("{name}.weight");
        let pairs = self.codes.as_chunks::<2>().0.iter().map(|[first, second]| [first << 4 | second]);
        file.put(weight.clone(), "U8", &[self.codes.len() / 2, 1], bytes_of(pairs));
        let steps = if kind == "nf4" { 112.0 } else { 120.0 };
        let absmax = self.scales.iter().map(|scale| (scale.to_f32() * steps).to_le_bytes());
        file.put(format!("{weight}.absmax"), "F32", &[self.scales.len()], bytes_of(absmax));
        let map = if kind == "nf4" { NF4 } else { FP4 };
        file.put(format!("{weight}.quant_map"), "F32", &[16], bytes_of(map.map(f32::to_le_bytes)));
        let state = json!({ "quant_type": kind, "blocksize": self.group_len, "dtype": "bfloat16",
                            "shape": [self.n_rows, self.n_cols] });
        let state = state.to_string().into_bytes();
        file.put(format!("{weight}.quant_state.bitsandbytes__{kind}"), "U8", &[state.len()], state);
    }
}

/// bitsandbytes' levels, to six places.
const NF4: [f32; 16] = [
    -1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.09105, 0.0, 0.07958, 0.16093, 0.246112, 0.337915,
    0.44071, 0.562617, 0.722957, 1.0,
];
const FP4: [f32; 16] = [
    0.0, 0.005208, 0.666667, 1.0, 0.333333, 0.5, 0.166667, 0.25, 0.0, -0.005208, -0.666667, -1.0, -0.333333, -0.5,
    -0.166667, -0.25,
];
