//! Kernels: entry points of programs that a device has loaded, and their launches.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    fmt, ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytemuck::Pod;
use cudarc::driver::{
    result,
    sys::{
        CUfunction, CUfunction_attribute as Attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
        CUlaunchConfig, CUmodule, cuLaunchKernelEx,
    },
};
use tracing::warn;

use super::{
    Architecture, Buffer, CudaError, Device, KernelCache, MachineCode, Program, Variant, compile, compiler_version,
    variants,
};

/// More arguments than any kernel of ours takes.
const MAX_ARGS: usize = 32;

/// An entry point that can be launched.
#[derive(Clone)]
pub struct Kernel {
    device: Device,
    function: CUfunction,
}

/// An argument of a launch. Its kind must be that of the kernel's parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg<'a> {
    /// A pointer into device memory; see [`Buffer::at`].
    Ptr(u64),
    /// `unsigned`.
    U32(u32),
    /// `int`.
    I32(i32),
    /// `float`.
    F32(f32),
    /// `unsigned long long`.
    U64(u64),
    /// A struct by value; see [`Arg::of`].
    Struct(&'a [u8]),
}

/// The programs that a device has loaded. The device's context must be that of the thread for every call.
pub(super) struct Kernels {
    architecture: Architecture,
    driver: (u32, u32),
    shared_bytes_per_block: u32,
    cache: KernelCache,
    /// Whether it was said that the cache cannot be written.
    complained: AtomicBool,
    /// Held while a program is compiled, so that no two threads compile the same.
    loaded: Mutex<HashMap<Program, Loaded>>,
}

struct Loaded {
    module: CUmodule,
    functions: HashMap<String, CUfunction>,
}

// SAFETY: the function lives as long as its module, which the device unloads at its end.
unsafe impl Send for Kernel {}
// SAFETY: as above; launching changes nothing in it.
unsafe impl Sync for Kernel {}

// === impl Kernel ===

impl Kernel {
    /// `function` is of a module that `device` has loaded.
    pub(super) fn new(device: Device, function: CUfunction) -> Self {
        Self { device, function }
    }

    /// Queues a launch of `grid` blocks of `block` threads, each block with `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// A size that the device does not have, or an error of a kernel that was launched before.
    ///
    /// # Safety
    /// `args` must be as many as the kernel has parameters, and each of its parameter's type. Pointers must lead to as
    /// much memory as the kernel will touch; it must stay allocated until the kernel has run, and other streams must
    /// leave it alone meanwhile.
    pub unsafe fn launch(
        &self,
        grid: [u32; 3],
        block: u32,
        shared_bytes: u32,
        args: &[Arg<'_>],
    ) -> Result<(), CudaError> {
        if args.len() > MAX_ARGS {
            return Err(CudaError::Arguments { n_args: args.len(), limit: MAX_ARGS });
        }
        self.device.bind()?;
        let mut pointers = [ptr::null_mut(); MAX_ARGS];
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = arg.value();
        }
        // It may start before the kernel ahead of it has ended: `begin_kernel` of `device.cuh` says what that asks of it.
        let mut overlaps = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: self.device.stream(),
            attrs: &raw mut overlaps,
            numAttrs: u32::from(self.device.overlaps_kernels()),
        };
        // SAFETY: the function is loaded, and there is a pointer for each of its parameters: the caller's contract. The
        // driver copies what they point to before it returns.
        unsafe { cuLaunchKernelEx(&raw const config, self.function, pointers.as_mut_ptr(), ptr::null_mut()) }
            .result()
            .map_err(CudaError::driver("cuLaunchKernelEx"))
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("device", &self.device).finish_non_exhaustive()
    }
}

// === impl Arg ===

impl<'a> Arg<'a> {
    /// A struct that the kernel takes by value, laid out as it has it.
    pub fn of<T: Pod>(value: &'a T) -> Self {
        Self::Struct(bytemuck::bytes_of(value))
    }

