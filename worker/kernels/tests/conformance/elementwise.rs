//! Normalization and gated products against their plain twins.

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{Activations, EncodedRows, Forms, PackedMatrix, SumTree, Terms, plain};
use rand_chacha::ChaCha8Rng;

use crate::{ROW_COUNTS, assert_same_bits, on_every_cpu, random};

/// Widths: SmolLM2's, one with a tail, one below a vector; the last makes several tasks of 33 rows.
const WIDTHS: [usize; 4] = [576, 83, 5, 2_000];

/// What a product with this matrix makes of an input shows every bit of its quantized form.
fn some_weights(rng: &mut ChaCha8Rng, n_out: usize, n_in: usize) -> Vec<u8> {
    random::weights(rng, Encoding::Q4_1, n_out, n_in)
}

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "a subtree list of one")]
fn rms_norm_of_a_sum_has_the_bits_of_the_plain_twins() {
    let rng = &mut random::seeded(30);
    for (width, n_rows) in WIDTHS.iter().flat_map(|width| ROW_COUNTS.map(|n_rows| (*width, n_rows))) {
        let (x, weight) = (random::floats(rng, n_rows * width), random::floats(rng, width));
        // Three segments on two ranks, of which the second holds one subtree.
        for subtrees in [vec![], vec![0..3], vec![0..1, 1..2, 2..3], vec![0..2, 2..3]] {
            let planes = random::floats(rng, subtrees.len() * x.len());
            let order = (!subtrees.is_empty()).then(|| SumTree::new(3).order(&subtrees));
            let mut sum = x.clone();
            if let Some(order) = &order {
                let mut terms = vec![0.0; x.len()];
                order.add(&planes, &mut terms);
                sum.iter_mut().zip(&terms).for_each(|(sum, term)| *sum += term);
            }
            let mut expected = vec![0.0; x.len()];
            plain::rms_norm(&sum, &weight, 1e-5, &mut expected);
            on_every_cpu(|cpu| {
                let (mut x, mut out) = (x.clone(), Activations::new(Forms::Floats));
                let terms = order.as_ref().map(|order| Terms { planes: &planes, order });
                cpu.rms_norm(&mut x, terms, &weight, 1e-5, &mut out);
                let what = format!("{n_rows} rows of {width}, {subtrees:?} on {cpu:?}");
                assert_same_bits(&x, &sum, &what);
                assert_same_bits(out.values(), &expected, &what);
            });
        }
    }
}

#[test]
fn normalized_rows_are_quantized_as_if_by_themselves() {
    let rng = &mut random::seeded(35);
    let bytes = some_weights(rng, 20, 576);
    let source = EncodedRows::new(Encoding::Q4_1, &bytes, 20, 576).unwrap();
    let packed = PackedMatrix::pack_whole(&source).unwrap();
    for n_rows in ROW_COUNTS {
        let (x, weight) = (random::floats(rng, n_rows * 576), random::floats(rng, 576));
        let (mut normed, mut expected) = (vec![0.0; x.len()], vec![0.0; n_rows * 20]);
        plain::rms_norm(&x, &weight, 1e-5, &mut normed);
        plain::matmul(&source, &[576], std::slice::from_ref(&(0..1)), &normed, &mut expected).unwrap();
        on_every_cpu(|cpu| {
            let (mut input, mut out) = (Activations::new(Forms::Quantized), vec![f32::NAN; n_rows * 20]);
            cpu.rms_norm(&mut x.clone(), None, &weight, 1e-5, &mut input);
            cpu.matmul(&packed, &input, &mut out);
            assert_same_bits(&out, &expected, &format_args!("{n_rows} rows on {cpu:?}"));
        });
    }
}

#[test]
fn rms_norm_is_near_f64() {
    let rng = &mut random::seeded(31);
    let (x, weight) = (random::floats(rng, 576), random::floats(rng, 576));
    let mut out = vec![0.0; 576];
    plain::rms_norm(&x, &weight, 1e-5, &mut out);
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 576.0;
    for i in 0..576 {
        let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
        assert!((f64::from(out[i]) - exact).abs() <= exact.abs() * 1e-6, "{} for {exact}", out[i]);
    }
}

