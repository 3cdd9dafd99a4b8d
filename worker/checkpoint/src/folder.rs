//! A Hugging Face folder: the container of `transformers`, that is `config.json` and weights in safetensors, one file or
//! several with an index.
//!
//! It is read as a Llama at once: settings and tensors come out under the names that GGUF files use, so that whoever
//! reads a checkpoint knows one set of names. Errors say what the folder's own files say. Tensors that are no part of
//! a Llama are refused by name, but for those that change nothing. Pickles are never opened.

mod bitsandbytes;
mod config;
mod grouped;
mod names;
mod safetensors;
mod scales;
mod special_tokens;
mod tokenizer;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path};

use memmap2::Mmap;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use self::bitsandbytes::{EightBit, FourBit};
use self::config::{Config, Grouping};
use self::grouped::Grouped;
use self::safetensors::{Dtype, RawTensor};
use self::tokenizer::Tokenizer;
use crate::checkpoint::Contents;
use crate::encoding::Encoding;
use crate::error::{CheckpointError, FolderError};
use crate::mmap;
use crate::special_tokens::Named;
use crate::tensor::{Piece, Source, TensorEntry, TensorTable};
use crate::vocabulary::Vocabulary;

pub(crate) use self::config::own_key;

pub(crate) const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Largest `config.json`; real ones have a few kB. Unit: bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest index; that of Llama-3.1-405B has 96 kB. Unit: bytes.
const INDEX_BYTES_MAX: u64 = 16 << 20;

/// Largest `tokenizer.json`. Those of 256 k-token vocabularies have 33 MB. Unit: bytes.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Weight files; Llama-3.1-405B has 191.
const FILES_MAX: usize = 4096;

/// Tensors of all files, as in GGUF files. A 126-layer Llama has 1,138, quantized up to seven times as many.
const TENSORS_MAX: usize = 1 << 16;

/// A folder that has been read.
pub(crate) struct Folder {
    /// What a digest of the model begins with: the settings, and which files there are.
    pub(crate) preamble: Vec<u8>,
    /// The weight files, ascending by name.
    pub(crate) maps: Vec<Mmap>,
    pub(crate) contents: Contents,
}

/// The index of a model of several weight files, as far as it matters here.
#[derive(Deserialize)]
struct Index {
    /// Which file a tensor is in.
    weight_map: BTreeMap<String, String>,
}

/// A weight that a quantizer's tensors make up.
#[derive(Debug)]
pub(crate) struct Quantized {
    /// The first of them, for messages.
    pub(crate) tensor: String,
    kind: Kind,
}

/// By the quantizer.
#[derive(Debug)]
enum Kind {
    Grouped(Grouped),
    FourBit(FourBit),
    EightBit(EightBit),
}

/// The tensors of one layer, such as the four of a quantized weight, by what follows the layer's name.
type Parts<'a> = BTreeMap<&'a str, &'a RawTensor>;

/// Maps the weights in `folder` and checks all that its files declare.
pub(crate) fn open(folder: &Path) -> Result<Folder, CheckpointError> {
    let failed = |cause| CheckpointError::Folder { path: folder.to_owned(), cause: Box::new(cause) };
    let settings = read(folder, CONFIG, CONFIG_BYTES_MAX).map_err(failed)?;
    let config = Config::read(parse(CONFIG, &settings).map_err(failed)?).map_err(failed)?;
    let mut preamble = framed(CONFIG, settings.len());
    preamble.extend(settings);
    let (mut maps, mut tensors) = (Vec::new(), Vec::new());
    let index = read_index(folder).map_err(failed)?;
    let files = index.as_ref().map_or_else(|| Ok(vec![WEIGHTS.to_owned()]), Index::files).map_err(failed)?;
    for file in &files {
        let map = mmap::open(&folder.join(file))?;
        let parsed = safetensors::parse(&map, maps.len());
        tensors
            .extend(parsed.map_err(|cause| failed(FolderError::Weights { file: file.clone(), cause: cause.into() }))?);
        if tensors.len() > TENSORS_MAX {
            return Err(failed(FolderError::TooManyTensors { found: tensors.len(), limit: TENSORS_MAX }));
        }
        preamble.extend(framed(file, map.len()));
        maps.push(map);
    }
    index.map_or(Ok(()), |index| index.check(&files, &tensors)).map_err(failed)?;
    let contents = contents(config, &tensors, &maps).map_err(failed)?;
    Ok(Folder { preamble, maps, contents })
}

