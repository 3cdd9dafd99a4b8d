//! Products: the packed kernels against the plain twin, the plain twin against f64, and rows against each other.

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{Activations, Cpu, EncodedRows, Forms, Isa, PackedMatrix, Product, dequantize, plain};

use crate::{ROW_COUNTS, assert_same_bits, on_every_cpu, random};

/// Outputs: two panels and a part of one.
const N_OUT: usize = 37;

/// Columns that try tails where the encoding has them.
fn n_cols(encoding: Encoding) -> usize {
    match encoding.block_len() {
        1 => 83,
        32 => 160,
        _ => 512,
    }
}

/// Segment ends and subtrees for `n_cols` columns: three segments, the first two added up.
fn segments(encoding: Encoding) -> [usize; 3] {
    match encoding.block_len() {
        1 => [17, 50, 83],
        32 => [32, 96, 160],
        _ => [96, 320, 512],
    }
}

/// Rows as every kind of weights reads them.
fn inputs(cpu: &mut Cpu, x: &[f32], width: usize) -> Activations {
    let forms = if width.is_multiple_of(32) { Forms::Both } else { Forms::Floats };
    let mut inputs = Activations::new(forms);
    cpu.quantize(x, width, &mut inputs);
    inputs
}

fn multiply(cpu: &mut Cpu, weights: &PackedMatrix, x: &[f32], out: &mut [f32]) {
    let x = inputs(cpu, x, weights.n_in());
    cpu.matmul(weights, &x, out);
}

#[test]
fn products_have_the_bits_of_the_plain_twin() {
    for encoding in Encoding::ALL {
        let rng = &mut random::seeded(10);
        let n_in = n_cols(encoding);
        let bytes = random::weights(rng, encoding, N_OUT, n_in);
        let source = EncodedRows::new(encoding, &bytes, N_OUT, n_in).unwrap();
        let subtrees = [0..2, 2..3];
        let packed = PackedMatrix::pack(&source, &segments(encoding), &subtrees).unwrap();
        assert_eq!((packed.n_in(), packed.n_out(), packed.n_partials()), (n_in, N_OUT, 2));
        for n_rows in ROW_COUNTS {
            let x = random::floats(rng, n_rows * n_in);
            let mut expected = vec![0.0; 2 * n_rows * N_OUT];
            plain::matmul(&source, &segments(encoding), &subtrees, &x, &mut expected).unwrap();
            on_every_cpu(|cpu| {
                let mut out = vec![f32::NAN; expected.len()];
                multiply(cpu, &packed, &x, &mut out);
                assert_same_bits(&out, &expected, &format_args!("{encoding}, {n_rows} rows on {cpu:?}"));
            });
        }
    }
}

#[test]
fn several_products_of_one_input_are_the_products_one_by_one() {
    let rng = &mut random::seeded(11);
    let sources = [(Encoding::Q4_1, 40), (Encoding::BF16, 5), (Encoding::Q8_0, 16)];
    let bytes = sources.map(|(encoding, n_out)| random::weights(rng, encoding, n_out, 96));
    let packed: Vec<PackedMatrix> = sources
        .iter()
        .zip(&bytes)
        .map(|((encoding, n_out), bytes)| EncodedRows::new(*encoding, bytes, *n_out, 96).unwrap())
        .map(|source| PackedMatrix::pack_whole(&source).unwrap())
        .collect();
    let x = random::floats(rng, 5 * 96);
    on_every_cpu(|cpu| {
        let mut together = sources.map(|(_, n_out)| vec![f32::NAN; 5 * n_out]);
        let products = packed.iter().zip(&mut together).map(|(weights, out)| Product { weights, out });
        let inputs = inputs(cpu, &x, 96);
        cpu.matmul_many(&inputs, &mut products.collect::<Vec<_>>());
        for (weights, together) in packed.iter().zip(&together) {
            let mut alone = vec![f32::NAN; together.len()];
            multiply(cpu, weights, &x, &mut alone);
            assert_same_bits(together, &alone, &"together and alone");
        }
    });
}

