//! Memory for arrays that a step streams through: on huge pages where the system has them, since with small ones a
//! stream of weights pays for an address translation every 4 KiB.

use std::alloc::{self, Layout};
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a huge page, and the alignment of regions.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a region that arrays share: a small model's matrices are far smaller than a huge page.
const REGION_BYTES: usize = 32 << 20;

/// Bytes that arrays are aligned to: a cache line.
const LINE: usize = 64;

/// Memory that arrays lie in, aligned to huge pages; freed with the last array.
#[derive(Debug)]
struct Region {
    start: NonNull<u8>,
    layout: Layout,
}

/// The region that the next small array goes to, and how much of it is taken.
static OPEN: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

/// Values in a region. They are written before anybody reads them, and never afterwards; clones share them.
#[derive(Debug)]
pub(crate) struct Array<T> {
    start: NonNull<T>,
    len: usize,
    region: Arc<Region>,
}

/// An array in the making: pieces of equal length, which any threads fill in any order. Its pages are first written by
/// who fills them, so nothing is written twice, and threads share the system's work of providing pages.
#[derive(Debug)]
pub(crate) struct Pieces<T> {
    values: Array<MaybeUninit<T>>,
    n_pieces: usize,
    piece_len: usize,
    n_filled: AtomicUsize,
}

// SAFETY: a region is memory without a thread of its own; it is only freed.
unsafe impl Send for Region {}
// SAFETY: as above; nothing in it is reached through a shared reference to it.
unsafe impl Sync for Region {}
// SAFETY: an array owns its values, as a vector does, or shares them with its clones, as an `Arc` does.
unsafe impl<T: Send + Sync> Send for Array<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Array<T> {}

/// A piece to fill.
#[derive(Debug)]
pub(crate) struct Piece<'a, T> {
    room: &'a mut [MaybeUninit<T>],
    n_filled: &'a AtomicUsize,
}

// === impl Region ===

impl Region {
    fn new(n_bytes: usize) -> Arc<Self> {
        let n_bytes = n_bytes.max(1).next_multiple_of(HUGE_PAGE);
        let layout = Layout::from_size_align(n_bytes, HUGE_PAGE).expect("weights fit the address space");
        // SAFETY: the layout has a size.
        let start = NonNull::new(unsafe { alloc::alloc(layout) }).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        let region = Arc::new(Self { start, layout });
        // Advice counts for pages that are not there yet, so it is given before the first write.
        // SAFETY: the bytes are the region's own.
        unsafe { advise_huge_pages(start.as_ptr(), n_bytes) };
        region
    }

