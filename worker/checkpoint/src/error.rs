//! What can be wrong with a model file or with a question asked of it.

use std::path::PathBuf;

use crate::encoding::Encoding;

/// Why a checkpoint could not be opened, or lacks what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused to open, stat or map the file.
    #[error("cannot open model file {}: {cause}", path.display())]
    Open {
        /// The file as it was named.
        path: PathBuf,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// A folder, pipe or device where a model file was expected.
    #[error("model file {} is not a regular file", path.display())]
    NotAFile {
        /// The path as it was named.
        path: PathBuf,
    },
    /// The file's content is not a model this crate can read.
    #[error("model file {}: {cause}", path.display())]
    Format {
        /// The file as it was named.
        path: PathBuf,
        /// What is wrong, and where in the file.
        cause: FormatError,
    },
    /// The folder is not a model this crate can read.
    #[error("model folder {}: {cause}", path.display())]
    Folder {
        /// The folder as it was named.
        path: PathBuf,
        /// What is wrong, and in which of its files.
        cause: Box<FolderError>,
    },
    /// The model is sound but has no tensor of this name.
    #[error("model {} has no tensor {name:?}", path.display())]
    MissingTensor {
        /// The file or folder as it was named.
        path: PathBuf,
        /// The tensor that was asked for, as such files call it.
        name: String,
    },
    /// The metadata has no such key.
    #[error("the model's metadata has no {key:?}")]
    MissingKey {
        /// The key that was asked for.
        key: String,
    },
    /// The metadata holds another type of value under this key.
    #[error("the model's metadata {key:?} is {found}, expected {expected}")]
    WrongType {
        /// The key that was asked for.
        key: String,
        /// The kind of value that was asked for.
        expected: &'static str,
        /// The kind of value that is there.
        found: String,
    },
}

