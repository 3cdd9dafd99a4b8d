//! An emulator of CUDA: libraries of the names and symbols of NVIDIA's, which run our own kernels on the CPU.
//!
//! The code that drives GPUs opens `libcuda` and `libnvrtc` at run time. Tests give it these libraries instead, so that
//! the very host code and kernel sources run on machines without a GPU:
//!
//! - `libnvrtc` compiles CUDA C++ with g++ into a shared object (`cpp/nvrtc.cpp`; the twin of the kernels' prelude is
//!   `cpp/device.cuh`);
//! - `libcuda` loads it (`cpp/module.cpp`), and runs each thread of a block as a fibre (`cpp/block.cpp`);
//! - `libcublasLt` multiplies dense matrices (`cpp/cublaslt.cpp`);
//! - `libnccl` connects ranks, threads or processes of one machine (`cpp/nccl.cpp`, where its settings are, too).
//!
//! It is made to show faults, not to forgive them: blocks, warps and lanes run in an order that a seed decides
//! (`LOCKSTEP_EMULATOR_SEED`); memory holds NaNs until it is written; what threads wait for in vain, memory that nobody
//! allocated and barriers that some threads never reach end the process with a message. `cpp/environment.h` lists the
//! settings. What it does not emulate: time, the order of a tensor core's sums, blocks that wait for one another.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Why the emulator cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// Kernels are compiled for AVX2, FMA and F16C.
    #[error("the CUDA emulator needs a CPU with AVX2, FMA and F16C")]
    Processor,
    /// The compiler could not be started.
    #[error("the CUDA emulator is built with g++ (or what CXX names): {compiler}: {source}")]
    NoCompiler {
        /// What was to be run.
        compiler: String,
        /// Why it could not.
        source: io::Error,
    },
    /// The compiler rejects our sources: it is older than g++ 12, most likely.
    #[error("{compiler} cannot build the CUDA emulator (g++ 12 or newer is needed):\n{messages}")]
    Compiler {
        /// What was run.
        compiler: String,
        /// What it said.
        messages: String,
    },
    /// A file could not be written or moved.
    #[error("{path}: {source}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A library was built, and does not load.
    #[error("the CUDA emulator does not load: {0}")]
    Load(#[from] libloading::Error),
}

/// A library: `name` is its SONAME, by which programs find it once it is loaded. `link_name` is the name without a
/// version, which cudarc asks for first: a library without code that needs the other. (A symbolic link would do for
/// `LD_LIBRARY_PATH`, yet not for [`load_into_this_process`], where the names of loaded libraries count.)
struct LibrarySources {
    name: &'static str,
    link_name: &'static str,
    sources: &'static [&'static str],
}

const LIBRARIES: &[LibrarySources] = &[
    LibrarySources {
        name: "libcuda.so.1",
        link_name: "libcuda.so",
        sources: &[
            "block.cpp",
            "driver.cpp",
            "environment.cpp",
            "fault.cpp",
            "launch.cpp",
            "memory.cpp",
            "module.cpp",
            "multiply.cpp",
            "stream.cpp",
        ],
    },
    LibrarySources { name: "libnvrtc.so.13", link_name: "libnvrtc.so", sources: &["nvrtc.cpp"] },
    LibrarySources { name: "libcublasLt.so.13", link_name: "libcublasLt.so", sources: &["cublaslt.cpp"] },
    LibrarySources { name: "libnccl.so.2", link_name: "libnccl.so", sources: &["nccl.cpp"] },
];

macro_rules! files {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../cpp/", $name)))),*] };
}

/// All of `cpp/`. The headers stay beside the libraries: kernels are compiled with them.
const FILES: &[(&str, &str)] = files![
    "api.h",
    "block.cpp",
    "block.h",
    "cublaslt.cpp",
    "device.cuh",
    "driver.cpp",
    "environment.cpp",
    "environment.h",
    "fault.cpp",
    "fault.h",
    "launch.cpp",
    "launch.h",
    "libcuda.h",
    "machine.h",
    "memory.cpp",
    "memory.h",
    "module.cpp",
    "module.h",
    "nccl.cpp",
    "multiply.cpp",
    "multiply.h",
    "nvrtc.cpp",
    "random.h",
    "stream.cpp",
    "stream.h",
];

