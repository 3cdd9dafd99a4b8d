//! What a group of ranks needs in order to move values between their devices: a device's stream, and parts of its buffers.
//! Here and not where the calls are made, because what these take on trust is what [`Device`] and [`Buffer`] keep.

use std::{ops::Range, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::result;
use lockstep_collectives::{DeviceSlice, DeviceSliceMut, DeviceStream};

use super::{Buffer, CudaError, Device};

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

impl<T: Pod> Buffer<T> {
    /// The values of `range`, for a collective between devices to read.
    ///
    /// # Errors
    /// The buffer has no such range.
    pub fn collective_slice(&self, range: Range<usize>) -> Result<DeviceSlice<'_, T>, CudaError> {
        let pointer = self.at(range.start, range.len())?;
        // SAFETY: the values lie there until the buffer is dropped, which waits for the device; all who use them do so on
        // its stream.
        Ok(unsafe { DeviceSlice::new(pointer, range.len()) })
    }

    /// The values of `range`, for a collective between devices to write.
    ///
    /// # Errors
    /// As there.
    pub fn collective_slice_mut(&mut self, range: Range<usize>) -> Result<DeviceSliceMut<'_, T>, CudaError> {
        let pointer = self.at(range.start, range.len())?;
        // SAFETY: as above.
        Ok(unsafe { DeviceSliceMut::new(pointer, range.len()) })
    }
}
