//! The NCCL library: opened at run time, so that a machine without it builds, tests and serves all the same.
//!
//! Bindings of our own, to the few functions in use: cudarc's look for `libnccl.so` but not for `libnccl.so.2`, the name
//! that comes without development files; they panic where it is missing; and they take a result for an `enum`, which
//! makes the codes of a newer NCCL (2.30 added one) undefined behaviour. Types and constants are those of `nccl.h` 2.30.7.

use std::{
    error::Error,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    fmt, ptr,
    sync::OnceLock,
};

use libloading::os::unix::{Library as Dynamic, RTLD_LOCAL, RTLD_NOW};

/// What NCCL is looked for under, in this order. The loader looks where `LD_LIBRARY_PATH` says, and in its own places.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Bytes of a unique id.
pub(super) const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawId(pub(super) [u8; ID_BYTES]);

/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;

/// `ncclResult_t`: 0 is success.
pub(super) type ResultCode = c_int;
pub(super) const SUCCESS: ResultCode = 0;
pub(super) const IN_PROGRESS: ResultCode = 7;

/// `ncclDataType_t`.
pub(super) const UINT32: c_int = 3;
pub(super) const FLOAT32: c_int = 7;

/// `ncclRedOp_t`.
pub(super) const SUM: c_int = 0;

/// `ncclConfig_t` as of 2.17; newer versions take the fields that it lacks for undefined.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const CONFIG_VERSION: c_uint = 21_700;
const UNDEFINED: c_int = c_int::MIN;

/// NCCL, opened. It stays so until the process ends.
pub(super) struct Library {
    version: Version,
    functions: Functions,
    _library: Dynamic,
}

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2, so far.
    pub major: u32,
    /// Its minor version.
    pub minor: u32,
    /// Its patch.
    pub patch: u32,
}

/// Declares [`Functions`], each field of which is the function of that name.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions in use, as `nccl.h` declares them.
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn find(library: &Dynamic) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the symbol, if it is there, is the function that `nccl.h` declares under this name.
                        let symbol = unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol) }?;
                        *symbol
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion\0": fn(*mut c_int) -> ResultCode;
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut RawId) -> ResultCode;
    get_error_string = b"ncclGetErrorString\0": fn(ResultCode) -> *const c_char;
    get_last_error = b"ncclGetLastError\0": fn(RawComm) -> *const c_char;
    comm_init_rank_config = b"ncclCommInitRankConfig\0": fn(*mut RawComm, c_int, RawId, c_int, *mut c_void) -> ResultCode;
    comm_get_async_error = b"ncclCommGetAsyncError\0": fn(RawComm, *mut ResultCode) -> ResultCode;
    comm_finalize = b"ncclCommFinalize\0": fn(RawComm) -> ResultCode;
    comm_destroy = b"ncclCommDestroy\0": fn(RawComm) -> ResultCode;
    comm_abort = b"ncclCommAbort\0": fn(RawComm) -> ResultCode;
    group_start = b"ncclGroupStart\0": fn() -> ResultCode;
    group_end = b"ncclGroupEnd\0": fn() -> ResultCode;
    all_gather = b"ncclAllGather\0": fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> ResultCode;
    all_reduce = b"ncclAllReduce\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> ResultCode;
    broadcast = b"ncclBroadcast\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> ResultCode;
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, RawComm, *mut c_void) -> ResultCode;
    recv = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> ResultCode;
}

// === impl Library ===

