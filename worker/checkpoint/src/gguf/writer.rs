//! A writer: a GGUF file from its parts, the header at once and the data as it comes, so that a file of any size takes
//! little memory.

use std::io::{self, Write};

use crate::encoding::Encoding;

const VERSION: u32 = 3;

/// Where tensors start: the alignment of files that do not give one.
const ALIGNMENT: usize = super::ALIGNMENT_DEFAULT as usize;

/// The header in the making: metadata pairs, and tensors in the order in which their data will follow.
#[derive(Debug, Default)]
pub struct GgufHeader {
    n_pairs: u64,
    pairs: Vec<u8>,
    descriptions: Vec<u8>,
    /// Bytes of each tensor.
    sizes: Vec<usize>,
    /// Where the next tensor starts.
    data_offset: usize,
}

/// A file whose header is written and whose data is awaited, tensor after tensor.
#[derive(Debug)]
pub struct GgufData<W> {
    out: W,
    sizes: std::vec::IntoIter<usize>,
    /// Bytes that the tensor at hand still lacks.
    missing: usize,
    /// Zeros that follow it.
    padding: usize,
}

// === impl GgufHeader ===

impl GgufHeader {
    /// Adds a number.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4, &value.to_le_bytes());
    }

    /// Adds a number.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, 6, &value.to_le_bytes());
    }

    /// Adds a truth value.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, 7, &[value.into()]);
    }

    /// Adds a text.
    pub fn string(&mut self, key: &str, value: &str) {
        self.pair(key, 8, &text(value));
    }

    /// Adds an array of texts.
    pub fn strings<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        let count = values.len();
        self.array(key, 8, count, &values.flat_map(text).collect::<Vec<u8>>());
    }

    /// Adds an array of numbers.
    pub fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        let count = values.len();
        self.array(key, 5, count, &values.flat_map(i32::to_le_bytes).collect::<Vec<u8>>());
    }

    /// Adds a tensor of `shape`, outermost dimension first.
    ///
    /// # Panics
    /// If no GGUF file has `encoding`, rows are not whole blocks of it, or the size overflows.
    pub fn tensor(&mut self, name: &str, shape: &[usize], encoding: Encoding) {
        let (n_cols, outer) = shape.split_last().expect("a tensor has a dimension");
        let row_bytes = encoding.row_bytes(*n_cols).expect("rows are whole blocks");
        let size = outer.iter().fold(row_bytes, |size, dimension| size * dimension);
        self.descriptions.extend(text(name));
        self.descriptions.extend((shape.len() as u32).to_le_bytes());
        self.descriptions.extend(shape.iter().rev().flat_map(|&dimension| (dimension as u64).to_le_bytes()));
        let ggml_type = encoding.ggml_type().expect("a GGUF file can have the encoding");
        self.descriptions.extend(ggml_type.to_le_bytes());
        self.descriptions.extend((self.data_offset as u64).to_le_bytes());
        self.sizes.push(size);
        self.data_offset += size.next_multiple_of(ALIGNMENT);
    }

    /// Writes the header to `out`, which then takes the data.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write<W: Write>(self, mut out: W) -> io::Result<GgufData<W>> {
        let mut file = b"GGUF".to_vec();
        file.extend(VERSION.to_le_bytes());
        file.extend((self.sizes.len() as u64).to_le_bytes());
        file.extend(self.n_pairs.to_le_bytes());
        file.extend(self.pairs);
        file.extend(self.descriptions);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&file)?;
        Ok(GgufData { out, sizes: self.sizes.into_iter(), missing: 0, padding: 0 })
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

// === impl GgufData ===

impl<W: Write> GgufData<W> {
    /// Writes more of the tensor at hand, or the first of the next one.
    ///
    /// # Errors
    /// Those of the file.
    ///
    /// # Panics
    /// If the bytes go beyond the tensor's end: that is where its last piece ends.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.missing == 0 {
            self.missing = self.sizes.next().expect("data belongs to a tensor of the header");
            self.padding = self.missing.next_multiple_of(ALIGNMENT) - self.missing;
        }
        self.missing = self.missing.checked_sub(bytes.len()).expect("data ends with its tensor");
        self.out.write_all(bytes)?;
        if self.missing == 0 {
            self.out.write_all(&[0; ALIGNMENT][..self.padding])?;
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Those of the file.
    ///
    /// # Panics
    /// If data is missing.
    pub fn finish(mut self) -> io::Result<W> {
        let missing = self.missing + self.sizes.sum::<usize>();
        assert_eq!(missing, 0, "every tensor has its data");
        self.out.flush()?;
        Ok(self.out)
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::GgufHeader;
    use crate::encoding::Encoding;
    use crate::gguf::parse;
    use crate::metadata::{Array, Value};

    #[test]
    fn what_is_written_is_read() {
        let mut header = GgufHeader::default();
        header.u32("n.u32", 7);
        header.f32("n.f32", 0.5);
        header.bool("n.bool", true);
        header.string("text", "é");
        header.strings("texts", ["a", ""].into_iter());
        header.i32s("numbers", [1, -1].into_iter());
        let encodings = || Encoding::ALL.into_iter().filter(|encoding| encoding.ggml_type().is_some()).enumerate();
        for (i, encoding) in encodings() {
            header.tensor(&format!("tensor {i}"), &[1 + i, 256], encoding);
        }
        let mut data = header.write(Vec::new()).unwrap();
        for (i, encoding) in encodings() {
            (0..=i).for_each(|_| data.write(&vec![i as u8; encoding.row_bytes(256).unwrap()]).unwrap());
        }
        let file = data.finish().unwrap();

        let contents = parse(&file).unwrap();
        for (key, value) in [
            ("n.u32", Value::U32(7)),
            ("n.f32", Value::F32(0.5)),
            ("n.bool", Value::Bool(true)),
            ("text", Value::String("é".into())),
            ("texts", Value::Array(Array::String(vec!["a".into(), String::new()]))),
            ("numbers", Value::Array(Array::I32(vec![1, -1]))),
        ] {
            assert_eq!(contents.metadata.get(key), Some(&value), "{key}");
        }
        for (i, encoding) in encodings() {
            let entry = contents.tensors.find(&format!("tensor {i}")).unwrap();
            assert_eq!((&entry.shape[..], entry.encoding), (&[1 + i, 256][..], encoding));
            let range = entry.pieces().next().unwrap().range.clone();
            assert!(file[range].iter().all(|byte| *byte == i as u8), "{encoding}");
        }
    }

    #[test]
    #[should_panic(expected = "every tensor has its data")]
    fn a_file_does_not_end_before_its_data() {
        let mut header = GgufHeader::default();
        header.tensor("vector", &[2], Encoding::F32);
        let mut data = header.write(Vec::new()).unwrap();
        data.write(&[0; 4]).unwrap();
        let _ = data.finish();
    }
}
