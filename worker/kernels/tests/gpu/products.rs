//! Products: within the rounding of f32 sums of the exact products of rounded inputs; rows and ranks against each other.

use std::ops::Range;

use half::bf16;
use lockstep_checkpoint::Encoding;
use lockstep_kernels::{
    EncodedRows, SumTree,
    cuda::{Gpu, GpuMatrix, RowParallelSum},
    dequantize,
};

use crate::{assert_same_bits, gpu, random};

/// Outputs: two tiles and a part of one.
const N_OUT: usize = 70;

/// A weight, its values, and it on the GPU.
struct Weight {
    encoding: Encoding,
    values: Vec<f32>,
    matrix: GpuMatrix,
}

fn weight(gpu: &Gpu, encoding: Encoding, n_out: usize, n_in: usize, seed: u64) -> Weight {
    let bytes = random::weights(&mut random::seeded(seed), encoding, n_out, n_in);
    let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
    let mut values = vec![0.0; n_out * n_in];
    dequantize(encoding, &bytes, &mut values);
    Weight { encoding, values, matrix: gpu.load_matrix(&source, None).unwrap() }
}

/// Each product and the magnitude of its terms, in f64.
fn exact(weight: &Weight, x: &[f32], n_in: usize) -> Vec<(f64, f64)> {
    let rounded = |value: f32| f64::from(bf16::from_f32(value).to_f32());
    let mut products = Vec::new();
    for x in x.chunks_exact(n_in) {
        for w in weight.values.chunks_exact(n_in) {
            let is_rounded = matches!(weight.encoding, Encoding::F32 | Encoding::F16 | Encoding::BF16);
            let value = |w: f32| if is_rounded { rounded(w) } else { f64::from(w) };
            let terms = x.iter().zip(w).map(|(x, w)| rounded(*x) * value(*w));
            products.push((terms.clone().sum(), terms.map(f64::abs).sum()));
        }
    }
    products
}

#[test]
fn products_are_within_the_rounding_of_their_sums() {
    let gpu = gpu();
    for encoding in Encoding::ALL {
        let n_in = if encoding.block_len() > 32 { 512 } else { 288 };
        let weight = weight(&gpu, encoding, N_OUT, n_in, 20);
        let n_rows = if encoding == Encoding::Q4_0 { MANY_ROWS } else { 3 };
        let x = random::floats(&mut random::seeded(21), n_rows * n_in);
        let [out] = gpu.matmul([&weight.matrix], &gpu.upload_input(&x, n_in).unwrap()).unwrap();
        let mut found = Vec::new();
        gpu.download(&out, &mut found).unwrap();
        for (i, (found, (exact, magnitude))) in found.iter().zip(exact(&weight, &x, n_in)).enumerate() {
            // Minimums and steps are summed apart; both are larger than their sum.
            let bound = 8.0 * magnitude * 2f64.powi(-20) + 1e-6;
            let error = (f64::from(*found) - exact).abs();
            assert!(error <= bound, "{encoding}, element {i}: {found} for {exact}, bound {bound}");
        }
    }
}

/// More rows than `matmul` computes in one block; `matmul_rows` takes over, and its last block has some to spare.
const MANY_ROWS: usize = 70;

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    let gpu = gpu();
    for encoding in Encoding::ALL {
        // Eight segments, or four of 2 and 3 tiles.
        let n_in = if encoding.block_len() > 32 { 512 } else { 288 };
        let weight = weight(&gpu, encoding, N_OUT, n_in, 22);
        let x = random::floats(&mut random::seeded(23), MANY_ROWS * n_in);
        let together = multiply(&gpu, &weight, &x);
        for n_rows in [1, 9, 17, 33] {
            let alone = multiply(&gpu, &weight, &x[5 * n_in..(5 + n_rows) * n_in]);
            let among = &together[5 * N_OUT..(5 + n_rows) * N_OUT];
            assert_same_bits(&alone, among, &format_args!("{encoding}, {n_rows} rows"));
        }
        let last = multiply(&gpu, &weight, &x[(MANY_ROWS - 16) * n_in..]);
        assert_same_bits(&last, &together[(MANY_ROWS - 16) * N_OUT..], &format_args!("{encoding}, the last rows"));
    }
}

