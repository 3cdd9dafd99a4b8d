use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Map, Value as Json, json};
use tempfile::TempDir;

use crate::{Checkpoint, Encoding, ROPE_HALVES, Spelling, Token};

/// A folder to spoil: its files by name.
#[derive(Clone)]
struct Files(Vec<(String, Vec<u8>)>);

impl Files {
    fn write(&self) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write_to(folder.path());
        folder
    }

    fn write_to(&self, folder: &Path) {
        self.0.iter().for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes).unwrap());
    }

    fn with(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.0.retain(|(other, _)| other != name);
        self.0.push((name.to_owned(), bytes.into()));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.0.retain(|(other, _)| other != name);
        self
    }

    /// With other settings; null removes one.
    fn with_settings(self, changes: Json) -> Self {
        let mut settings = config();
        for (key, value) in changes.as_object().unwrap() {
            settings[key] = value.clone();
        }
        self.with("config.json", settings.to_string())
    }

    /// With another tensor of this name, in the same file.
    fn with_tensor(self, tensor: Tensor<'_>) -> Self {
        let name = tensor.0;
        self.replaced(name, Some(tensor))
    }

    fn without_tensor(self, name: &str) -> Self {
        self.replaced(name, None)
    }

    fn replaced(mut self, name: &str, by: Option<Tensor<'_>>) -> Self {
        for (_, file) in self.0.iter_mut().filter(|(file, _)| file.ends_with(".safetensors")) {
            let tensors = tensors(file);
            if !tensors.iter().any(|(other, ..)| other == name) {
                continue;
            }
            let kept = tensors.iter().filter(|(other, ..)| other != name);
            let kept = kept.map(|(name, dtype, shape, bytes)| (&**name, &**dtype, &**shape, bytes.clone()));
            *file = safetensors(&kept.chain(by.clone()).collect::<Vec<_>>());
        }
        self.indexed()
    }

    /// With one more file of weights.
    fn with_tensors(self, tensors: &[Tensor<'_>]) -> Self {
        self.with("more.safetensors", safetensors(tensors)).indexed()
    }

    /// With an index of its files.
    fn indexed(self) -> Self {
        let mut weight_map = Map::new();
        for (file, bytes) in self.0.iter().filter(|(file, _)| file.ends_with(".safetensors")) {
            weight_map.extend(tensors(bytes).into_iter().map(|(name, ..)| (name, file.as_str().into())));
        }
        self.with("model.safetensors.index.json", json!({ "weight_map": weight_map }).to_string())
    }
}

/// Name, dtype, shape, bytes.
type Tensor<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

fn safetensors(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        header.insert((*name).into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [data.len(), end] }));
        data.extend(bytes);
    }
    with_header(&Json::Object(header).to_string(), &data)
}

/// What a sound file holds, as [`Tensor`] has it.
fn tensors(file: &[u8]) -> Vec<(String, String, Vec<usize>, Vec<u8>)> {
    let length = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let header: Map<String, Json> = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let number = |value: &Json| value.as_u64().unwrap() as usize;
    let tensors = header.iter().map(|(name, tensor)| {
        let shape: Vec<usize> = tensor["shape"].as_array().unwrap().iter().map(number).collect();
        let [begin, end] = [0, 1].map(|i| number(&tensor["data_offsets"][i]));
        (name.clone(), tensor["dtype"].as_str().unwrap().to_owned(), shape, file[8 + length..][begin..end].to_vec())
    });
    tensors.collect()
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn config() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 32,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
        "vocab_size": 2,
        "rope_theta": 500_000,
        "quantization_config": { "quant_method": "gptq", "bits": 4, "group_size": 32 },
    })
}

