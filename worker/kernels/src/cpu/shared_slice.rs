//! A shared slice: one output that the tasks of a job write in parts that do not overlap.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice that several threads may take parts of.
#[derive(Clone, Copy)]
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for an exclusive borrow of the elements, which may move to other threads if they may.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: sharing it only lets threads take parts, which `part` asks them not to let overlap.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

// === impl SharedSlice ===

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements `range`.
    ///
    /// # Panics
    /// If the range is not within the slice.
    ///
    /// # Safety
    /// While the part is in use, no other part that overlaps it may be: the tasks of a job must divide the output, and a
    /// task must drop a part before it takes it again.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a slice of {}", self.len);
        // SAFETY: in bounds as just checked; exclusive by the caller's promise and this type's exclusive borrow.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start) }
    }
    /// The elements `range`, to be read.
    ///
    /// # Panics
    /// If the range is not within the slice.
    ///
    /// # Safety
    /// While the part is in use, nobody may have a part from [`SharedSlice::part`] that overlaps it.
    #[inline(always)]
    pub(crate) unsafe fn shared_part(&self, range: Range<usize>) -> &'a [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a slice of {}", self.len);
        // SAFETY: in bounds as just checked; by the caller's promise nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.end - range.start) }
    }
}
