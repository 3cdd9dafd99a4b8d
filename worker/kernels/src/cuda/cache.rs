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
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use sha2::{Digest, Sha256};
use tracing::warn;

use super::{Architecture, CompilerVersion, CudaError, MachineCode, Program};

/// The first bytes of an entry; then come the code's length as 8 bytes, its SHA-256 and the code.
const MAGIC: &[u8; 16] = b"lockstep cubin 1";
const HEADER_LEN: usize = 16 + 8 + 32;

/// Larger entries are damaged: kernels of ours take some hundred KiB.
const MAX_ENTRY_BYTES: u64 = 16 << 20;

/// What a folder may take. All kernels for one architecture take a few MiB.
const MAX_FOLDER_BYTES: u64 = 256 << 20;

const EXTENSION: &str = "cubin";

/// A folder of machine code, or none: then every process compiles what it needs.
#[derive(Clone, Debug)]
pub struct KernelCache {
    folder: Option<PathBuf>,
    max_bytes: u64,
}

impl KernelCache {
    /// The cache in `folder`, which is made when something is stored. Its files are run as they are, so it must be a
    /// folder that only trusted users can write.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, max_bytes: MAX_FOLDER_BYTES }
    }

    /// The code of a program from the newest compiler of at most `max_major`, if there is an entry that is whole.
    pub(super) fn load(&self, program: &Program, architecture: Architecture, max_major: u32) -> Option<MachineCode> {
        self.entries(program, architecture, max_major).into_iter().find_map(|(compiler, path)| match read(&path) {
            Ok(cubin) => Some(MachineCode { cubin, compiler }),
            Err(why) => {
                warn!("kernel cache: {} is damaged and will be made anew: {why}", path.display());
                None
            }
        })
    }

    /// Whether [`KernelCache::load`] finds an entry, which may turn out to be damaged.
    pub(super) fn has(&self, program: &Program, architecture: Architecture, max_major: u32) -> bool {
        !self.entries(program, architecture, max_major).is_empty()
    }

    /// Stores code, and makes room for it.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn store(&self, program: &Program, architecture: Architecture, code: &MachineCode) -> Result<(), CudaError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let path = folder.join(format!("{}-nvrtc{}.{EXTENSION}", program.stem(architecture), code.compiler));
        write(folder, &path, &code.cubin)
            .and_then(|()| trim(folder, &path, self.max_bytes))
            .map_err(|error| CudaError::Cache { path: folder.clone(), error })
    }

    /// The files that may hold the code, newest compiler first.
    fn entries(
        &self,
        program: &Program,
        architecture: Architecture,
        max_major: u32,
    ) -> Vec<(CompilerVersion, PathBuf)> {
        let Some(folder) = &self.folder else { return Vec::new() };
        let stem = program.stem(architecture);
        let mut entries = Vec::new();
        // A folder that is not there has no entries.
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = file.file_name();
            let version = name.to_str().and_then(|name| version_in(name, &stem));
            entries.extend(version.filter(|version| version.major <= max_major).map(|version| (version, file.path())));
        }
        entries.sort_unstable_by(|a, b| b.cmp(a));
        entries
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Source;

    /// A cache in a folder of its own, with one program's code of these compilers.
    struct Case {
        folder: tempfile::TempDir,
        cache: KernelCache,
        program: Program,
        architecture: Architecture,
    }

    impl Case {
        fn new(majors: &[u32]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            // Stored into a folder that is not there yet.
            let cache = KernelCache::new(Some(folder.path().join("a/b")));
            let program = Program::new(Source::Probe, &[("FACTOR", 3)]);
            let case = Self { folder, cache, program, architecture: "sm_80".parse().unwrap() };
            majors.iter().for_each(|major| case.store(&case.program, &code(*major)));
            case
        }

        fn store(&self, program: &Program, code: &MachineCode) {
            self.cache.store(program, self.architecture, code).unwrap();
        }

        fn load(&self, max_major: u32) -> Option<MachineCode> {
            self.cache.load(&self.program, self.architecture, max_major)
        }

        fn files(&self) -> Vec<PathBuf> {
            let files = fs::read_dir(self.folder.path().join("a/b")).unwrap();
            let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
            files.sort();
            files
        }
    }

    /// Something to store, different for each compiler.
    fn code(major: u32) -> MachineCode {
        let cubin = (0..1000_u32).map(|i| (i * major % 251) as u8).collect();
        MachineCode { cubin, compiler: CompilerVersion { major, minor: 4 } }
    }

    #[test]
    fn what_was_stored_is_found_whoever_compiled_it() {
        let case = Case::new(&[12]);
        assert_eq!(case.load(12), Some(code(12)));
        assert_eq!(case.load(13), Some(code(12)));
        assert!(case.cache.has(&case.program, case.architecture, 13));
        assert_eq!(case.files().len(), 1, "nothing is left half written");
    }

    #[test]
    fn the_newest_code_that_the_driver_can_load_is_taken() {
        let case = Case::new(&[12, 13, 9]);
        assert_eq!(case.load(13), Some(code(13)));
        assert_eq!(case.load(12), Some(code(12)));
        assert_eq!(case.load(8), None);
    }

    #[test]
    fn another_program_or_architecture_is_not_found() {
        let case = Case::new(&[13]);
        let other = Program::new(Source::Probe, &[("FACTOR", 4)]);
        assert_eq!(case.cache.load(&other, case.architecture, 13), None);
        assert_eq!(case.cache.load(&case.program, "sm_89".parse().unwrap(), 13), None);
        assert!(!case.cache.has(&other, case.architecture, 13));
    }

    #[test]
    fn a_damaged_entry_is_absent_until_it_is_stored_anew() {
        let case = Case::new(&[13]);
        let path = &case.files()[0];
        let whole = fs::read(path).unwrap();
        let n = whole.len();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        let damaged = [
            Vec::new(),
            whole[..HEADER_LEN - 1].to_vec(),
            whole[..HEADER_LEN].to_vec(),
            whole[..n - 1].to_vec(),
            [whole.clone(), vec![0]].concat(),
            flipped(0),
            flipped(16),
            flipped(24),
            flipped(HEADER_LEN),
            flipped(n - 1),
            vec![0; MAX_ENTRY_BYTES as usize + 1],
        ];
        for bytes in damaged {
            fs::write(path, &bytes).unwrap();
            assert_eq!(case.load(13), None, "{} bytes", bytes.len());
            case.store(&case.program, &code(13));
            assert_eq!(case.load(13), Some(code(13)));
        }
    }

    #[test]
    fn behind_a_damaged_entry_an_older_one_is_found() {
        let case = Case::new(&[12, 13]);
        fs::write(&case.files()[1], "nothing").unwrap();
        assert_eq!(case.load(13), Some(code(12)));
    }

    #[test]
    fn a_folder_keeps_what_was_stored_last() {
        let mut case = Case::new(&[]);
        let entry_bytes = (HEADER_LEN + code(13).cubin.len()) as u64;
        case.cache.max_bytes = 2 * entry_bytes;
        let programs = [1, 2, 3].map(|factor| Program::new(Source::Probe, &[("FACTOR", factor)]));
        for (age, program) in programs.iter().enumerate() {
            case.store(program, &code(13));
            // Files written within one tick of the clock have no order.
            let modified = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(age as u64);
            for path in case.files() {
                if path.to_str().unwrap().contains(&program.stem(case.architecture)) {
                    fs::File::options().append(true).open(path).unwrap().set_modified(modified).unwrap();
                }
            }
        }
        let kept = programs.each_ref().map(|program| case.cache.has(program, case.architecture, 13));
        assert_eq!(kept, [false, true, true]);
        case.cache.max_bytes = 1;
        case.store(&case.program, &code(13));
        assert_eq!(case.files().len(), 1, "the entry that was just stored stays");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_that_names_it() {
        let case = Case::new(&[]);
        let file = case.folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = KernelCache::new(Some(file.join("cache")));
        let error = cache.store(&case.program, case.architecture, &code(13)).unwrap_err().to_string();
        assert!(error.contains("file/cache"), "{error}");
        assert_eq!(cache.load(&case.program, case.architecture, 13), None);
    }

    #[test]
    fn without_a_folder_nothing_is_kept() {
        let case = Case::new(&[]);
        let cache = KernelCache::new(None);
        cache.store(&case.program, case.architecture, &code(13)).unwrap();
        assert_eq!(cache.load(&case.program, case.architecture, 13), None);
    }
}
