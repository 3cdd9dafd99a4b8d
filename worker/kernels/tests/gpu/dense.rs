//! Dense products: within the rounding of f32 sums of the exact products of inputs and weights that are rounded to bf16; and
//! nothing of the kind where there are few rows, or what the library cannot do.

use std::ops::Range;

use half::bf16;
use lockstep_checkpoint::Encoding;
use lockstep_kernels::{
    EncodedRows, SumTree,
    cuda::{Gpu, GpuInput, GpuMatrix, RowParallelSum},
    dequantize,
};

use crate::{assert_same_bits, gpu, products::check_sums, random};

/// Rows from which on products are dense.
const MIN_ROWS: usize = 512;

/// A weight on the GPU, and its values, rounded to bf16.
struct Weight {
    rounded: Vec<f32>,
    matrix: GpuMatrix,
}

/// Dense products, and those that keep the lockstep rule.
fn gpus() -> [Gpu; 2] {
    [gpu().with_dense_prompts().unwrap(), gpu()]
}

fn bytes(encoding: Encoding, n_out: usize, n_in: usize) -> Vec<u8> {
    random::weights(&mut random::seeded(60), encoding, n_out, n_in)
}

fn rounded(encoding: Encoding, bytes: &[u8], len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    dequantize(encoding, bytes, &mut values);
    values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect()
}

fn weight(gpu: &Gpu, encoding: Encoding, n_out: usize, n_in: usize) -> Weight {
    let bytes = bytes(encoding, n_out, n_in);
    let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
    Weight { rounded: rounded(encoding, &bytes, n_out * n_in), matrix: gpu.load_matrix(&source, None).unwrap() }
}

fn inputs(n_rows: usize, n_in: usize) -> Vec<f32> {
    random::floats(&mut random::seeded(61), n_rows * n_in)
}

fn input(gpu: &Gpu, x: &[f32], n_in: usize) -> GpuInput {
    gpu.upload_input(x, n_in).unwrap()
}

fn multiply(gpu: &Gpu, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let [out] = gpu.matmul([&weight.matrix], &input(gpu, x, weight.matrix.n_in())).unwrap();
    let mut values = Vec::new();
    gpu.download(&out, &mut values).unwrap();
    values
}

/// The product of one row and one output, and the magnitude of its terms, in f64.
fn exact(x: &[f32], w: &[f32]) -> (f64, f64) {
    let terms = x.iter().zip(w).map(|(x, w)| f64::from(bf16::from_f32(*x).to_f32()) * f64::from(*w));
    (terms.clone().sum(), terms.map(f64::abs).sum())
}

/// Checks the first rows, the last, and some where the library's tiles begin.
fn check(found: &[f32], x: &[f32], w: &[f32], n_in: usize, what: &dyn std::fmt::Display) {
    let (n_rows, n_out) = (x.len() / n_in, w.len() / n_in);
    assert_eq!(found.len(), n_rows * n_out, "{what}");
    for row in [0, 1, 127, 128, 255, 256, n_rows - 1] {
        for output in 0..n_out {
            let (exact, magnitude) = exact(&x[row * n_in..][..n_in], &w[output * n_in..][..n_in]);
            let found = f64::from(found[row * n_out + output]);
            let bound = magnitude * 2f64.powi(-19) + 1e-9;
            assert!((found - exact).abs() <= bound, "{what}, row {row}, output {output}: {found} for {exact}");
        }
    }
}

fn differs(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).any(|(a, b)| a.to_bits() != b.to_bits())
}

#[test]
fn dense_products_are_those_of_weights_in_bf16() {
    let gpu = gpu().with_dense_prompts().unwrap();
    for encoding in Encoding::ALL {
        // A tile of outputs that is not whole; blocks of inputs of the kernel that are not.
        let (n_out, n_in) = (72, if encoding.block_len() > 32 { 512 } else { 288 });
        let weight = weight(&gpu, encoding, n_out, n_in);
        let x = inputs(MIN_ROWS + 3, n_in);
        check(&multiply(&gpu, &weight, &x), &x, &weight.rounded, n_in, &encoding);
    }
}

#[test]
fn products_of_few_rows_keep_the_rule() {
    let [dense, own] = gpus();
    let [fast, exact] = [&dense, &own].map(|gpu| weight(gpu, Encoding::Q4_1, 64, 96));
    let x = inputs(MIN_ROWS, 96);
    let few = &x[..(MIN_ROWS - 1) * 96];
    assert_same_bits(&multiply(&dense, &fast, few), &multiply(&own, &exact, few), &"few rows");
    // Weights that are rounded are others.
    assert!(differs(&multiply(&dense, &fast, &x), &multiply(&own, &exact, &x)), "many rows");
}

