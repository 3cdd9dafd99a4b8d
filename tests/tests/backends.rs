//! Both backends against the f64 oracle, on random models in every encoding and in odd shapes.
//!
//! Tolerances. The `reference` backend computes in float32 without any quantization of its own: it is within float32's
//! rounding of the oracle. The `cpu` backend rounds the inputs of quantized layers to int8 in blocks of 32 (relative
//! error of a block about 1/254 of its largest value), and keeps keys and values as f16: over two layers that moves
//! logits of spread 3 by some hundredths. Keys and values in int8 do nearly as much by themselves. Weights that are floats
//! are not quantized at all, and stay close.

use lockstep_checkpoint::{Checkpoint, Encoding};
use lockstep_kernels::KvEncoding;
use lockstep_tests::{
    oracle,
    ranks::Ranks,
    tiny_model::{Container, TinyModel},
};
use lockstep_worker::device::Device;

const PROMPT: [u32; 24] =
    [5, 17, 301, 44, 9, 260, 3, 77, 128, 255, 64, 31, 8, 190, 222, 101, 12, 13, 14, 350, 2, 99, 140, 7];

/// Root mean square of the difference between a backend's logits and the oracle's, or between their hidden states, whichever
/// is greater.
fn difference(model: &TinyModel, device: &Device, kv_encoding: KvEncoding) -> f64 {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model");
    model.write(&path).expect("the model is written");
    let checkpoint = Checkpoint::open(&path).expect("it opens");
    let mut ranks = Ranks::load(&path, device, kv_encoding, 1, 1, 64).expect("the model loads");
    let logits = oracle::logits(&checkpoint, &PROMPT).expect("the oracle runs");
    let hidden = oracle::hidden(&checkpoint, &PROMPT).expect("the oracle runs");
    let of_logits = root_mean_square(&logits, &ranks.logits(&PROMPT, 16).expect("the model runs"));
    of_logits.max(root_mean_square(&hidden, &ranks.hidden(&PROMPT, 16).expect("the model runs")))
}

fn root_mean_square(wanted: &[Vec<f64>], got: &[f32]) -> f64 {
    assert_eq!(wanted.iter().flatten().count(), got.len());
    let squares = wanted.iter().flatten().zip(got).map(|(wanted, got)| (wanted - f64::from(*got)).powi(2));
    (squares.sum::<f64>() / got.len() as f64).sqrt()
}

#[test]
fn the_reference_backend_computes_what_the_oracle_computes_in_every_encoding() {
    for encoding in Encoding::ALL {
        let model = TinyModel { encoding, ..TinyModel::default() }.in_fitting_container();
        let off = difference(&model, &Device::Reference, KvEncoding::F16);
        println!("{encoding}: {off:.2e}");
        assert!(off < 1e-4, "{encoding} is off by {off}");
    }
}

#[test]
fn the_cpu_backend_is_within_its_rounding_in_every_encoding() {
    for encoding in Encoding::ALL {
        let model = TinyModel { encoding, ..TinyModel::default() }.in_fitting_container();
        let off = difference(&model, &Device::Cpu, KvEncoding::F16);
        println!("{encoding}: {off:.2e}");
        assert!(off < 0.1, "{encoding} is off by {off}");
    }
}

/// What a folder can have.
fn float_embedding() -> TinyModel {
    TinyModel { encoding: Encoding::U4_32, embedding_encoding: Encoding::F16, ..TinyModel::default() }
}

#[test]
fn odd_shapes_are_computed_alike() {
    let shapes = [
        TinyModel { n_heads: 6, n_kv_heads: 2, tied: true, ..TinyModel::default() },
        TinyModel { rope_dim: 16, rope_base: 500_000.0, ..TinyModel::default() },
        TinyModel { rope_factors: Some((0..16).map(|i| 1.0 + i as f32 / 2.0).collect()), ..TinyModel::default() },
        TinyModel { n_heads: 8, n_kv_heads: 8, n_layers: 1, ..TinyModel::default() },
        TinyModel { vocab_size: 389, ..TinyModel::default() },
        TinyModel { container: Container::Folder, encoding: Encoding::BF16, ..float_embedding() },
        TinyModel { container: Container::Folder, n_heads: 6, n_kv_heads: 2, tied: true, ..float_embedding() },
    ];
    for model in shapes {
        for (device, kv_encoding, limit) in [
            (&Device::Reference, KvEncoding::F16, 1e-4),
            (&Device::Reference, KvEncoding::Int8, 0.1),
            (&Device::Cpu, KvEncoding::F16, 0.1),
            (&Device::Cpu, KvEncoding::Int8, 0.1),
        ] {
            let off = difference(&model, device, kv_encoding);
            println!("{device}, {kv_encoding:?}: {off:.2e}");
            assert!(off < limit, "{device}, {kv_encoding:?} is off by {off} on {model:?}");
        }
    }
}
