//! Host memory that a device reads and writes by itself, so that copies can be queued like any other work.

use std::{fmt, mem::size_of, ops::Range, ptr::NonNull, slice};

use bytemuck::Pod;
use cudarc::driver::result;

use super::{Buffer, CudaError, Device};

/// Page-locked memory of the host for `len` values. It is freed at the end, which waits for all work that is queued.
pub struct HostBuffer<T: Pod> {
    device: Device,
    /// Dangling if there are no bytes.
    values: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its memory, which any thread may use.
unsafe impl<T: Pod + Send> Send for HostBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Sync> Sync for HostBuffer<T> {}

impl Device {
    /// Page-locked memory for `len` values of zero bits. It is scarce and slow to get: for what goes to and fro in every
    /// step.
    ///
    /// # Errors
    /// The system does not give so much.
    pub fn host_buffer<T: Pod>(&self, len: usize) -> Result<HostBuffer<T>, CudaError> {
        let size = size_of::<T>();
        let bytes = len.checked_mul(size).filter(|bytes| isize::try_from(*bytes).is_ok());
        let bytes = bytes.ok_or(CudaError::TooLarge { len, size })?;
        if bytes == 0 {
            return Ok(HostBuffer { device: self.clone(), values: NonNull::dangling(), len });
        }
        self.bind()?;
        // SAFETY: the buffer frees it.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(CudaError::driver("cuMemHostAlloc"))?;
        let values = NonNull::new(memory.cast::<T>()).expect("the driver gave memory");
        // SAFETY: there are so many bytes, and nobody else knows them.
        unsafe { values.cast::<u8>().write_bytes(0, bytes) };
        Ok(HostBuffer { device: self.clone(), values, len })
    }

    /// Queues that the values of `range` are copied into `buffer` from its value `offset` on.
    ///
    /// # Errors
    /// The range is not that of `values`, or does not fit into the buffer.
    ///
    /// # Safety
    /// `values` must not be changed until the copy is done, as an [`Event`](super::Event) after it tells.
    pub unsafe fn queue_upload<T: Pod>(
        &self,
        buffer: &mut Buffer<T>,
        offset: usize,
        values: &HostBuffer<T>,
        range: Range<usize>,
    ) -> Result<(), CudaError> {
        let pointer = buffer.at(offset, range.len())?;
        let error = CudaError::Range { offset: range.start, len: range.len(), buffer_len: values.len };
        let values = values.as_slice().get(range).ok_or(error)?;
        // SAFETY: both sides have room; that the values stay as they are is the caller's contract.
        unsafe { self.queue_copy(pointer, values) }
    }

    /// Queues that `values` are copied to `pointer` on the device.
    ///
    /// # Safety
    /// There is room. `values` are page-locked, and must not be changed or freed until the copy is done.
    pub(super) unsafe fn queue_copy<T: Pod>(&self, pointer: u64, values: &[T]) -> Result<(), CudaError> {
        if size_of_val(values) == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's contract.
        unsafe { result::memcpy_htod_async(pointer, values, self.stream()) }
            .map_err(CudaError::driver("cuMemcpyHtoDAsync"))
    }

    /// Queues that the values of `range` are copied into the first of `values`.
    ///
    /// # Errors
    /// The range is not the buffer's, or longer than `values`.
    ///
    /// # Safety
    /// `values` must not be read or changed until the copy is done, as an [`Event`](super::Event) after it tells.
    pub unsafe fn queue_download<T: Pod>(
        &self,
        buffer: &Buffer<T>,
        range: Range<usize>,
        values: &mut HostBuffer<T>,
    ) -> Result<(), CudaError> {
        let pointer = buffer.at(range.start, range.len())?;
        let error = CudaError::Range { offset: 0, len: range.len(), buffer_len: values.len };
        let values = values.as_mut_slice().get_mut(..range.len()).ok_or(error)?;
        // SAFETY: both sides have room; that nobody uses the values is the caller's contract.
        unsafe { self.queue_copy_back(pointer, values) }
    }

    /// Queues that what lies at `pointer` on the device is copied to `values`.
    ///
    /// # Safety
    /// There are so many values. `values` are page-locked, and must not be read, changed or freed until the copy is done.
    pub(super) unsafe fn queue_copy_back<T: Pod>(&self, pointer: u64, values: &mut [T]) -> Result<(), CudaError> {
        if size_of_val(values) == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's contract.
        unsafe { result::memcpy_dtoh_async(values, pointer, self.stream()) }
            .map_err(CudaError::driver("cuMemcpyDtoHAsync"))
    }
}

impl<T: Pod> HostBuffer<T> {
    /// The values.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: so many values lie there, aligned to pages (or to `T` if they have no bytes), and any bits are a `T`.
        unsafe { slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }

    /// The values, to change them.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and they are borrowed once.
        unsafe { slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

impl<T: Pod> Drop for HostBuffer<T> {
    fn drop(&mut self) {
        if self.len * size_of::<T>() == 0 {
            return;
        }
        // An error means that a kernel failed and took the context.
        let _ = self.device.synchronize();
        // SAFETY: it was allocated once and is freed once, and no copy that was queued is left to use it.
        let _ = unsafe { result::free_host(self.values.as_ptr().cast()) };
    }
}

impl<T: Pod> fmt::Debug for HostBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer<{}>({} values)", std::any::type_name::<T>(), self.len)
    }
}