fn halves(n: usize, value: f32) -> Vec<u8> {
    (0..n).flat_map(|_| half::f16::from_f32(value).to_le_bytes()).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

const KEY: &str = "model.layers.0.self_attn.k_proj";
const VALUE: &str = "model.layers.0.self_attn.v_proj.weight";
const QUERY: &str = "model.layers.0.self_attn.q_proj";

/// Floats, and a matrix of each quantizer, `[8, 64]`, that has all of its tensors.
fn sound() -> Files {
    let gptq = |part: &str| format!("{KEY}.{part}");
    let four_bit = |part: &str| format!("{VALUE}.{part}");
    let eight_bit = |part: &str| format!("{QUERY}.{part}");
    let groups: Vec<u8> = (0..64u32).flat_map(|col| (col / 32).to_le_bytes()).collect();
    let map: Vec<f32> = [-1.0, -0.696_193, -0.525_073, -0.394_917, -0.284_441, -0.184_773, -0.091_05, 0.0]
        .into_iter()
        .chain([0.079_58, 0.160_93, 0.246_112, 0.337_915, 0.440_71, 0.562_617, 0.722_957, 1.0])
        .collect();
    let nested_map: Vec<f32> = (0..256).map(|i| i as f32 / 256.0).collect();
    let state =
        json!({ "quant_type": "nf4", "blocksize": 64, "shape": [8, 64], "nested_blocksize": 4, "nested_offset": 0.25 });
    let state = state.to_string().into_bytes();
    let first = safetensors(&[
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[8], vec![0; 32]),
        (&gptq("qweight"), "I32", &[8, 8], (0..=255).collect()),
        (&gptq("qzeros"), "I32", &[2, 1], [[0x76; 4], [0x10; 4]].concat()),
        (&gptq("scales"), "F16", &[2, 8], halves(16, 0.5)),
        (&gptq("g_idx"), "I32", &[64], groups),
        (&gptq("bias"), "F16", &[8], vec![0; 16]),
        ("model.embed_tokens.weight", "BF16", &[2, 64], vec![0x3F; 256]),
    ]);
    let second = safetensors(&[
        (VALUE, "U8", &[256, 1], (0..=255).collect()),
        (&four_bit("absmax"), "U8", &[8], vec![0, 64, 128, 192, 0, 64, 128, 192]),
        (&four_bit("nested_absmax"), "F32", &[2], floats(&[1.0, 2.0])),
        (&four_bit("nested_quant_map"), "F32", &[256], floats(&nested_map)),
        (&four_bit("quant_map"), "F32", &[16], floats(&map)),
        (&four_bit("quant_state.bitsandbytes__nf4"), "U8", &[state.len()], state.clone()),
        (&eight_bit("weight"), "I8", &[8, 64], vec![0x85; 512]),
        (&eight_bit("SCB"), "F32", &[8], floats(&[12.7; 8])),
        (&eight_bit("weight_format"), "U8", &[], vec![0]),
        ("lm_head.weight", "BF16", &[2, 64], vec![0x3F; 256]),
    ]);
    Files(Vec::new())
        .with("config.json", config().to_string())
        .with("first.safetensors", first)
        .with("second.safetensors", second)
        .indexed()
}

#[test]
fn a_sound_folder_is_read_in_the_names_of_gguf_files() {
    let folder = sound().write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let metadata = checkpoint.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.u32("llama.attention.head_count").unwrap(), 4);
    assert_eq!(metadata.opt_u32("llama.attention.head_count_kv").unwrap(), None);
    assert_eq!(metadata.f32("llama.rope.freq_base").unwrap(), 500_000.0);
    assert!(metadata.bool(ROPE_HALVES).unwrap());
    assert_eq!(checkpoint.own_key("llama.attention.head_count"), "num_attention_heads");
    assert_eq!(checkpoint.own_name("blk.3.ffn_up.weight"), "model.layers.3.mlp.up_proj.weight");

    let tensors: Vec<_> =
        checkpoint.tensors().map(|tensor| (tensor.name.to_owned(), tensor.shape.to_vec(), tensor.encoding)).collect();
    let expected = [
        ("blk.0.attn_k.weight", [8, 64], Encoding::U4_32),
        ("blk.0.attn_q.weight", [8, 64], Encoding::Q8_0),
        ("blk.0.attn_v.weight", [8, 64], Encoding::NF4),
        // The output matrix of a tied model is the embedding, of which the file has a copy.
        ("token_embd.weight", [2, 64], Encoding::BF16),
    ];
    assert_eq!(tensors, expected.map(|(name, shape, encoding)| (name.to_owned(), shape.to_vec(), encoding)));
    for tensor in checkpoint.tensors() {
        assert_eq!(tensor.bytes().unwrap().len(), tensor.size_bytes());
        assert_eq!(tensor.mapped().is_some(), tensor.name == "token_embd.weight");
    }
    let missing = checkpoint.tensor("output_norm.weight").unwrap_err().to_string();
    assert!(missing.ends_with("has no tensor \"model.norm.weight\""), "{missing}");
}

