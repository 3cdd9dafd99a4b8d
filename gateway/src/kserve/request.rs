//! A request to continue a prompt, as clients of Triton's vLLM backend write it, and what it is for the pipeline.

use std::time::Duration;

use lockstep_proto::{
    inference::{ModelInferRequest, model_infer_request::InferRequestedOutputTensor},
    v1::{GenerateRequest, OutputOptions, RawPrompt, raw_prompt::Prompt},
};

use super::{
    parameters::Parameters,
    signature::{OUTPUTS, VERSION},
    tensors::Inputs,
};
use crate::{request::RequestError, status::Failure};

/// What a client asks for.
#[derive(Debug)]
pub(super) struct Ask {
    /// Names it to the client.
    pub(super) id: String,
    /// For the pipeline.
    pub(super) generate: GenerateRequest,
    /// What the client gives it.
    pub(super) timeout: Option<Duration>,
    /// Whether the answer comes in pieces.
    pub(super) stream: bool,
    /// Which outputs come, in the signature's order.
    pub(super) outputs: Vec<&'static str>,
}

// === impl Ask ===

impl Ask {
    /// Reads a request.
    ///
    /// # Errors
    /// Names what is wrong.
    pub(super) fn read(request: ModelInferRequest) -> Result<Self, Failure> {
        let ModelInferRequest { model_name, model_version, id, parameters, inputs, outputs, raw_input_contents } =
            request;
        let model = versioned(model_name, &model_version)?;
        let mut inputs = Inputs::read(inputs, raw_input_contents)?;
        let sampling_parameters = inputs.take_text("sampling_parameters");
        let Parameters { sampling, logprobs, skip_special_tokens, timeout } =
            Parameters::read(parameters, sampling_parameters.as_deref())?;
        let text = inputs.take_text("text_input");
        let text = text.ok_or_else(|| RequestError::invalid("inputs.text_input", "it is missing"))?;
        let stream = inputs.flag("stream").unwrap_or(false);
        let outputs = wanted(&outputs, &inputs)?;
        let output = OutputOptions {
            return_full_text: Some(with_prompt(inputs.flag("exclude_input_in_output"), stream)?),
            logprobs: logprobs.or_else(|| outputs.contains(&"cumulative_logprob").then_some(0)),
            prompt_logprobs: None,
            skip_special_tokens,
        };
        let generate = GenerateRequest {
            model,
            prompt: Some(RawPrompt { prompt: Some(Prompt::Text(text)) }),
            sampling: Some(sampling),
            output: Some(output),
        };
        Ok(Self { id, generate, timeout, stream, outputs })
    }
}

/// The model of this name, if it has this version.
///
/// # Errors
/// When it has not.
pub(super) fn versioned(name: String, version: &str) -> Result<String, Failure> {
    if version.is_empty() || version == VERSION {
        return Ok(name);
    }
    Err(Failure::UnknownModel(format!("{name} version {version}").trim_start().to_owned()))
}

/// Whether the text begins with the prompt. A whole answer's does, as in the vLLM backend, unless the client says no.
fn with_prompt(excluded: Option<bool>, stream: bool) -> Result<bool, RequestError> {
    match (excluded, stream) {
        (Some(false), true) => {
            Err(RequestError::invalid("inputs.exclude_input_in_output", "a stream has no place for the prompt"))
        }
        (excluded, stream) => Ok(!excluded.unwrap_or(stream)),
    }
}

/// The outputs that a client names, or the text, and those that its inputs ask for.
fn wanted(named: &[InferRequestedOutputTensor], inputs: &Inputs) -> Result<Vec<&'static str>, RequestError> {
    for tensor in named {
        let path = format!("outputs.{}", tensor.name);
        if OUTPUTS.iter().all(|known| known.name != tensor.name) {
            return Err(RequestError::invalid(path, "there is no such output"));
        }
        if let Some(parameter) = tensor.parameters.keys().min() {
            return Err(RequestError::invalid(path, format!("its parameter {parameter} is not supported")));
        }
    }
    let is_wanted = |name: &str| {
        named.iter().any(|tensor| tensor.name == name)
            || (named.is_empty() && name == "text_output")
            || inputs.flag(&format!("return_{name}")).unwrap_or(false)
    };
    Ok(OUTPUTS.iter().map(|output| output.name).filter(|name| is_wanted(name)).collect())
}

