//! Memory for arrays that a step streams through: on huge pages where the system has them, since with small ones a
//! stream of weights pays for an address translation every 4 KiB.

/// `len` copies of `value`.
pub(crate) fn filled<T: Copy>(value: T, len: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    // Advice counts for pages that are not there yet, so it is given before the first write.
    #[cfg(target_os = "linux")]
    advise_huge_pages(&mut values);
    values.resize(len, value);
    values
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