#[test]
fn many_rows_have_the_same_bits_over_many_outputs_and_segments() {
    let gpu = gpu();
    // Two blocks of outputs, the last of two tiles of which one is ragged; eight segments of 3 and 4 tiles.
    let (n_out, n_in) = (300, 896);
    for encoding in [Encoding::Q4_0, Encoding::Q4_1] {
        let weight = weight(&gpu, encoding, n_out, n_in, 31);
        let x = random::floats(&mut random::seeded(32), MANY_ROWS * n_in);
        let together = multiply(&gpu, &weight, &x);
        let apart: Vec<f32> = x.chunks(32 * n_in).flat_map(|x| multiply(&gpu, &weight, x)).collect();
        assert_same_bits(&together, &apart, &encoding);
    }
}

fn multiply(gpu: &Gpu, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let [out] = gpu.matmul([&weight.matrix], &gpu.upload_input(x, weight.matrix.n_in()).unwrap()).unwrap();
    let mut values = Vec::new();
    gpu.download(&out, &mut values).unwrap();
    values
}

#[test]
fn several_products_of_one_input_are_the_products_one_by_one() {
    let gpu = gpu();
    let weights = [(Encoding::Q4_1, 40), (Encoding::Q4_1, 64), (Encoding::Q8_0, 33)]
        .map(|(encoding, n_out)| weight(&gpu, encoding, n_out, 96, 24));
    for n_rows in [5, MANY_ROWS] {
        let x = random::floats(&mut random::seeded(25), n_rows * 96);
        let input = gpu.upload_input(&x, 96).unwrap();
        let together = gpu.matmul(weights.each_ref().map(|weight| &weight.matrix), &input).unwrap();
        for (weight, together) in weights.iter().zip(&together) {
            let mut values = Vec::new();
            gpu.download(together, &mut values).unwrap();
            assert_same_bits(&values, &multiply(&gpu, weight, &x), &format_args!("{}, {n_rows} rows", weight.encoding));
        }
    }
}

#[test]
fn a_row_parallel_product_has_the_same_bits_over_ranks() {
    let gpu = gpu();
    for encoding in [Encoding::Q4_0, Encoding::Q4K] {
        // Six segments of a block of 256 each.
        let (n_in, n_out) = (6 * SEGMENT, 40);
        let bytes = random::weights(&mut random::seeded(26), encoding, n_out, n_in);
        let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
        let x = random::floats(&mut random::seeded(27), MANY_ROWS * n_in);
        let expected = sum_over_ranks(&gpu, &source, &[0..6], &x[..2 * n_in]);
        for ranks in [&[0..6][..], &[0..3, 3..6], &[0..2, 2..4, 4..6], &[0..1, 1..6]] {
            for n_rows in [2, MANY_ROWS] {
                let sum = sum_over_ranks(&gpu, &source, ranks, &x[..n_rows * n_in]);
                let what = format_args!("{encoding}, ranks {ranks:?}, {n_rows} rows").to_string();
                assert_same_bits(&sum[..2 * n_out], &expected, &what);
            }
        }
    }
}

/// Columns of a K-segment of a row-parallel weight.
const SEGMENT: usize = 256;

/// The product of a row-parallel weight, each rank's part computed by itself; `ranks` are ranges of segments.
fn sum_over_ranks(gpu: &Gpu, source: &EncodedRows<'_>, ranks: &[Range<usize>], x: &[f32]) -> Vec<f32> {
    let (n_in, n_out) = (source.n_cols(), source.n_rows());
    let tree = SumTree::new(n_in / SEGMENT);
    let subtrees: Vec<_> = ranks.iter().map(|rank| tree.subtrees(rank.clone())).collect();
    let order = tree.order(&subtrees.concat());
    let plane = x.len() / n_in * n_out;
    let mut planes = Vec::new();
    for (owned, subtrees) in ranks.iter().zip(&subtrees) {
        let columns = owned.start * SEGMENT..owned.end * SEGMENT;
        let local: Vec<_> = subtrees.iter().map(|tree| tree.start - owned.start..tree.end - owned.start).collect();
        let ends: Vec<_> = (1..=owned.len()).map(|i| i * SEGMENT).collect();
        let sum = RowParallelSum { segment_ends: &ends, subtrees: &local, order: &order };
        let matrix = gpu.load_matrix(&source.cols(columns.clone()).unwrap(), Some(sum)).unwrap();
        let mine: Vec<f32> = x.chunks_exact(n_in).flat_map(|x| &x[columns.clone()]).copied().collect();
        let first = planes.len() / plane;
        let terms = gpu.matmul_partial(&matrix, &gpu.upload_input(&mine, columns.len()).unwrap(), first).unwrap();
        let mut all = Vec::new();
        terms.download(&mut all).unwrap();
        planes.extend_from_slice(&all[first * plane..][..local.len() * plane]);
    }
    let mut sum = vec![0.0; plane];
    order.add(&planes, &mut sum);
    sum
}

