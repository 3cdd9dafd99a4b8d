//! Graphs: work that was recorded once and is queued again as one, which costs the host a single call.

use std::fmt;

use cudarc::driver::{
    result,
    sys::{CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::{CudaError, Device};

/// Recorded work.
pub struct Graph {
    device: Device,
    executable: CUgraphExec,
}

// SAFETY: the driver's functions may be called from any thread, if not at once: launching takes `&mut self`.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Device {
    /// Records the work that `record` queues, instead of doing it. Meanwhile this thread must not wait for the device,
    /// copy from or to ordinary memory, allocate, free, or load kernels: the driver refuses all of that.
    ///
    /// # Errors
    /// That of `record`, or the driver's.
    pub fn capture<E: From<CudaError>>(&self, record: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.bind()?;
        // Other threads may do what they like.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.stream(), mode) }
            .map_err(CudaError::driver("cuStreamBeginCapture"))?;
        let recorded = record();
        self.bind()?;
        // SAFETY: as above; it is being captured.
        let graph = unsafe { result::stream::end_capture(self.stream()) };
        // What went wrong first says more.
        if let Err(error) = recorded {
            graph.into_iter().for_each(destroy);
            return Err(error);
        }
        let graph = graph.map_err(CudaError::driver("cuStreamEndCapture"))?;
        // SAFETY: the graph was just made.
        let executable = unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) };
        destroy(graph);
        let executable = executable.map_err(CudaError::driver("cuGraphInstantiate"))?;
        Ok(Graph { device: self.clone(), executable })
    }
}

/// What is launched is a copy.
fn destroy(graph: CUgraph) {
    // SAFETY: the graph was made by `capture`, which forgets it. There is nothing to do about an error.
    let _ = unsafe { result::graph::destroy(graph) };
}

impl Graph {
    /// Queues the work once more.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// For all that was recorded, what was promised then (see [`Kernel::launch`](super::Kernel::launch)) must hold now.
    pub unsafe fn launch(&mut self) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: graph and stream live; the rest is the caller's contract.
        unsafe { result::graph::launch(self.executable, self.device.stream()) }
            .map_err(CudaError::driver("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: it was instantiated once and is destroyed once; what is queued of it still runs.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("device", &self.device).finish_non_exhaustive()
    }
}
