//! Devices: what a rank computes on, chosen once at its start.
//!
//! `auto` takes a GPU where one can be used and the CPU where not, and says which and why in one line of the log. Who asks
//! for `cuda` gets it or an error. All ranks of a group must come to the same, since a step's result depends on it; the
//! attestation holds that.

use std::{fmt, path::PathBuf};

use lockstep_collectives::DeviceStream;
use lockstep_kernels::cuda::{self, CudaError, KernelCache};
use serde::{Deserialize, Serialize};
use tracing::info;

/// The device that an operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU if one can be used, else the CPU.
    #[default]
    Auto,
    /// A GPU.
    Cuda,
    /// Our own CPU kernels.
    Cpu,
    /// candle tensors with eager attention: slow, plain, the standard of tests.
    Reference,
}

/// A device that computes. [`fmt::Display`] gives all of it that decides results: ranks of a group must agree on it.
#[derive(Clone, Debug)]
pub enum Device {
    /// See [`DeviceChoice::Cpu`].
    Cpu,
    /// See [`DeviceChoice::Reference`].
    Reference,
    /// An open GPU.
    Cuda(cuda::Device),
}

/// What decides which device is opened, and how.
#[derive(Clone, Debug)]
pub struct DeviceSettings {
    /// What is asked for.
    pub choice: DeviceChoice,
    /// Number of the GPU; `None`: the rank, modulo the number of GPUs.
    pub gpu: Option<usize>,
    /// This rank.
    pub rank: usize,
    /// Where compiled kernels are kept; `None`: nowhere.
    pub kernel_cache: Option<PathBuf>,
    /// Threads that compute on a CPU.
    pub threads: usize,
}

/// Why there is no GPU to compute on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// CUDA says so.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// There is a driver, and nothing behind it.
    #[error("the NVIDIA driver sees no GPU")]
    NoGpu,
}

// === impl DeviceSettings ===

impl DeviceSettings {
    /// Opens the device, and logs which one it is.
    ///
    /// # Errors
    /// `cuda` is asked for where no GPU can be used.
    pub fn open(&self) -> Result<Device, DeviceError> {
        let device = match self.choice {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Reference => Device::Reference,
            DeviceChoice::Cuda => self.open_gpu()?,
            DeviceChoice::Auto => match self.open_gpu() {
                Ok(device) => device,
                Err(why) => {
                    info!("no CUDA: {why}; computing on the CPU with {} threads", self.threads);
                    return Ok(Device::Cpu);
                }
            },
        };
        match &device {
            Device::Cpu => info!("computing on the CPU with {} threads", self.threads),
            Device::Reference => info!("computing on the CPU with candle"),
            Device::Cuda(gpu) => info!("computing on {}", gpu.info()),
        }
        Ok(device)
    }

    fn open_gpu(&self) -> Result<Device, DeviceError> {
        let n_devices = cuda::devices()?.len();
        let ordinal = self.gpu.or(self.rank.checked_rem(n_devices)).ok_or(DeviceError::NoGpu)?;
        let device = cuda::Device::open(ordinal, KernelCache::new(self.kernel_cache.clone()))?;
        device.check_kernels()?;
        Ok(Device::Cuda(device))
    }
}

// === impl Device ===

impl Device {
    /// The stream by which ranks on GPUs meet over NCCL; none on a CPU.
    ///
    /// # Errors
    /// The driver's.
    pub fn collective_stream(&self) -> Result<Option<DeviceStream>, DeviceError> {
        match self {
            Self::Cpu | Self::Reference => Ok(None),
            Self::Cuda(device) => Ok(Some(device.collective_stream()?)),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Reference => f.write_str("reference"),
            // The sums of tensor cores differ between architectures.
            Self::Cuda(device) => write!(f, "cuda {}", device.architecture()),
        }
    }
}
