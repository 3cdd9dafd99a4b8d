//! What bytes mean: against candle, an independent reader of the same formats.

use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
use candle_core::{Device, Tensor};
use lockstep_checkpoint::Encoding;
use lockstep_kernels::{EncodedRows, PackedMatrix, dequantize};

use crate::{assert_same_bits, random};

/// candle's name, where it reads the encoding. The others are held against the f64 oracle (`tests/tests/backends.rs`),
/// which is held against the `gguf` package.
fn candle_type(encoding: Encoding) -> Option<GgmlDType> {
    let known = match encoding {
        Encoding::F32 => GgmlDType::F32,
        Encoding::F16 => GgmlDType::F16,
        Encoding::BF16 => GgmlDType::BF16,
        Encoding::Q4_0 => GgmlDType::Q4_0,
        Encoding::Q4_1 => GgmlDType::Q4_1,
        Encoding::Q5_0 => GgmlDType::Q5_0,
        Encoding::Q5_1 => GgmlDType::Q5_1,
        Encoding::Q8_0 => GgmlDType::Q8_0,
        Encoding::Q2K => GgmlDType::Q2K,
        Encoding::Q3K => GgmlDType::Q3K,
        Encoding::Q4K => GgmlDType::Q4K,
        Encoding::Q5K => GgmlDType::Q5K,
        Encoding::Q6K => GgmlDType::Q6K,
        Encoding::IQ4_NL | Encoding::IQ4_XS => return None,
        Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 | Encoding::I8_32 => return None,
        Encoding::NF4 | Encoding::FP4 => return None,
    };
    Some(known)
}

#[test]
fn encodings_dequantize_as_candle_has_it() {
    for (encoding, candle_type) in Encoding::ALL.into_iter().filter_map(|it| Some((it, candle_type(it)?))) {
        let bytes = random::weights(&mut random::seeded(1), encoding, 20, 512);
        let tensor = qtensor_from_ggml(candle_type, &bytes, vec![20, 512], &Device::Cpu).unwrap();
        let expected = tensor.dequantize(&Device::Cpu).and_then(|tensor: Tensor| tensor.flatten_all()).unwrap();
        let mut actual = vec![0.0; 20 * 512];
        dequantize(encoding, &bytes, &mut actual);
        assert_same_bits(&actual, &expected.to_vec1::<f32>().unwrap(), &encoding);
    }
}

#[test]
fn a_packed_row_is_the_row_of_the_file() {
    for encoding in Encoding::ALL {
        let bytes = random::weights(&mut random::seeded(2), encoding, 37, 512);
        let source = EncodedRows::new(encoding, &bytes, 37, 512).unwrap();
        let packed = PackedMatrix::pack_whole(&source).unwrap();
        for row_idx in 0..37 {
            let (mut actual, mut expected) = (vec![0.0; 512], vec![0.0; 512]);
            packed.dequantize_row(row_idx, &mut actual);
            dequantize(encoding, source.row(row_idx), &mut expected);
            assert_same_bits(&actual, &expected, &format_args!("{encoding} row {row_idx}"));
        }
    }
}

#[test]
fn packed_weights_are_no_larger_than_documented() {
    // Bytes a panel of 16 outputs and 256 inputs.
    let check = |encoding: Encoding, panel_bytes: usize| {
        let bytes = random::weights(&mut random::seeded(3), encoding, 32, 512);
        let packed = PackedMatrix::pack_whole(&EncodedRows::new(encoding, &bytes, 32, 512).unwrap()).unwrap();
        assert_eq!(packed.size_bytes(), 2 * 2 * panel_bytes, "{encoding}");
    };
    check(Encoding::F32, 16 * 256 * 4);
    check(Encoding::BF16, 16 * 256 * 2);
    check(Encoding::Q4_0, 8 * (256 + 32));
    check(Encoding::Q4_1, 8 * (256 + 64));
    check(Encoding::Q5_0, 8 * (320 + 32));
    check(Encoding::Q8_0, 8 * (512 + 32));
    check(Encoding::Q2K, 8 * (256 + 64) + 64);
    check(Encoding::Q3K, 8 * (256 + 32) + 32);
    check(Encoding::Q4K, 8 * (256 + 32) + 64);
    check(Encoding::Q5K, 8 * (320 + 32) + 64);
    check(Encoding::Q6K, 8 * (384 + 32) + 32);
    check(Encoding::IQ4_NL, 8 * (256 + 32));
    check(Encoding::IQ4_XS, 8 * (256 + 16) + 32);
    check(Encoding::U4_128, 8 * (256 + 32) + 2 * 64);
    check(Encoding::U4_32, 8 * (256 + 32 + 64));
    check(Encoding::I8_32, 8 * (512 + 32 + 64));
    check(Encoding::NF4, 8 * (256 + 32));
}
