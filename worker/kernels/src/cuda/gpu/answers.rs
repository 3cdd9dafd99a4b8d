//! Answers: results of a step on their way to the host, while the next step is queued.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytemuck::Pod;

use super::{
    super::{CudaError, Device, Event, Recording, page::Page, pool::Target, recording::RecordedResult},
    Gpu, GpuTensor,
};

/// Answers of one kind that may be under way.
const MAX_ANSWERS: usize = 2;

/// Values that are there once the device has come so far. They go where other answers have been, and will be: so it may be
/// dropped at any time, and then makes room for another.
#[derive(Debug)]
pub struct Answer<T: Pod> {
    /// Always there until `drop`.
    page: Option<Page<T>>,
    len: usize,
    /// Marks the beginning of the step.
    begun: Arc<Event>,
    pages: Pages<T>,
}

/// Where answers of one kind go, in turn. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Pages<T: Pod>(Arc<Mutex<Vec<Page<T>>>>);

// === impl Gpu ===

impl Gpu {
    /// Queues that the tokens which were chosen for the first `n_rows` rows of logits come to the host.
    ///
    /// # Errors
    /// Two such answers are there already, or the driver's.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn queue_choices(&mut self, n_rows: usize) -> Result<Answer<u32>, CudaError> {
        assert!(n_rows <= self.choices.len(), "{n_rows} choices of {}", self.choices.len());
        self.answers.fetch(Target::of(&self.choices), n_rows, &self.begun)
    }

    /// Queues that some rows of a tensor come to the host. Waits for the device if no answer had so many values before.
    ///
    /// # Errors
    /// Two such answers are there already, or the driver's.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn queue_rows(&mut self, tensor: &GpuTensor, rows: Range<usize>) -> Result<Answer<f32>, CudaError> {
        self.queue_recorded(tensor.recorded(), rows)
    }

    /// As [`Gpu::queue_rows`], of the first rows of what a recording ends in, if nothing has been queued since it was replayed.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn queue_result(&mut self, recording: &Recording, n_rows: usize) -> Result<Answer<f32>, CudaError> {
        self.queue_recorded(recording.result(), 0..n_rows)
    }

    fn queue_recorded(&mut self, result: RecordedResult, rows: Range<usize>) -> Result<Answer<f32>, CudaError> {
        let RecordedResult { target, n_rows, width } = result;
        assert!(rows.start <= rows.end && rows.end <= n_rows, "rows {rows:?} of {n_rows}");
        self.rows.fetch(target.after::<f32>(rows.start * width)?, rows.len() * width, &self.begun)
    }
}

// === impl Answer ===

impl<T: Pod> Answer<T> {
    /// Whether the device has come so far.
    ///
    /// # Errors
    /// A kernel failed.
    pub fn is_there(&self) -> Result<bool, CudaError> {
        self.page().copied().is_done()
    }

    /// Waits for the values.
    ///
    /// # Errors
    /// A kernel failed, or it takes longer than a minute.
    pub fn wait(&self) -> Result<&[T], CudaError> {
        self.page().wait(self.len)
    }

    /// The time that the device took, from the end of the copy of the step's words to the end of this answer; `None` where the
    /// driver is too old to say.
    ///
    /// # Errors
    /// It is not there, or a kernel failed.
    pub fn device_time(&self) -> Result<Option<Duration>, CudaError> {
        self.page().copied().since(&self.begun)
    }

    fn page(&self) -> &Page<T> {
        self.page.as_ref().expect("it is taken at the end alone")
    }
}

impl<T: Pod> Drop for Answer<T> {
    fn drop(&mut self) {
        // A copy that is still under way comes before that of the page's next answer.
        self.pages.0.lock().unwrap_or_else(PoisonError::into_inner).extend(self.page.take());
    }
}

// === impl Pages ===

impl<T: Pod> Pages<T> {
    /// With room for `len` values each for a start.
    pub(super) fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        let pages = (0..MAX_ANSWERS).map(|_| Page::new(device, len)).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Mutex::new(pages))))
    }

    /// Makes room for `len` values in all of them, at a time when nobody has to wait for that.
    pub(super) fn reserve(&self, len: usize) -> Result<(), CudaError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().try_for_each(|page| page.make_room(len))
    }

    fn fetch(&self, from: Target, len: usize, begun: &Arc<Event>) -> Result<Answer<T>, CudaError> {
        let page = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let page = page.ok_or(CudaError::Answers { limit: MAX_ANSWERS })?;
        let mut answer = Answer { page: Some(page), len, begun: begun.clone(), pages: self.clone() };
        answer.page.as_mut().expect("it was just put there").fetch(from, len)?;
        Ok(answer)
    }
}