#[test]
fn the_digest_covers_settings_and_every_weight_file() {
    let digest = |files: &Files| Checkpoint::open(files.write().path()).unwrap().digest();
    let untied = json!({ "tie_word_embeddings": false });
    let sound = sound().with_settings(untied);
    let whole = digest(&sound);
    assert_eq!(whole, digest(&sound.clone().with("README.md", "no part of the model")));
    assert_ne!(whole, digest(&sound.clone().with("config.json", config().to_string() + " ")));
    for (i, (_, bytes)) in sound.0.iter().enumerate().filter(|(_, (name, _))| name.ends_with(".safetensors")) {
        let mut changed = sound.clone();
        *changed.0[i].1.last_mut().unwrap() ^= 1;
        assert_ne!(whole, digest(&changed), "{} bytes", bytes.len());
    }
}

#[test]
fn the_vocabulary_is_that_of_the_tokenizer() {
    let read = |tokenizer: Json| {
        let folder = sound().with("tokenizer.json", tokenizer.to_string()).write();
        Checkpoint::open(folder.path()).unwrap().vocabulary().map(|vocabulary| vocabulary.tokens)
    };
    let token = |text: &str, is_reserved| Token { text: text.to_owned(), is_reserved };
    let added =
        json!([{ "id": 1, "content": "</s>", "special": true }, { "id": 4, "content": "<tool>", "special": false }]);
    let vocab = json!({ "\u{120}a": 0, "</s>": 1, "b": 2 });
    let tokens = read(json!({ "added_tokens": added, "model": { "type": "BPE", "vocab": vocab } })).unwrap();
    let expected = [("\u{120}a", false), ("</s>", true), ("b", false), ("", true), ("<tool>", false)];
    assert_eq!(tokens, expected.map(|(text, is_reserved)| token(text, is_reserved)));

    let folder =
        sound().with("tokenizer.json", r#"{ "model": { "vocab": {} }, "decoder": { "type": "ByteLevel" } }"#).write();
    let vocabulary = Checkpoint::open(folder.path()).unwrap().vocabulary().unwrap();
    assert_eq!(vocabulary.spelling, Ok(Spelling::ByteLevel));

    assert_eq!(read(json!({ "model": { "type": "Unigram", "vocab": [["a", -1.0]] } })).unwrap(), []);
    assert_eq!(Checkpoint::open(sound().write().path()).unwrap().vocabulary().unwrap().tokens, []);
    let absurd = read(json!({ "model": { "vocab": { "a": 4_194_304 } } })).unwrap_err().to_string();
    assert!(absurd.ends_with("tokenizer.json: token id 4194304, the limit is 4194304"), "{absurd}");
    for id in [json!(-1), json!(0.5)] {
        let other = read(json!({ "model": { "vocab": { "a": 0, "b": id } } })).unwrap_err().to_string();
        assert!(other.contains("tokenizer.json: data did not match any variant"), "{other}");
    }
    let twins: Map<String, Json> = (0..100).map(|i| (format!("{i:02}"), json!(0))).collect();
    assert_eq!(read(json!({ "model": { "vocab": twins } })).unwrap(), [token("99", false)]);
    let broken = read(json!([])).unwrap_err().to_string();
    assert!(broken.contains("tokenizer.json: "), "{broken}");
}

/// Opens a folder that must be refused; the message names the folder and ends so.
#[track_caller]
fn check(files: &Files, reason: &str) {
    let folder = files.write();
    let error = Checkpoint::open(folder.path()).expect_err("accepted").to_string();
    assert!(error.contains(&folder.path().display().to_string()), "{error}");
    assert!(error.ends_with(reason), "{error}");
    assert!(!error.contains('\n'), "a message is one line");
}

#[test]
fn folders_without_what_it_takes_are_refused() {
    let sound = sound();
    check(&Files(Vec::new()), "config.json: No such file or directory (os error 2)");
    let no_weights = sound.clone().without("model.safetensors.index.json");
    check(&no_weights, "it has neither model.safetensors nor model.safetensors.index.json");
    check(
        &no_weights.with("pytorch_model.bin", "cposix\nsystem"),
        "its weights are a pickle (pytorch_model.bin), which may run code when it is read; convert them to safetensors",
    );
    check(&sound.clone().without("second.safetensors"), "second.safetensors: No such file or directory (os error 2)");
    check(
        &sound.clone().with("config.json", "[]"),
        "config.json: invalid type: sequence, expected a map at line 1 column 0",
    );
    let folder = Files(Vec::new()).with("config.json", config().to_string()).write();
    std::os::unix::fs::symlink("nowhere", folder.path().join("model.safetensors")).unwrap();
    let broken = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(broken.ends_with("model.safetensors: No such file or directory (os error 2)"), "{broken}");
    check(&sound.with("config.json", vec![b' '; (1 << 20) + 1]), "config.json is larger than 1048576 bytes");
}

#[test]
fn an_index_leads_to_no_other_folder() {
    for name in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./first.safetensors", "a/"] {
        let index = json!({ "weight_map": { "a": name } }).to_string();
        let reason = format!("model.safetensors.index.json: {name:?} is not the name of a file in the folder");
        check(&sound().with("model.safetensors.index.json", index), &reason);
    }
}

