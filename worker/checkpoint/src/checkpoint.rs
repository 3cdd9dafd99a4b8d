//! A checkpoint: one model on disk, its files mapped, validated and open for reading.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::metadata::Metadata;
use crate::mmap;
use crate::special_tokens::{self, SpecialTokens};
use crate::tensor::{Tensor, TensorEntry, TensorTable};
use crate::vocabulary::{self, Vocabulary};
use crate::{folder, gguf};

/// Bytes of a file that a digest keeps in memory at a time.
const DIGEST_PIECE_BYTES: usize = 16 << 20;

/// An opened model. Weights are paged in when their bytes are touched. Opening reads headers, and of a folder what
/// decides how its weights are to be read: settings, and the zero points, groups and biases of quantized ones. (If it has
/// a copy of a tied embedding, opening compares the two.)
pub struct Checkpoint {
    path: PathBuf,
    container: Container,
    /// What a digest begins with: of a model of several files, what tells them apart.
    preamble: Vec<u8>,
    maps: Vec<Mmap>,
    contents: Contents,
}

/// What a container holds, whichever its format, by the names that GGUF files use.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: TensorTable,
}

/// Where a model lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    /// In one GGUF file.
    Gguf,
    /// In a Hugging Face folder.
    Folder,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Maps the GGUF file, or the weights of the Hugging Face folder, at `path` and validates everything that it
    /// declares.
    ///
    /// # Errors
    /// If a file cannot be opened or is not a regular one, or if the model is neither a sound GGUF file of version 2 or 3
    /// nor a sound folder of a Llama.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        if path.is_dir() {
            let folder::Folder { preamble, maps, contents } = folder::open(path)?;
            return Ok(Checkpoint { path: path.to_owned(), container: Container::Folder, preamble, maps, contents });
        }
        let map = mmap::open(path)?;
        let contents = gguf::parse(&map).map_err(|cause| CheckpointError::Format { path: path.to_owned(), cause })?;
        let (container, maps) = (Container::Gguf, vec![map]);
        Ok(Checkpoint { path: path.to_owned(), container, preamble: Vec::new(), maps, contents })
    }

    /// The model's settings (of a GGUF file its vocabulary, too), under the keys that GGUF files use.
    pub fn metadata(&self) -> &Metadata {
        &self.contents.metadata
    }

    /// What the model's own files call the setting `key`; for messages.
    pub fn own_key<'a>(&self, key: &'a str) -> &'a str {
        match self.container {
            Container::Gguf => key,
            Container::Folder => folder::own_key(key),
        }
    }

    /// What the model's own files call its settings; for messages.
    pub fn own_settings(&self) -> &'static str {
        match self.container {
            Container::Gguf => "the model's metadata",
            Container::Folder => folder::CONFIG,
        }
    }

    /// What the model's own files call the tensor `name`; for messages.
    pub fn own_name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        match self.container {
            Container::Gguf => Cow::Borrowed(name),
            Container::Folder => folder::own_name(name),
        }
    }

    /// The vocabulary. A folder's is read at each call.
    ///
    /// # Errors
    /// A vocabulary that is malformed.
    pub fn vocabulary(&self) -> Result<Vocabulary, CheckpointError> {
        match self.container {
            Container::Gguf => vocabulary::of_gguf(self.metadata()),
            Container::Folder => folder::vocabulary(&self.path),
        }
    }

    /// The special tokens of the model, of which `vocabulary` is the vocabulary. A folder's are read at each call.
    ///
    /// # Errors
    /// Settings that are malformed.
    pub fn special_tokens(&self, vocabulary: &Vocabulary) -> Result<SpecialTokens, CheckpointError> {
        let named = match self.container {
            Container::Gguf => special_tokens::of_gguf(self.metadata())?,
            Container::Folder => folder::special_tokens(&self.path, vocabulary)?,
        };
        Ok(SpecialTokens::new(named, vocabulary))
    }

    /// The folder that the model lies in; none if it is a file.
    pub fn folder(&self) -> Option<&Path> {
        (self.container == Container::Folder).then_some(self.path.as_path())
    }

    /// The tensor called `name`, a name as GGUF files have it.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`] if there is none.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { path: self.path.clone(), name: self.own_name(name).into() };
        self.find(name).ok_or_else(missing)
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        self.contents.tensors.find(name).map(|entry| self.view(entry))
    }

    /// All tensors: of a file in its order, of a folder by name.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.contents.tensors.entries().iter().map(|entry| self.view(entry))
    }

    /// Says that the tensor called `name` will hardly be read again: its pages no longer count as memory of this
    /// process. Reading it nevertheless pages them in once more.
    pub fn release(&self, name: &str) {
        let pieces = self.contents.tensors.find(name).into_iter().flat_map(TensorEntry::pieces);
        pieces.for_each(|piece| mmap::release(&self.maps[piece.file], piece.range.clone()));
    }

    /// SHA-256 of the whole file, or of a folder's settings and weights (their names, sizes and bytes, in the order of
    /// names). Reads all of it at each call: keep the result.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest.update(&self.preamble);
        for map in &self.maps {
            for (piece_idx, piece) in map.chunks(DIGEST_PIECE_BYTES).enumerate() {
                digest.update(piece);
                let start = piece_idx * DIGEST_PIECE_BYTES;
                mmap::release(map, start..start + piece.len());
            }
        }
        digest.finalize().into()
    }

    /// The path that [`Checkpoint::open`] was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> Tensor<'a> {
        Tensor::new(entry, &self.maps, &self.path)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).finish_non_exhaustive()
    }
}
