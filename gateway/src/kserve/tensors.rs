//! Tensors: the inputs of a request become values, and values become outputs.

use std::collections::BTreeMap;

use lockstep_proto::inference::{
    InferTensorContents, model_infer_request::InferInputTensor, model_infer_response::InferOutputTensor,
};

use super::signature::{Datatype, INPUTS, Tensor};
use crate::request::RequestError;

/// The inputs of one request, each known to the signature and of one element.
#[derive(Debug, Default)]
pub(super) struct Inputs(BTreeMap<&'static str, Element>);

/// The element of an input.
#[derive(Debug, PartialEq)]
enum Element {
    Text(String),
    Flag(bool),
}

/// The outputs of one response.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    pub(super) tensors: Vec<InferOutputTensor>,
    /// Their elements, by the tensors' places.
    pub(super) raw: Vec<Vec<u8>>,
}

// === impl Inputs ===

impl Inputs {
    /// Reads inputs whose elements are all in `raw`, or each in its own contents.
    ///
    /// # Errors
    /// Names the first input that is not one of the signature's.
    pub(super) fn read(tensors: Vec<InferInputTensor>, raw: Vec<Vec<u8>>) -> Result<Self, RequestError> {
        if !raw.is_empty() && raw.len() != tensors.len() {
            let message = format!("{} for {} inputs", raw.len(), tensors.len());
            return Err(RequestError::invalid("raw_input_contents", message));
        }
        let mut raw = raw.into_iter();
        let mut read = BTreeMap::new();
        for tensor in tensors {
            let path = format!("inputs.{}", tensor.name);
            let invalid = |message: String| RequestError::invalid(&path, message);
            let known = INPUTS.iter().find(|known| known.name == tensor.name);
            let known = known.ok_or_else(|| invalid("there is no such input".to_owned()))?;
            check(known, &tensor).map_err(invalid)?;
            let element = match (raw.next(), tensor.contents) {
                (Some(_), Some(_)) => Err("its elements are in raw_input_contents and in its contents".to_owned()),
                (Some(raw), None) => of_raw(known.datatype, &raw),
                (None, contents) => of_contents(known.datatype, contents.unwrap_or_default()),
            };
            if read.insert(known.name, element.map_err(invalid)?).is_some() {
                return Err(invalid("it is there twice".to_owned()));
            }
        }
        Ok(Self(read))
    }

    /// Takes the text of an input, if it is there.
    pub(super) fn take_text(&mut self, name: &str) -> Option<String> {
        match self.0.remove(name)? {
            Element::Text(text) => Some(text),
            Element::Flag(_) => None,
        }
    }

    /// The truth value of an input, if it is there.
    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name)? {
            Element::Flag(flag) => Some(*flag),
            Element::Text(_) => None,
        }
    }
}

fn check(known: &Tensor, tensor: &InferInputTensor) -> Result<(), String> {
    if tensor.datatype != known.datatype.name() {
        return Err(format!("its datatype is {}, not {}", known.datatype.name(), tensor.datatype));
    }
    // A batch of one is how servers that batch have it.
    if tensor.shape != [1] && tensor.shape != [1, 1] {
        return Err(format!("shape {:?} is not [1]: send a request for each element", tensor.shape));
    }
    match tensor.parameters.keys().min() {
        Some(parameter) => Err(format!("its parameter {parameter} is not supported")),
        None => Ok(()),
    }
}

fn of_raw(datatype: Datatype, raw: &[u8]) -> Result<Element, String> {
    match (datatype, raw) {
        (Datatype::Bool, &[flag @ (0 | 1)]) => Ok(Element::Flag(flag == 1)),
        (Datatype::Bool, _) => Err(format!("{} bytes are no BOOL", raw.len())),
        _ => match raw.split_first_chunk() {
            Some((length, bytes)) if usize::try_from(u32::from_le_bytes(*length)) == Ok(bytes.len()) => {
                text(bytes.to_vec())
            }
            _ => Err("its raw contents are not one element behind its length".to_owned()),
        },
    }
}

