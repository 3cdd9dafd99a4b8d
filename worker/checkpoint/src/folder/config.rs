//! `config.json`: the settings of a Llama, turned into the metadata that a GGUF file would have.
//!
//! Types are checked here, and what asks for another graph than a Llama's is refused by its key. Whether numbers fit each
//! other is the business of whoever builds the model; [`own_key`] lets its messages speak of `config.json`.

use std::f64::consts::PI;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use crate::error::FolderError;
use crate::metadata::{Metadata, ROPE_HALVES, Value};

/// Classes of `transformers` that are a Llama, by `model_type`. Mistral's is one if no sliding window cuts attention off.
const ARCHITECTURES: [(&str, &str); 2] = [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM")];

/// Tokens that attention sees in a Mistral whose `config.json` has no `sliding_window`.
const MISTRAL_WINDOW: u32 = 4096;

/// Widest head; real ones have up to 256 values.
const HEAD_DIM_MAX: u32 = 1 << 16;

/// Integers: the key in GGUF files and the one in `config.json`.
const SIZES: [(&str, &str); 8] = [
    ("llama.block_count", "num_hidden_layers"),
    ("llama.context_length", "max_position_embeddings"),
    ("llama.embedding_length", "hidden_size"),
    ("llama.feed_forward_length", "intermediate_size"),
    ("llama.attention.head_count", "num_attention_heads"),
    ("llama.attention.head_count_kv", "num_key_value_heads"),
    ("llama.attention.key_length", "head_dim"),
    ("llama.vocab_size", "vocab_size"),
];

/// Numbers, likewise.
const NUMBERS: [(&str, &str); 2] =
    [("llama.attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("llama.rope.freq_base", "rope_theta")];

/// The settings of a model.
#[derive(Debug)]
pub(super) struct Config {
    /// Under the keys of GGUF files.
    pub(super) metadata: Metadata,
    /// Divisors of the rotary frequencies, one for each pair of a head.
    pub(super) rope_factors: Option<Vec<f32>>,
    /// Rows of the embedding, where stated.
    pub(super) vocab_size: Option<u32>,
    /// Whether the embedding is the output matrix too.
    pub(super) is_tied: bool,
    /// What explains `qweight` tensors.
    pub(super) grouping: Option<Grouping>,
}

/// How a quantizer that makes groups of inputs lays them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grouping {
    /// GPTQ with codes of 4 or 8 bits.
    Gptq {
        bits: u32,
        /// Inputs in a group, unless tensors say; all inputs if `None`.
        group_size: Option<usize>,
        /// Whether zero points are stored less one.
        zeros_less_one: bool,
        /// Whether `desc_act` says that groups are not in the order of inputs, so that `g_idx` must tell.
        is_reordered: bool,
    },
    /// AWQ, whose codes have 4 bits.
    Awq {
        /// Inputs in a group; all inputs if `None`.
        group_size: Option<usize>,
    },
}

/// An object of settings, and what its keys begin with in messages.
struct Settings<'a> {
    object: &'a Map<String, Json>,
    prefix: &'static str,
}

/// Llama 3.1's change of the rotary frequencies (`_compute_llama3_parameters` of `transformers`).
struct Llama3Scaling {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    original_context_length: f64,
}

/// What `config.json` calls the setting that GGUF files call `key`.
pub(crate) fn own_key(key: &str) -> &str {
    let own = SIZES.into_iter().chain(NUMBERS).find(|(name, _)| *name == key);
    own.map_or(key, |(_, own)| own)
}

// === impl Config ===

impl Config {
    /// Reads the settings.
    pub(super) fn read(object: Map<String, Json>) -> Result<Self, FolderError> {
        let settings = Settings { object: &object, prefix: "" };
        check_architecture(&settings)?;
        let mut metadata = Metadata::default();
        let mut insert = |key: &str, value: Value| assert!(metadata.insert(key.to_owned(), value), "{key} is set once");
        insert("general.architecture", Value::String("llama".to_owned()));
        insert(ROPE_HALVES, Value::Bool(true));
        for (key, own) in SIZES {
            match own {
                // These may follow from others, as in GGUF files.
                "num_key_value_heads" | "head_dim" | "vocab_size" => {
                    if let Some(size) = settings.optional(own)? {
                        insert(key, Value::U32(size));
                    }
                }
                _ => insert(key, Value::U32(settings.required(own)?)),
            }
        }
        let epsilon: Option<f64> = settings.optional("rms_norm_eps")?;
        insert("llama.attention.layer_norm_rms_epsilon", Value::F32(epsilon.unwrap_or(1e-6) as f32));
        let rope = settings.rope()?;
        let theta = rope.as_ref().map_or(Ok(None), |rope| rope.optional("rope_theta"))?;
        let theta: f64 = theta.map_or_else(|| settings.optional("rope_theta"), |theta| Ok(Some(theta)))?.unwrap_or(1e4);
        insert("llama.rope.freq_base", Value::F32(theta as f32));
        let mut rope_factors = None;
        match rope.as_ref().map_or(Ok(None), Settings::rope_type)?.as_deref() {
            None | Some("default") => rope.as_ref().map_or(Ok(()), Settings::check_plain_rope)?,
            Some("linear") => {
                let factor = rope.as_ref().map_or(Ok(1.0), Settings::linear_factor)?;
                insert("llama.rope.scaling.type", Value::String("linear".to_owned()));
                insert("llama.rope.scaling.factor", Value::F32(factor));
            }
            Some("llama3") => {
                let scaling = rope.map(|rope| Llama3Scaling::read(&rope, &settings)).transpose()?;
                let head_dim = head_dim(&settings)?;
                rope_factors = scaling.map(|scaling| scaling.factors(theta, head_dim));
            }
            Some(other) => {
                let why = format!("{other:?} is not supported, only default, linear and llama3 are");
                return Err(rope.as_ref().unwrap_or(&settings).wrong("rope_type", why));
            }
        }
        let is_tied = settings.optional("tie_word_embeddings")?.unwrap_or(false);
        let grouping = settings.object("quantization_config")?.as_ref().map_or(Ok(None), Grouping::read)?;
        let vocab_size = settings.optional("vocab_size")?;
        Ok(Config { metadata, rope_factors, vocab_size, is_tied, grouping })
    }
}

/// Refuses what computes otherwise than a Llama.
fn check_architecture(settings: &Settings<'_>) -> Result<(), FolderError> {
    let mut rows = ARCHITECTURES.to_vec();
    let architectures: Option<Vec<String>> = settings.optional("architectures")?;
    if let Some(architectures) = &architectures {
        rows.retain(|(_, class)| architectures == &[*class]);
        if rows.is_empty() {
            let classes = ARCHITECTURES.map(|(_, class)| class).join(" and ");
            let why = format!("{architectures:?} is not supported, only {classes} are");
            return Err(settings.wrong("architectures", why));
        }
    }
    // Granite and others share Llama's tensors, not its graph: what is stated twice must be a Llama both times.
    let model_type: Option<String> =
        if architectures.is_some() { settings.optional("model_type")? } else { Some(settings.required("model_type")?) };
    if let Some(model_type) = model_type {
        let names: Vec<&str> = rows.iter().map(|(name, _)| *name).collect();
        if !names.contains(&model_type.as_str()) {
            let why = format!("{model_type:?} is not supported here, only {}", names.join(" and "));
            return Err(settings.wrong("model_type", why));
        }
        rows.retain(|(name, _)| *name == model_type);
    }
    let activation: Option<String> = settings.optional("hidden_act")?;
    if let Some(activation) = activation
        && activation != "silu"
    {
        return Err(settings.wrong("hidden_act", format!("{activation:?} is not supported, only \"silu\" is")));
    }
    let is_mistral = rows.iter().any(|(name, _)| *name == "mistral");
    let window = match settings.optional("sliding_window")? {
        // An absent key is not null to `transformers`: its default applies.
        None if is_mistral && !settings.object.contains_key("sliding_window") => Some(MISTRAL_WINDOW),
        window => window,
    };
    if let Some(window) = window
        && window < settings.required("max_position_embeddings")?
    {
        return Err(settings.wrong("sliding_window", format!("attention over {window} tokens alone is not supported")));
    }
    settings.check_whole_heads_turn()
}

/// The width of a head, which may follow from others.
fn head_dim(settings: &Settings<'_>) -> Result<u32, FolderError> {
    if let Some(head_dim) = settings.optional("head_dim")? {
        return if head_dim <= HEAD_DIM_MAX { Ok(head_dim) } else { Err(settings.over("head_dim", head_dim)) };
    }
    let hidden_size: u32 = settings.required("hidden_size")?;
    let head_dim = hidden_size.checked_div(settings.required("num_attention_heads")?).unwrap_or(0);
    if head_dim <= HEAD_DIM_MAX { Ok(head_dim) } else { Err(settings.over("hidden_size", hidden_size)) }
}

// === impl Grouping ===

impl Grouping {
    /// Reads `quantization_config`; `None` where tensors say everything by themselves.
    fn read(settings: &Settings<'_>) -> Result<Option<Self>, FolderError> {
        let supported = |key: &str, what: &str, is_supported: bool| -> Result<(), FolderError> {
            let found = || settings.object.get(key).unwrap_or(&Json::Null);
            let wrong = || settings.wrong(key, format!("{} is not supported, only {what}", found()));
            is_supported.then_some(()).ok_or_else(wrong)
        };
        let method: String = settings.required("quant_method")?;
        supported(
            "quant_method",
            "gptq, awq and bitsandbytes are",
            ["gptq", "awq", "bitsandbytes"].contains(&&*method),
        )?;
        if method == "bitsandbytes" {
            return Ok(None);
        }
        let bits: u32 = settings.required("bits")?;
        let group_size: i64 = settings.required("group_size")?;
        // Blocks have one scale for 32 values.
        let is_whole = group_size == -1 || group_size > 0 && group_size % 32 == 0;
        supported("group_size", "-1 and multiples of 32 are", is_whole)?;
        let group_size = usize::try_from(group_size).ok();
        // One key has had several names.
        let keys: &[&str] = if method == "awq" {
            &["checkpoint_format", "format", "version"]
        } else {
            &["checkpoint_format", "format"]
        };
        let (stated, format) = settings.agreed(keys)?;
        if method == "awq" {
            supported("bits", "4 are", bits == 4)?;
            supported(stated, "gemm is", format.is_none_or(|format| format == "gemm"))?;
            return Ok(Some(Grouping::Awq { group_size }));
        }
        supported("bits", "4 and 8 are", [4, 8].contains(&bits))?;
        let format = format.unwrap_or_else(|| "gptq".to_owned());
        supported(stated, "gptq and gptq_v2 are", ["gptq", "gptq_v2"].contains(&&*format))?;
        let is_reordered = settings.optional("desc_act")?.unwrap_or(false);
        Ok(Some(Grouping::Gptq { bits, group_size, zeros_less_one: format == "gptq", is_reordered }))
    }

    /// Bits of a code.
    pub(super) fn bits(self) -> u32 {
        match self {
            Grouping::Gptq { bits, .. } => bits,
            Grouping::Awq { .. } => 4,
        }
    }

    /// Codes in a word of 32 bits.
    pub(super) fn codes_per_word(self) -> usize {
        32 / self.bits() as usize
    }
}

// === impl Settings ===

impl<'a> Settings<'a> {
    /// The setting `key`, unless it is absent or null.
    fn optional<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, FolderError> {
        match self.object.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|cause| self.wrong(key, cause.to_string())),
        }
    }

    fn required<T: DeserializeOwned>(&self, key: &str) -> Result<T, FolderError> {
        self.optional(key)?.ok_or_else(|| self.wrong(key, "it is missing".to_owned()))
    }

    /// The object of settings under `key`.
    fn object(&self, key: &'static str) -> Result<Option<Settings<'a>>, FolderError> {
        match self.object.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Object(object)) => Ok(Some(Settings { object, prefix: key })),
            Some(_) => Err(self.wrong(key, "it is no object".to_owned())),
        }
    }

    /// A text that goes by several keys, in lower case, and the key that was used; those that are there must agree.
    fn agreed<'k>(&self, keys: &[&'k str]) -> Result<(&'k str, Option<String>), FolderError> {
        let mut first: Option<(&str, String)> = None;
        for key in keys {
            let Some(text) = self.optional::<String>(key)? else { continue };
            let text = text.to_lowercase();
            match &first {
                Some((other, found)) if *found != text => {
                    return Err(self.wrong(key, format!("{text:?}, but {other} is {found:?}")));
                }
                Some(_) => {}
                None => first = Some((key, text)),
            }
        }
        Ok(first.map_or((keys[0], None), |(key, text)| (key, Some(text))))
    }

    /// The object that tells how heads turn; it has had two names.
    fn rope(&self) -> Result<Option<Settings<'a>>, FolderError> {
        let (scaling, parameters) = (self.object("rope_scaling")?, self.object("rope_parameters")?);
        if let (Some(scaling), Some(parameters)) = (&scaling, &parameters)
            && scaling.object != parameters.object
        {
            return Err(self.wrong("rope_scaling", "it is not what rope_parameters is".to_owned()));
        }
        let rope = scaling.or(parameters);
        rope.as_ref().map_or(Ok(()), Settings::check_whole_heads_turn)?;
        Ok(rope)
    }

    fn check_whole_heads_turn(&self) -> Result<(), FolderError> {
        const KEY: &str = "partial_rotary_factor";
        match self.optional::<f64>(KEY)? {
            None | Some(1.0) => Ok(()),
            Some(_) => Err(self.wrong(KEY, "heads that turn in part are not supported".to_owned())),
        }
    }

    /// Sees to it that frequencies are said to be unscaled by all keys of an object that names no scaling.
    fn check_plain_rope(&self) -> Result<(), FolderError> {
        const PLAIN: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        let mut set = self.object.iter().filter(|(_, value)| !value.is_null()).map(|(key, _)| key.as_str());
        set.find(|key| !PLAIN.contains(key)).map_or(Ok(()), |key| {
            Err(self.wrong(key, "without a rope_type other than default it is not supported".to_owned()))
        })
    }

    /// What positions are divided by.
    fn linear_factor(&self) -> Result<f32, FolderError> {
        let factor = self.required::<f64>("factor")? as f32;
        let is_sound = factor.is_finite() && factor > 0.0;
        is_sound.then_some(factor).ok_or_else(|| self.wrong("factor", format!("{factor} is not a positive number")))
    }

    /// The kind of change to the rotary frequencies; its key had another name once.
    fn rope_type(&self) -> Result<Option<String>, FolderError> {
        Ok(self.optional("rope_type")?.or(self.optional("type")?))
    }

    fn over(&self, key: &str, found: u32) -> FolderError {
        self.wrong(key, format!("{found} makes heads wider than {HEAD_DIM_MAX}"))
    }

    fn wrong(&self, key: &str, why: String) -> FolderError {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        FolderError::Setting { key: format!("{}{dot}{key}", self.prefix), why }
    }
}

