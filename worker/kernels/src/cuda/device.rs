//! Devices: the GPUs of this machine, and one that is open.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::driver::{
    result,
    sys::{CUcontext, CUdevice, CUdevice_attribute as Attribute, CUstream, cuDriverGetVersion},
};

use super::{Architecture, CudaError, Kernel, KernelCache, Program, kernels::Kernels, library::Library};

/// The oldest driver whose functions suffice.
pub(super) const MIN_DRIVER: &str = "12.0";

/// Where a kernel may start before the one ahead of it has ended (programmatic dependent launch): on these compute
/// capabilities, and from this driver on, the first that keeps to it in graphs. On 12.0 others have failed to capture it.
const OVERLAPPING_KERNELS: (Range<(u32, u32)>, (u32, u32)) = ((9, 0)..(12, 0), (12, 3));

/// A GPU that is open: its context, and the one stream in whose order everything runs. Clones are the same device.
///
/// Any thread may call it. Calls return when the work is queued, not when it is done, unless they say otherwise.
#[derive(Clone, Debug)]
pub struct Device(Arc<Opened>);

/// What [`Device`]s share.
struct Opened {
    info: DeviceInfo,
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    driver: (u32, u32),
    overlaps_kernels: AtomicBool,
    kernels: Kernels,
}

// SAFETY: the driver's functions may be called from any thread, and the handles name things that live until `drop`.
unsafe impl Send for Opened {}
// SAFETY: as above; what changes behind them, the driver guards.
unsafe impl Sync for Opened {}

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among the devices that the driver shows this process.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// What tells it from every other GPU, in the form of `nvidia-smi -L`.
    pub uuid: String,
    /// Compute capability, as major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// What a kernel may take.
    pub limits: DeviceLimits,
}

/// What a kernel may take of a device, and what there is to spread it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Multiprocessors.
    pub n_multiprocessors: u32,
    /// Bytes of shared memory that a block may have, static and dynamic together.
    pub shared_bytes_per_block: u32,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
}

/// Newest CUDA version that the driver runs, as major and minor.
///
/// # Errors
/// There is no driver, or it does not work.
pub fn driver_version() -> Result<(u32, u32), CudaError> {
    Library::Driver.find()?;
    let mut version = 0;
    // SAFETY: it points to an integer that is written.
    let result = unsafe { cuDriverGetVersion(&raw mut version) };
    result.result().map_err(CudaError::driver("cuDriverGetVersion"))?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// The GPUs that the driver shows this process; `CUDA_VISIBLE_DEVICES` hides some.
///
/// # Errors
/// There is no driver, or it does not work.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    (0..start_driver()?).map(|ordinal| Ok(look_at(ordinal)?.1)).collect()
}

/// Why no GPU can be used, in one line; `None` if there is one.
pub fn unavailable() -> Option<String> {
    match devices() {
        Err(error) => Some(error.to_string()),
        Ok(devices) if devices.is_empty() => Some("the NVIDIA driver sees no GPU".into()),
        Ok(devices) => match devices.iter().map(architecture).collect::<Result<Vec<_>, _>>() {
            Err(error) => Some(error.to_string()),
            Ok(_) => None,
        },
    }
}