#[test]
fn files_have_the_tensors_that_an_index_lists() {
    let with = |weight_map: Json| {
        sound().with("model.safetensors.index.json", json!({ "weight_map": weight_map }).to_string())
    };
    let all: Map<String, Json> = [("first.safetensors", 7), ("second.safetensors", 10)]
        .into_iter()
        .flat_map(|(file, n)| {
            let bytes = &sound().0.into_iter().find(|(name, _)| name == file).unwrap().1;
            let names = tensors(bytes);
            assert_eq!(names.len(), n);
            names.into_iter().map(move |(name, ..)| (name, json!(file)))
        })
        .collect();
    Checkpoint::open(with(json!(all)).write().path()).unwrap();
    let changed = |name: &str, file: Json| {
        let mut changed = all.clone();
        changed.insert(name.to_owned(), file);
        with(changed.into())
    };
    let reason = "model.safetensors.index.json: tensor \"lm_head.weight\" is not in first.safetensors";
    check(&changed("lm_head.weight", json!("first.safetensors")), reason);
    let reason = "model.safetensors.index.json: tensor \"model.norm.weight\" is not in second.safetensors";
    check(&changed("model.norm.weight", json!("second.safetensors")), reason);
    let mut fewer = all.clone();
    fewer.remove("lm_head.weight");
    Checkpoint::open(with(fewer.into()).write().path()).unwrap();
}

#[test]
fn settings_that_ask_for_another_graph_are_refused_by_key() {
    let check = |changes: Json, reason: &str| check(&sound().with_settings(changes), reason);
    check(
        json!({ "architectures": ["Qwen2ForCausalLM"] }),
        "architectures: [\"Qwen2ForCausalLM\"] is not supported, only LlamaForCausalLM and MistralForCausalLM are",
    );
    check(json!({ "architectures": null }), "config.json: model_type: it is missing");
    // Granite has Llama's tensors and another graph.
    check(json!({ "model_type": "granite" }), "model_type: \"granite\" is not supported here, only llama");
    check(
        json!({ "architectures": null, "model_type": "granite" }),
        "model_type: \"granite\" is not supported here, only llama and mistral",
    );
    check(
        json!({ "architectures": ["MistralForCausalLM"], "max_position_embeddings": 4097 }),
        "sliding_window: attention over 4096 tokens alone is not supported",
    );
    check(json!({ "hidden_size": null }), "config.json: hidden_size: it is missing");
    check(json!({ "hidden_size": "64" }), "config.json: hidden_size: invalid type: string \"64\", expected u32");
    check(json!({ "hidden_act": "gelu" }), "hidden_act: \"gelu\" is not supported, only \"silu\" is");
    check(json!({ "sliding_window": 128 }), "sliding_window: attention over 128 tokens alone is not supported");
    check(json!({ "tie_word_embeddings": false, "vocab_size": -1 }), "expected u32");
    check(json!({ "vocab_size": 3 }), "config.json: vocab_size: 3, but model.embed_tokens.weight has 2 rows");
}

