//! What ranks have gathered, put together.

use crate::{gpu, random};

#[test]
fn columns_of_ranks_become_whole_rows() {
    let gpu = gpu();
    let n_rows = 3;
    // One rank, equal and unequal shares, a rank that has nothing, and more columns than a block has threads.
    for ends in [&[7][..], &[48, 96], &[16, 16, 40], &[592, 1184, 1777], &[16, 32, 48, 64, 80, 96, 112, 120]] {
        let width = *ends.last().unwrap() as usize;
        let whole = random::floats(&mut random::seeded(41), n_rows * width);
        let starts = [0].iter().chain(ends);
        let parts = starts.zip(ends).flat_map(|(start, end)| {
            whole.chunks_exact(width).flat_map(|row| row[*start as usize..*end as usize].to_vec())
        });
        let gathered = gpu.upload(&parts.collect::<Vec<_>>(), width).unwrap();
        let joined = gpu.join_columns(&gathered, ends).unwrap();
        let mut found = Vec::new();
        gpu.download(&joined, &mut found).unwrap();
        assert_eq!(found, whole, "columns that end at {ends:?}");
    }
}

#[test]
fn no_rows_are_joined_to_none() {
    let gpu = gpu();
    let joined = gpu.join_columns(&gpu.gather_room(0, 32).unwrap(), &[16, 32]).unwrap();
    let mut found = vec![1.0];
    gpu.download(&joined, &mut found).unwrap();
    assert!(found.is_empty());
}

#[test]
#[should_panic(expected = "no ends of the ranks' columns in 32")]
fn columns_that_nobody_has_are_refused() {
    let gpu = gpu();
    drop(gpu.join_columns(&gpu.gather_room(1, 32).unwrap(), &[16, 31]));
}
