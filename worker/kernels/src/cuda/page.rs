//! Pages: page-locked memory that copies are under way from or to, and that is used again when they are done.

use std::time::Duration;

use bytemuck::Pod;

use super::{CudaError, Device, Event, HostBuffer, pool::Target};

/// Longest time that a step may take. A device that is busy for longer hangs.
pub(super) const MAX_STEP: Duration = Duration::from_secs(60);

/// Room for the values of one copy. It grows with them, and stays as large. To grow is to wait for all that is queued, since
/// page-locked memory comes and goes only when a device is idle: what is wanted in every step is best made large at once.
#[derive(Debug)]
pub(super) struct Page<T: Pod> {
    device: Device,
    values: HostBuffer<T>,
    /// Marks the end of the last copy.
    copied: Event,
}

// === impl Page ===

impl<T: Pod> Page<T> {
    /// Room for `len` values for a start.
    pub(super) fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        Ok(Self { device: device.clone(), values: device.host_buffer(len)?, copied: device.event()? })
    }

    /// Queues that `values` go to the beginning of `to`, whose pool must still be there. Waits until the last copy is done.
    pub(super) fn send(&mut self, values: &[T], to: Target) -> Result<(), CudaError> {
        self.copied.wait(MAX_STEP)?;
        self.make_room(values.len())?;
        let page = &mut self.values.as_mut_slice()[..values.len()];
        page.copy_from_slice(values);
        // SAFETY: nobody changes the page before `copied` is reached.
        unsafe { to.queue_upload(&self.device, page)? };
        self.copied.record()
    }

    /// Queues that the first `len` values of `from`, whose pool must still be there, come here. If the last copy is not done,
    /// this one comes after it.
    pub(super) fn fetch(&mut self, from: Target, len: usize) -> Result<(), CudaError> {
        if self.values.as_slice().len() < len {
            self.copied.wait(MAX_STEP)?;
            self.make_room(len)?;
        }
        // SAFETY: nobody looks at the page before `copied` is reached, see `values`.
        unsafe { from.queue_download(&self.device, &mut self.values.as_mut_slice()[..len])? };
        self.copied.record()
    }

    /// Marks the end of the last copy.
    pub(super) fn copied(&self) -> &Event {
        &self.copied
    }

    /// The first values, once the last copy is done.
    pub(super) fn wait(&self, len: usize) -> Result<&[T], CudaError> {
        self.copied.wait(MAX_STEP)?;
        Ok(&self.values.as_slice()[..len])
    }

    /// Grows to `len` values. No copy may be under way.
    pub(super) fn make_room(&mut self, len: usize) -> Result<(), CudaError> {
        if self.values.as_slice().len() < len {
            self.values = self.device.host_buffer(len.next_power_of_two())?;
        }
        Ok(())
    }
}
