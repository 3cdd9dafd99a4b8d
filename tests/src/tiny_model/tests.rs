use lockstep_checkpoint::{Checkpoint, Encoding};

use lockstep_worker::make_model::llama::Part;

use super::{CHATML, Container, TinyModel, quantize};
use crate::oracle;

/// Writes the model and opens it as any reader would.
fn open(model: &TinyModel) -> Checkpoint {
    let folder = tempfile::tempdir().unwrap();
    model.write(&folder.path().join("model")).unwrap();
    Checkpoint::open(&folder.path().join("model")).unwrap()
}

#[test]
fn the_seed_decides_every_byte() {
    let model = TinyModel::default();
    assert_eq!(model.bytes().unwrap(), model.bytes().unwrap());
    assert_ne!(model.bytes().unwrap(), TinyModel { seed: 1, ..model }.bytes().unwrap());
}

#[test]
fn every_encoding_opens_with_the_described_shapes() {
    for encoding in Encoding::ALL {
        let model = TinyModel { encoding, embedding_encoding: encoding, ..TinyModel::default() }.in_fitting_container();
        let checkpoint = open(&model);
        for name in ["token_embd.weight", "output.weight"] {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!((tensor.shape, tensor.encoding), (&[384, 256][..], model.embedding_encoding), "{name}");
        }
        for (name, shape) in [
            ("blk.1.attn_q.weight", [512, 256]),
            ("blk.1.attn_k.weight", [256, 256]),
            ("blk.1.attn_v.weight", [256, 256]),
            ("blk.1.attn_output.weight", [256, 512]),
            ("blk.1.ffn_gate.weight", [512, 256]),
            ("blk.1.ffn_up.weight", [512, 256]),
            ("blk.1.ffn_down.weight", [256, 512]),
        ] {
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!((tensor.shape, tensor.encoding), (&shape[..], encoding), "{name}");
        }
        assert_eq!(checkpoint.tensors().count(), 3 + 2 * 9);
    }
}

#[test]
fn a_file_and_a_folder_are_the_same_model() {
    let ids: Vec<u32> = (0..12).map(|i| 3 + i * 13 % 250).collect();
    let float = Encoding::F32;
    for encoding in [Encoding::F32, Encoding::F16, Encoding::BF16, Encoding::Q4_0, Encoding::Q8_0] {
        let file = TinyModel { encoding, embedding_encoding: float, n_heads: 9, n_kv_heads: 3, ..TinyModel::default() };
        let folder = TinyModel { container: Container::Folder, ..file.clone() };
        let [file, folder] = [file, folder].map(|model| oracle::logits(&open(&model), &ids).unwrap().concat());
        let off = file.iter().zip(&folder).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-9, "{encoding}: logits differ by {off:.1e}");
    }
}

#[test]
fn a_folder_gives_back_the_blocks_that_it_was_made_of() {
    use Encoding::{FP4, I8_32, NF4, Q4_0, Q8_0, U4_32, U4_64, U4_128};
    for encoding in [Q4_0, Q8_0, U4_32, U4_64, U4_128, I8_32, NF4, FP4] {
        // Values have 160 rows, others more: several tiles of 128, the last one in part.
        let shape = TinyModel { n_heads: 20, n_kv_heads: 5, ..TinyModel::default() };
        let (container, embedding_encoding) = (Container::Folder, Encoding::F16);
        let model = TinyModel { encoding, container, embedding_encoding, ..shape };
        let checkpoint = open(&model);
        let is_in_order =
            |part| matches!(part, Part::Value | Part::AttentionOutput | Part::Gate | Part::Up | Part::Down);
        for (tensor, values) in model.weights().filter(|(tensor, _)| is_in_order(tensor.part)) {
            let found = checkpoint.tensor(&tensor.name).unwrap();
            assert_eq!(found.encoding, encoding, "{}", tensor.name);
            assert!(found.bytes().unwrap() == quantize(encoding, &values), "{} as {encoding}", tensor.name);
        }
    }
}

#[test]
fn the_tokenizer_is_complete() {
    let checkpoint = open(&TinyModel { vocab_size: 300, ..TinyModel::default() });
    let metadata = checkpoint.metadata();
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 300);
    assert_eq!(tokens[..3], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]);
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap()[..5], [3, 3, 3, 1, 1]);
    assert_eq!(metadata.strings("tokenizer.ggml.merges").unwrap()[0], "Ġ a");
    assert_eq!(metadata.u32("tokenizer.ggml.eos_token_id").unwrap(), 2);
    assert_eq!(metadata.str("tokenizer.chat_template").unwrap(), CHATML);

    let plain = open(&TinyModel { chat_template: None, ..TinyModel::default() });
    assert_eq!(plain.metadata().opt_str("tokenizer.chat_template").unwrap(), None);
}

/// Logits of a well-made model spread over several units, and their favourite changes with the context.
#[track_caller]
fn check_logits(model: &TinyModel) {
    let ids: Vec<u32> = (0..24).map(|i| 3 + i * 13 % 250).collect();
    let logits = oracle::logits(&open(model), &ids).unwrap();
    let mut favourites = Vec::new();
    for row in &logits {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let deviation = (row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64).sqrt();
        assert!((1.5..6.0).contains(&deviation), "standard deviation {deviation} of {model:?}");
        favourites.push((0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap());
    }
    favourites.sort_unstable();
    favourites.dedup();
    assert!(favourites.len() > 12, "{} distinct favourites at {} positions", favourites.len(), ids.len());
}

#[test]
fn logits_are_well_spread_in_every_shape() {
    let model = TinyModel::default();
    check_logits(&model);
    check_logits(&TinyModel { tied: true, ..model.clone() });
    check_logits(&TinyModel { n_layers: 6, encoding: Encoding::Q4K, ..model.clone() });
    check_logits(&TinyModel { n_heads: 9, n_kv_heads: 3, hidden_dim: 96, ffn_dim: 192, ..model.clone() });
    let rope_factors = Some((0..8).map(|i| 1.0 + i as f32).collect());
    check_logits(&TinyModel { rope_dim: 16, rope_factors, ..model });
}

#[test]
fn contradictions_are_refused_by_name() {
    let model = TinyModel::default();
    let check = |model: TinyModel, message: &str| assert_eq!(model.bytes().unwrap_err().to_string(), message);
    check(TinyModel { n_heads: 9, ..model.clone() }, "9 query heads cannot share 8 KV heads");
    check(TinyModel { n_kv_heads: 0, ..model.clone() }, "16 query heads cannot share 0 KV heads");
    check(TinyModel { rope_dim: 64, ..model.clone() }, "64 rotating dimensions in heads of 32");
    check(TinyModel { vocab_size: 258, ..model.clone() }, "a vocabulary of 258 ids is not within 259..=475513");
    check(TinyModel { rope_factors: Some(vec![1.0]), ..model.clone() }, "1 factors for 32 rotating dimensions");
    check(TinyModel { ffn_dim: 96, encoding: Encoding::Q6K, ..model }, "rows of 96 values are not whole Q6_K blocks");
}