#[test]
fn what_the_library_cannot_do_keeps_the_rule() {
    let [dense, own] = gpus();
    let x = inputs(MIN_ROWS, 96);
    // Rows of 28 outputs are not aligned to 16 bytes as those of 64 are, which come in the same call.
    let products = |gpu: &Gpu| {
        let weights = [28, 64].map(|n_out| weight(gpu, Encoding::Q4_0, n_out, 96));
        let out = gpu.matmul(weights.each_ref().map(|weight| &weight.matrix), &input(gpu, &x, 96)).unwrap();
        let found = out.map(|out| {
            let mut values = Vec::new();
            gpu.download(&out, &mut values).unwrap();
            values
        });
        (found, weights)
    };
    let (([odd, even], [_, weight]), ([own_odd, own_even], _)) = (products(&dense), products(&own));
    assert_same_bits(&odd, &own_odd, &"28 outputs");
    assert!(differs(&even, &own_even), "64 outputs");
    check(&even, &x, &weight.rounded, 96, &"64 outputs");
}

#[test]
fn a_dense_gated_mlp_is_silu_of_gate_times_up() {
    let gpu = gpu().with_dense_prompts().unwrap();
    for [of_gate, of_up] in [[Encoding::Q4_0, Encoding::Q4_0], [Encoding::Q4K, Encoding::Q6K]] {
        let (n_out, n_in) = (96, 256);
        let [gate_bytes, up_bytes] = [of_gate, of_up].map(|encoding| bytes(encoding, n_out, n_in));
        let rows = |encoding, bytes| EncodedRows::new(encoding, bytes, n_out, n_in).unwrap();
        let sources = [rows(of_gate, &gate_bytes), rows(of_up, &up_bytes)];
        let [gate, up] = gpu.load_gated(sources.each_ref()).unwrap();
        let x: Vec<f32> = inputs(MIN_ROWS, n_in).iter().map(|x| x.clamp(-1.0, 1.0)).collect();
        let out = gpu.gated(&gate, &up, &input(&gpu, &x, n_in)).unwrap();
        let [values, sums_of_16, sums_of_32] = gpu.download_input(&out).unwrap();
        let gate = rounded(of_gate, &gate_bytes, n_out * n_in);
        let up = rounded(of_up, &up_bytes, n_out * n_in);
        for row in [0, 255, MIN_ROWS - 1] {
            for output in 0..n_out {
                let of = |w: &[f32]| exact(&x[row * n_in..][..n_in], &w[output * n_in..][..n_in]);
                let ((gate, gate_size), (up, up_size)) = (of(&gate), of(&up));
                let expected = gate / (1.0 + (-gate).exp()) * up;
                // The result is rounded to bf16.
                let bound = 2f64.powi(-8) * expected.abs() + 2f64.powi(-18) * gate_size * up_size.max(1.0) + 1e-6;
                let found = f64::from(values[row * n_out + output]);
                assert!((found - expected).abs() <= bound, "row {row}, output {output}: {found} for {expected}");
            }
        }
        check_sums(&values, &sums_of_16, 16);
        check_sums(&values, &sums_of_32, 32);
    }
}

#[test]
fn a_rank_whose_sum_is_one_plane_multiplies_densely() {
    let [dense, own] = gpus();
    let (n_out, n_in, segment) = (40, 512, 128);
    let bytes = bytes(Encoding::Q5_0, n_out, n_in);
    let source = EncodedRows::new(Encoding::Q5_0, &bytes, n_out, n_in).unwrap();
    let tree = SumTree::new(n_in / segment);
    let order = tree.order(&tree.subtrees(0..2).into_iter().chain(tree.subtrees(2..4)).collect::<Vec<_>>());
    assert_eq!(order.n_planes(), 2);
    let x = inputs(MIN_ROWS, n_in);
    // The second half of the columns is the second rank's: two segments, one plane.
    let mine: Vec<f32> = x.chunks_exact(n_in).flat_map(|x| &x[n_in / 2..]).copied().collect();
    let plane = MIN_ROWS * n_out;
    let planes = |gpu: &Gpu, subtrees: &[Range<usize>], first: usize| {
        let sum = RowParallelSum { segment_ends: &[segment, 2 * segment], subtrees, order: &order };
        let matrix = gpu.load_matrix(&source.cols(n_in / 2..n_in).unwrap(), Some(sum)).unwrap();
        let x = input(gpu, &mine, n_in / 2);
        let mut terms = gpu.matmul_partial(&matrix, &x, first).unwrap();
        // The next takes the same memory.
        terms.upload(&vec![7.0; 2 * plane]).unwrap();
        drop(terms);
        let mut all = Vec::new();
        gpu.matmul_partial(&matrix, &x, first).unwrap().download(&mut all).unwrap();
        all
    };
    let whole = std::slice::from_ref(&(0..2));
    let found = planes(&dense, whole, 1);
    assert_eq!(found[..plane], vec![7.0; plane], "the other rank's plane");
    let values = rounded(Encoding::Q5_0, &bytes, n_out * n_in);
    let values: Vec<f32> = values.chunks_exact(n_in).flat_map(|w| &w[n_in / 2..]).copied().collect();
    check(&found[plane..], &mine, &values, n_in / 2, &"one plane");
    assert!(differs(&found[plane..], &planes(&own, whole, 1)[plane..]), "one plane");
    // As two planes, which are apart for others to add.
    let apart = [0..1, 1..2];
    assert_same_bits(&planes(&dense, &apart, 0), &planes(&own, &apart, 0), &"two planes");
}