fn of_contents(datatype: Datatype, contents: InferTensorContents) -> Result<Element, String> {
    let n_elements = contents.bool_contents.len()
        + contents.int_contents.len()
        + contents.int64_contents.len()
        + contents.uint_contents.len()
        + contents.uint64_contents.len()
        + contents.fp32_contents.len()
        + contents.fp64_contents.len()
        + contents.bytes_contents.len();
    let InferTensorContents { bool_contents, mut bytes_contents, .. } = contents;
    match (datatype, &bool_contents[..]) {
        _ if n_elements != 1 => Err(format!("it has {n_elements} elements, not 1")),
        (Datatype::Bool, &[flag]) => Ok(Element::Flag(flag)),
        (Datatype::Bytes, []) if bytes_contents.len() == 1 => text(bytes_contents.remove(0)),
        _ => Err(format!("its element is no {}", datatype.name())),
    }
}

fn text(bytes: Vec<u8>) -> Result<Element, String> {
    String::from_utf8(bytes).map(Element::Text).map_err(|error| format!("it is no UTF-8: {}", error.utf8_error()))
}

// === impl Outputs ===

impl Outputs {
    /// Adds a tensor of texts.
    pub(super) fn texts<'a>(&mut self, name: &str, texts: impl Iterator<Item = &'a str>) {
        let (mut raw, mut n_elements) = (Vec::new(), 0);
        for text in texts {
            // An answer is far shorter than 4 GiB.
            raw.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
            raw.extend_from_slice(text.as_bytes());
            n_elements += 1;
        }
        self.push(name, Datatype::Bytes, n_elements, raw);
    }

    /// Adds a tensor of numbers.
    pub(super) fn floats(&mut self, name: &str, values: impl Iterator<Item = f32>) {
        let raw: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        self.push(name, Datatype::Fp32, raw.len() / size_of::<f32>(), raw);
    }

    /// Adds a tensor of counts.
    pub(super) fn counts(&mut self, name: &str, values: impl Iterator<Item = u32>) {
        let raw: Vec<u8> = values.flat_map(u32::to_le_bytes).collect();
        self.push(name, Datatype::Uint32, raw.len() / size_of::<u32>(), raw);
    }

    fn push(&mut self, name: &str, datatype: Datatype, n_elements: usize, raw: Vec<u8>) {
        self.tensors.push(InferOutputTensor {
            name: name.to_owned(),
            datatype: datatype.name().to_owned(),
            shape: vec![i64::try_from(n_elements).unwrap_or(i64::MAX)],
            ..InferOutputTensor::default()
        });
        self.raw.push(raw);
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::inference::InferParameter;

    use super::*;

    fn tensor(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
        InferInputTensor {
            name: name.into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
            ..InferInputTensor::default()
        }
    }

    fn with_contents(name: &str, datatype: &str, contents: InferTensorContents) -> InferInputTensor {
        InferInputTensor { contents: Some(contents), ..tensor(name, datatype, &[1]) }
    }

    fn bytes(elements: &[&[u8]]) -> InferTensorContents {
        InferTensorContents {
            bytes_contents: elements.iter().map(|element| element.to_vec()).collect(),
            ..InferTensorContents::default()
        }
    }

    fn flag(flag: bool) -> InferTensorContents {
        InferTensorContents { bool_contents: vec![flag], ..InferTensorContents::default() }
    }

    #[test]
    fn elements_are_read_from_both_places() {
        let raw = vec![b"\x02\0\0\0Hi".to_vec(), vec![1]];
        let tensors = vec![tensor("text_input", "BYTES", &[1]), tensor("stream", "BOOL", &[1, 1])];
        let mut of_raw = Inputs::read(tensors, raw).unwrap();
        let tensors =
            vec![with_contents("text_input", "BYTES", bytes(&[b"Hi"])), with_contents("stream", "BOOL", flag(true))];
        let mut of_contents = Inputs::read(tensors, Vec::new()).unwrap();
        for inputs in [&mut of_raw, &mut of_contents] {
            assert_eq!(inputs.flag("stream"), Some(true));
            assert_eq!(inputs.take_text("text_input").as_deref(), Some("Hi"));
            assert_eq!((inputs.take_text("sampling_parameters"), inputs.flag("return_logprobs")), (None, None));
        }
    }

    #[test]
    fn what_is_no_input_is_named() {
        let text = || tensor("text_input", "BYTES", &[1]);
        let shared = InferInputTensor {
            parameters: [("shared_memory_region".to_owned(), InferParameter::default())].into(),
            ..text()
        };
        let two_lists = InferTensorContents { bool_contents: vec![true], ..bytes(&[b"a"]) };
        for (tensors, raw, expected) in [
            (vec![tensor("text", "BYTES", &[1])], vec![], "inputs.text: there is no such input"),
            (vec![tensor("text_input", "INT32", &[1])], vec![], "inputs.text_input: its datatype is BYTES, not INT32"),
            (vec![tensor("text_input", "BYTES", &[2])], vec![], "inputs.text_input: shape [2] is not [1]"),
            (vec![tensor("text_input", "BYTES", &[])], vec![], "inputs.text_input: shape [] is not [1]"),
            (vec![tensor("text_input", "BYTES", &[-1])], vec![], "inputs.text_input: shape [-1] is not [1]"),
            (vec![shared], vec![], "inputs.text_input: its parameter shared_memory_region is not supported"),
            (vec![text()], vec![], "inputs.text_input: it has 0 elements, not 1"),
            (vec![with_contents("text_input", "BYTES", bytes(&[b"a", b"b"]))], vec![], "inputs.text_input: it has 2"),
            (vec![with_contents("text_input", "BYTES", flag(true))], vec![], "inputs.text_input: its element is no"),
            (vec![with_contents("text_input", "BYTES", two_lists)], vec![], "inputs.text_input: it has 2 elements"),
            (vec![with_contents("stream", "BOOL", bytes(&[b"1"]))], vec![], "inputs.stream: its element is no BOOL"),
            (
                vec![with_contents("text_input", "BYTES", bytes(&[b"\xff"]))],
                vec![],
                "inputs.text_input: it is no UTF-8",
            ),
            (vec![text()], vec![b"\x03\0\0\0Hi".to_vec()], "inputs.text_input: its raw contents are not one element"),
            (vec![text()], vec![b"\x01\0\0\0Hi".to_vec()], "inputs.text_input: its raw contents are not one element"),
            (vec![text()], vec![b"\xff\xff\xff\xff".to_vec()], "inputs.text_input: its raw contents are not"),
            (vec![text()], vec![b"Hi".to_vec()], "inputs.text_input: its raw contents are not one element"),
            (vec![tensor("stream", "BOOL", &[1])], vec![vec![2]], "inputs.stream: 1 bytes are no BOOL"),
            (vec![tensor("stream", "BOOL", &[1])], vec![vec![]], "inputs.stream: 0 bytes are no BOOL"),
            (vec![text()], vec![vec![], vec![]], "raw_input_contents: 2 for 1 inputs"),
            (
                vec![with_contents("text_input", "BYTES", bytes(&[b"a"]))],
                vec![b"\x01\0\0\0a".to_vec()],
                "inputs.text_input: its elements are in raw_input_contents and in its contents",
            ),
            (
                vec![text(), text()],
                vec![b"\x01\0\0\0a".to_vec(), b"\x01\0\0\0b".to_vec()],
                "inputs.text_input: it is there twice",
            ),
        ] {
            let error = Inputs::read(tensors, raw).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
    }

    #[test]
    fn outputs_are_written_as_inputs_are_read() {
        let mut outputs = Outputs::default();
        outputs.texts("text_output", ["Hi", ""].into_iter());
        outputs.floats("cumulative_logprob", [-0.5].into_iter());
        outputs.counts("num_output_tokens", [1, 258].into_iter());
        let shapes: Vec<_> = outputs.tensors.iter().map(|tensor| (tensor.datatype.as_str(), tensor.shape[0])).collect();
        assert_eq!(shapes, [("BYTES", 2), ("FP32", 1), ("UINT32", 2)]);
        assert_eq!(outputs.raw[0], b"\x02\0\0\0Hi\0\0\0\0");
        assert_eq!(outputs.raw[1], (-0.5f32).to_le_bytes());
        assert_eq!(outputs.raw[2], [1, 0, 0, 0, 2, 1, 0, 0]);
    }
}
