//! Products: within the rounding of f32 sums of the exact products of rounded inputs; rows and ranks against each other.

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
        let n_rows = if encoding == Encoding::Q4_0 { 37 } else { 3 };
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

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    let gpu = gpu();
    for encoding in [Encoding::Q4_0, Encoding::Q4K, Encoding::Q6K, Encoding::Q8_0, Encoding::NF4, Encoding::BF16] {
        let n_in = 512;
        let weight = weight(&gpu, encoding, 40, n_in, 22);
        let x = random::floats(&mut random::seeded(23), 70 * n_in);
        let multiply = |x: &[f32]| {
            let [out] = gpu.matmul([&weight.matrix], &gpu.upload_input(x, n_in).unwrap()).unwrap();
            let mut values = Vec::new();
            gpu.download(&out, &mut values).unwrap();
            values
        };
        let together = multiply(&x);
        for n_rows in [1, 9, 17, 33] {
            let alone = multiply(&x[5 * n_in..(5 + n_rows) * n_in]);
            assert_same_bits(&alone, &together[5 * 40..(5 + n_rows) * 40], &format_args!("{encoding}, {n_rows} rows"));
        }
    }
}

#[test]
fn several_products_of_one_input_are_the_products_one_by_one() {
    let gpu = gpu();
    let weights = [(Encoding::Q4_1, 40), (Encoding::Q4_1, 64), (Encoding::Q8_0, 33)]
        .map(|(encoding, n_out)| weight(&gpu, encoding, n_out, 96, 24));
    let x = gpu.upload_input(&random::floats(&mut random::seeded(25), 5 * 96), 96).unwrap();
    let together = gpu.matmul(weights.each_ref().map(|weight| &weight.matrix), &x).unwrap();
    for (weight, together) in weights.iter().zip(&together) {
        let [alone] = gpu.matmul([&weight.matrix], &x).unwrap();
        let (mut a, mut b) = (Vec::new(), Vec::new());
        gpu.download(&alone, &mut a).unwrap();
        gpu.download(together, &mut b).unwrap();
        assert_same_bits(&b, &a, &weight.encoding);
    }
}

#[test]
fn a_row_parallel_product_has_the_same_bits_over_ranks() {
    let gpu = gpu();
    for encoding in [Encoding::Q4_0, Encoding::Q4K] {
        let (n_in, n_out, n_rows) = (1536, 40, 2);
        // Six segments of a block of 256 each.
        let (tree, segment) = (SumTree::new(6), 256);
        let bytes = random::weights(&mut random::seeded(26), encoding, n_out, n_in);
        let source = EncodedRows::new(encoding, &bytes, n_out, n_in).unwrap();
        let x = random::floats(&mut random::seeded(27), n_rows * n_in);
        let mut expected: Option<Vec<f32>> = None;
        for ranks in [vec![0..6], vec![0..3, 3..6], vec![0..2, 2..4, 4..6], vec![0..1, 1..6]] {
            let subtrees: Vec<_> = ranks.iter().map(|rank| tree.subtrees(rank.clone())).collect();
            let order = tree.order(&subtrees.concat());
            let mut planes = Vec::new();
            for (rank, owned) in ranks.iter().enumerate() {
                let columns = owned.start * segment..owned.end * segment;
                let local: Vec<_> =
                    subtrees[rank].iter().map(|tree| tree.start - owned.start..tree.end - owned.start).collect();
                let ends: Vec<_> = (1..=owned.len()).map(|i| i * segment).collect();
                let sum = RowParallelSum { segment_ends: &ends, subtrees: &local, order: &order };
                let matrix = gpu.load_matrix(&source.cols(columns.clone()).unwrap(), Some(sum)).unwrap();
                let mine: Vec<f32> = x.chunks_exact(n_in).flat_map(|x| &x[columns.clone()]).copied().collect();
                let first = planes.len() / (n_rows * n_out);
                let terms =
                    gpu.matmul_partial(&matrix, &gpu.upload_input(&mine, columns.len()).unwrap(), first).unwrap();
                let mut all = Vec::new();
                terms.download(&mut all).unwrap();
                planes.extend_from_slice(&all[first * n_rows * n_out..][..local.len() * n_rows * n_out]);
            }
            let mut sum = vec![0.0; n_rows * n_out];
            order.add(&planes, &mut sum);
            match &expected {
                None => expected = Some(sum),
                Some(expected) => assert_same_bits(&sum, expected, &format_args!("{encoding}, ranks {ranks:?}")),
            }
        }
    }
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

/// The sums of groups are those of the values, but for the rounding of f32.
pub(crate) fn check_sums(values: &[f32], sums: &[f32], group_len: usize) {
    assert_eq!(values.len(), sums.len() * group_len);
    for (group, sum) in values.chunks_exact(group_len).zip(sums) {
        let exact: f64 = group.iter().map(|value| f64::from(*value)).sum();
        let size: f64 = group.iter().map(|value| f64::from(value.abs())).sum();
        assert!((f64::from(*sum) - exact).abs() <= size * 2f64.powi(-20), "{sum} for {exact}");
    }
}
