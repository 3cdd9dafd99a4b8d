//! A region: the memory that all ranks of a group see, and what lies where in it.
//!
//! ```text
//! [ title page ][ desk of rank 0 ] … [ desk of rank n-1 ][ slots of rank 0: even, odd rounds ] … [ slots of rank n-1 ]
//! ```
//!
//! A slot is the call that it belongs to and up to [`SLOT_FLOATS`] floats. Everything but the floats is atomic; who may
//! touch the floats when is the protocol's matter.

use std::{
    fmt,
    fs::File,
    io, ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use memmap2::{MmapMut, MmapRaw};

use super::desk::Desk;
use crate::{Call, call::CALL_WORDS};

/// Floats of a slot: 256 KiB, large enough that copying them hides what a round costs beside it (microseconds), and
/// small enough that the segment of 8 ranks takes 4 MiB (a container's `/dev/shm` holds 64 MiB by default).
pub(crate) const SLOT_FLOATS: usize = 65_536;

/// The memory of a group.
pub(crate) struct Region {
    memory: MmapRaw,
    world_size: usize,
}

/// What the region is, for those who come to it by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Title {
    pub(crate) epoch: u64,
    pub(crate) world_size: usize,
}

#[repr(C, align(128))]
struct TitlePage {
    magic: AtomicU64,
    epoch: AtomicU64,
    world_size: AtomicU64,
}

#[repr(C, align(128))]
struct SlotHead {
    call: [AtomicU64; CALL_WORDS],
}

/// Marks a region of this layout; its last byte is the layout's version.
const MAGIC: u64 = u64::from_be_bytes(*b"lockstp\x01");

const SLOT_BYTES: usize = size_of::<SlotHead>() + SLOT_FLOATS * size_of::<f32>();

// === impl Title ===

impl fmt::Display for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {} for {} ranks", self.epoch, self.world_size)
    }
}

// === impl Region ===

impl Region {
    /// Memory that the threads of this process share.
    pub(crate) fn anonymous(world_size: usize) -> io::Result<Self> {
        Ok(Self { memory: MmapMut::map_anon(Self::size_bytes(world_size))?.into(), world_size })
    }

    /// Memory that all who map `file` share. The file must be [`size_bytes`](Self::size_bytes) long.
    pub(crate) fn map(file: &File, world_size: usize) -> io::Result<Self> {
        let size_bytes = Self::size_bytes(world_size);
        let found = file.metadata()?.len();
        // A mapping beyond the file's end would be a fatal signal at its first use.
        if found != size_bytes as u64 {
            return Err(io::Error::other(format!("it has {found} bytes, expected {size_bytes}")));
        }
        Ok(Self { memory: MmapRaw::map_raw(file)?, world_size })
    }

    /// What a group of `world_size` ranks needs.
    pub(crate) fn size_bytes(world_size: usize) -> usize {
        size_of::<TitlePage>() + world_size * (size_of::<Desk>() + 2 * SLOT_BYTES)
    }

    /// Writes the title page; before, the region has none.
    pub(crate) fn set_title(&self, title: Title) {
        let page = self.title_page();
        page.epoch.store(title.epoch, Ordering::Relaxed);
        page.world_size.store(title.world_size as u64, Ordering::Relaxed);
        page.magic.store(MAGIC, Ordering::Release);
    }

    /// What the title page says; `None`: it is not a region of this layout, or not yet.
    pub(crate) fn title(&self) -> Option<Title> {
        let page = self.title_page();
        (page.magic.load(Ordering::Acquire) == MAGIC).then(|| Title {
            epoch: page.epoch.load(Ordering::Relaxed),
            world_size: page.world_size.load(Ordering::Relaxed) as usize,
        })
    }

    /// The desk of `rank`.
    pub(crate) fn desk(&self, rank: usize) -> &Desk {
        assert!(rank < self.world_size, "rank {rank} is outside the group");
        let offset = size_of::<TitlePage>() + rank * size_of::<Desk>();
        // SAFETY: the desk lies within the memory, since `rank` is below the world size that its length was computed
        // from. The memory starts at a page and all that precedes is a multiple of 128 bytes, so it is aligned. A desk
        // is only atomics, for which every bit pattern is valid, and lives as long as `self` does.
        unsafe { &*self.memory.as_mut_ptr().add(offset).cast::<Desk>() }
    }

    /// The call that the slot of `rank` for `round` belongs to.
    pub(crate) fn slot_call(&self, rank: usize, round: u32) -> Call {
        Call::decode(self.slot_head(rank, round).call.each_ref().map(|word| word.load(Ordering::Relaxed)))
    }

    /// Writes `floats` and their call into the slot of `rank` for `round`.
    ///
    /// # Safety
    ///
    /// No other thread touches the slot's floats until it has seen a later release operation of this thread.
    pub(crate) unsafe fn write_slot(&self, rank: usize, round: u32, call: &Call, floats: &[f32]) {
        assert!(floats.len() <= SLOT_FLOATS, "a chunk fits its slot");
        for (word, value) in self.slot_head(rank, round).call.iter().zip(call.encode()) {
            word.store(value, Ordering::Relaxed);
        }
        // SAFETY: the slot has room for the floats (asserted), nobody else touches it (this function's contract), and
        // `floats` is a Rust slice, which cannot overlap memory that is only reached through `self.memory`.
        unsafe { ptr::copy_nonoverlapping(floats.as_ptr(), self.slot_floats(rank, round), floats.len()) };
    }

    /// Reads the first `out.len()` floats of the slot of `rank` for `round`.
    ///
    /// # Safety
    ///
    /// The thread that wrote the slot did so before a release operation that this thread has seen, and does not write
    /// it again before it has seen a later one of this thread.
    pub(crate) unsafe fn read_slot(&self, rank: usize, round: u32, out: &mut [f32]) {
        assert!(out.len() <= SLOT_FLOATS, "a chunk fits its slot");
        // SAFETY: as for `write_slot`; every bit pattern is an f32.
        unsafe { ptr::copy_nonoverlapping(self.slot_floats(rank, round), out.as_mut_ptr(), out.len()) };
    }

    fn title_page(&self) -> &TitlePage {
        // SAFETY: the memory begins with the title page, at a page's start, and it is only atomics.
        unsafe { &*self.memory.as_mut_ptr().cast::<TitlePage>() }
    }

    fn slot_head(&self, rank: usize, round: u32) -> &SlotHead {
        // SAFETY: `slot` lies within the memory and is aligned; its head is only atomics and lives as long as `self`.
        unsafe { &*self.slot(rank, round).cast::<SlotHead>() }
    }

    /// Points to [`SLOT_FLOATS`] floats.
    fn slot_floats(&self, rank: usize, round: u32) -> *mut f32 {
        // SAFETY: a slot is its head and then its floats, all within the memory.
        unsafe { self.slot(rank, round).add(size_of::<SlotHead>()).cast::<f32>() }
    }

    /// Points to `SLOT_BYTES` bytes within the memory, aligned to 128 bytes.
    fn slot(&self, rank: usize, round: u32) -> *mut u8 {
        assert!(rank < self.world_size, "rank {rank} is outside the group");
        let index = 2 * rank + (round % 2) as usize;
        let offset = size_of::<TitlePage>() + self.world_size * size_of::<Desk>() + index * SLOT_BYTES;
        // SAFETY: two slots for each of `world_size` ranks follow the desks, see `size_bytes`.
        unsafe { self.memory.as_mut_ptr().add(offset) }
    }
}