#[test]
fn inputs_that_are_not_finite_poison_their_row_and_no_other() {
    let gpu = gpu();
    let weight = weight(&gpu, Encoding::Q4_1, 16, 64, 28);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![1.0; 3 * 64];
        x[64 + 40] = bad;
        let [out] = gpu.matmul([&weight.matrix], &gpu.upload_input(&x, 64).unwrap()).unwrap();
        let mut values = Vec::new();
        gpu.download(&out, &mut values).unwrap();
        assert!(values[16..32].iter().all(|out| !out.is_finite()), "{bad}");
        assert!(values[..16].iter().chain(&values[32..]).all(|out| out.is_finite()), "{bad}");
    }
}

#[test]
fn the_gated_mlp_is_silu_of_gate_times_up() {
    let gpu = gpu();
    // Of one form, and of two.
    for encodings in [[Encoding::Q4_0, Encoding::Q4_0], [Encoding::Q4K, Encoding::Q6K]] {
        let (n_in, n_out, n_rows) = (512, 96, 11);
        let [gate, up] = encodings.map(|encoding| weight(&gpu, encoding, n_out, n_in, 29));
        let x: Vec<f32> =
            random::floats(&mut random::seeded(30), n_rows * n_in).iter().map(|x| x.clamp(-1.0, 1.0)).collect();
        let out = gpu.gated(&gate.matrix, &up.matrix, &gpu.upload_input(&x, n_in).unwrap()).unwrap();
        let [values, sums_of_16, sums_of_32] = gpu.download_input(&out).unwrap();
        let products = exact(&gate, &x, n_in).into_iter().zip(exact(&up, &x, n_in));
        for (i, (found, ((gate, gate_size), (up, up_size)))) in values.iter().zip(products).enumerate() {
            let expected = gate / (1.0 + (-gate).exp()) * up;
            let bound = 2f64.powi(-8) * expected.abs() + 2f64.powi(-16) * gate_size * up_size.max(1.0) + 1e-5;
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= bound, "{encodings:?}, element {i}: {found} for {expected}");
        }
        check_sums(&values, &sums_of_16, 16);
        check_sums(&values, &sums_of_32, 32);
    }
}

#[test]
fn a_row_of_a_gated_mlp_has_the_same_bits_alone_and_among_others() {
    let gpu = gpu();
    // Two blocks of outputs of each weight, the last of one tile.
    let (n_in, n_out) = (288, 160);
    for encoding in [Encoding::Q4_0, Encoding::Q4_1, Encoding::Q8_0] {
        let [gate, up] = [33, 34].map(|seed| weight(&gpu, encoding, n_out, n_in, seed));
        let x = random::floats(&mut random::seeded(35), MANY_ROWS * n_in);
        let gated = |x: &[f32]| {
            let out = gpu.gated(&gate.matrix, &up.matrix, &gpu.upload_input(x, n_in).unwrap()).unwrap();
            gpu.download_input(&out).unwrap()
        };
        let together = gated(&x);
        for rows in [0..9, 48..MANY_ROWS] {
            let alone = gated(&x[rows.start * n_in..rows.end * n_in]);
            for (alone, together) in alone.iter().zip(&together) {
                let width = together.len() / MANY_ROWS;
                let what = format_args!("{encoding}, rows {rows:?}, {width} of each").to_string();
                assert_same_bits(alone, &together[rows.start * width..rows.end * width], &what);
            }
        }
    }
}

/// The sums of groups are those of the values, but for the rounding of f32.
pub(crate) fn check_sums(values: &[f32], sums: &[f32], group_len: usize) {
    assert_eq!(values.len(), sums.len() * group_len);
    for (group, sum) in values.chunks_exact(group_len).zip(sums) {
        let exact: f64 = group.iter().map(|value| f64::from(*value)).sum();
        let size: f64 = group.iter().map(|value| f64::from(value.abs())).sum();
        assert!((f64::from(*sum) - exact).abs() <= size * 2f64.powi(-20), "{sum} for {exact}");
    }
}
