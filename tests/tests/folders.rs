//! Hugging Face folders: quantized tensors mean what the tools that made them say, and a cluster serves such a folder.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result};
use lockstep_checkpoint::{Checkpoint, Encoding};
use lockstep_kernels::{KvEncoding, dequantize};
use lockstep_proto::v1::{GenerateRequest, RawPrompt, SamplingParams, raw_prompt::Prompt};
use lockstep_tests::{
    cluster::Cluster,
    ranks::Ranks,
    tiny_model::{Container, TinyModel},
};
use lockstep_worker::{device::Device, model::load::Source};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// A matrix as a tool left it, from `tests/reference/make_quantized.py`.
#[derive(Deserialize)]
struct Sample {
    /// `quantization_config` of its `config.json`.
    quantization_config: Value,
    /// By what follows the layer's name.
    tensors: BTreeMap<String, RawTensor>,
    shape: [usize; 2],
    /// What the tool makes of the first rows, as f32 in hexadecimal.
    values: String,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    /// In hexadecimal.
    bytes: String,
}

const LAYER: &str = "model.layers.0.self_attn.k_proj";

fn from_hex(text: &str) -> Vec<u8> {
    let digit = |digit: &u8| char::from(*digit).to_digit(16).expect("a hexadecimal digit") as u8;
    text.as_bytes().as_chunks::<2>().0.iter().map(|[high, low]| digit(high) << 4 | digit(low)).collect()
}

/// Writes a folder that has nothing but the matrix, and reads it.
fn read(sample: &Sample) -> (Encoding, Vec<f32>) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (part, RawTensor { dtype, shape, bytes }) in &sample.tensors {
        let begin = data.len();
        data.extend(from_hex(bytes));
        let tensor = json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()] });
        header.insert(format!("{LAYER}.{part}"), tensor);
    }
    let header = Value::Object(header).to_string();
    let weights = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    let config = json!({ "architectures": ["LlamaForCausalLM"], "hidden_size": sample.shape[1],
        "intermediate_size": 32, "max_position_embeddings": 32, "num_attention_heads": 1, "num_hidden_layers": 1,
        "tie_word_embeddings": true, "vocab_size": 2, "quantization_config": sample.quantization_config });
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("model.safetensors"), weights).expect("it is written");
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("it is written");

    let checkpoint = Checkpoint::open(folder.path()).expect("it opens");
    let tensor = checkpoint.tensor("blk.0.attn_k.weight").expect("it is there");
    assert_eq!(tensor.shape, sample.shape);
    let mut values = vec![0.0; sample.shape.iter().product()];
    dequantize(tensor.encoding, &tensor.bytes().expect("it is read"), &mut values);
    (tensor.encoding, values)
}

/// The largest difference of two values, and the root mean square of all, as parts of the root mean square of the wanted.
fn errors(values: &[f32], wanted: &[f32]) -> (f64, f64) {
    let mean_square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>() / wanted.len() as f64;
    let size = mean_square(&mut wanted.iter().map(|wanted| f64::from(*wanted))).sqrt();
    let differences = || values.iter().zip(wanted).map(|(value, wanted)| f64::from(*value) - f64::from(*wanted));
    let largest = differences().fold(0.0, |largest: f64, difference| largest.max(difference.abs()));
    (largest / size, mean_square(&mut differences()).sqrt() / size)
}

#[test]
fn quantized_tensors_mean_what_their_tools_say() {
    let samples: BTreeMap<String, Sample> = serde_json::from_str(include_str!("../data/quantized.json"))
        .expect("the file is what make_quantized.py writes");
    let kinds = [
        // Integers times half floats: exact.
        ("gptq 4", Encoding::Q4_0, 0.0),
        ("gptq 4 asymmetric", Encoding::U4_32, 0.0),
        ("gptq_v2 4 asymmetric", Encoding::U4_128, 0.0),
        ("gptq 8", Encoding::Q8_0, 0.0),
        ("gptq 8 asymmetric", Encoding::I8_32, 0.0),
        // Scales that are brain floats fit half floats.
        ("awq", Encoding::U4_128, 0.0),
        // Half a unit in the last place of a half float.
        ("int8", Encoding::Q8_0, 0.0005),
        // Levels are rounded, too.
        ("nf4", Encoding::NF4, 0.006),
        ("nf4 nested", Encoding::NF4, 0.006),
        ("fp4", Encoding::FP4, 0.005),
        ("fp4 nested", Encoding::FP4, 0.005),
    ];
    assert!(samples.keys().map(String::as_str).eq({
        let mut names = kinds.map(|(name, ..)| name);
        names.sort_unstable();
        names
    }));
    for (name, encoding, limit) in kinds {
        let sample = &samples[name];
        let (found, values) = read(sample);
        assert_eq!(found, encoding, "{name}");
        let wanted: Vec<f32> =
            from_hex(&sample.values).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let (largest, typical) = errors(&values[..wanted.len()], &wanted);
        println!("{name}: off by {typical:.1e} of its root mean square, at most {largest:.1e}");
        assert!(typical <= limit && (limit > 0.0 || largest == 0.0), "{name} is off by {typical}, at most {largest}");
    }
}