#[cfg(test)]
mod tests {
    use lockstep_proto::inference::{InferParameter, InferTensorContents, model_infer_request::InferInputTensor};

    use super::*;

    fn flag(name: &str, flag: bool) -> InferInputTensor {
        let contents = InferTensorContents { bool_contents: vec![flag], ..InferTensorContents::default() };
        InferInputTensor {
            name: name.into(),
            datatype: "BOOL".into(),
            shape: vec![1],
            contents: Some(contents),
            ..InferInputTensor::default()
        }
    }

    fn request(more: Vec<InferInputTensor>) -> ModelInferRequest {
        let contents = InferTensorContents { bytes_contents: vec![b"Hi".to_vec()], ..InferTensorContents::default() };
        let text = InferInputTensor { datatype: "BYTES".into(), contents: Some(contents), ..flag("text_input", true) };
        let inputs = std::iter::once(text).chain(more).collect();
        ModelInferRequest { model_name: "m".into(), id: "7".into(), inputs, ..ModelInferRequest::default() }
    }

    fn output(name: &str) -> InferRequestedOutputTensor {
        InferRequestedOutputTensor { name: name.into(), ..InferRequestedOutputTensor::default() }
    }

    #[test]
    fn a_whole_answer_has_the_prompt_and_a_stream_has_not() {
        let full_text = |inputs| {
            let ask = Ask::read(request(inputs)).map_err(|failure| failure.to_string())?;
            Ok(ask.generate.output.and_then(|output| output.return_full_text))
        };
        let excluded = |yes| flag("exclude_input_in_output", yes);
        assert_eq!(full_text(vec![]), Ok(Some(true)));
        assert_eq!(full_text(vec![excluded(true)]), Ok(Some(false)));
        assert_eq!(full_text(vec![flag("stream", true)]), Ok(Some(false)));
        assert_eq!(full_text(vec![flag("stream", false), excluded(false)]), Ok(Some(true)));
        let expected = "inputs.exclude_input_in_output: a stream has no place for the prompt".to_owned();
        assert_eq!(full_text(vec![flag("stream", true), excluded(false)]), Err(expected));
    }

    #[test]
    fn outputs_come_if_they_are_named_or_asked_for() {
        let outputs = |named: &[&str], inputs| {
            let named = named.iter().map(|name| output(name)).collect();
            let ask = Ask::read(ModelInferRequest { outputs: named, ..request(inputs) }).unwrap();
            (ask.outputs, ask.generate.output.and_then(|output| output.logprobs))
        };
        assert_eq!(outputs(&[], vec![]), (vec!["text_output"], None));
        let asked = vec![flag("return_num_output_tokens", true), flag("return_finish_reason", false)];
        assert_eq!(outputs(&[], asked), (vec!["text_output", "num_output_tokens"], None));
        let named = outputs(&["cumulative_logprob", "finish_reason"], vec![]);
        assert_eq!(named, (vec!["finish_reason", "cumulative_logprob"], Some(0)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let classified = InferRequestedOutputTensor {
            parameters: [("classification".to_owned(), InferParameter::default())].into(),
            ..output("text_output")
        };
        for (wrong, expected) in [
            (ModelInferRequest { inputs: vec![], ..request(vec![]) }, "inputs.text_input: it is missing"),
            (ModelInferRequest { outputs: vec![output("text")], ..request(vec![]) }, "outputs.text: there is no such"),
            (
                ModelInferRequest { outputs: vec![classified], ..request(vec![]) },
                "outputs.text_output: its parameter classification is not supported",
            ),
            (ModelInferRequest { model_version: "2".into(), ..request(vec![]) }, "no model `m version 2` is served"),
        ] {
            let failure = Ask::read(wrong).unwrap_err().to_string();
            assert!(failure.starts_with(expected), "{failure} is not {expected}");
        }
    }
}