/// The vocabulary of the model in `folder`; empty if there is no `tokenizer.json`.
pub(crate) fn vocabulary(folder: &Path) -> Result<Vocabulary, CheckpointError> {
    let read = || match has(folder, TOKENIZER) {
        true => parse::<Tokenizer>(TOKENIZER, &read(folder, TOKENIZER, TOKENIZER_BYTES_MAX)?)?.vocabulary(),
        false => Tokenizer::default().vocabulary(),
    };
    read().map_err(|cause| CheckpointError::Folder { path: folder.to_owned(), cause: Box::new(cause) })
}

/// The special tokens that the settings in `folder` name.
pub(crate) fn special_tokens(folder: &Path, vocabulary: &Vocabulary) -> Result<Named, CheckpointError> {
    let failed = |cause| CheckpointError::Folder { path: folder.to_owned(), cause: Box::new(cause) };
    special_tokens::named(folder, vocabulary).map_err(failed)
}

/// What the folder's files call the tensor that GGUF files call `name`.
pub(crate) fn own_name(name: &str) -> Cow<'_, str> {
    names::own(name).map_or(Cow::Borrowed(name), Cow::Owned)
}

/// A file's name and size, so that a digest tells where one ends.
fn framed(file: &str, n_bytes: usize) -> Vec<u8> {
    [file.as_bytes(), &[0], &(n_bytes as u64).to_le_bytes()].concat()
}

/// The index, unless one file has all weights.
fn read_index(folder: &Path) -> Result<Option<Index>, FolderError> {
    if has(folder, WEIGHTS) {
        return Ok(None);
    }
    if !has(folder, INDEX) {
        let pickle = PICKLES.into_iter().find(|pickle| has(folder, pickle));
        return Err(pickle.map_or(FolderError::NoWeights, |file| FolderError::Pickle { file }));
    }
    parse(INDEX, &read(folder, INDEX, INDEX_BYTES_MAX)?).map(Some)
}

/// Whether there is such a file, or a link that is to lead to it.
fn has(folder: &Path, file: &str) -> bool {
    folder.join(file).symlink_metadata().is_ok()
}

/// Whether `name`, joined to a folder, stays in it. (The file may still be a link: the hub's cache is made of them.)
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    matches!(first, Some(Component::Normal(first)) if first == name) && components.next().is_none()
}

/// Reads a small file whole.
fn read(folder: &Path, file: &'static str, limit: u64) -> Result<Vec<u8>, FolderError> {
    let failed = |cause| FolderError::Read { file, cause };
    let path = folder.join(file);
    // Asked before opening: opening a pipe would wait for a writer.
    if !std::fs::metadata(&path).map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > limit { Err(FolderError::TooLarge { file, limit }) } else { Ok(bytes) }
}

fn parse<T: DeserializeOwned>(file: &'static str, bytes: &[u8]) -> Result<T, FolderError> {
    serde_json::from_slice(bytes).map_err(|cause| FolderError::Json { file, cause })
}

/// What the folder holds, by the names of GGUF files.
fn contents(config: Config, tensors: &[RawTensor], maps: &[Mmap]) -> Result<Contents, FolderError> {
    let mut layers: BTreeMap<String, Parts<'_>> = BTreeMap::new();
    for tensor in tensors.iter().filter(|tensor| !is_unused(&tensor.name)) {
        let (layer, part) = names::split(&tensor.name)
            .ok_or_else(|| tensor.error("it is no part of a Llama, or of a kind that is not supported"))?;
        if layers.entry(layer).or_default().insert(part, tensor).is_some() {
            return Err(tensor.error("it occurs twice"));
        }
    }
    check_output(layers.get(names::OUTPUT), layers.get(names::EMBEDDING), config.is_tied, maps)?;
    if config.is_tied {
        layers.remove(names::OUTPUT);
    }
    let entries =
        layers.into_iter().map(|(layer, parts)| weight(format!("{layer}.weight"), &parts, config.grouping, maps));
    let mut entries: Vec<TensorEntry> = entries.collect::<Result<_, _>>()?;
    if let Some(factors) = &config.rope_factors {
        let source = Source::Derived(factors.iter().flat_map(|factor| factor.to_le_bytes()).collect());
        let shape = vec![factors.len()];
        entries.push(TensorEntry { name: "rope_freqs.weight".to_owned(), shape, encoding: Encoding::F32, source });
    }
    if let Some(vocab_size) = config.vocab_size
        && let Some(embedding) = entries.iter().find(|entry| entry.name == format!("{}.weight", names::EMBEDDING))
        && embedding.shape[0] != vocab_size as usize
    {
        let why = format!("{vocab_size}, but model.embed_tokens.weight has {} rows", embedding.shape[0]);
        return Err(FolderError::Setting { key: "vocab_size".to_owned(), why });
    }
    let tensors = TensorTable::new(entries).expect("layers were gathered by name");
    Ok(Contents { metadata: config.metadata, tensors })
}