    /// Where the value lies. The driver only reads there.
    fn value(&self) -> *mut c_void {
        match self {
            Self::Ptr(value) | Self::U64(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::I32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => ptr::from_ref(value).cast_mut().cast(),
            Self::Struct(bytes) => bytes.as_ptr().cast_mut().cast(),
        }
    }
}

impl<T: Pod> From<&Buffer<T>> for Arg<'_> {
    fn from(buffer: &Buffer<T>) -> Self {
        Self::Ptr(buffer.pointer())
    }
}

// === impl Kernels ===

impl Kernels {
    pub(super) fn new(
        architecture: Architecture,
        driver: (u32, u32),
        shared_bytes_per_block: u32,
        cache: KernelCache,
    ) -> Self {
        Self {
            architecture,
            driver,
            shared_bytes_per_block,
            cache,
            complained: AtomicBool::new(false),
            loaded: Mutex::default(),
        }
    }

    pub(super) fn architecture(&self) -> Architecture {
        self.architecture
    }

    pub(super) fn get(&self, program: &Program, name: &str) -> Result<CUfunction, CudaError> {
        // What a panicking thread left is whole: a program is inserted when it is loaded.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if !loaded.contains_key(program) {
            loaded.insert(program.clone(), Loaded { module: self.load(program)?, functions: HashMap::new() });
        }
        let Loaded { module, functions } = loaded.get_mut(program).expect("it was inserted if it was not there");
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let function = self.entry(program, *module, name)?;
        functions.insert(name.to_owned(), function);
        Ok(function)
    }

    /// The entry point `name`, which may use all the shared memory that a block can have.
    fn entry(&self, program: &Program, module: CUmodule, name: &str) -> Result<CUfunction, CudaError> {
        let no_entry = |error| CudaError::NoEntry { program: program.clone(), name: name.to_owned(), error };
        let c_name = CString::new(name).expect("names of kernels are our own and have no NUL");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module, c_name) }.map_err(no_entry)?;
        // SAFETY: the function was got from the driver.
        let fixed = unsafe {
            result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        };
        let fixed = fixed.map_err(CudaError::driver("cuFuncGetAttribute"))?.unsigned_abs();
        let room = self.shared_bytes_per_block.saturating_sub(fixed) as i32;
        let dynamic = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: as above.
        unsafe { result::function::set_function_attribute(function, dynamic, room) }
            .map_err(CudaError::driver("cuFuncSetAttribute"))?;
        Ok(function)
    }

    /// Loads the code that the cache has, or, where there is none or the driver refuses it, compiles it.
    fn load(&self, program: &Program) -> Result<CUmodule, CudaError> {
        if let Some(code) = self.cache.load(program, self.architecture, self.driver.0) {
            match self.load_code(program, code) {
                Ok(module) => return Ok(module),
                Err(error) => warn!("{error}; it is compiled anew"),
            }
        }
        let code = self.compile(program)?;
        self.load_code(program, code)
    }

    fn load_code(&self, program: &Program, code: MachineCode) -> Result<CUmodule, CudaError> {
        let MachineCode { cubin, compiler } = code;
        // SAFETY: the code is a compiler's, whole by its checksum, and the driver has read it when it returns.
        unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(|error| CudaError::Load {
            program: program.clone(),
            compiler,
            driver: self.driver,
            error,
        })
    }

    fn compile(&self, program: &Program) -> Result<MachineCode, CudaError> {
        let code = compile(program, self.architecture)?.code;
        if let Err(error) = self.cache.store(program, self.architecture, &code)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            warn!("{error}: kernels are compiled at each start (engine.kernel_cache names another folder)");
        }
        Ok(code)
    }

    /// Whether every program's code is in the cache, or else a compiler is there.
    pub(super) fn check(&self) -> Result<(), CudaError> {
        let cached = |variant: &Variant| self.cache.has(&variant.program, self.architecture, self.driver.0);
        if variants().iter().all(cached) { Ok(()) } else { compiler_version().map(|_| ()) }
    }

    /// Unloads everything. No [`Kernel`] is left by then: each holds its device.
    pub(super) fn unload(&self) {
        for (_, Loaded { module, .. }) in self.loaded.lock().unwrap_or_else(PoisonError::into_inner).drain() {
            // SAFETY: it was loaded, and is unloaded once. An error means that the context is gone, and it with it.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
