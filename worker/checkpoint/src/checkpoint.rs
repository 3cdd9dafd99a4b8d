//! A checkpoint: one model file, mapped, validated and open for reading.

use std::fmt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::gguf;
use crate::metadata::Metadata;
use crate::mmap;
use crate::tensor::{Tensor, TensorEntry, TensorTable};

/// Bytes of the file that a digest keeps in memory at a time.
const DIGEST_PIECE_BYTES: usize = 16 << 20;

/// An opened model file. Cheap to open: the header is read, weights are paged in when their bytes are touched.
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    contents: Contents,
}

/// What a container holds, whichever its format.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) metadata: Metadata,
    pub(crate) tensors: TensorTable,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Maps the file at `path` and validates everything that it declares.
    ///
    /// # Errors
    /// If the file cannot be opened, is not a regular file, or is not a sound GGUF file of version 2 or 3.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let map = mmap::open(path)?;
        let contents = gguf::parse(&map).map_err(|cause| CheckpointError::Format { path: path.to_owned(), cause })?;
        Ok(Checkpoint { path: path.to_owned(), map, contents })
    }

    /// The model's settings and vocabulary.
    pub fn metadata(&self) -> &Metadata {
        &self.contents.metadata
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`CheckpointError::MissingTensor`] if there is none.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, CheckpointError> {
        self.find(name).ok_or_else(|| CheckpointError::MissingTensor { path: self.path.clone(), name: name.to_owned() })
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        self.contents.tensors.find(name).map(|entry| self.view(entry))
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.contents.tensors.entries().iter().map(|entry| self.view(entry))
    }

    /// Says that the tensor called `name` will hardly be read again: its pages no longer count as memory of this
    /// process. Reading it nevertheless pages them in once more.
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.contents.tensors.find(name) {
            mmap::release(&self.map, entry.range.clone());
        }
    }

    /// SHA-256 of the whole file. Reads all of it at each call: keep the result.
    pub fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for (piece_idx, piece) in self.map.chunks(DIGEST_PIECE_BYTES).enumerate() {
            digest.update(piece);
            let start = piece_idx * DIGEST_PIECE_BYTES;
            mmap::release(&self.map, start..start + piece.len());
        }
        digest.finalize().into()
    }

    /// The path that [`Checkpoint::open`] was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> Tensor<'a> {
        // In bounds: every container checks ranges against the file before it returns `Contents`.
        let bytes = &self.map[entry.range.clone()];
        Tensor { name: &entry.name, shape: &entry.shape, encoding: entry.encoding, bytes }
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).finish_non_exhaustive()
    }
}