// === impl Llama3Scaling ===

impl Llama3Scaling {
    fn read(rope: &Settings<'_>, settings: &Settings<'_>) -> Result<Self, FolderError> {
        let original = rope.optional("original_max_position_embeddings")?;
        let scaling = Llama3Scaling {
            factor: rope.required("factor")?,
            low_freq_factor: rope.required("low_freq_factor")?,
            high_freq_factor: rope.required("high_freq_factor")?,
            original_context_length: match original {
                Some(length) => length,
                None => settings.required("original_max_position_embeddings")?,
            },
        };
        for (key, value) in [
            ("factor", scaling.factor),
            ("low_freq_factor", scaling.low_freq_factor),
            ("high_freq_factor", scaling.high_freq_factor - scaling.low_freq_factor),
            ("original_max_position_embeddings", scaling.original_context_length),
        ] {
            if value <= 0.0 {
                return Err(rope.wrong(key, "it is too small".to_owned()));
            }
        }
        Ok(scaling)
    }

    /// What divides the frequency of each pair.
    fn factors(&self, theta: f64, head_dim: u32) -> Vec<f32> {
        let divisor = |pair: u32| {
            let frequency = theta.powf(-2.0 * f64::from(pair) / f64::from(head_dim));
            let wavelength = 2.0 * PI / frequency;
            let turns = self.original_context_length / wavelength;
            // Slow pairs are slowed by the factor, fast ones left alone, those between in part.
            let kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            (1.0 / ((1.0 - kept) / self.factor + kept)) as f32
        };
        (0..head_dim / 2).map(divisor).collect()
    }
}
