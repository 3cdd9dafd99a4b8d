//! A pool: device memory that steps use in turn.
//!
//! What a step computes on its way lies in pieces of the pool. A piece that is dropped is there for the next one that
//! wants as much: its kernels are queued behind those that used it before, on the same stream, so nobody has to wait.
//! Once the largest step has run, nothing is allocated any more, and equal steps take equal pieces.

use std::{
    collections::BTreeMap,
    marker::PhantomData,
    mem::size_of,
    sync::{Arc, Mutex, PoisonError},
};

use bytemuck::Pod;

use super::{Buffer, CudaError, Device};

/// Smallest piece, in bytes: what the driver aligns to.
const MIN_BYTES: usize = 256;

/// Pieces of device memory by size. Clones are the same pool.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    device: Device,
    /// Free pieces by their bytes, the last one given back at the end.
    free: Arc<Mutex<BTreeMap<usize, Vec<Buffer<u8>>>>>,
}

/// A piece of a [`Pool`] that holds `len` values; it holds whatever lay there.
#[derive(Debug)]
pub(super) struct Piece<T: Pod> {
    /// Always there until `drop`.
    buffer: Option<Buffer<u8>>,
    len: usize,
    pool: Pool,
    _values: PhantomData<T>,
}

/// Where values lie, or lay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pointer: u64,
    n_bytes: usize,
}

// === impl Target ===

impl Target {
    pub(super) fn of<T: Pod>(buffer: &Buffer<T>) -> Self {
        Self { pointer: buffer.pointer(), n_bytes: buffer.len() * size_of::<T>() }
    }

    /// Queues that `values` are copied here.
    ///
    /// # Safety
    /// They are page-locked, and must not be changed or freed until the copy is done. What they go to is still there.
    pub(super) unsafe fn queue_upload<T: Pod>(self, device: &Device, values: &[T]) -> Result<(), CudaError> {
        self.check_room(values)?;
        // SAFETY: there is room; the rest is the caller's contract.
        unsafe { device.queue_copy(self.pointer, values) }
    }

    /// Queues that the first values here are copied to `values`.
    ///
    /// # Safety
    /// They are page-locked, and must not be read, changed or freed until the copy is done. What they come from is still
    /// there.
    pub(super) unsafe fn queue_download<T: Pod>(self, device: &Device, values: &mut [T]) -> Result<(), CudaError> {
        self.check_room(values)?;
        // SAFETY: there are so many; the rest is the caller's contract.
        unsafe { device.queue_copy_back(self.pointer, values) }
    }

    /// Where the values after the first `len` lie.
    pub(super) fn after<T: Pod>(self, len: usize) -> Result<Self, CudaError> {
        let Self { pointer, n_bytes } = self;
        match len.checked_mul(size_of::<T>()).filter(|skipped| *skipped <= n_bytes) {
            Some(skipped) => Ok(Self { pointer: pointer + skipped as u64, n_bytes: n_bytes - skipped }),
            None => Err(CudaError::Range { offset: len, len: 0, buffer_len: n_bytes }),
        }
    }

    fn check_room<T>(self, values: &[T]) -> Result<(), CudaError> {
        let (len, buffer_len) = (size_of_val(values), self.n_bytes);
        if len <= buffer_len { Ok(()) } else { Err(CudaError::Range { offset: 0, len, buffer_len }) }
    }
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(device: Device) -> Self {
        Self { device, free: Arc::default() }
    }

    /// Room for `len` values.
    ///
    /// # Errors
    /// Not enough device memory.
    pub(super) fn take<T: Pod>(&self, len: usize) -> Result<Piece<T>, CudaError> {
        let size = size_of::<T>();
        let n_bytes = len.checked_mul(size).and_then(|bytes| bytes.max(MIN_BYTES).checked_next_power_of_two());
        let n_bytes = n_bytes.ok_or(CudaError::TooLarge { len, size })?;
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&n_bytes).and_then(Vec::pop);
        let buffer = match free {
            Some(buffer) => buffer,
            None => self.device.alloc(n_bytes)?,
        };
        Ok(Piece { buffer: Some(buffer), len, pool: self.clone(), _values: PhantomData })
    }
}

// === impl Piece ===

impl<T: Pod> Piece<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where it begins on the device.
    pub(super) fn pointer(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::pointer)
    }

    /// Where it lies, for copies that are queued. A pool gives nothing back, so it lies there as long as the pool does.
    pub(super) fn target(&self) -> Target {
        Target { pointer: self.pointer(), n_bytes: self.len * size_of::<T>() }
    }

    /// As [`Device::upload`].
    pub(super) fn upload(&mut self, values: &[T]) -> Result<(), CudaError> {
        let Some(buffer) = &mut self.buffer else { return Ok(()) };
        self.pool.device.upload(buffer, 0, bytemuck::cast_slice(values))
    }

    /// As [`Device::download`], from its first value on.
    pub(super) fn download(&self, values: &mut [T]) -> Result<(), CudaError> {
        let Some(buffer) = &self.buffer else { return Ok(()) };
        self.pool.device.download(buffer, 0..size_of_val(values), bytemuck::cast_slice_mut(values))
    }
}

impl<T: Pod> Drop for Piece<T> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.entry(buffer.len()).or_default().push(buffer);
        }
    }
}
