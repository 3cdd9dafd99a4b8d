//! Compiler: NVRTC, which turns a program into machine code for one architecture. Needs no GPU.

use std::{
    ffi::{CString, c_char},
    fmt, ptr,
};

use cudarc::nvrtc::{
    result::{self, NvrtcError},
    sys::{self, nvrtcProgram},
};

use super::{Architecture, CudaError, Program, library::Library, program::HEADERS};

/// Has the assembler say what each entry point takes. It changes nothing else, so no digest contains it.
const VERBOSE: &str = "--ptxas-options=-v";

/// A version of NVRTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CompilerVersion {
    /// The CUDA version that it belongs to.
    pub major: u32,
    /// Its second number.
    pub minor: u32,
}

/// Machine code of a program for one architecture.
#[derive(Clone, PartialEq, Eq)]
pub struct MachineCode {
    /// An ELF file.
    pub cubin: Vec<u8>,
    /// What compiled it.
    pub compiler: CompilerVersion,
}

/// A program that was compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// The result.
    pub code: MachineCode,
    /// What the compiler and the assembler said; see [`Resources`](super::Resources).
    pub log: String,
}

/// Which compiler there is.
///
/// # Errors
/// There is none.
pub fn compiler_version() -> Result<CompilerVersion, CudaError> {
    Library::Nvrtc.find()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both point to integers that are written.
    let result = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    result.result().map_err(CudaError::compiler("nvrtcVersion"))?;
    Ok(CompilerVersion { major: major.unsigned_abs(), minor: minor.unsigned_abs() })
}

/// Compiles a program.
///
/// # Errors
/// No compiler, or an error in the source: then the compiler's log is in it.
pub fn compile(program: &Program, architecture: Architecture) -> Result<Compiled, CudaError> {
    let compiler = compiler_version()?;
    let handle = Handle::new(program)?;
    let mut options = program.options(architecture);
    options.push(VERBOSE.into());
    // SAFETY: the program was created above and is alive.
    let compiled = unsafe { result::compile_program(handle.program, &options) };
    let log = handle.log()?;
    match compiled {
        Ok(()) => Ok(Compiled { code: MachineCode { cubin: handle.cubin()?, compiler }, log }),
        // An architecture that this compiler does not know is an option that is wrong.
        Err(NvrtcError(sys::nvrtcResult::NVRTC_ERROR_COMPILATION | sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION)) => {
            Err(CudaError::Compile { program: program.clone(), architecture, log })
        }
        Err(error) => Err(CudaError::Compiler { op: "nvrtcCompileProgram", error }),
    }
}

/// A program in the compiler's hands, and the strings that it may refer to.
struct Handle {
    program: nvrtcProgram,
    _strings: Vec<CString>,
}

impl Handle {
    fn new(program: &Program) -> Result<Self, CudaError> {
        let name = format!("{}.cu", program.source.name());
        let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
        let strings: Vec<CString> = [program.source.text(), &name]
            .into_iter()
            .chain(headers)
            .map(|text| CString::new(text).expect("sources are our own and have no NUL"))
            .collect();
        let pointers =
            |first: usize| strings.iter().skip(first).step_by(2).map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (header_names, headers) = (pointers(2), pointers(3));
        let mut handle = ptr::null_mut();
        // SAFETY: all strings end in NUL and live as long as the program; there is a name for each header.
        let result = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut handle,
                strings[0].as_ptr(),
                strings[1].as_ptr(),
                HEADERS.len() as i32,
                headers.as_ptr(),
                header_names.as_ptr(),
            )
        };
        result.result().map_err(CudaError::compiler("nvrtcCreateProgram"))?;
        Ok(Self { program: handle, _strings: strings })
    }

    fn log(&self) -> Result<String, CudaError> {
        // SAFETY: the program is alive.
        let log =
            unsafe { result::get_program_log(self.program) }.map_err(CudaError::compiler("nvrtcGetProgramLog"))?;
        let bytes: Vec<u8> = log.into_iter().map(|byte| byte as u8).take_while(|byte| *byte != 0).collect();
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, CudaError> {
        let mut size = 0;
        // SAFETY: the program is alive, and `size` is written.
        let result = unsafe { sys::nvrtcGetCUBINSize(self.program, &raw mut size) };
        result.result().map_err(CudaError::compiler("nvrtcGetCUBINSize"))?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the program is alive, and there is room for the bytes that it said it has.
        let result = unsafe { sys::nvrtcGetCUBIN(self.program, cubin.as_mut_ptr().cast::<c_char>()) };
        result.result().map_err(CudaError::compiler("nvrtcGetCUBIN"))?;
        Ok(cubin)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the program is alive, and nobody uses it any more. An error would mean that it is gone already.
        let _ = unsafe { result::destroy_program(self.program) };
    }
}

impl fmt::Display for CompilerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl fmt::Debug for MachineCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MachineCode({} bytes by NVRTC {})", self.cubin.len(), self.compiler)
    }
}