#[test]
fn rotary_settings_that_are_not_followed_are_refused_by_key() {
    let check = |changes: Json, reason: &str| {
        check(&sound().with_settings(changes), &format!("config.json: {reason}"));
    };
    for name in ["rope_scaling", "rope_parameters"] {
        let of = |rope: Json, reason: &str| check(json!({ name: rope }), &format!("{name}{reason}"));
        of(json!(8), ": it is no object");
        of(json!({ "type": "yarn" }), ".rope_type: \"yarn\" is not supported, only default, linear and llama3 are");
        of(json!({ "type": "llama3" }), ".factor: it is missing");
        of(json!({ "type": "linear", "factor": 0 }), ".factor: 0 is not a positive number");
        of(json!({ "factor": 8.0 }), ".factor: without a rope_type other than default it is not supported");
        of(
            json!({ "rope_type": "default", "factor": 8.0 }),
            ".factor: without a rope_type other than default it is not supported",
        );
        for kind in ["default", "linear"] {
            of(
                json!({ "rope_type": kind, "factor": 2.0, "partial_rotary_factor": 0.5 }),
                ".partial_rotary_factor: heads that turn in part are not supported",
            );
        }
    }
    check(json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor: heads that turn in part are not supported");
    check(
        json!({ "rope_scaling": { "type": "linear", "factor": 4 }, "rope_parameters": { "rope_theta": 1e4 } }),
        "rope_scaling: it is not what rope_parameters is",
    );
}

#[test]
fn quantizations_that_are_not_supported_are_refused_by_key() {
    let quantized = |quantization: Json, reason: &str| {
        let files = sound().with_settings(json!({ "quantization_config": quantization }));
        check(&files, &format!("config.json: quantization_config{reason}"));
    };
    quantized(json!({}), ".quant_method: it is missing");
    quantized(
        json!({ "quant_method": "fp8" }),
        ".quant_method: \"fp8\" is not supported, only gptq, awq and bitsandbytes are",
    );
    quantized(
        json!({ "quant_method": "gptq", "bits": 3, "group_size": 32 }),
        ".bits: 3 is not supported, only 4 and 8 are",
    );
    quantized(
        json!({ "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv" }),
        ".version: \"gemv\" is not supported, only gemm is",
    );
    for group_size in [0, 16, -2] {
        quantized(
            json!({ "quant_method": "gptq", "bits": 4, "group_size": group_size }),
            &format!(".group_size: {group_size} is not supported, only -1 and multiples of 32 are"),
        );
    }
    let formats = json!({ "quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": null,
        "format": "marlin" });
    quantized(formats, ".format: \"marlin\" is not supported, only gptq and gptq_v2 are");
    let formats = json!({ "quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq",
        "format": "gptq_v2" });
    quantized(formats, ".format: \"gptq_v2\", but checkpoint_format is \"gptq\"");
}

#[test]
fn what_changes_no_graph_is_accepted() {
    for changes in [
        json!({ "architectures": ["MistralForCausalLM"], "sliding_window": null }),
        json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral" }),
        json!({ "architectures": ["MistralForCausalLM"], "sliding_window": null, "max_position_embeddings": 8192 }),
        json!({ "sliding_window": 512 }),
        // `version` is AWQ's name of the format.
        json!({ "quantization_config": { "quant_method": "gptq", "bits": 4, "group_size": 32, "version": "2" } }),
        json!({ "rope_scaling": { "rope_type": "default", "partial_rotary_factor": 1.0, "factor": null } }),
        json!({ "architectures": null, "model_type": "llama" }),
        json!({ "rope_scaling": null, "hidden_act": "silu", "partial_rotary_factor": 1.0 }),
        json!({ "rope_theta": null, "rope_parameters": { "rope_theta": 500_000.0, "rope_type": "default" } }),
    ] {
        let folder = sound().with_settings(changes).write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert!([10_000.0, 500_000.0].contains(&checkpoint.metadata().f32("llama.rope.freq_base").unwrap()));
    }
}

#[test]
fn rotary_scaling_becomes_what_gguf_files_have() {
    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 4 } });
    let folder = sound().with_settings(linear).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.metadata().str("llama.rope.scaling.type").unwrap(), "linear");
    assert_eq!(checkpoint.metadata().f32("llama.rope.scaling.factor").unwrap(), 4.0);

    let scaling = json!({ "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
    let folder = sound().with_settings(json!({ "rope_parameters": scaling, "head_dim": 128 })).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let factors = checkpoint.tensor("rope_freqs.weight").unwrap();
    assert_eq!((factors.shape, factors.encoding), (&[64][..], Encoding::F32));
    let bytes = factors.bytes().unwrap();
    let factors: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    // Frequencies of `default` over those of `llama3`, by transformers 5.23 (`ROPE_INIT_FUNCTIONS`).
    let expected = [(0, 1.0), (28, 1.0), (29, 1.2075), (31, 2.0263), (33, 3.6843), (34, 5.2573), (35, 8.0), (63, 8.0)];
    for (pair, expected) in expected {
        assert!((factors[pair] - expected).abs() < 1e-3, "pair {pair}: {}", factors[pair]);
    }
}

#[test]
fn tensors_that_are_no_part_of_a_llama_are_refused_by_name() {
    let check = |tensor: Tensor<'_>, reason: &str| check(&sound().with_tensors(&[tensor]), reason);
    check(
        ("model.layers.0.self_attn.q_norm.weight", "F32", &[1], vec![0; 4]),
        "tensor \"model.layers.0.self_attn.q_norm.weight\": it is no part of a Llama, or of a kind that is not supported",
    );
    check(
        ("model.layers.0.mlp.up_proj.bias", "F32", &[1], vec![0; 4]),
        "tensor \"model.layers.0.mlp.up_proj.bias\": there is no weight that it goes with",
    );
    check((&format!("{KEY}.qweight"), "F32", &[1], vec![0; 4]), "k_proj.qweight\": it occurs twice");
    check(
        ("model.norm.weight", "U8", &[4], vec![0; 4]),
        "model.norm.weight\": integers, and no tensors beside them that say what for",
    );
    check(("model.norm.scales", "F32", &[1], vec![0; 4]), "scales\": it is no part of a weight that is supported");
    check(("model.norm.weight", "F32", &[], vec![0; 4]), "model.norm.weight\": its shape [] is empty");
    check(("model.norm.weight", "F32", &[0, 4], vec![]), "model.norm.weight\": its shape [0, 4] is empty");
    let untied = sound().with_settings(json!({ "tie_word_embeddings": false })).without("second.safetensors");
    check_untied(&untied.indexed());
}

fn check_untied(files: &Files) {
    check(files, "tensor \"lm_head.weight\": there is none, and tie_word_embeddings in config.json is not true");
}

#[test]
fn lying_headers_are_refused() {
    let refused = check;
    let check = |file: Vec<u8>, reason: &str| {
        check(&sound().with("model.safetensors", file), &format!("model.safetensors: {reason}"));
    };
    check(vec![0; 7], "header: needs 8 bytes but the file has only 7 left (at byte 0)");
    check(vec![0xFF; 16], "header: header size is 18446744073709551615, the limit is 67108864 (at byte 0)");
    check(with_header("{}", &[])[..9].to_vec(), "header: needs 2 bytes but the file has only 1 left (at byte 8)");
    check(
        with_header("[]", &[]),
        "header: the header is no list of tensors: invalid type: sequence, expected an object of tensors \
         at line 1 column 0 (at byte 8)",
    );
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
        with_header(&header, &[0; 8])
    };
    check(tensor("F64", "[1]", "[0,8]"), "tensor \"a\": unsupported dtype \"F64\" (at byte 62)");
    check(
        tensor("F32", "[1]", "[0,8]"),
        "tensor \"a\": data_offsets of 8 bytes for shape [1] of F32, which takes 4 (at byte 62)",
    );
    check(
        tensor("F32", "[3]", "[0,12]"),
        "tensor \"a\": data of 12 bytes at offset 0 ends beyond the file's 8 bytes (at byte 63)",
    );
    check(
        tensor("F32", "[1]", "[8,4]"),
        "tensor \"a\": data of 0 bytes at offset 8 ends beyond the file's 8 bytes (at byte 62)",
    );
    check(
        tensor("U8", "[18446744073709551600]", "[0,18446744073709551600]"),
        "tensor \"a\": data of 18446744073709551600 bytes at offset 0 ends beyond the file's 8 bytes (at byte 99)",
    );
    check(
        tensor("F32", "[4294967296,4294967296]", "[0,8]"),
        "tensor \"a\": the size of shape [4294967296, 4294967296] overflows (at byte 82)",
    );
    let name = "n".repeat(257);
    check(
        safetensors(&[(&name, "U8", &[1], vec![0])]),
        "header: length of a tensor's name is 257, the limit is 256 (at byte 8)",
    );
    let nine = tensor("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]");
    check(nine, "tensor \"a\": number of dimensions is 9, the limit is 8 (at byte 77)");
    // A tensor of no bytes is in nobody's way.
    let empty =
        r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    refused(
        &sound().with("model.safetensors", with_header(empty, &[0; 8])),
        "tensor \"a\": it is no part of a Llama, or of a kind that is not supported",
    );
    let four = |at: usize| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":[{at},{}]}}"#, at + 4);
    let twice = format!(r#"{{"a":{},"b":{}}}"#, four(0), four(2));
    check(with_header(&twice, &[0; 8]), "tensor \"b\": the data overlaps that of tensor \"a\" (at byte 117)");
}

/// Replaces one of the tensors of the sound folder.
fn with_part(name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> Files {
    sound().with_tensor((name, dtype, shape, bytes))
}

#[test]
fn quantized_tensors_that_do_not_fit_each_other_are_refused_by_name() {
    let check = |(name, dtype, shape, bytes): Tensor<'_>, reason: &str| {
        check(&with_part(name, dtype, shape, bytes), &format!("tensor {name:?}: {reason}"));
    };
    let key = |part: &str| format!("{KEY}.{part}");
    check((&key("qzeros"), "I32", &[1, 1], vec![0; 4]), "its shape is [1, 1], expected [2, 1]");
    check((&key("scales"), "I32", &[2, 8], vec![0; 64]), "its type is I32, expected one of [F16, BF16, F32]");
    check((&key("scales"), "F16", &[2, 4], vec![0; 16]), "its shape is [2, 4], expected [2, 8]");
    check((&key("g_idx"), "I32", &[1], vec![0; 4]), "its shape is [1], expected [64]");
    check((&key("g_idx"), "I32", &[64], vec![0xFF; 256]), "group -1 of 2");
    check((&key("g_idx"), "I32", &[64], [1, 0, 0, 0].repeat(64)), "group 0 of 2 has 0 inputs, config.json asks for 32");
    check((&key("scales"), "F16", &[3, 8], halves(24, 0.5)), "3 groups of 64 inputs are not whole runs of 32");
    let mixed = (0..64u32).flat_map(|col| (col % 2).to_le_bytes()).collect();
    check(
        (&key("g_idx"), "I32", &[64], mixed),
        "32 neighbouring inputs are of several groups: activation order (desc_act) is not supported",
    );
    check((&key("bias"), "F16", &[8], vec![1; 16]), "biases other than 0 are not supported");
    check(
        (&key("qweight"), "I32", &[2, 8], vec![0; 64]),
        "8 outputs of 16 inputs are not whole words, and runs of 32 inputs",
    );
    let value = |part: &str| format!("{VALUE}.{part}");
    check((VALUE, "U8", &[255, 1], vec![0; 255]), "255 bytes are not 4 bits for each of [8, 64]");
    check((&value("absmax"), "F16", &[8], vec![0; 16]), "its type is F16, expected one of [F32, U8]");
    check((&value("absmax"), "U8", &[7], vec![0; 7]), "its shape is [7], expected [8]");
    check((&value("quant_map"), "F32", &[16], vec![0; 64]), "it is not the map of NF4");
    check((&value("nested_absmax"), "F32", &[1], vec![0; 4]), "its shape is [1], expected [2]");
    let state = value("quant_state.bitsandbytes__nf4");
    check((&state, "U8", &[2], b"{}".to_vec()), "missing field `blocksize` at line 1 column 2");
    let state_of = |state: Json| state.to_string().into_bytes();
    let zero = state_of(json!({ "blocksize": 0, "shape": [8, 64] }));
    check((&state, "U8", &[zero.len()], zero), "rows of 64 values in blocks of 0 are not whole runs of 32");
    let query = |part: &str| format!("{QUERY}.{part}");
    check((&query("SCB"), "F32", &[7], vec![0; 28]), "its shape is [7], expected [8]");
    check((&query("weight_format"), "U8", &[], vec![1]), "weights that are not row after row are not supported");
}

#[test]
fn a_weight_of_two_kinds_is_refused() {
    let fp4 = format!("{VALUE}.quant_state.bitsandbytes__fp4");
    let files = sound().with_tensors(&[(&fp4, "U8", &[2], b"{}".to_vec())]);
    check(&files, "v_proj.weight\": there are quant_states of both NF4 and FP4 for it");
}

#[test]
fn absurdly_many_tensors_are_refused() {
    let tensor = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let header = (0..(1 << 16) + 1).map(tensor).collect::<Vec<_>>().join(",");
    let file = with_header(&format!("{{{header}}}"), &[]);
    check(&sound().with("model.safetensors", file), "its weight files have 65537 tensors or more, the limit is 65536");
}

/// The bytes of GPTQ's matrix.
fn key_bytes(files: &Files) -> Vec<u8> {
    let folder = files.write();
    Checkpoint::open(folder.path()).unwrap().tensor("blk.0.attn_k.weight").unwrap().bytes().unwrap().into_owned()
}

/// Settings of another `quantization_config`.
fn gptq(group_size: i64, desc_act: bool) -> Json {
    let gptq = json!({ "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": desc_act });
    json!({ "quantization_config": gptq })
}

#[test]
fn inputs_without_groups_of_their_own_are_in_order() {
    let wanted = key_bytes(&sound());
    let without = sound().without_tensor(&format!("{KEY}.g_idx"));
    assert_eq!(key_bytes(&without), wanted);
    // What GPTQ's tools take for none.
    let zeros = with_part(&format!("{KEY}.g_idx"), "I32", &[64], vec![0; 256]);
    assert_eq!(key_bytes(&zeros), wanted);
    // In order, and not asked for.
    assert_eq!(key_bytes(&sound().with_settings(gptq(32, true))), wanted);
    for files in [without, zeros] {
        check(
            &files.with_settings(gptq(32, true)),
            "k_proj.qweight\": there is no g_idx other than 0 for it, and desc_act in config.json's \
             quantization_config is true",
        );
    }
}

#[test]
fn a_group_can_be_a_whole_row() {
    let scales = (0..8).flat_map(|row| halves(1, row as f32)).collect();
    let files = with_part(&format!("{KEY}.scales"), "F16", &[1, 8], scales);
    let zeros = (format!("{KEY}.qzeros"), vec![0x76; 4]);
    let files = files.with_tensor((&zeros.0, "I32", &[1, 1], zeros.1));
    let groups = format!("{KEY}.g_idx");
    let one_group = files.clone().with_tensor((&groups, "I32", &[64], vec![0; 256]));
    let files = files.without_tensor(&groups).with_settings(gptq(-1, false));
    let bytes = key_bytes(&files);
    assert_eq!(bytes, key_bytes(&one_group.with_settings(gptq(-1, true))));
    // Rows are blocks of 64 values: a scale, a zero point, codes.
    for (row, block) in bytes.chunks_exact(2 + 1 + 32).enumerate() {
        assert_eq!(block[..2], halves(1, row as f32));
    }
    assert_eq!(bytes.len(), 8 * 35);
}

#[test]
fn a_copy_of_a_tied_embedding_must_be_one() {
    let reason = "tensor \"lm_head.weight\": it is not model.embed_tokens.weight, \
                  but tie_word_embeddings in config.json is true";
    let other = [vec![0x3F; 255], vec![0]].concat();
    check(&with_part("lm_head.weight", "BF16", &[2, 64], other), reason);
    check(&with_part("lm_head.weight", "F16", &[2, 64], vec![0x3F; 256]), reason);
    check(&with_part("lm_head.weight", "BF16", &[64, 2], vec![0x3F; 256]), reason);
    let quantized = sound().without_tensor("lm_head.weight");
    check(&quantized.with_tensors(&[("lm_head.qweight", "I32", &[8, 2], vec![0; 64])]), reason);
}

#[test]
fn scales_beyond_half_floats_are_refused_when_they_are_read() {
    let name = format!("{QUERY}.SCB");
    let folder = with_part(&name, "F32", &[8], floats(&[127e6; 8])).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = checkpoint.tensor("blk.0.attn_q.weight").unwrap().bytes().expect_err("refused").to_string();
    let tensor = format!("{QUERY}.weight");
    let folder = folder.path().display();
    assert_eq!(
        error,
        format!("model folder {folder}: tensor {tensor:?}: a scale of 1e6 is beyond half floats, which go up to 65504")
    );
}

#[test]
fn mutated_folders_never_panic_and_never_break_a_promise() {
    const N_MUTANTS: usize = 2_000;
    let seed = RandomState::new().build_hasher().finish();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let sound = sound();
    let folder = sound.write();
    let interesting = [b'0', b'9', b'-', b'"', b'{', b']', b',', b'e', 0, 0x7F, 0x80, 0xFF];
    let mut n_accepted = 0;
    for _ in 0..N_MUTANTS {
        let (name, bytes) = &sound.0[rng.random_range(0..sound.0.len())];
        let mut file = bytes.clone();
        for _ in 0..rng.random_range(1..=3) {
            let at = rng.random_range(0..file.len().min(1 << 11));
            match rng.random_range(0..6) {
                0 => file[at] = rng.random(),
                1 => file[at] = interesting[rng.random_range(0..interesting.len())],
                2 => file[at] ^= 1 << rng.random_range(0..8),
                3 => file.truncate(at + 1),
                4 => file.insert(at, rng.random_range(b'0'..=b'9')),
                _ => {
                    let end = (at + 3).min(file.len());
                    file[at..end].fill(b'9');
                }
            }
        }
        std::fs::write(folder.path().join(name), &file).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(folder.path()) {
            n_accepted += 1;
            for tensor in checkpoint.tensors() {
                if let Ok(bytes) = tensor.bytes() {
                    assert_eq!(bytes.len(), tensor.size_bytes(), "{tensor:?}");
                }
            }
        }
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    // Guards the test itself: mutants must reach both the acceptance and the refusals.
    let plausible = N_MUTANTS / 100..N_MUTANTS * 19 / 20;
    assert!(plausible.contains(&n_accepted), "{n_accepted} of {N_MUTANTS} mutants accepted");
}
