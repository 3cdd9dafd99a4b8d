//! Memory bandwidth: how fast threads read memory that no cache holds. A decode step reads all weights once, so this is
//! the limit of its speed.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use crate::memory::Pieces;

/// 64 bytes.
type Words = [u64; 8];

/// Passes over the memory; the fastest counts, as others may use the memory meanwhile.
const N_PASSES: usize = 5;

/// Bytes a second that `n_threads` threads read together, each from `N_STREAMS` places at a time, out of `size_bytes`
/// of memory.
///
/// # Panics
/// If there are no threads, no streams or too few bytes for them.
pub fn read_bandwidth<const N_STREAMS: usize>(n_threads: usize, size_bytes: usize) -> f64 {
    // An odd number of lines, so that streams that go side by side do not meet in the same set of a cache.
    let n_words = (size_bytes / size_of::<Words>() / (n_threads * N_STREAMS)).saturating_sub(1) | 1;
    assert!(
        n_words * N_STREAMS * n_threads * size_of::<Words>() <= size_bytes,
        "{size_bytes} bytes for {n_threads} threads with {N_STREAMS} streams"
    );
    let mut streams = Pieces::new(n_threads * N_STREAMS, n_words);
    streams.iter_mut().for_each(|stream| _ = stream.fill([1; 8]));
    let memory = streams.into_array();
    let streams: Vec<&[Words]> = memory.chunks_exact(n_words).collect();
    let pass = || {
        let start = Instant::now();
        thread::scope(|scope| {
            for streams in streams.as_chunks::<N_STREAMS>().0 {
                scope.spawn(move || black_box(sum(streams)));
            }
        });
        (streams.len() * n_words * size_of::<Words>()) as f64 / start.elapsed().as_secs_f64()
    };
    (0..N_PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// Adds up all words, going through the streams side by side: as little work as reading them takes.
fn sum<const N: usize>(streams: &[&[Words]; N]) -> Words {
    let mut sums = [[0u64; 8]; N];
    for i in 0..streams[0].len() {
        for (sums, stream) in sums.iter_mut().zip(streams) {
            sums.iter_mut().zip(&stream[i]).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        }
    }
    sums.into_iter().fold([0; 8], |total, sums| std::array::from_fn(|i| total[i].wrapping_add(sums[i])))
}

#[cfg(test)]
mod tests {
    use super::{read_bandwidth, sum};

    #[test]
    fn every_word_is_read() {
        let (a, b) = ([[1; 8], [2; 8]], [[3; 8], [4; 8]]);
        assert_eq!(sum(&[&a, &b]), [10; 8]);
        assert!(read_bandwidth::<4>(2, 1 << 16) > 0.0);
    }
}
