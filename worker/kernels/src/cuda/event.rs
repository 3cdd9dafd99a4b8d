//! Events: marks in a device's stream that tell a thread how far it is, and since when, without making it wait.

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{CUevent, CUevent_flags, CUresult},
};

use super::{CudaError, Device};

/// The first driver that has the function which the bindings call for times (`cuEventElapsedTime_v2`); with an older one they
/// would panic.
const TIMING_DRIVER: (u32, u32) = (12, 8);

/// A mark that can be set again and again.
pub struct Event {
    device: Device,
    event: CUevent,
}

// SAFETY: the driver's functions may be called from any thread, and the event lives until `drop`.
unsafe impl Send for Event {}
// SAFETY: as above; what changes behind it, the driver guards.
unsafe impl Sync for Event {}

impl Device {
    /// An event that has not been recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self) -> Result<Event, CudaError> {
        self.bind()?;
        let event = result::event::create(CUevent_flags::CU_EVENT_DEFAULT);
        Ok(Event { device: self.clone(), event: event.map_err(CudaError::driver("cuEventCreate"))? })
    }
}

impl Event {
    /// Marks the end of the work that is queued by now.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.event, self.device.stream()) }.map_err(CudaError::driver("cuEventRecord"))
    }

    /// Waits until the work before the last mark is done, if there is one.
    ///
    /// # Errors
    /// A kernel failed, or it takes longer than `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<(), CudaError> {
        let start = Instant::now();
        while !self.is_done()? {
            if start.elapsed() > timeout {
                return Err(CudaError::Stuck { timeout });
            }
            thread::yield_now();
        }
        Ok(())
    }

    /// Whether the work before the last mark is done; true if there is no mark.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.device.bind()?;
        // SAFETY: the event lives.
        match unsafe { result::event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(error) => Err(CudaError::driver("cuEventQuery")(error)),
        }
    }

    /// The time on the device between the last marks of `start` and of this event; `None` where the driver is too old to say.
    ///
    /// # Errors
    /// One of them has no mark or has not been reached, or a kernel failed.
    pub fn since(&self, start: &Self) -> Result<Option<Duration>, CudaError> {
        if self.device.driver() < TIMING_DRIVER {
            return Ok(None);
        }
        self.device.bind()?;
        // SAFETY: both events live.
        let milliseconds = unsafe { result::event::elapsed(start.event, self.event) };
        let milliseconds = milliseconds.map_err(CudaError::driver("cuEventElapsedTime"))?;
        Ok(Some(Duration::try_from_secs_f32(milliseconds / 1000.0).unwrap_or_default()))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: it was created once and is destroyed once. An error would be that of a kernel.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("device", &self.device).finish_non_exhaustive()
    }
}
