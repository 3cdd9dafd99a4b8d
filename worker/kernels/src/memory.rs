//! Memory for arrays that a step streams through: on huge pages where the system has them, since with small ones a
//! stream of weights pays for an address translation every 4 KiB.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An array in the making: pieces of equal length, which any threads fill in any order. Its pages are first written by
/// who fills them, so nothing is written twice, and threads share the system's work of providing pages.
#[derive(Debug)]
pub(crate) struct Pieces<T> {
    /// Empty, with room for all pieces.
    values: Vec<T>,
    n_pieces: usize,
    piece_len: usize,
    n_filled: AtomicUsize,
}

/// A piece to fill.
#[derive(Debug)]
pub(crate) struct Piece<'a, T> {
    room: &'a mut [MaybeUninit<T>],
    n_filled: &'a AtomicUsize,
}

// === impl Pieces ===

impl<T: Copy> Pieces<T> {
    pub(crate) fn new(n_pieces: usize, piece_len: usize) -> Self {
        let mut values = Vec::with_capacity(n_pieces * piece_len);
        // Advice counts for pages that are not there yet, so it is given before the first write.
        #[cfg(target_os = "linux")]
        advise_huge_pages(&mut values);
        Self { values, n_pieces, piece_len, n_filled: AtomicUsize::new(0) }
    }

    /// All pieces, in order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = Piece<'_, T>> {
        // Pieces of an earlier call are gone, so each counts once.
        *self.n_filled.get_mut() = 0;
        let (n_filled, piece_len) = (&self.n_filled, self.piece_len);
        let mut rest = self.values.spare_capacity_mut();
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
    pub(crate) fn into_vec(mut self) -> Vec<T> {
        assert_eq!(*self.n_filled.get_mut(), self.n_pieces, "pieces that were filled");
        // SAFETY: the pieces are distinct parts of the room, `iter_mut` starts the count anew whenever it hands them
        // out, and a piece counts once, when all of it has been written. So all values have been.
        unsafe { self.values.set_len(self.n_pieces * self.piece_len) };
        self.values
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

#[cfg(target_os = "linux")]
fn advise_huge_pages<T>(values: &mut Vec<T>) {
    use rustix::mm::{Advice, madvise};

    let page_size = rustix::param::page_size();
    let spare = values.spare_capacity_mut().as_mut_ptr_range();
    let start = spare.start.map_addr(|addr| addr.next_multiple_of(page_size));
    let len = spare.end.addr().saturating_sub(start.addr()) / page_size * page_size;
    if len > 0 {
        // SAFETY: the pages lie within the vector's own allocation, and advice about huge pages changes no contents.
        // A system that has none says so, and all goes on as before.
        let _unsupported = unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) };
    }
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
        assert_eq!(pieces.into_vec(), [0, 0, 0, 1, 0, 2]);
        let mut empty = Pieces::new(3, 0);
        assert_eq!(empty.iter_mut().map(|piece| piece.fill(1).len()).sum::<usize>(), 0);
        assert_eq!(empty.into_vec(), [0; 0]);
    }

    #[test]
    #[should_panic(expected = "pieces that were filled")]
    fn a_piece_that_was_left_out_is_found() {
        let mut pieces = Pieces::new(3, 2);
        pieces.iter_mut().take(2).for_each(|piece| _ = piece.fill(0));
        pieces.iter_mut().skip(1).for_each(|piece| _ = piece.fill(0));
        pieces.into_vec();
    }
}