/// What is wrong with a Hugging Face folder. Keys and tensors have the names that its files give them.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// One of the folder's files cannot be read.
    #[error("{file}: {cause}")]
    Read {
        /// The file's name.
        file: &'static str,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// A file that is to be read whole is no such small file as it should be.
    #[error("{file} is larger than {limit} bytes")]
    TooLarge {
        /// The file's name.
        file: &'static str,
        /// The largest size that is accepted. Unit: bytes.
        limit: u64,
    },
    /// A file is not the JSON that it should be.
    #[error("{file}: {cause}")]
    Json {
        /// The file's name.
        file: &'static str,
        /// What is wrong, and where.
        cause: serde_json::Error,
    },
    /// No weights that could be read.
    #[error("it has neither model.safetensors nor model.safetensors.index.json")]
    NoWeights,
    /// Weights as a pickle alone.
    #[error("its weights are a pickle ({file}), which may run code when it is read; convert them to safetensors")]
    Pickle {
        /// The file's name.
        file: &'static str,
    },
    /// The index names what may not be a weight file.
    #[error("model.safetensors.index.json: {name:?} is not the name of a file in the folder")]
    FileName {
        /// The name in the index.
        name: String,
    },
    /// The index names too many files.
    #[error("model.safetensors.index.json: {found} files, the limit is {limit}")]
    TooManyFiles {
        /// How many there are.
        found: usize,
        /// The largest number that is accepted.
        limit: usize,
    },
    /// The files of weights have absurdly many tensors.
    #[error("its weight files have {found} tensors or more, the limit is {limit}")]
    TooManyTensors {
        /// How many were found.
        found: usize,
        /// The largest number that is accepted.
        limit: usize,
    },
    /// The index and the weight files tell of different tensors.
    #[error("model.safetensors.index.json: {why}")]
    Index {
        /// Which tensor they differ about, and how.
        why: String,
    },
    /// A token with an absurd id.
    #[error("tokenizer.json: token id {id}, the limit is {limit}")]
    TokenId {
        /// The id in the file.
        id: u32,
        /// Ids must be below this.
        limit: u32,
    },
    /// A setting that is missing, of another type, or asks for what is not supported.
    #[error("config.json: {key}: {why}")]
    Setting {
        /// Its key; those of nested objects are joined by dots.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// A defect of a weight file's content.
    #[error("{file}: {cause}")]
    Weights {
        /// The file's name.
        file: String,
        /// What is wrong, and where in the file.
        cause: Box<FormatError>,
    },
    /// A tensor that is sound by itself, but not what its name or the settings promise.
    #[error("tensor {tensor:?}: {why}")]
    Tensor {
        /// Its name in the file.
        tensor: String,
        /// What is wrong with it.
        why: String,
    },
}

/// A defect of a file's content: what it is, in which part, at which byte.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {fault} (at byte {offset})")]
pub struct FormatError {
    /// The part of the file: `header`, `metadata key "x"`, `tensor "y"`.
    pub place: String,
    /// Offset into the file, in bytes, of the item at fault.
    pub offset: u64,
    /// What is wrong with it.
    pub fault: Fault,
}

/// The kinds of defect.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not a GGUF file at all.
    #[error("not a GGUF file, it starts with {found:02x?} instead of \"GGUF\"")]
    Magic {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// A GGUF version other than 2 and 3.
    #[error("GGUF version {found} is not supported, only 2 and 3 are")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// A GGUF file for big-endian machines.
    #[error("the file is big-endian, only little-endian GGUF is supported")]
    BigEndian,
    /// The file ends before what it announces.
    #[error("needs {needed} bytes but the file has only {available} left")]
    Truncated {
        /// Bytes that the item takes.
        needed: u64,
        /// Bytes from the item's start to the end of the file.
        available: u64,
    },
    /// A count or length beyond what any real file has.
    #[error("{what} is {found}, the limit is {limit}")]
    OverLimit {
        /// The quantity.
        what: &'static str,
        /// Its value in the file.
        found: u64,
        /// The largest value that is accepted.
        limit: u64,
    },
    /// A name or key of no bytes.
    #[error("the name is empty")]
    EmptyName,
    /// Two entries of one name.
    #[error("the name occurs twice")]
    DuplicateName,
    /// A key that only settings of other containers are given.
    #[error("keys that begin with {prefix:?} are not for GGUF files")]
    ReservedKey {
        /// What such keys begin with.
        prefix: &'static str,
    },
    /// A string that is not UTF-8.
    #[error("the text is not valid UTF-8")]
    Utf8,
    /// A boolean stored as neither 0 nor 1.
    #[error("a boolean is stored as {found}, expected 0 or 1")]
    Bool {
        /// The byte in the file.
        found: u8,
    },
    /// A metadata value type that the format does not define.
    #[error("unknown metadata value type {found}")]
    ValueType {
        /// The type number in the file.
        found: u32,
    },
    /// `general.alignment` is of no use as an alignment.
    #[error("the alignment must be a power of two from 8 to {limit}, found {found}")]
    Alignment {
        /// The value in the file.
        found: String,
        /// The largest alignment that is accepted.
        limit: u64,
    },
    /// A tensor type that this crate does not know or does not support.
    #[error("unsupported GGML type {found}{}", known_as(*found))]
    TensorType {
        /// The type number in the file.
        found: u32,
    },
    /// A tensor with no dimensions.
    #[error("the tensor has no dimensions")]
    NoDimensions,
    /// A dimension of zero.
    #[error("dimension {index} of the tensor is zero")]
    ZeroDimension {
        /// Which, in the file's order (innermost first).
        index: usize,
    },
    /// A row that is not a whole number of blocks.
    #[error("a row of {n_cols} values is not a whole number of {encoding} blocks of {}", encoding.block_len())]
    PartialBlock {
        /// Values in a row.
        n_cols: usize,
        /// The tensor's encoding.
        encoding: Encoding,
    },
    /// The tensor's size in bytes exceeds the address space.
    #[error("the size of shape {shape:?} overflows")]
    SizeOverflow {
        /// Dimensions in the file's order (in GGUF innermost first).
        shape: Vec<u64>,
    },
    /// A data offset off the file's alignment.
    #[error("the data offset {found} is not a multiple of the alignment {alignment}")]
    Misaligned {
        /// The offset in the file, from the start of the data section.
        found: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// The tensor's bytes do not lie within the file.
    #[error("data of {size} bytes at offset {data_offset} ends beyond the file's {file_size} bytes")]
    BeyondFile {
        /// Bytes of the tensor.
        size: u64,
        /// The offset in the file, from the start of the data section.
        data_offset: u64,
        /// Bytes of the file.
        file_size: u64,
    },
    /// A safetensors header that is not the JSON that it should be.
    #[error("the header is no list of tensors: {why}")]
    Header {
        /// What the parser says.
        why: String,
    },
    /// An element type that this crate does not know or does not support.
    #[error("unsupported dtype {found:?}")]
    Dtype {
        /// The type in the file.
        found: String,
    },
    /// A safetensors file gives a tensor another number of bytes than its shape and type take.
    #[error("data_offsets of {found} bytes for shape {shape:?} of {dtype}, which takes {expected}")]
    DataSize {
        /// Bytes in the file.
        found: u64,
        /// Outermost dimension first.
        shape: Vec<u64>,
        /// The type in the file.
        dtype: String,
        /// Bytes that shape and type call for.
        expected: u64,
    },
    /// The tensor shares bytes with another one.
    #[error("the data overlaps that of tensor {other:?}")]
    Overlap {
        /// The tensor that lies before this one.
        other: String,
    },
}

/// GGML's name of a type that is not supported, in brackets, so that the message says what the user has.
fn known_as(ggml_type: u32) -> &'static str {
    match ggml_type {
        4 => " (Q4_2, removed from GGML)",
        5 => " (Q4_3, removed from GGML)",
        9 => " (Q8_1)",
        15 => " (Q8_K)",
        16 => " (IQ2_XXS)",
        17 => " (IQ2_XS)",
        18 => " (IQ3_XXS)",
        19 => " (IQ1_S)",
        21 => " (IQ3_S)",
        22 => " (IQ2_S)",
        24 => " (I8)",
        25 => " (I16)",
        26 => " (I32)",
        27 => " (I64)",
        28 => " (F64)",
        29 => " (IQ1_M)",
        34 => " (TQ1_0)",
        35 => " (TQ2_0)",
        39 => " (MXFP4)",
        _ => "",
    }
}