#[test]
fn gated_products_have_the_bits_of_the_plain_twins() {
    let rng = &mut random::seeded(32);
    let whole = std::slice::from_ref(&(0..1));
    // Whole pairs of panels, and a part of one (which only floats can have); formats that differ.
    let cases = [
        (Encoding::Q4_1, Encoding::Q4_1, Encoding::Q8_0, 96),
        (Encoding::Q6K, Encoding::Q6K, Encoding::Q4_1, 96),
        (Encoding::Q4K, Encoding::Q6K, Encoding::Q4_1, 64),
        (Encoding::Q4_0, Encoding::F16, Encoding::BF16, 96),
        (Encoding::F32, Encoding::BF16, Encoding::F16, 83),
        (Encoding::F16, Encoding::F16, Encoding::F32, 5),
    ];
    for (gate_encoding, up_encoding, down_encoding, width) in cases {
        let mut load = |encoding, n_out, n_in| (random::weights(rng, encoding, n_out, n_in), encoding, n_out, n_in);
        let weights = [load(gate_encoding, width, 512), load(up_encoding, width, 512), load(down_encoding, 20, width)];
        let [gate, up, down] = weights
            .each_ref()
            .map(|(bytes, encoding, n_out, n_in)| EncodedRows::new(*encoding, bytes, *n_out, *n_in).unwrap());
        let packed_down = PackedMatrix::pack_whole(&down).unwrap();
        let [packed_gate, packed_up] = PackedMatrix::pack_pair([&gate, &up]).unwrap();
        for (packed, source) in [(&packed_gate, &gate), (&packed_up, &up)] {
            assert_eq!(packed.size_bytes(), PackedMatrix::pack_whole(source).unwrap().size_bytes());
            let [mut row, mut expected] = [vec![0.0; 512], vec![0.0; 512]];
            packed.dequantize_row(width - 1, &mut row);
            lockstep_kernels::dequantize(source.encoding(), source.row(width - 1), &mut expected);
            assert_same_bits(&row, &expected, &format_args!("the last row of {}", source.encoding()));
        }
        for n_rows in ROW_COUNTS {
            // Gates far beyond where the exponential is cut off on either side.
            let x: Vec<f32> = random::floats(rng, n_rows * 512).iter().map(|x| x * 30.0).collect();
            let mut planes = [vec![0.0; n_rows * width], vec![0.0; n_rows * width]];
            plain::matmul(&gate, &[512], whole, &x, &mut planes[0]).unwrap();
            plain::matmul(&up, &[512], whole, &x, &mut planes[1]).unwrap();
            let (mut hidden, mut expected) = (vec![0.0; n_rows * width], vec![0.0; n_rows * 20]);
            plain::silu_mul(&planes[0], &planes[1], &mut hidden);
            plain::matmul(&down, &[width], whole, &hidden, &mut expected).unwrap();
            on_every_cpu(|cpu| {
                let what = format!("{gate_encoding}, {up_encoding}, {down_encoding}, {n_rows} rows on {cpu:?}");
                let forms = if width.is_multiple_of(32) { Forms::Both } else { Forms::Floats };
                let (mut input, mut gated) = (Activations::new(Forms::Both), Activations::new(forms));
                cpu.quantize(&x, 512, &mut input);
                cpu.gated(&packed_gate, &packed_up, &input, &mut gated);
                assert_same_bits(gated.values(), &hidden, &what);
                let mut out = vec![f32::NAN; expected.len()];
                cpu.matmul(&packed_down, &gated, &mut out);
                assert_same_bits(&out, &expected, &what);
            });
        }
    }
}

#[test]
fn silu_is_near_f64() {
    for i in -9_000..9_000i16 {
        let gate = f32::from(i) / 100.0;
        let mut out = [0.0];
        plain::silu_mul(&[gate], &[1.0], &mut out);
        let exact = f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
        // Below -87 the power counts as e^88 or less; what is left is under the smallest normal float.
        assert!((f64::from(out[0]) - exact).abs() <= exact.abs() * 4e-7 + 1e-36, "{gate}: {} for {exact}", out[0]);
    }
}