/// Makes the driver's functions callable; how many devices it shows.
fn start_driver() -> Result<usize, CudaError> {
    let (major, minor) = driver_version()?;
    if major < 12 {
        return Err(CudaError::OldDriver { major, minor });
    }
    result::init().map_err(CudaError::driver("cuInit"))?;
    let count = result::device::get_count().map_err(CudaError::driver("cuDeviceGetCount"))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn look_at(ordinal: usize) -> Result<(CUdevice, DeviceInfo), CudaError> {
    let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
    let device = result::device::get(number).map_err(CudaError::driver("cuDeviceGet"))?;
    let attribute = |attribute: Attribute| {
        // SAFETY: the device was got from the driver.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        value.map(i32::unsigned_abs).map_err(CudaError::driver("cuDeviceGetAttribute"))
    };
    // SAFETY: as above.
    let memory = unsafe { result::device::total_mem(device) };
    let info = DeviceInfo {
        ordinal,
        name: result::device::get_name(device).map_err(CudaError::driver("cuDeviceGetName"))?,
        uuid: uuid(device)?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory_bytes: memory.map_err(CudaError::driver("cuDeviceTotalMem"))?,
        limits: DeviceLimits {
            n_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        },
    };
    Ok((device, info))
}

fn uuid(device: CUdevice) -> Result<String, CudaError> {
    let bytes = result::device::get_uuid(device).map_err(CudaError::driver("cuDeviceGetUuid"))?.bytes;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let (a, b, c, d, e) = (&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    Ok(format!("GPU-{a}-{b}-{c}-{d}-{e}"))
}

fn architecture(info: &DeviceInfo) -> Result<Architecture, CudaError> {
    let (major, minor) = info.compute_capability;
    Architecture::of_device(major, minor).ok_or_else(|| CudaError::OldDevice { name: info.name.clone(), major, minor })
}

// === impl Device ===

impl Device {
    /// Opens the device `ordinal`, with a stream of its own. Machine code comes from `cache`, and goes there.
    ///
    /// # Errors
    /// No driver, an old one, no such device, or one that kernels do not run on.
    pub fn open(ordinal: usize, cache: KernelCache) -> Result<Self, CudaError> {
        let n_devices = start_driver()?;
        if ordinal >= n_devices {
            return Err(CudaError::NoDevice { ordinal, n_devices });
        }
        let (device, info) = look_at(ordinal)?;
        let driver = driver_version()?;
        let (capabilities, first_driver) = OVERLAPPING_KERNELS;
        let overlaps = capabilities.contains(&info.compute_capability) && driver >= first_driver;
        let overlaps_kernels = AtomicBool::new(overlaps);
        let kernels = Kernels::new(architecture(&info)?, driver, info.limits.shared_bytes_per_block, cache);
        // SAFETY: the device was got from the driver; `drop` releases it.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = context.map_err(CudaError::driver("cuDevicePrimaryCtxRetain"))?;
        let stream = result::stream::null();
        let mut opened = Opened { info, device, context, stream, driver, overlaps_kernels, kernels };
        opened.bind()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        opened.stream = stream.map_err(CudaError::driver("cuStreamCreate"))?;
        Ok(Self(Arc::new(opened)))
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// What kernels are compiled for.
    pub fn architecture(&self) -> Architecture {
        self.0.kernels.architecture()
    }

    /// The entry point `name` of a program: loaded already, or from the cache, or compiled. That may take a second, so
    /// get kernels before there is work, and keep them.
    ///
    /// # Errors
    /// No compiler where one is needed, an error in the source, or code that the driver refuses.
    pub fn kernel(&self, program: &Program, name: &str) -> Result<Kernel, CudaError> {
        self.bind()?;
        Ok(Kernel::new(self.clone(), self.0.kernels.get(program, name)?))
    }

    /// Makes sure that kernels can be had: every program's code is in the cache, or there is a compiler.
    ///
    /// # Errors
    /// There is no compiler, and it is needed.
    pub fn check_kernels(&self) -> Result<(), CudaError> {
        self.0.kernels.check()
    }

    /// Waits until all work that was queued is done, and reports what went wrong in it.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream()) }.map_err(CudaError::driver("cuStreamSynchronize"))
    }

    /// Whether a kernel may start before the one ahead of it has ended.
    pub(super) fn overlaps_kernels(&self) -> bool {
        self.0.overlaps_kernels.load(Ordering::Relaxed)
    }

    /// From now on a kernel starts when the one ahead of it has ended. Whether that was different before.
    pub fn stop_overlapping(&self) -> bool {
        self.0.overlaps_kernels.swap(false, Ordering::Relaxed)
    }

    /// Newest CUDA version that the driver runs, as major and minor.
    pub(super) fn driver(&self) -> (u32, u32) {
        self.0.driver
    }

    /// The driver's stream, for libraries that queue work on it. It lives as long as the device.
    pub fn stream(&self) -> CUstream {
        self.0.stream
    }

    /// Makes the device's context that of this thread, as the driver's functions want it. Cheap if it is.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.0.bind()
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ordinal, name, compute_capability: (major, minor), memory_bytes, .. } = self;
        write!(f, "GPU {ordinal}: {name}, compute capability {major}.{minor}, {} MiB", memory_bytes >> 20)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

// === impl Opened ===

impl Opened {
    fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained until `drop`.
        unsafe { result::ctx::set_current(self.context) }.map_err(CudaError::driver("cuCtxSetCurrent"))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Errors are of no use to anybody here: the process has failed already, or the driver is shutting down.
        if self.bind().is_ok() {
            self.kernels.unload();
            if !self.stream.is_null() {
                // SAFETY: nothing else knows the stream: everything that does holds the device.
                let _ = unsafe { result::stream::destroy(self.stream) };
            }
        }
        // SAFETY: it was retained once, when the device was opened.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("info", &self.info).finish_non_exhaustive()
    }
}
