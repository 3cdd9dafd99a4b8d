//! CUDA's libraries: whether they can be opened.
//!
//! cudarc opens a library when one of its functions is first called, and panics if there is none. So [`Library::find`]
//! comes before the first call, always.

use super::CudaError;

/// A library of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Library {
    /// The driver's.
    Driver,
    /// The compiler.
    Nvrtc,
    /// Products of dense matrices.
    CublasLt,
}

impl Library {
    /// The file names under which it is known on Linux, of those that cudarc tries.
    fn names(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so", "libcuda.so.1"],
            Self::Nvrtc => &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"],
            Self::CublasLt => &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"],
        }
    }

    fn purpose(self) -> &'static str {
        match self {
            Self::Driver => "NVIDIA's driver",
            Self::Nvrtc => "NVRTC, CUDA's run-time compiler",
            Self::CublasLt => "cuBLASLt, for products in dense bf16",
        }
    }

    /// Makes sure that the library's functions can be called.
    pub(super) fn find(self) -> Result<(), CudaError> {
        let found = match self {
            // SAFETY: opening a library runs its initializers; NVIDIA's may run at any time.
            Self::Driver => unsafe { cudarc::driver::sys::is_culib_present() },
            // SAFETY: as above.
            Self::Nvrtc => unsafe { cudarc::nvrtc::sys::is_culib_present() },
            // SAFETY: as above.
            Self::CublasLt => unsafe { cudarc::cublaslt::sys::is_culib_present() },
        };
        if found {
            return Ok(());
        }
        let searched = match std::env::var("LD_LIBRARY_PATH") {
            Ok(path) if !path.is_empty() => format!("LD_LIBRARY_PATH ({path}) and the loader's default folders"),
            _ => "the loader's default folders (LD_LIBRARY_PATH is not set)".into(),
        };
        Err(CudaError::MissingLibrary { names: self.names(), purpose: self.purpose(), searched })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_files_that_are_looked_for() {
        for (library, stem) in [(Library::Driver, "cuda"), (Library::Nvrtc, "nvrtc"), (Library::CublasLt, "cublasLt")] {
            let tried = cudarc::get_lib_name_candidates(stem);
            for name in library.names() {
                assert!(tried.iter().any(|candidate| candidate == name), "{name} is not looked for");
            }
        }
    }
}
