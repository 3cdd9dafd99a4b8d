//! Device memory: owned buffers, and copies to and from them.

use std::{fmt, marker::PhantomData, mem::size_of, ops::Range};

use bytemuck::Pod;
use cudarc::driver::{
    result::{self, DriverError},
    sys::{CUdeviceptr, CUresult},
};

use super::{CudaError, Device};

/// Memory of a device for `len` values. It is freed at the end, which waits for all work that is queued: buffers are
/// made before there is work, and kept.
pub struct Buffer<T: Pod> {
    device: Device,
    /// 0 if `len` is.
    pointer: CUdeviceptr,
    len: usize,
    _values: PhantomData<T>,
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// What can be allocated, all in all.
    pub free: usize,
    /// What there is.
    pub total: usize,
}

// === impl Device ===

impl Device {
    /// Memory for `len` values, which are whatever lies there.
    ///
    /// # Errors
    /// Not enough memory; the error says how much is free.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        let size = size_of::<T>();
        let wanted = len.checked_mul(size).filter(|bytes| isize::try_from(*bytes).is_ok());
        let wanted = wanted.ok_or(CudaError::TooLarge { len, size })?;
        let mut buffer = Buffer { device: self.clone(), pointer: 0, len, _values: PhantomData };
        if wanted == 0 {
            return Ok(buffer);
        }
        self.bind()?;
        // SAFETY: the buffer frees it.
        buffer.pointer = unsafe { result::malloc_sync(wanted) }.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => match self.memory_info() {
                Ok(memory) => CudaError::OutOfMemory { wanted, memory },
                Err(error) => error,
            },
            error => CudaError::driver("cuMemAlloc")(error),
        })?;
        Ok(buffer)
    }

    /// Memory for `len` values of zero bits.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.alloc(len)?;
        self.fill_zeros(&mut buffer)?;
        Ok(buffer)
    }

    /// Queues that all of `buffer` becomes zero bits.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill_zeros<T: Pod>(&self, buffer: &mut Buffer<T>) -> Result<(), CudaError> {
        let bytes = buffer.len * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the buffer has so many bytes.
        unsafe { result::memset_d8_async(buffer.pointer, 0, bytes, self.stream()) }
            .map_err(CudaError::driver("cuMemsetD8Async"))
    }

    /// Copies `values` into `buffer` from its value `offset` on, after all work that was queued, and waits for it.
    ///
    /// # Errors
    /// The buffer is too short, or a kernel failed.
    pub fn upload<T: Pod>(&self, buffer: &mut Buffer<T>, offset: usize, values: &[T]) -> Result<(), CudaError> {
        let pointer = buffer.at(offset, values.len())?;
        if size_of_val(values) == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the buffer has room, and nobody changes the values before the wait below.
        unsafe { result::memcpy_htod_async(pointer, values, self.stream()) }
            .map_err(CudaError::driver("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    /// A buffer with these values.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::upload`].
    pub fn upload_new<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.alloc(values.len())?;
        self.upload(&mut buffer, 0, values)?;
        Ok(buffer)
    }

    /// Copies the values of `range` into `values`, which are as many, after all work that was queued, and waits for it.
    ///
    /// # Errors
    /// The range is not the buffer's or not as long as `values`, or a kernel failed.
    pub fn download<T: Pod>(&self, buffer: &Buffer<T>, range: Range<usize>, values: &mut [T]) -> Result<(), CudaError> {
        let pointer = buffer.at(range.start, range.len())?;
        if values.len() != range.len() {
            return Err(CudaError::Range { offset: 0, len: range.len(), buffer_len: values.len() });
        }
        if size_of_val(values) == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range lies in the buffer, and nobody reads or writes `values` before the wait below.
        unsafe { result::memcpy_dtoh_async(values, pointer, self.stream()) }
            .map_err(CudaError::driver("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    /// How much memory is free, and how much there is.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_info(&self) -> Result<MemoryInfo, CudaError> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(CudaError::driver("cuMemGetInfo"))?;
        Ok(MemoryInfo { free, total })
    }
}

// === impl Buffer ===

impl<T: Pod> Buffer<T> {
    /// How many values it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it begins on the device.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Where the `len` values from `offset` on begin on the device.
    ///
    /// # Errors
    /// There are not so many.
    pub fn at(&self, offset: usize, len: usize) -> Result<u64, CudaError> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let inside = || self.pointer + (offset * size_of::<T>()) as u64;
        fits.then(inside).ok_or(CudaError::Range { offset, len, buffer_len: self.len })
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.pointer == 0 {
            return;
        }
        // An error means that a kernel failed and took the context, and the memory with it.
        let _ = self.device.synchronize();
        // SAFETY: it was allocated in this context, which is that of the thread now; it is freed once, and no kernel that
        // was queued is left to use it.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

impl<T: Pod> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer<{}>({} values at {:#x})", std::any::type_name::<T>(), self.len, self.pointer)
    }
}
