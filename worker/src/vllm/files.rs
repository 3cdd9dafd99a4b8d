//! What the model's own files say, beyond what the engine needs: read when it is first asked for, and kept.

use std::{
    io::{Cursor, Write as _},
    path::Path,
    sync::Arc,
};

use lockstep_checkpoint::{Checkpoint, CheckpointError, SpecialTokens, TokenBytes};
use lockstep_proto::smg::grpc::common::GetTokenizerChunk;
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;
use tonic::Status;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::status;

/// The files of a folder from which a router makes tokens and prompts. Others are weights, or not for models of text.
const NAMES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
];

/// Largest archive. `tokenizer.json` has up to 33 MB. Unit: bytes.
const ARCHIVE_BYTES_MAX: u64 = 256 << 20;

/// Bytes in a chunk of it, as the interface's own servers have it.
const CHUNK_BYTES: usize = 64 << 10;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Files {
    checkpoint: Arc<Checkpoint>,
    facts: OnceCell<Arc<Facts>>,
    archive: OnceCell<Arc<Archive>>,
}

/// What the files say of tokens.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) special: SpecialTokens,
    /// None if the files do not say; none of a control token.
    pub(super) token_bytes: Option<TokenBytes>,
}

/// A zip archive.
#[derive(Debug)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    /// In hexadecimal.
    sha256: String,
}

// === impl Files ===

impl Files {
    pub(super) fn new(checkpoint: Arc<Checkpoint>) -> Self {
        Self { checkpoint, facts: OnceCell::new(), archive: OnceCell::new() }
    }

    /// The model's folder; none if it is a file.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.checkpoint.folder()
    }

    /// What the files say of tokens.
    ///
    /// # Errors
    /// Files that are malformed.
    pub(super) async fn facts(&self) -> Result<&Arc<Facts>, Status> {
        let read = || async {
            let checkpoint = Arc::clone(&self.checkpoint);
            let facts = blocking(move || Facts::read(&checkpoint)).await?;
            facts.map(Arc::new).map_err(|error| status::unimplemented(&error.to_string()))
        };
        self.facts.get_or_try_init(read).await
    }

    /// The files that a tokenizer is made of.
    ///
    /// # Errors
    /// A model that has none, or files that cannot be read.
    pub(super) async fn archive(&self) -> Result<Arc<Archive>, Status> {
        let write = || async {
            let none = "GetTokenizer: a GGUF file has no tokenizer that a router could read; give the router its own";
            let folder = self.folder().ok_or_else(|| status::unimplemented(none))?.to_owned();
            let archive = blocking(move || Archive::of(&folder)).await?;
            archive.map(Arc::new).map_err(|error| status::unimplemented(&format!("GetTokenizer: {error}")))
        };
        self.archive.get_or_try_init(write).await.cloned()
    }
}

/// Runs what takes a while beside the async runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| status::internal(&format!("the model's files could not be read: {error}")))
}

// === impl Facts ===

impl Facts {
    fn read(checkpoint: &Checkpoint) -> Result<Self, CheckpointError> {
        let vocabulary = checkpoint.vocabulary()?;
        let special = checkpoint.special_tokens(&vocabulary)?;
        let texts = vocabulary.tokens.iter().map(|token| if token.is_reserved { "" } else { token.text.as_str() });
        let spelling = vocabulary.spelling.as_ref().ok().filter(|_| !vocabulary.tokens.is_empty());
        let token_bytes = spelling.map(|spelling| TokenBytes::new(spelling, texts));
        Ok(Self { special, token_bytes })
    }
}

// === impl Archive ===

impl Archive {
    fn of(folder: &Path) -> zip::result::ZipResult<Self> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let mut n_left = ARCHIVE_BYTES_MAX;
        for name in NAMES {
            let path = folder.join(name);
            let Ok(metadata) = std::fs::metadata(&path) else { continue };
            // Asked before opening: opening a pipe would wait for a writer.
            if !metadata.is_file() {
                continue;
            }
            n_left = n_left
                .checked_sub(metadata.len())
                .ok_or_else(|| std::io::Error::other(format!("files of more than {ARCHIVE_BYTES_MAX} bytes")))?;
            zip.start_file(name, options)?;
            zip.write_all(&std::fs::read(&path)?)?;
        }
        let bytes = zip.finish()?.into_inner();
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { bytes, sha256 })
    }

    /// The archive, piece by piece.
    pub(super) fn chunks(self: Arc<Self>) -> impl Iterator<Item = GetTokenizerChunk> {
        let n_bytes = self.bytes.len();
        (0..n_bytes).step_by(CHUNK_BYTES).map(move |start| {
            let end = n_bytes.min(start + CHUNK_BYTES);
            let sha256 = if end == n_bytes { self.sha256.clone() } else { String::new() };
            GetTokenizerChunk { data: self.bytes[start..end].to_vec(), sha256 }
        })
    }
}
