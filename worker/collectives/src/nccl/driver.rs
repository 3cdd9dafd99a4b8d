//! What the transport needs of the CUDA driver, which whoever made the [`DeviceStream`] has loaded.

use cudarc::driver::{
    DriverError, result,
    sys::{self, CUdeviceptr, CUresult},
};

use crate::DeviceStream;

/// Device memory by which host memory reaches the other ranks. It grows to what the largest call needs: little, since
/// large ones are made on the device.
#[derive(Debug, Default)]
pub(super) struct Staging {
    address: CUdeviceptr,
    size_bytes: usize,
}

/// Makes the stream's context the calling thread's.
pub(super) fn enter(stream: &DeviceStream) -> Result<(), String> {
    // SAFETY: the context lives as long as the stream's owner.
    unsafe { result::ctx::set_current(stream.context().cast()) }.map_err(one_line)
}

/// Whether the device is through all that is on the stream.
pub(super) fn is_idle(stream: &DeviceStream) -> Result<bool, String> {
    // SAFETY: the stream lives as long as its owner.
    match unsafe { sys::cuStreamQuery(stream.stream().cast()) } {
        CUresult::CUDA_SUCCESS => Ok(true),
        CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        code => Err(one_line(DriverError(code))),
    }
}

// === impl Staging ===

impl Staging {
    /// Memory of at least `size_bytes`, whose contents are lost if it grows. The stream must be idle.
    pub(super) fn reserve(&mut self, size_bytes: usize) -> Result<u64, String> {
        if self.size_bytes < size_bytes {
            self.free();
            // SAFETY: a size is all it takes, and it is not 0.
            self.address = unsafe { result::malloc_sync(size_bytes) }.map_err(one_line)?;
            self.size_bytes = size_bytes;
        }
        Ok(self.address)
    }

    /// Brings `values` to the device, `offset` floats from the start, in the order of the stream.
    pub(super) fn write(&mut self, stream: &DeviceStream, offset: usize, values: &[f32]) -> Result<(), String> {
        let to = self.at(offset, values.len());
        // SAFETY: that much lies there. The driver has read `values`, which are not page-locked, when it returns.
        unsafe { result::memcpy_htod_async(to, values, stream.stream().cast()) }.map_err(one_line)
    }

    /// Brings values back, likewise. The stream must be idle, or it waits without an end.
    pub(super) fn read(&self, stream: &DeviceStream, offset: usize, values: &mut [f32]) -> Result<(), String> {
        let from = self.at(offset, values.len());
        // SAFETY: that much lies there. The driver has written `values`, which are not page-locked, when it returns.
        unsafe { result::memcpy_dtoh_async(values, from, stream.stream().cast()) }.map_err(one_line)
    }

    /// Gives the memory back, for which the driver waits until the device is idle.
    pub(super) fn free(&mut self) {
        if self.size_bytes > 0 {
            self.size_bytes = 0;
            // An error that the device has had before is reported here again; nothing is left to be done.
            // SAFETY: it was allocated, and is used no more.
            let _reported = unsafe { result::free_sync(self.address) };
        }
    }

    fn at(&self, offset: usize, len: usize) -> CUdeviceptr {
        assert!((offset + len) * size_of::<f32>() <= self.size_bytes, "the staging memory was reserved");
        self.address + (offset * size_of::<f32>()) as CUdeviceptr
    }
}

fn one_line(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("the driver says {:?}: {}", error.0, text.to_string_lossy()),
        Err(_) => format!("the driver says {:?}", error.0),
    }
}