/// The only error of a product with quantized weights is that of its 8-bit inputs: at most half a step, 1/254 of the
/// block's largest input, for each, times the weight; f32 rounding adds less than 2^-20 of the terms' magnitudes.
#[test]
fn products_are_within_the_rounding_of_their_inputs() {
    for encoding in Encoding::ALL {
        let rng = &mut random::seeded(12);
        let n_in = n_cols(encoding);
        let bytes = random::weights(rng, encoding, N_OUT, n_in);
        let source = EncodedRows::new(encoding, &bytes, N_OUT, n_in).unwrap();
        let packed = PackedMatrix::pack_whole(&source).unwrap();
        let mut weights = vec![0.0; N_OUT * n_in];
        dequantize(encoding, &bytes, &mut weights);
        let x = random::floats(rng, 4 * n_in);
        let mut out = vec![0.0; 4 * N_OUT];
        multiply(&mut Cpu::new(1), &packed, &x, &mut out);
        for (i, out) in out.iter().enumerate() {
            let (x, w) = (&x[i / N_OUT * n_in..][..n_in], &weights[i % N_OUT * n_in..][..n_in]);
            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let exact: f64 = terms.clone().sum();
            let magnitude: f64 = terms.map(f64::abs).sum();
            let mut bound = magnitude * 2f64.powi(-20);
            if encoding.block_len() > 1 {
                for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
                    bound += w.iter().map(|w| f64::from(w.abs())).sum::<f64>() * f64::from(largest) / 253.9;
                }
            }
            assert!((f64::from(*out) - exact).abs() <= bound, "{encoding}: {out} for {exact}, bound {bound}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    for encoding in [Encoding::Q4_1, Encoding::Q8_0, Encoding::Q6K, Encoding::F16] {
        let rng = &mut random::seeded(13);
        let bytes = random::weights(rng, encoding, N_OUT, 512);
        let packed = PackedMatrix::pack_whole(&EncodedRows::new(encoding, &bytes, N_OUT, 512).unwrap()).unwrap();
        let x = random::floats(rng, 70 * 512);
        let cpu = &mut Cpu::new(2);
        let mut together = vec![0.0; 70 * N_OUT];
        multiply(cpu, &packed, &x, &mut together);
        for (x, together) in x.chunks_exact(512).zip(together.chunks_exact(N_OUT)) {
            let mut alone = vec![0.0; N_OUT];
            multiply(cpu, &packed, x, &mut alone);
            assert_same_bits(together, &alone, &encoding);
        }
    }
}

#[test]
fn many_rows_and_wide_matrices_are_divided_among_tasks_without_gaps() {
    let rng = &mut random::seeded(14);
    // Inputs of 16,384 make a pass of 16 rows; 700 outputs make many runs of panels.
    let (n_in, n_out, n_rows) = (16_384, 700, 19);
    let bytes = random::weights(rng, Encoding::Q4_0, n_out, n_in);
    let source = EncodedRows::new(Encoding::Q4_0, &bytes, n_out, n_in).unwrap();
    let packed = PackedMatrix::pack_whole(&source).unwrap();
    let x = random::floats(rng, n_rows * n_in);
    let mut out = vec![f32::NAN; n_rows * n_out];
    multiply(&mut Cpu::new(2), &packed, &x, &mut out);
    for out_idx in [0, 15, 16, 350, 699] {
        let mut expected = vec![0.0; n_rows];
        plain::matmul(
            &source.rows(out_idx..out_idx + 1).unwrap(),
            &[n_in],
            std::slice::from_ref(&(0..1)),
            &x,
            &mut expected,
        )
        .unwrap();
        let actual: Vec<f32> = (0..n_rows).map(|row_idx| out[row_idx * n_out + out_idx]).collect();
        assert_same_bits(&actual, &expected, &format_args!("output {out_idx}"));
    }
    assert!(out.iter().all(|out| out.is_finite()));
}

#[test]
fn inputs_that_are_not_finite_poison_their_row_and_no_other() {
    let bytes = random::weights(&mut random::seeded(15), Encoding::Q4_1, 16, 64);
    let packed = PackedMatrix::pack_whole(&EncodedRows::new(Encoding::Q4_1, &bytes, 16, 64).unwrap()).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![1.0; 3 * 64];
        x[64 + 40] = bad;
        on_every_cpu(|cpu| {
            let mut out = vec![0.0; 3 * 16];
            multiply(cpu, &packed, &x, &mut out);
            assert!(out[16..32].iter().all(|out| out.is_nan()), "{bad}");
            assert!(out[..16].iter().chain(&out[32..]).all(|out| out.is_finite()), "{bad}");
        });
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    // All codes at either end, activations too: the largest integers a dot product can meet.
    for encoding in Encoding::ALL.into_iter().filter(|encoding| encoding.block_len() > 1) {
        let n_in = encoding.block_len();
        for code in [0x00, 0x7f, 0x80, 0xff] {
            let mut bytes = vec![code; 16 * encoding.block_bytes()];
            for block in bytes.chunks_exact_mut(encoding.block_bytes()) {
                let halves = random::halves(encoding).iter();
                halves.for_each(|at| block[*at..at + 2].copy_from_slice(&half::f16::ONE.to_le_bytes()));
            }
            let source = EncodedRows::new(encoding, &bytes, 16, n_in).unwrap();
            let packed = PackedMatrix::pack_whole(&source).unwrap();
            let mut weights = vec![0.0; 16 * n_in];
            dequantize(encoding, &bytes, &mut weights);
            for x in [-127.0, 127.0] {
                // Every sum on the way is an integer that a float holds exactly. None is -0: sums begin at 0.
                let expected = 0.0 + weights[..n_in].iter().sum::<f32>() * x;
                on_every_cpu(|cpu| {
                    let mut out = [0.0; 16];
                    multiply(cpu, &packed, &vec![x; n_in], &mut out);
                    let what = format_args!("{encoding} of {code:#x} times {x} on {:?}", cpu.isa());
                    assert_same_bits(&out, &[expected; 16], &what);
                });
            }
        }
    }
}

#[test]
fn an_instruction_set_that_is_not_there_is_refused() {
    for isa in Isa::ALL {
        assert_eq!(Cpu::with_isa(1, isa).is_ok(), isa.is_supported());
    }
    assert!(Isa::best().is_supported());
    assert_eq!(Cpu::new(2).isa(), Isa::best());
    assert_eq!(Cpu::new(2).n_threads(), 2);
}