#[test]
fn a_file_and_a_folder_can_have_the_same_vocabulary() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let open = |name: &str, model: TinyModel| -> Result<Source> {
        let path = scratch.path().join(name);
        model.write(&path)?;
        Ok(Source::open(Arc::new(Checkpoint::open(&path)?), 0, 1)?)
    };
    let float = TinyModel { encoding: Encoding::F16, embedding_encoding: Encoding::F16, ..TinyModel::default() };
    let file = open("file", float.clone())?;
    let folder = open("folder", TinyModel { container: Container::Folder, ..float })?;
    file.check_same_vocabulary(&folder)?;

    let path = scratch.path().join("folder").join("tokenizer.json");
    let tokenizer = std::fs::read_to_string(&path)?;
    // Bytes come after three control tokens.
    std::fs::write(&path, tokenizer.replacen("\"a\":", "\"other\":", 1))?;
    let error = file.check_same_vocabulary(&folder).expect_err("two vocabularies").to_string();
    assert!(error.ends_with("have different vocabularies: token 100 is \"a\" and \"other\""), "{error}");
    Ok(())
}

#[test]
fn a_quantized_embedding_is_refused_before_anything_is_loaded() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let encoding = Encoding::Q4_0;
    let model =
        TinyModel { container: Container::Folder, encoding, embedding_encoding: encoding, ..TinyModel::default() };
    let path = folder.path().join("tiny");
    model.write(&path)?;
    let error = Source::open(Arc::new(Checkpoint::open(&path)?), 0, 1).expect_err("refused").to_string();
    let why = "it is quantized, and of a folder only embeddings of floats are supported";
    assert!(error.contains("model.embed_tokens.weight") && error.ends_with(why), "{error}");
    Ok(())
}

#[test]
fn a_shape_that_settings_contradict_names_the_folders_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let float = Encoding::F16;
    let model =
        TinyModel { container: Container::Folder, encoding: float, embedding_encoding: float, ..TinyModel::default() };
    let path = folder.path().join("tiny");
    model.write(&path)?;
    let config = std::fs::read_to_string(path.join("config.json"))?;
    let other = config.replacen("\"intermediate_size\":512", "\"intermediate_size\":256", 1);
    std::fs::write(path.join("config.json"), other)?;
    let loaded = Ranks::load(&path, &Device::Reference, KvEncoding::F16, 1, 1, 64);
    let error = format!("{:#}", loaded.err().context("refused")?);
    let why = "mlp.gate_proj.weight: its shape [512, 256] is not [256, 256], which config.json asks for";
    assert!(error.contains(why), "{error}");
    Ok(())
}

/// The most likely continuation, as ids, on so many ranks.
async fn continuation(model: &std::path::Path, world_size: usize) -> Result<Vec<u32>> {
    let cluster = Cluster::builder().model(model.to_owned()).world_size(world_size).start().await?;
    let request = GenerateRequest {
        prompt: Some(RawPrompt { prompt: Some(Prompt::Text("once upon a time".into())) }),
        sampling: Some(SamplingParams {
            max_new_tokens: Some(12),
            ignore_eos: Some(true),
            do_sample: Some(false),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let response = cluster.inference().await?.generate(request).await?.into_inner();
    let ids = response.choices.first().context("a choice")?.token_ids.clone();
    cluster.stop().await?;
    Ok(ids)
}

#[tokio::test]
async fn a_folder_is_served_on_one_rank_and_on_three() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = TinyModel {
        container: Container::Folder,
        encoding: Encoding::U4_32,
        embedding_encoding: Encoding::BF16,
        ..TinyModel::default()
    };
    let path = folder.path().join("tiny");
    model.write(&path)?;
    let ids = continuation(&path, 1).await?;
    assert_eq!(ids.len(), 12);
    assert_eq!(ids, continuation(&path, 3).await?);
    Ok(())
}
