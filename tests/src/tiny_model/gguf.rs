//! A GGUF file in the making: metadata pairs and tensors, put together in the end.

use lockstep_checkpoint::Encoding;

use super::quantize::quantize;

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;

/// The parts of a file, in the order in which they were added.
#[derive(Default)]
pub(super) struct Gguf {
    n_pairs: u64,
    pairs: Vec<u8>,
    n_tensors: u64,
    descriptions: Vec<u8>,
    data: Vec<u8>,
}

// === impl Gguf ===

impl Gguf {
    pub(super) fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4, &value.to_le_bytes());
    }

    pub(super) fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, 6, &value.to_le_bytes());
    }

    pub(super) fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, 7, &[value.into()]);
    }

    pub(super) fn string(&mut self, key: &str, value: &str) {
        self.pair(key, 8, &text(value));
    }

    pub(super) fn strings<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        let count = values.len();
        self.array(key, 8, count, &values.flat_map(text).collect::<Vec<u8>>());
    }

    pub(super) fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        let count = values.len();
        self.array(key, 5, count, &values.flat_map(i32::to_le_bytes).collect::<Vec<u8>>());
    }

    /// Adds a tensor of `shape`, outermost dimension first.
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize], encoding: Encoding, values: &[f32]) {
        self.n_tensors += 1;
        self.descriptions.extend(text(name));
        self.descriptions.extend((shape.len() as u32).to_le_bytes());
        self.descriptions.extend(shape.iter().rev().flat_map(|&dimension| (dimension as u64).to_le_bytes()));
        self.descriptions.extend(ggml_type(encoding).to_le_bytes());
        self.descriptions.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(quantize(encoding, values));
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(VERSION.to_le_bytes());
        file.extend(self.n_tensors.to_le_bytes());
        file.extend(self.n_pairs.to_le_bytes());
        file.extend(self.pairs);
        file.extend(self.descriptions);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(self.data);
        file
    }

    fn array(&mut self, key: &str, element_type: u32, count: usize, elements: &[u8]) {
        let head = [&element_type.to_le_bytes()[..], &(count as u64).to_le_bytes()].concat();
        self.pair(key, 9, &[&head, elements].concat());
    }

    fn pair(&mut self, key: &str, value_type: u32, value: &[u8]) {
        self.n_pairs += 1;
        self.pairs.extend(text(key));
        self.pairs.extend(value_type.to_le_bytes());
        self.pairs.extend(value);
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// The type number (`enum ggml_type`).
fn ggml_type(encoding: Encoding) -> u32 {
    match encoding {
        Encoding::F32 => 0,
        Encoding::F16 => 1,
        Encoding::Q4_0 => 2,
        Encoding::Q4_1 => 3,
        Encoding::Q5_0 => 6,
        Encoding::Q5_1 => 7,
        Encoding::Q8_0 => 8,
        Encoding::Q2K => 10,
        Encoding::Q3K => 11,
        Encoding::Q4K => 12,
        Encoding::Q5K => 13,
        Encoding::Q6K => 14,
        Encoding::BF16 => 30,
    }
}