const FLAGS: &[&str] =
    &["-std=c++17", "-O2", "-march=x86-64-v3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"];

/// Builds the libraries unless they have been built, and returns their folder: for the `LD_LIBRARY_PATH` of a child
/// process. Any number of threads and processes may call this at once.
///
/// # Errors
///
/// See [`EmulatorError`].
pub fn build() -> Result<PathBuf, EmulatorError> {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        return Err(EmulatorError::Processor);
    }
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one_thread = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let version = version();
    let home = target_folder().join("emulator");
    let folder = home.join(&version);
    if folder.exists() {
        return Ok(folder);
    }
    // Whoever comes first puts a whole folder in place; the others' go away.
    let draft = home.join(format!("{version}.{}", std::process::id()));
    build_in(&draft, &version)?;
    match std::fs::rename(&draft, &folder) {
        Err(_) if folder.exists() => at(&draft, std::fs::remove_dir_all(&draft))?,
        moved => at(&folder, moved)?,
    }
    Ok(folder)
}

/// Builds the libraries if need be, and loads them into this process, for good: whoever opens `libcuda.so.1` or
/// `libnvrtc.so.13` by name from now on gets these, whatever the system has.
///
/// # Errors
///
/// See [`EmulatorError`].
pub fn load_into_this_process() -> Result<(), EmulatorError> {
    static LOADED: OnceLock<()> = OnceLock::new();
    if LOADED.get().is_some() {
        return Ok(());
    }
    let folder = build()?;
    for library in LIBRARIES {
        for name in [library.name, library.link_name] {
            // SAFETY: our libraries' initializers touch nothing but their own variables.
            let loaded = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) }?;
            std::mem::forget(loaded);
        }
    }
    LOADED.get_or_init(|| ());
    Ok(())
}

/// How many launches of this process, which has [loaded](load_into_this_process) the emulator, were allowed to start before
/// the kernel ahead of them had ended (`CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`).
///
/// # Errors
///
/// The emulator is not loaded.
pub fn overlapping_launches() -> Result<u64, EmulatorError> {
    // SAFETY: as in `load_into_this_process`.
    let driver = unsafe { Library::open(Some("libcuda.so.1"), RTLD_NOW) }?;
    // SAFETY: `cpp/driver.cpp` has this function.
    let count = unsafe { driver.get::<unsafe extern "C" fn() -> u64>("emulator_overlapping_launches") }?;
    // SAFETY: it reads a number.
    Ok(unsafe { count() })
}

/// Changes with whatever the libraries are built from.
fn version() -> String {
    let mut hasher = DefaultHasher::new();
    (FILES, FLAGS, compiler()).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned())
}

/// Cargo marks its target folder as a cache.
fn target_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let marked = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    marked.map_or_else(|| std::env::temp_dir().join("lockstep"), Path::to_owned)
}

fn build_in(folder: &Path, version: &str) -> Result<(), EmulatorError> {
    at(folder, std::fs::create_dir_all(folder))?;
    for (name, text) in FILES {
        let path = folder.join(name);
        at(&path, std::fs::write(&path, text))?;
    }
    for library in LIBRARIES {
        let define = format!("-DEMULATOR_VERSION=\"{version}\"");
        let soname = format!("-Wl,-soname,{}", library.name);
        let arguments = [define.as_str(), &soname, "-o", library.name];
        run_compiler(folder, [FLAGS, &arguments, library.sources].concat())?;
        let soname = format!("-Wl,-soname,{}", library.link_name);
        let needed = format!("-l:{}", library.name);
        run_compiler(folder, vec!["-shared", &soname, "-o", library.link_name, "-L.", "-Wl,--no-as-needed", &needed])?;
    }
    Ok(())
}

fn run_compiler(folder: &Path, arguments: Vec<&str>) -> Result<(), EmulatorError> {
    let compiler = compiler();
    let output = Command::new(&compiler).current_dir(folder).args(arguments).output();
    let output = output.map_err(|source| EmulatorError::NoCompiler { compiler: compiler.clone(), source })?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(EmulatorError::Compiler { compiler, messages });
    }
    Ok(())
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, EmulatorError> {
    result.map_err(|source| EmulatorError::File { path: path.to_owned(), source })
}
