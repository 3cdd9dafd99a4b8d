//! A mapping: a whole file as read-only bytes, paged in on use.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::error::CheckpointError;

/// Maps the regular file at `path`.
pub(crate) fn open(path: &Path) -> Result<Mmap, CheckpointError> {
    let failed = |cause| CheckpointError::Open { path: path.to_owned(), cause };
    // Asked before opening: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(CheckpointError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the bytes are only read, as plain `u8`. What `Mmap` asks for beyond that, that nobody changes the file
    // while it is mapped, is the operator's to keep: a model file is replaced by renaming another over it, never
    // rewritten in place. A file that shrinks while mapped ends the process with SIGBUS; guarding against that is out
    // of scope, since the only remedy is a private copy of all weights.
    unsafe { Mmap::map(&file) }.map_err(failed)
}

/// Lets go of the pages that hold these bytes: they stop counting as this process's memory. The system's file cache
/// keeps them as long as it likes, and whoever reads them again gets them from there or from the file.
pub(crate) fn release(map: &Mmap, range: Range<usize>) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: `MADV_DONTNEED` loses what was written to pages, and nobody writes to these: the mapping is read-only,
        // so that a page, whether let go or not, has the bytes of the file. Readers at the same time see the same.
        // (The range is widened to whole pages, which are the map's own.) A refusal changes nothing.
        let _advised =
            unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (map, range);
}
