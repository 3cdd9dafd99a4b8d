//! Names: what a Hugging Face folder and a GGUF file call the layers of a Llama.
//!
//! A layer has one or more tensors: `model.layers.3.mlp.up_proj` has `.weight`, or `.qweight`, `.scales` and so on, which
//! together are `blk.3.ffn_up.weight`.

/// The embedding, in GGUF files.
pub(super) const EMBEDDING: &str = "token_embd";

/// The output matrix, likewise.
pub(super) const OUTPUT: &str = "output";

/// Layers that a model has once: in GGUF files, in folders.
const WHOLE: [(&str, &str); 3] =
    [(EMBEDDING, "model.embed_tokens"), ("output_norm", "model.norm"), (OUTPUT, "lm_head")];

/// The parts of a transformer layer: in GGUF files, in folders.
const PARTS: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The layer that a folder's tensor belongs to, as GGUF files call it, and what follows the layer's name.
pub(super) fn split(tensor: &str) -> Option<(String, &str)> {
    tensor.rmatch_indices('.').find_map(|(dot, _)| Some((layer(&tensor[..dot])?, &tensor[dot + 1..])))
}

/// What GGUF files call a folder's layer.
fn layer(own: &str) -> Option<String> {
    if let Some((name, _)) = WHOLE.into_iter().find(|(_, whole)| *whole == own) {
        return Some(name.to_owned());
    }
    let (number, part) = own.strip_prefix("model.layers.")?.split_once('.')?;
    let index: u32 = number.parse().ok()?;
    let (name, _) = PARTS.into_iter().find(|(_, own)| *own == part)?;
    // One spelling of each number, so that one layer has one name.
    (index.to_string() == number).then(|| format!("blk.{index}.{name}"))
}

/// What folders call the tensor that GGUF files call `name`.
pub(super) fn own(name: &str) -> Option<String> {
    let layer = name.strip_suffix(".weight")?;
    if let Some((_, own)) = WHOLE.into_iter().find(|(whole, _)| *whole == layer) {
        return Some(format!("{own}.weight"));
    }
    let (number, part) = layer.strip_prefix("blk.")?.split_once('.')?;
    let (_, own) = PARTS.into_iter().find(|(name, _)| *name == part)?;
    Some(format!("model.layers.{number}.{own}.weight"))
}

#[cfg(test)]
mod tests {
    use super::{PARTS, WHOLE, own, split};

    #[test]
    fn every_name_has_its_counterpart() {
        let parts = PARTS.map(|(name, own)| (format!("blk.17.{name}"), format!("model.layers.17.{own}")));
        let whole = WHOLE.map(|(name, own)| (name.to_owned(), own.to_owned()));
        for (name, own_layer) in parts.into_iter().chain(whole) {
            let tensor = format!("{own_layer}.weight");
            assert_eq!(split(&tensor), Some((name.clone(), "weight")));
            assert_eq!(own(&format!("{name}.weight")), Some(tensor));
        }
    }

    #[test]
    fn a_part_may_have_dots_itself() {
        let nested = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4";
        assert_eq!(split(nested), Some(("blk.0.ffn_up".to_owned(), "weight.quant_state.bitsandbytes__nf4")));
    }

    #[test]
    fn other_names_have_none() {
        for name in
            ["", "weight", "lm_head", "model.layers.01.mlp.up_proj.weight", "model.layers.+1.mlp.up_proj.weight"]
        {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!(split("model.layers.0.self_attn.q_norm.weight"), None);
        assert_eq!(own("rope_freqs.weight"), None);
    }
}