/// Tensors that change nothing: frequencies, which follow from the settings.
fn is_unused(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Sees to it that there is one output matrix: its own or, where `config.json` ties them, the embedding, of which there
/// may be a copy.
fn check_output(
    output: Option<&Parts<'_>>,
    embedding: Option<&Parts<'_>>,
    is_tied: bool,
    maps: &[Mmap],
) -> Result<(), FolderError> {
    let wrong = |why: &str| Err(FolderError::Tensor { tensor: "lm_head.weight".to_owned(), why: why.to_owned() });
    match (output, embedding) {
        (None, _) if !is_tied => wrong("there is none, and tie_word_embeddings in config.json is not true"),
        (Some(output), embedding) if is_tied && !embedding.is_some_and(|other| are_same(output, other, maps)) => {
            wrong("it is not model.embed_tokens.weight, but tie_word_embeddings in config.json is true")
        }
        _ => Ok(()),
    }
}

fn are_same(left: &Parts<'_>, right: &Parts<'_>, maps: &[Mmap]) -> bool {
    left.keys().eq(right.keys())
        && left.values().zip(right.values()).all(|(left, right)| {
            let is_same_kind = left.dtype == right.dtype && left.shape == right.shape;
            is_same_kind && left.piece.of(maps) == right.piece.of(maps)
        })
}

/// The weight that a layer's tensors make up.
fn weight(
    name: String,
    parts: &Parts<'_>,
    grouping: Option<Grouping>,
    maps: &[Mmap],
) -> Result<TensorEntry, FolderError> {
    let (main, beside): (&str, &[&str]) = if parts.contains_key("qweight") {
        ("qweight", &grouped::PARTS)
    } else if parts.contains_key("weight.absmax") {
        ("weight", &bitsandbytes::FOUR_BIT_PARTS)
    } else if parts.contains_key("SCB") {
        ("weight", &bitsandbytes::EIGHT_BIT_PARTS)
    } else {
        ("weight", &[])
    };
    let is_known = |part: &str| part == main || part == "bias" || beside.contains(&part);
    if let Some((_, other)) = parts.iter().find(|(part, _)| !is_known(part)) {
        return Err(other.error("it is no part of a weight that is supported"));
    }
    let first = parts.values().next().expect("a layer is there because of a tensor");
    let tensor = parts.get(main).ok_or_else(|| first.error("there is no weight that it goes with"))?;
    if let Some(bias) = parts.get("bias")
        && bias.piece.of(maps).iter().any(|byte| *byte != 0)
    {
        return Err(bias.error("biases other than 0 are not supported"));
    }
    let quantized = |kind: Kind| Source::Quantized(Quantized { tensor: tensor.name.clone(), kind });
    let (shape, encoding, source) = match beside {
        [] => (tensor.shape.clone(), tensor.float()?, Source::File(tensor.piece.clone())),
        _ if main == "qweight" => {
            let why = "config.json has no quantization_config of GPTQ or AWQ that explains it";
            let matrix = Grouped::new(tensor, parts, grouping.ok_or_else(|| tensor.error(why))?, maps)?;
            (matrix.shape(), matrix.encoding(), quantized(Kind::Grouped(matrix)))
        }
        _ if parts.contains_key("SCB") => {
            let matrix = EightBit::new(tensor, parts, maps)?;
            (matrix.shape(), Encoding::Q8_0, quantized(Kind::EightBit(matrix)))
        }
        _ => {
            let matrix = FourBit::new(tensor, parts, maps)?;
            (matrix.shape(), matrix.encoding(), quantized(Kind::FourBit(matrix)))
        }
    };
    if shape.is_empty() || shape.contains(&0) {
        return Err(tensor.error(&format!("its shape {shape:?} is empty")));
    }
    Ok(TensorEntry { name, shape, encoding, source })
}

/// What goes with a weight.
fn required<'a>(weight: &RawTensor, parts: &Parts<'a>, part: &str) -> Result<&'a RawTensor, FolderError> {
    parts.get(part).copied().ok_or_else(|| weight.error(&format!("there is no {part} for it")))
}

