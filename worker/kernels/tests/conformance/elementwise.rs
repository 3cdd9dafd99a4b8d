//! Elementwise ops, normalization, rotation and embedding against their plain twins.

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{EncodedRows, PackedMatrix, RopeStyle, RopeTable, plain};

use crate::{ROW_COUNTS, assert_same_bits, on_every_cpu, random};

/// Widths: SmolLM2's, one with a tail, one below a vector; the last makes several tasks of 33 rows.
const WIDTHS: [usize; 4] = [576, 83, 5, 2_000];

#[test]
fn rms_norm_has_the_bits_of_the_plain_twin() {
    let rng = &mut random::seeded(30);
    for (width, n_rows) in WIDTHS.iter().flat_map(|width| ROW_COUNTS.map(|n_rows| (*width, n_rows))) {
        let (x, weight) = (random::floats(rng, n_rows * width), random::floats(rng, width));
        let mut expected = vec![0.0; x.len()];
        plain::rms_norm(&x, &weight, 1e-5, &mut expected);
        on_every_cpu(|cpu| {
            let mut out = vec![f32::NAN; x.len()];
            cpu.rms_norm(&x, &weight, 1e-5, n_rows, &mut out);
            assert_same_bits(&out, &expected, &format_args!("{n_rows} rows of {width} on {cpu:?}"));
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
fn adding_and_gating_have_the_bits_of_the_plain_twins() {
    let rng = &mut random::seeded(32);
    for n in [1, 15, 16, 33, 576, 40_003] {
        // Gates far beyond where the exponential is cut off on either side.
        let gate: Vec<f32> = random::floats(rng, n).iter().map(|x| x * 3.0).collect();
        let up = random::floats(rng, n);
        let (mut sum, mut gated) = (gate.clone(), vec![0.0; n]);
        plain::add(&up, &mut sum);
        plain::silu_mul(&gate, &up, &mut gated);
        on_every_cpu(|cpu| {
            let (mut acc, mut out) = (gate.clone(), vec![f32::NAN; n]);
            cpu.add(&up, &mut acc);
            assert_same_bits(&acc, &sum, &format_args!("sum of {n} on {cpu:?}"));
            cpu.silu_mul(&gate, &up, &mut out);
            assert_same_bits(&out, &gated, &format_args!("{n} gates on {cpu:?}"));
        });
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

#[test]
fn rotation_has_the_bits_of_the_plain_twin() {
    let rng = &mut random::seeded(33);
    for style in [RopeStyle::Adjacent, RopeStyle::Halves] {
        for (head_dim, rope_dim) in [(64, 64), (80, 32), (128, 128)] {
            let table = RopeTable::new(head_dim, rope_dim, 500_000.0, None, 300, style).unwrap();
            for n_rows in ROW_COUNTS {
                let x = random::floats(rng, n_rows * 9 * head_dim);
                let positions: Vec<u32> = (0..n_rows as u32).map(|i| i * 97 % 300).collect();
                let mut expected = x.clone();
                plain::rope(&mut expected, 9, &table, &positions);
                on_every_cpu(|cpu| {
                    let mut out = x.clone();
                    cpu.rope(&mut out, 9, &table, &positions);
                    assert_same_bits(&out, &expected, &format_args!("{style:?}, {n_rows} rows on {cpu:?}"));
                });
            }
        }
    }
}

#[test]
fn embedding_has_the_bits_of_the_file() {
    let rng = &mut random::seeded(34);
    for encoding in Encoding::ALL {
        let bytes = random::weights(rng, encoding, 50, 512);
        let source = EncodedRows::new(encoding, &bytes, 50, 512).unwrap();
        let table = PackedMatrix::pack_whole(&source).unwrap();
        for n_rows in ROW_COUNTS {
            let ids: Vec<u32> = (0..n_rows as u32).map(|i| i * 31 % 50).collect();
            let mut expected = vec![0.0; n_rows * 512];
            plain::embed(&source, &ids, &mut expected);
            on_every_cpu(|cpu| {
                let mut out = vec![f32::NAN; n_rows * 512];
                cpu.embed(&table, &ids, &mut out);
                assert_same_bits(&out, &expected, &format_args!("{encoding}, {n_rows} ids on {cpu:?}"));
            });
        }
    }
}
