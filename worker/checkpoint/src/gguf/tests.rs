use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::parse;
use crate::checkpoint::Contents;
use crate::encoding::Encoding;
use crate::metadata::{Array, Value};
use crate::tensor::TensorEntry;

/// A file to spoil: the parts of a GGUF as bytes, joined by `bytes`.
#[derive(Clone)]
struct Parts {
    version: u32,
    n_tensors: u64,
    n_pairs: u64,
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    n_data_bytes: usize,
}

impl Parts {
    fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.n_tensors.to_le_bytes());
        file.extend(self.n_pairs.to_le_bytes());
        file.extend(self.pairs.iter().flatten());
        file.extend(self.tensors.iter().flatten());
        let data_start = file.len().next_multiple_of(32);
        file.resize(data_start + self.n_data_bytes, 0xA5);
        file
    }

    fn with_pair(mut self, pair: Vec<u8>) -> Self {
        self.pairs.push(pair);
        self.n_pairs += 1;
        self
    }

    fn with_tensor(mut self, tensor: Vec<u8>) -> Self {
        self.tensors.push(tensor);
        self.n_tensors += 1;
        self
    }
}

fn text(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

fn pair(key: impl AsRef<[u8]>, value_type: u32, value: impl AsRef<[u8]>) -> Vec<u8> {
    [text(key), value_type.to_le_bytes().to_vec(), value.as_ref().to_vec()].concat()
}

fn array(element_type: u32, count: u64, elements: impl AsRef<[u8]>) -> Vec<u8> {
    [&element_type.to_le_bytes()[..], &count.to_le_bytes(), elements.as_ref()].concat()
}

fn tensor(name: impl AsRef<[u8]>, dimensions: &[u64], ggml_type: u32, offset: u64) -> Vec<u8> {
    let mut description = text(name);
    description.extend((dimensions.len() as u32).to_le_bytes());
    description.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
    description.extend(ggml_type.to_le_bytes());
    description.extend(offset.to_le_bytes());
    description
}

/// A sound file with every kind of value and three tensors.
fn sound() -> Parts {
    let file = Parts { version: 3, n_tensors: 0, n_pairs: 0, pairs: vec![], tensors: vec![], n_data_bytes: 136 };
    file.with_pair(pair("general.architecture", 8, text("llama")))
        .with_pair(pair("n.u8", 0, [200]))
        .with_pair(pair("n.i8", 1, [0xFF]))
        .with_pair(pair("n.u16", 2, 300u16.to_le_bytes()))
        .with_pair(pair("n.i16", 3, (-300i16).to_le_bytes()))
        .with_pair(pair("n.u32", 4, 70_000u32.to_le_bytes()))
        .with_pair(pair("n.i32", 5, (-70_000i32).to_le_bytes()))
        .with_pair(pair("n.f32", 6, 0.5f32.to_le_bytes()))
        .with_pair(pair("n.bool", 7, [1]))
        .with_pair(pair("n.u64", 10, (1u64 << 40).to_le_bytes()))
        .with_pair(pair("n.i64", 11, (-1i64 << 40).to_le_bytes()))
        .with_pair(pair("n.f64", 12, 0.25f64.to_le_bytes()))
        .with_pair(pair("tokens", 9, array(8, 2, [text("a"), text("é")].concat())))
        .with_pair(pair("scores", 9, array(6, 2, [1f32.to_le_bytes(), (-1f32).to_le_bytes()].concat())))
        .with_pair(pair("flags", 9, array(7, 2, [0, 1])))
        .with_pair(pair("nested", 9, array(9, 2, [array(0, 1, [7]), array(5, 0, [])].concat())))
        .with_tensor(tensor("matrix", &[4, 2], 0, 0))
        .with_tensor(tensor("quantized", &[32, 2], 8, 32))
        .with_tensor(tensor("vector", &[3], 1, 128))
}

#[test]
fn a_sound_file_is_read_in_full() {
    for version in [2, 3] {
        let contents = parse(&Parts { version, ..sound() }.bytes()).unwrap();
        check_sound(&contents);
    }
}

fn check_sound(contents: &Contents) {
    let metadata = &contents.metadata;
    assert_eq!(metadata.str("general.architecture").unwrap(), "llama");
    for (key, value) in [
        ("n.u8", Value::U8(200)),
        ("n.i8", Value::I8(-1)),
        ("n.u16", Value::U16(300)),
        ("n.i16", Value::I16(-300)),
        ("n.u32", Value::U32(70_000)),
        ("n.i32", Value::I32(-70_000)),
        ("n.f32", Value::F32(0.5)),
        ("n.bool", Value::Bool(true)),
        ("n.u64", Value::U64(1 << 40)),
        ("n.i64", Value::I64(-1 << 40)),
        ("n.f64", Value::F64(0.25)),
        ("scores", Value::Array(Array::F32(vec![1.0, -1.0]))),
        ("flags", Value::Array(Array::Bool(vec![false, true]))),
        ("nested", Value::Array(Array::Array(vec![Array::U8(vec![7]), Array::I32(vec![])]))),
    ] {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    assert_eq!(metadata.strings("tokens").unwrap(), ["a", "é"]);

    let tensors: Vec<_> = contents
        .tensors
        .entries()
        .iter()
        .map(|entry| (entry.name.as_str(), entry.shape.as_slice(), entry.encoding, range(entry).len()))
        .collect();
    let expected: [(&str, &[usize], Encoding, usize); 3] = [
        ("matrix", &[2, 4], Encoding::F32, 32),
        ("quantized", &[2, 32], Encoding::Q8_0, 68),
        ("vector", &[3], Encoding::F16, 6),
    ];
    assert_eq!(tensors, expected);
    for entry in contents.tensors.entries() {
        let found = contents.tensors.find(&entry.name).unwrap();
        assert_eq!(range(found), range(entry));
    }
    assert!(contents.tensors.find("absent").is_none());
}

#[test]
fn data_starts_at_the_alignment_that_the_file_gives() {
    let none = Parts { tensors: vec![], n_tensors: 0, ..sound() };
    let aligned = none.with_pair(pair("general.alignment", 4, 4096u32.to_le_bytes()));

    let mut file = aligned.clone().with_tensor(tensor("matrix", &[4, 2], 0, 4096)).bytes();
    file.resize(3 * 4096, 0);
    assert_eq!(range(&parse(&file).unwrap().tensors.entries()[0]), 8192..8224);

    let mut file = aligned.with_tensor(tensor("matrix", &[4, 2], 0, 32)).bytes();
    file.resize(3 * 4096, 0);
    let error = parse(&file).expect_err("accepted").to_string();
    assert!(error.contains("the data offset 32 is not a multiple of the alignment 4096"), "{error}");
}

/// Parses what must be refused and compares the message.
#[track_caller]
fn check(file: &[u8], message: &str) {
    let error = parse(file).expect_err("accepted").to_string();
    assert_eq!(error, message);
    assert!(!error.contains('\n'), "a message is one line");
}

#[track_caller]
fn check_pair(pair: Vec<u8>, message: &str) {
    // The only pair, so that offsets in messages do not depend on `sound`.
    let file = Parts { pairs: vec![pair], n_pairs: 1, tensors: vec![], n_tensors: 0, ..sound() };
    check(&file.bytes(), message);
}

#[track_caller]
fn check_tensor(tensor: Vec<u8>, message: &str) {
    let file = Parts { pairs: vec![], n_pairs: 0, tensors: vec![tensor], n_tensors: 1, ..sound() };
    check(&file.bytes(), message);
}

#[test]
fn files_of_other_kinds_are_refused() {
    check(b"", "header: needs 4 bytes but the file has only 0 left (at byte 0)");
    check(b"GG", "header: needs 4 bytes but the file has only 2 left (at byte 0)");
    check(
        b"PK\x03\x04 and more",
        "header: not a GGUF file, it starts with [50, 4b, 03, 04] instead of \"GGUF\" (at byte 0)",
    );
    check(
        &Parts { version: 1, ..sound() }.bytes(),
        "header: GGUF version 1 is not supported, only 2 and 3 are (at byte 4)",
    );
    check(
        &Parts { version: 3u32.swap_bytes(), ..sound() }.bytes(),
        "header: the file is big-endian, only little-endian GGUF is supported (at byte 4)",
    );
}

#[test]
fn lying_counts_are_refused() {
    check(
        &Parts { n_tensors: u64::MAX, ..sound() }.bytes(),
        "header: number of tensors is 18446744073709551615, the limit is 65536 (at byte 8)",
    );
    check(
        &Parts { n_pairs: 65_537, ..sound() }.bytes(),
        "header: number of metadata entries is 65537, the limit is 65536 (at byte 16)",
    );
    let empty = Parts { pairs: vec![], tensors: vec![], n_pairs: 0, n_tensors: 0, n_data_bytes: 0, ..sound() };
    check(
        &Parts { n_pairs: 2, ..empty.clone() }.bytes(),
        "header: needs 28 bytes but the file has only 8 left (at byte 16)",
    );
    check(&Parts { n_tensors: 1, ..empty }.bytes(), "header: needs 33 bytes but the file has only 16 left (at byte 8)");
}

#[test]
fn bad_metadata_is_refused_by_key() {
    check_pair(pair("", 0, [1]), "metadata entry 0: the name is empty (at byte 24)");
    check_pair(pair([b'k', 0xFF], 0, [1]), "metadata entry 0: the text is not valid UTF-8 (at byte 32)");
    check_pair(pair(vec![b'k'; 1025], 0, [1]), "metadata entry 0: key length is 1025, the limit is 1024 (at byte 24)");
    check_pair(pair("k", 13, [1]), "metadata key \"k\": unknown metadata value type 13 (at byte 33)");
    check_pair(pair("k", 7, [2]), "metadata key \"k\": a boolean is stored as 2, expected 0 or 1 (at byte 37)");
    check_pair(pair("k", 8, text([0xC3])), "metadata key \"k\": the text is not valid UTF-8 (at byte 45)");
    check_pair(
        pair("k", 8, u64::MAX.to_le_bytes()),
        "metadata key \"k\": string length is 18446744073709551615, the limit is 4194304 (at byte 37)",
    );
    check_pair(
        pair("k", 8, 200u64.to_le_bytes()),
        "metadata key \"k\": needs 200 bytes but the file has only 155 left (at byte 37)",
    );
    check_pair(
        pair("lockstep.rope.halves", 7, [1]),
        "metadata key \"lockstep.rope.halves\": keys that begin with \"lockstep.\" are not for GGUF files (at byte 24)",
    );
    let twice = [pair("k\n", 0, [1]), pair("k\n", 0, [2])].concat();
    check(
        &Parts { pairs: vec![twice], n_pairs: 2, tensors: vec![], n_tensors: 0, ..sound() }.bytes(),
        "metadata key \"k\\n\": the name occurs twice (at byte 39)",
    );
}

#[test]
fn bad_arrays_are_refused() {
    check_pair(
        pair("k", 9, array(10, 1 << 61, [])),
        "metadata key \"k\": array length is 2305843009213693952, the limit is 67108864 (at byte 41)",
    );
    check_pair(
        pair("k", 9, array(8, 1 << 20, text("x"))),
        "metadata key \"k\": needs 8388608 bytes but the file has only 151 left (at byte 41)",
    );
    check_pair(pair("k", 9, array(77, 1, [])), "metadata key \"k\": unknown metadata value type 77 (at byte 37)");
    check_pair(
        pair("k", 9, array(7, 2, [1, 9])),
        "metadata key \"k\": a boolean is stored as 9, expected 0 or 1 (at byte 50)",
    );
    let deep = (0..5).fold(array(0, 1, [1]), |inner, _| array(9, 1, inner));
    check_pair(pair("k", 9, deep), "metadata key \"k\": array nesting is 5, the limit is 4 (at byte 85)");
}

#[test]
fn bad_alignments_are_refused() {
    let check_alignment = |pair: Vec<u8>, found: &str, end: usize| {
        check_pair(
            pair,
            &format!(
                "metadata key \"general.alignment\": the alignment must be a power of two from 8 to 65536, \
                 found {found} (at byte {end})"
            ),
        );
    };
    for alignment in [0u32, 4, 24, 1 << 17, u32::MAX] {
        let pair = pair("general.alignment", 4, alignment.to_le_bytes());
        check_alignment(pair, &alignment.to_string(), 57);
    }
    check_alignment(pair("general.alignment", 8, text("32")), "string", 63);
}

#[test]
fn bad_descriptions_are_refused_by_tensor() {
    check_tensor(tensor("", &[4], 0, 0), "tensor 0: the name is empty (at byte 24)");
    check_tensor(tensor([0xFF], &[4], 0, 0), "tensor 0: the text is not valid UTF-8 (at byte 32)");
    check_tensor(tensor([b't'; 65], &[4], 0, 0), "tensor 0: name length is 65, the limit is 64 (at byte 24)");
    check_tensor(tensor("long", &[], 0, 0), "tensor \"long\": the tensor has no dimensions (at byte 36)");
    check_tensor(tensor("t", &[1; 5], 0, 0), "tensor \"t\": number of dimensions is 5, the limit is 4 (at byte 33)");
    check_tensor(tensor("t", &[4, 0], 0, 0), "tensor \"t\": dimension 1 of the tensor is zero (at byte 33)");
    check_tensor(tensor("t", &[4], 21, 0), "tensor \"t\": unsupported GGML type 21 (IQ3_S) (at byte 45)");
    check_tensor(tensor("t", &[4], 1000, 0), "tensor \"t\": unsupported GGML type 1000 (at byte 45)");
    check_tensor(
        tensor("t", &[48, 2], 2, 0),
        "tensor \"t\": a row of 48 values is not a whole number of Q4_0 blocks of 32 (at byte 33)",
    );
    check_tensor(
        tensor("t", &[1 << 32, 1 << 32], 0, 0),
        "tensor \"t\": the size of shape [4294967296, 4294967296] overflows (at byte 33)",
    );
    check_tensor(
        tensor("t", &[u64::MAX], 0, 0),
        "tensor \"t\": the size of shape [18446744073709551615] overflows (at byte 33)",
    );
}

#[test]
fn data_outside_the_file_is_refused() {
    check_tensor(
        tensor("t", &[4], 0, 8),
        "tensor \"t\": the data offset 8 is not a multiple of the alignment 32 (at byte 49)",
    );
    check_tensor(
        tensor("t", &[35], 0, 0),
        "tensor \"t\": data of 140 bytes at offset 0 ends beyond the file's 200 bytes (at byte 49)",
    );
    check_tensor(
        tensor("t", &[4], 0, 128),
        "tensor \"t\": data of 16 bytes at offset 128 ends beyond the file's 200 bytes (at byte 49)",
    );
    check_tensor(
        tensor("t", &[4], 0, u64::MAX - 31),
        "tensor \"t\": data of 16 bytes at offset 18446744073709551584 ends beyond the file's 200 bytes (at byte 49)",
    );
    let none = Parts { pairs: vec![], n_pairs: 0, tensors: vec![], n_tensors: 0, ..sound() };
    check(
        &none.clone().with_tensor(tensor("a", &[9], 0, 0)).with_tensor(tensor("b", &[4], 0, 32)).bytes(),
        "tensor \"b\": the data overlaps that of tensor \"a\" (at byte 128)",
    );
    check(
        &none.with_tensor(tensor("a", &[8], 0, 32)).with_tensor(tensor("a", &[8], 0, 0)).bytes(),
        "tensor \"a\": the name occurs twice (at byte 96)",
    );
}

#[test]
fn every_truncation_of_a_sound_file_is_refused() {
    let file = sound().bytes();
    // The last two bytes belong to no tensor.
    for length in 0..file.len() - 2 {
        assert!(parse(&file[..length]).is_err(), "accepted {length} of {} bytes", file.len());
    }
    check_sound(&parse(&file[..file.len() - 2]).unwrap());
}

/// Where the data lies.
fn range(entry: &TensorEntry) -> Range<usize> {
    entry.pieces().next().expect("every tensor of a GGUF has data").range.clone()
}

/// What `parse` promises of anything it accepts.
fn check_promises(contents: &Contents, file_len: usize) {
    let mut ranges: Vec<_> = contents.tensors.entries().iter().map(range).collect();
    ranges.sort_by_key(|range| range.start);
    assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "ranges overlap");
    for entry in contents.tensors.entries() {
        let (n_cols, outer) = entry.shape.split_last().expect("a shape is not empty");
        let n_rows: usize = outer.iter().product();
        assert!(n_rows > 0 && range(entry).end <= file_len);
        assert_eq!(entry.encoding.row_bytes(*n_cols).map(|bytes| bytes * n_rows), Some(range(entry).len()));
    }
}

#[test]
fn mutated_files_never_panic_and_never_break_a_promise() {
    let seed = RandomState::new().build_hasher().finish();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let sound = sound().bytes();
    let interesting = [0, 1, 2, 7, 8, 9, 31, 32, 0x7F, 0x80, 0xFF];
    let mut n_accepted = 0;
    for _ in 0..300_000 {
        let mut file = sound.clone();
        for _ in 0..rng.random_range(1..=4) {
            let at = rng.random_range(0..file.len());
            match rng.random_range(0..6) {
                0 => file[at] = rng.random(),
                1 => file[at] = interesting[rng.random_range(0..interesting.len())],
                2 => file[at] ^= 1 << rng.random_range(0..8),
                3 => file.truncate(at + 1),
                4 => file.insert(at, rng.random()),
                _ => {
                    let end = (at + 8).min(file.len());
                    file[at..end].fill(0xFF);
                }
            }
        }
        if let Ok(contents) = parse(&file) {
            n_accepted += 1;
            check_promises(&contents, file.len());
        }
    }
    // Guards the test itself: mutants must reach both the acceptance and the refusals.
    assert!((1_000..200_000).contains(&n_accepted), "{n_accepted} of 300000 mutants accepted");
}
