//! Kernel cache: machine code on disk, so that only the first start on a machine needs a compiler.
//!
//! An entry's file name says all that its code was made from: `PROGRAM-ARCHITECTURE-DIGEST-nvrtcMAJOR.MINOR.cubin`. A
//! reader cannot know the compiler's version, because a folder that was filled when a container image was built serves
//! machines without a compiler; so entries of several versions lie side by side, and the newest one that the driver can
//! load is taken.
//!
//! An entry is written beside its place and renamed, so processes may share a folder. One that is damaged counts as
//! absent and is written anew. The folder is bounded: the oldest entries make room.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::SystemTime,
};

use sha2::{Digest, Sha256};
use tracing::warn;

use super::{CompilerVersion, CudaError};

/// The first bytes of an entry; then come the code's length as 8 bytes, its SHA-256 and the code.
const MAGIC: &[u8; 16] = b"lockstep cubin 1";
const HEADER_LEN: usize = 16 + 8 + 32;

/// Larger entries are damaged: kernels of ours take some hundred KiB.
const MAX_ENTRY_BYTES: u64 = 16 << 20;

/// What a folder may take. All kernels for one architecture take a few MiB.
const MAX_FOLDER_BYTES: u64 = 256 << 20;

const EXTENSION: &str = "cubin";

/// A folder of machine code, or none: then every process compiles what it needs.
#[derive(Debug)]
pub struct KernelCache {
    folder: Option<PathBuf>,
    max_bytes: u64,
    /// Whether it was said that the folder cannot be written.
    complained: AtomicBool,
}

/// Machine code that was found, and what compiled it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) cubin: Vec<u8>,
    pub(super) compiler: CompilerVersion,
}

impl KernelCache {
    /// The cache in `folder`, which is made when something is stored. Its files are run as they are, so it must be a
    /// folder that only trusted users can write.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, max_bytes: MAX_FOLDER_BYTES, complained: AtomicBool::new(false) }
    }

    /// Where the code lies.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The code of `stem`, from the newest compiler of at most `max_major`, if there is an entry that is whole.
    pub(super) fn load(&self, stem: &str, max_major: u32) -> Option<Entry> {
        let folder = self.folder.as_ref()?;
        let mut found: Vec<(CompilerVersion, PathBuf)> = Vec::new();
        // A folder that is not there has no entries.
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = file.file_name();
            let version = name.to_str().and_then(|name| version_in(name, stem));
            found.extend(version.filter(|version| version.major <= max_major).map(|version| (version, file.path())));
        }
        found.sort_unstable();
        found.into_iter().rev().find_map(|(compiler, path)| match read(&path) {
            Ok(cubin) => Some(Entry { cubin, compiler }),
            Err(why) => {
                warn!("kernel cache: {} is damaged and will be made anew: {why}", path.display());
                None
            }
        })
    }

    /// Stores code, and makes room for it. A folder that cannot be written costs each start the time to compile, so it
    /// is a warning, once.
    pub(super) fn store(&self, stem: &str, entry: &Entry) {
        let Some(folder) = &self.folder else { return };
        let path = folder.join(format!("{stem}-nvrtc{}.{EXTENSION}", entry.compiler));
        let stored = write(folder, &path, &entry.cubin).and_then(|()| trim(folder, &path, self.max_bytes));
        if let Err(error) = stored
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            let error = CudaError::Cache { path: folder.clone(), error };
            warn!("{error}: kernels are compiled at each start (engine.kernel_cache names another folder)");
        }
    }
}

/// The compiler's version in the name of an entry of `stem`.
fn version_in(name: &str, stem: &str) -> Option<CompilerVersion> {
    let version = name.strip_prefix(stem)?.strip_prefix("-nvrtc")?.strip_suffix(EXTENSION)?.strip_suffix('.')?;
    let (major, minor) = version.split_once('.')?;
    Some(CompilerVersion { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The code of an entry, or what is wrong with it.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MAX_ENTRY_BYTES {
        return Err(format!("it has {size} bytes, over {MAX_ENTRY_BYTES}"));
    }
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let Some((header, cubin)) = bytes.split_at_checked(HEADER_LEN) else { return Err("it is too short".into()) };
    if header == self::header(cubin) {
        Ok(cubin.to_vec())
    } else if header.starts_with(MAGIC) {
        Err("its bytes are not those that were written".into())
    } else {
        Err("it does not begin as an entry does".into())
    }
}

fn header(cubin: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..16].copy_from_slice(MAGIC);
    header[16..24].copy_from_slice(&(cubin.len() as u64).to_le_bytes());
    header[24..].copy_from_slice(&Sha256::digest(cubin));
    header
}

fn write(folder: &Path, path: &Path, cubin: &[u8]) -> io::Result<()> {
    /// Makes the names of files that are being written differ within this process.
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let partial = path.with_extension(format!("{}-{count}.partial", std::process::id()));
    let bytes = [header(cubin).as_slice(), cubin].concat();
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// Deletes the oldest files until all fit, but never `newest`. What a killed process left half written goes this way,
/// too.
fn trim(folder: &Path, newest: &Path, max_bytes: u64) -> io::Result<()> {
    let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        let ours = path.extension().is_some_and(|extension| extension == EXTENSION || extension == "partial");
        // Another process may be trimming.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if ours && metadata.is_file() {
            files.push((metadata.modified()?, metadata.len(), path));
        }
    }
    files.sort_unstable();
    let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in files {
        if total <= max_bytes {
            break;
        }
        if path != newest {
            // As above.
            let _ = fs::remove_file(&path);
            total -= size;
        }
    }
    Ok(())
}
