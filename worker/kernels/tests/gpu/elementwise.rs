//! Normalization, with and without the terms of several planes.

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{EncodedRows, SumTree, cuda::RowParallelSum};

use crate::{assert_same_bits, gpu, products::check_sums, random};

#[test]
fn a_normalized_row_is_within_the_rounding_of_bf16() {
    let gpu = gpu();
    for width in [32, 96, 576, 2048] {
        let rng = &mut random::seeded(31);
        let (x, weight) = (random::floats(rng, 5 * width), random::floats(rng, width));
        let mut tensor = gpu.upload(&x, width).unwrap();
        let weights = gpu.upload(&weight, width).unwrap();
        let out = gpu.rms_norm(&mut tensor, None, &weights, 1e-5).unwrap();
        let [values, sums_of_16, sums_of_32] = gpu.download_input(&out).unwrap();
        for (x, values) in x.chunks_exact(width).zip(values.chunks_exact(width)) {
            let mean: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / width as f64;
            for ((x, weight), found) in x.iter().zip(&weight).zip(values) {
                let expected = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*weight);
                let bound = expected.abs() * (2f64.powi(-8) + 1e-6);
                assert!((f64::from(*found) - expected).abs() <= bound, "{found} for {expected}");
            }
        }
        check_sums(&values, &sums_of_16, 16);
        check_sums(&values, &sums_of_32, 32);
    }
}

#[test]
fn terms_of_all_ranks_are_added_in_the_order_of_the_tree() {
    let gpu = gpu();
    let (n_in, width, n_rows) = (7 * 32, 96, 3);
    let tree = SumTree::new(7);
    // Every segment a rank of its own.
    let subtrees: Vec<_> = (0..7).map(|segment| segment..segment + 1).collect();
    let order = tree.order(&subtrees);
    let bytes = random::weights(&mut random::seeded(32), Encoding::Q4_0, width, 32);
    let source = EncodedRows::new(Encoding::Q4_0, &bytes, width, 32).unwrap();
    let sum = RowParallelSum { segment_ends: &[32], subtrees: std::slice::from_ref(&(0..1)), order: &order };
    let matrix = gpu.load_matrix(&source, Some(sum)).unwrap();
    let input = gpu.upload_input(&random::floats(&mut random::seeded(33), n_rows * 32), 32).unwrap();
    let mut terms = gpu.matmul_partial(&matrix, &input, 3).unwrap();
    let rng = &mut random::seeded(34);
    let planes = random::floats(rng, 7 * n_rows * width);
    terms.upload(&planes).unwrap();
    let x = random::floats(rng, n_rows * width);
    let mut tensor = gpu.upload(&x, width).unwrap();
    let ones = gpu.upload(&vec![1.0; width], width).unwrap();
    gpu.rms_norm(&mut tensor, Some(&terms), &ones, 1e-5).unwrap();
    let mut found = Vec::new();
    gpu.download(&tensor, &mut found).unwrap();
    let mut sum = vec![0.0; n_rows * width];
    order.add(&planes, &mut sum);
    let expected: Vec<f32> = x.iter().zip(&sum).map(|(x, sum)| x + sum).collect();
    assert_same_bits(&found, &expected, &format_args!("{n_in} inputs on seven ranks"));
}