impl Library {
    /// The library, opened at the first call.
    ///
    /// # Errors
    ///
    /// In one line: what was tried, and why it failed.
    pub(super) fn get() -> Result<&'static Self, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(|| Self::open(&NAMES)).as_ref().map_err(Clone::clone)
    }

    fn open(names: &[&str]) -> Result<Self, String> {
        let mut tried = Vec::new();
        for name in names {
            // SAFETY: to load NCCL runs its initializers, which ask nothing of their caller.
            match unsafe { Dynamic::open(Some(*name), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => return Self::of(library).map_err(|error| format!("{name} cannot be used: {error}")),
                Err(error) => tried.push(why(&error)),
            }
        }
        Err(format!("cannot open NCCL, in LD_LIBRARY_PATH or the system's folders: {}", tried.join("; ")))
    }

    fn of(library: Dynamic) -> Result<Self, String> {
        let functions = Functions::find(&library).map_err(|error| why(&error))?;
        let mut version = 0;
        // SAFETY: it writes the one integer.
        match unsafe { (functions.get_version)(&raw mut version) } {
            SUCCESS => Ok(Self { version: Version::of_code(version), functions, _library: library }),
            code => Err(format!("ncclGetVersion returned {code}")),
        }
    }

    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// A new unique id. NCCL begins to listen, in this process, for those who come with it.
    pub(super) fn unique_id(&self) -> Result<RawId, String> {
        let mut id = RawId([0; ID_BYTES]);
        // SAFETY: it writes the id's bytes.
        let code = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.check(code).map(|()| id)
    }

    /// Begins to bring `rank` together with the others who have `id`; NCCL goes on with it in a thread of its own. The
    /// communicator is there even on an error.
    ///
    /// # Safety
    ///
    /// The device's context is current.
    pub(super) unsafe fn init(&self, id: RawId, rank: c_int, world_size: c_int) -> (RawComm, ResultCode) {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        };
        let mut comm = ptr::null_mut();
        let config = (&raw mut config).cast();
        // SAFETY: the configuration says how long it is and is copied during the call, which writes the communicator.
        let code = unsafe { (self.functions.comm_init_rank_config)(&raw mut comm, world_size, id, rank, config) };
        (comm, code)
    }

    /// What has become of what the communicator does: [`SUCCESS`], [`IN_PROGRESS`] or an error.
    ///
    /// # Safety
    ///
    /// `comm` has neither been destroyed nor aborted.
    pub(super) unsafe fn state(&self, comm: RawComm) -> ResultCode {
        let mut state = SUCCESS;
        // SAFETY: the caller's; it writes the one integer.
        match unsafe { (self.functions.comm_get_async_error)(comm, &raw mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// An error in words, unless `code` says that all is well or goes on.
    pub(super) fn check(&self, code: ResultCode) -> Result<(), String> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: it takes any code and returns a string constant.
        let what = text(unsafe { (self.functions.get_error_string)(code) });
        // SAFETY: NCCL does not use the communicator that it takes, and returns a buffer of its own.
        let why = text(unsafe { (self.functions.get_last_error)(ptr::null_mut()) });
        Err(if why.is_empty() { what } else { format!("{what} ({why})") })
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library").field("version", &self.version).finish_non_exhaustive()
    }
}

/// What the loader says, which the error itself does not tell.
fn why(error: &libloading::Error) -> String {
    error.source().unwrap_or(error).to_string()
}

/// NCCL's text, in one line.
fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: NCCL returns strings that end, and that nobody frees.
    let text = unsafe { CStr::from_ptr(from) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

// === impl Version ===

impl Version {
    /// As `NCCL_VERSION` encodes it from 2.9 on.
    fn of_code(code: c_int) -> Self {
        let code = code.unsigned_abs();
        Self { major: code / 10_000, minor: code / 100 % 100, patch: code % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_every_name_that_was_tried() {
        let error = Library::open(&["liblockstep-absent.so.2", "liblockstep-absent.so"]).unwrap_err();
        let expected = "cannot open NCCL, in LD_LIBRARY_PATH or the system's folders: liblockstep-absent.so.2: cannot open \
                        shared object file: No such file or directory; liblockstep-absent.so: cannot open shared object \
                        file: No such file or directory";
        assert_eq!(error, expected);
    }

    #[test]
    fn a_library_that_is_not_nccl_names_what_it_lacks() {
        let error = Library::open(&["libc.so.6"]).unwrap_err();
        assert!(error.starts_with("libc.so.6 cannot be used: ") && error.contains("ncclGetVersion"), "{error}");
    }

    #[test]
    fn a_version_reads_as_nccl_writes_it() {
        assert_eq!(Version::of_code(22_907).to_string(), "2.29.7");
        assert!(Version::of_code(23_007) > Version::of_code(22_999));
    }
}