    /// A region with `n_bytes` that no array has, and where in it they begin.
    fn with_room(n_bytes: usize) -> (Arc<Self>, usize) {
        if n_bytes > REGION_BYTES / 4 {
            return (Self::new(n_bytes), 0);
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, first) = match open.0.upgrade() {
            Some(region) if open.1 + n_bytes <= region.layout.size() => (region, open.1),
            _ => (Self::new(REGION_BYTES), 0),
        };
        *open = (Arc::downgrade(&region), (first + n_bytes).next_multiple_of(LINE));
        (region, first)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `new`, and no array is left.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

// === impl Array ===

impl<T: Copy> Array<MaybeUninit<T>> {
    fn new(len: usize) -> Self {
        assert!(align_of::<T>() <= LINE, "arrays begin on cache lines");
        let n_bytes = len.checked_mul(size_of::<T>()).expect("weights fit the address space");
        let (region, first) = Region::with_room(n_bytes);
        // SAFETY: `first + n_bytes` lies within the region.
        let start = unsafe { region.start.add(first) }.cast();
        Self { start, len, region }
    }

    fn as_mut_slice(&mut self) -> &mut [MaybeUninit<T>] {
        // SAFETY: the region's bytes from `start` on belong to this array alone and need no value yet.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// # Safety
    /// Every value must have been written.
    unsafe fn assume_init(self) -> Array<T> {
        Array { start: self.start.cast(), len: self.len, region: self.region }
    }
}

impl<T: Copy> Clone for Array<T> {
    fn clone(&self) -> Self {
        Self { start: self.start, len: self.len, region: Arc::clone(&self.region) }
    }
}

impl<T> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the values were written before the array became one of `T` (`assume_init`), and the region lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

// === impl Pieces ===

impl<T: Copy> Pieces<T> {
    pub(crate) fn new(n_pieces: usize, piece_len: usize) -> Self {
        Self { values: Array::new(n_pieces * piece_len), n_pieces, piece_len, n_filled: AtomicUsize::new(0) }
    }

    /// All pieces, in order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = Piece<'_, T>> {
        // Pieces of an earlier call are gone, so each counts once.
        *self.n_filled.get_mut() = 0;
        let (n_filled, piece_len) = (&self.n_filled, self.piece_len);
        let mut rest = self.values.as_mut_slice();
        (0..self.n_pieces).map(move |_| {
            let (room, others) = std::mem::take(&mut rest).split_at_mut(piece_len);
            rest = others;
            Piece { room, n_filled }
        })
    }

    /// The whole array.
    ///
    /// # Panics
    /// If a piece was not filled.
    pub(crate) fn into_array(mut self) -> Array<T> {
        assert_eq!(*self.n_filled.get_mut(), self.n_pieces, "pieces that were filled");
        // SAFETY: the pieces are distinct parts of the room, `iter_mut` starts the count anew whenever it hands them
        // out, and a piece counts once, when all of it has been written. So all values have been.
        unsafe { self.values.assume_init() }
    }
}

// === impl Piece ===

impl<'a, T: Copy> Piece<'a, T> {
    /// Fills the piece with `value`, to be written over.
    pub(crate) fn fill(self, value: T) -> &'a mut [T] {
        self.room.fill(MaybeUninit::new(value));
        self.n_filled.fetch_add(1, Ordering::Relaxed);
        let room: *mut [MaybeUninit<T>] = self.room;
        // SAFETY: the line above wrote every value of the piece, which this borrow alone reaches.
        unsafe { &mut *(room as *mut [T]) }
    }
}

/// Asks for huge pages where whole ones fit.
///
/// # Safety
/// The bytes must be part of one allocation.
pub(crate) unsafe fn advise_huge_pages(start: *mut u8, n_bytes: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        use rustix::mm::{Advice, madvise};

        let first = start.map_addr(|addr| addr.next_multiple_of(HUGE_PAGE));
        let len = (start.addr() + n_bytes).saturating_sub(first.addr()) / HUGE_PAGE * HUGE_PAGE;
        if len > 0 {
            // SAFETY: the pages lie within the allocation, and advice about huge pages changes no contents. A system that
            // has none says so, and all goes on as before.
            let _unsupported = unsafe { madvise(first.cast(), len, Advice::LinuxHugepage) };
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = (start, n_bytes);
}

#[cfg(test)]
mod tests {
    use super::Pieces;

    #[test]
    fn pieces_are_the_array_in_order() {
        let mut pieces = Pieces::new(3, 2);
        pieces.iter_mut().take(2).for_each(|piece| _ = piece.fill(9));
        for (value, piece) in pieces.iter_mut().enumerate() {
            piece.fill(0)[1] = value;
        }
        assert_eq!(pieces.into_array()[..], [0, 0, 0, 1, 0, 2]);
        let mut empty = Pieces::new(3, 0);
        assert_eq!(empty.iter_mut().map(|piece| piece.fill(1).len()).sum::<usize>(), 0);
        assert_eq!(empty.into_array()[..], [0; 0]);
    }

    #[test]
    #[should_panic(expected = "pieces that were filled")]
    fn a_piece_that_was_left_out_is_found() {
        let mut pieces = Pieces::new(3, 2);
        pieces.iter_mut().take(2).for_each(|piece| _ = piece.fill(0));
        pieces.iter_mut().skip(1).for_each(|piece| _ = piece.fill(0));
        pieces.into_array();
    }
}
