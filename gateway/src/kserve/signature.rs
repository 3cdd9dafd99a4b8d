//! The signature of a model: the tensors that it takes and gives, the same for every model. They are those of Triton's
//! vLLM backend (github.com/triton-inference-server/vllm_backend, `src/model.py`), so that its clients need no change.

use lockstep_proto::inference::{ModelMetadataResponse, model_metadata_response::TensorMetadata};

/// The only version that a model has.
pub(super) const VERSION: &str = "1";

/// What serves the models, as metadata has it.
pub(super) const PLATFORM: &str = "lockstep";

/// A type of elements, by its name in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Datatype {
    Bytes,
    Bool,
    Fp32,
    Uint32,
}

/// A tensor of the signature.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: &'static str,
    pub(super) datatype: Datatype,
    /// -1: one element for each choice.
    shape: &'static [i64],
}

pub(super) const INPUTS: [Tensor; 9] = [
    Tensor { name: "text_input", datatype: Datatype::Bytes, shape: &[1] },
    Tensor { name: "stream", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "sampling_parameters", datatype: Datatype::Bytes, shape: &[1] },
    Tensor { name: "exclude_input_in_output", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "return_finish_reason", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "return_cumulative_logprob", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "return_logprobs", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "return_num_input_tokens", datatype: Datatype::Bool, shape: &[1] },
    Tensor { name: "return_num_output_tokens", datatype: Datatype::Bool, shape: &[1] },
];

/// All but the text come only if they are asked for.
pub(super) const OUTPUTS: [Tensor; 6] = [
    Tensor { name: "text_output", datatype: Datatype::Bytes, shape: &[-1] },
    Tensor { name: "finish_reason", datatype: Datatype::Bytes, shape: &[-1] },
    Tensor { name: "cumulative_logprob", datatype: Datatype::Fp32, shape: &[-1] },
    Tensor { name: "logprobs", datatype: Datatype::Bytes, shape: &[-1] },
    Tensor { name: "num_input_tokens", datatype: Datatype::Uint32, shape: &[1] },
    Tensor { name: "num_output_tokens", datatype: Datatype::Uint32, shape: &[-1] },
];

/// What a model of this name takes and gives.
pub(super) fn metadata(name: String) -> ModelMetadataResponse {
    let tensor = |tensor: &Tensor| TensorMetadata {
        name: tensor.name.to_owned(),
        datatype: tensor.datatype.name().to_owned(),
        shape: tensor.shape.to_vec(),
    };
    ModelMetadataResponse {
        name,
        versions: vec![VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: INPUTS.iter().map(tensor).collect(),
        outputs: OUTPUTS.iter().map(tensor).collect(),
    }
}

// === impl Datatype ===

impl Datatype {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bytes => "BYTES",
            Self::Bool => "BOOL",
            Self::Fp32 => "FP32",
            Self::Uint32 => "UINT32",
        }
    }
}
