//! What a group of ranks needs in order to move values between their devices: a device's stream. Here and not where the
//! calls are made, because what it takes on trust is what [`Device`] keeps.

use std::sync::Arc;

use cudarc::driver::result;
use lockstep_collectives::DeviceStream;

use super::{CudaError, Device};

impl Device {
    /// The device's stream, as the NCCL transport takes it; it keeps the device open.
    ///
    /// With such a group a thread must wait for the device by `wait` or `wait_until` of the group's device collective
    /// before it calls anything here that waits, such as [`Device::download`] and [`Device::synchronize`]: what is on the
    /// stream may wait for a rank that is gone.
    ///
    /// # Errors
    /// The driver's.
    pub fn collective_stream(&self) -> Result<DeviceStream, CudaError> {
        self.bind()?;
        let context = result::ctx::get_current().map_err(CudaError::driver("cuCtxGetCurrent"))?;
        let context = context.map_or(std::ptr::null_mut(), |context| context.cast());
        // SAFETY: both are the device's, which is kept open by the clone.
        Ok(unsafe {
            DeviceStream::new(context, self.stream().cast(), self.info().uuid.as_str(), Arc::new(self.clone()))
        })
    }
}