// === impl Index ===

impl Index {
    /// The names of the weight files, ascending.
    fn files(&self) -> Result<Vec<String>, FolderError> {
        let files: BTreeSet<&String> = self.weight_map.values().collect();
        if files.len() > FILES_MAX {
            return Err(FolderError::TooManyFiles { found: files.len(), limit: FILES_MAX });
        }
        match files.iter().find(|name| !is_file_name(name)) {
            Some(name) => Err(FolderError::FileName { name: (*name).clone() }),
            None => Ok(files.into_iter().cloned().collect()),
        }
    }

    /// Sees to it that the tensors that the index lists are in `files`. Others may be there, too, and count: indices of
    /// merged or converted models lack some.
    fn check(&self, files: &[String], tensors: &[RawTensor]) -> Result<(), FolderError> {
        let found: BTreeMap<&str, &String> =
            tensors.iter().map(|tensor| (tensor.name.as_str(), &files[tensor.piece.file])).collect();
        match self.weight_map.iter().find(|(name, file)| found.get(name.as_str()) != Some(file)) {
            Some((name, file)) => Err(FolderError::Index { why: format!("tensor {name:?} is not in {file}") }),
            None => Ok(()),
        }
    }
}

// === impl Quantized ===

impl Quantized {
    /// The parts of files that it is made of.
    pub(crate) fn pieces(&self) -> Vec<&Piece> {
        match &self.kind {
            Kind::Grouped(matrix) => matrix.pieces().to_vec(),
            Kind::FourBit(matrix) => matrix.pieces(),
            Kind::EightBit(matrix) => matrix.pieces().to_vec(),
        }
    }

    /// Its values in its encoding, row after row.
    pub(crate) fn reblock(&self, maps: &[Mmap]) -> Result<Vec<u8>, String> {
        match &self.kind {
            Kind::Grouped(matrix) => matrix.reblock(maps),
            Kind::FourBit(matrix) => matrix.reblock(maps),
            Kind::EightBit(matrix) => matrix.reblock(maps),
        }
    }
}

// === impl RawTensor ===

impl RawTensor {
    fn error(&self, why: &str) -> FolderError {
        FolderError::Tensor { tensor: self.name.clone(), why: why.to_owned() }
    }

    /// The encoding of a tensor of floats.
    fn float(&self) -> Result<Encoding, FolderError> {
        match self.dtype {
            Dtype::F32 => Ok(Encoding::F32),
            Dtype::F16 => Ok(Encoding::F16),
            Dtype::BF16 => Ok(Encoding::BF16),
            Dtype::I32 | Dtype::I8 | Dtype::U8 => {
                Err(self.error("integers, and no tensors beside them that say what for"))
            }
        }
    }

    fn check_type(&self, wanted: &[Dtype]) -> Result<(), FolderError> {
        let why = || format!("its type is {:?}, expected one of {wanted:?}", self.dtype);
        if wanted.contains(&self.dtype) { Ok(()) } else { Err(self.error(&why())) }
    }

    fn check_shape(&self, wanted: &[usize]) -> Result<(), FolderError> {
        let why = || format!("its shape is {:?}, expected {wanted:?}", self.shape);
        if self.shape == wanted { Ok(()) } else { Err(self.error(&why())) }
    }

    /// Both dimensions, neither of them 0.
    fn matrix(&self) -> Result<[usize; 2], FolderError> {
        match *self.shape.as_slice() {
            [n_rows, n_cols] if n_rows > 0 && n_cols > 0 => Ok([n_rows, n_cols]),
            _ => Err(self.error(&format!("its shape {:?} is no matrix", self.shape))),
        }
    }
}

#[cfg(test)]
mod tests;
