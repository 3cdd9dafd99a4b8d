//! What encoding takes, the short way and through the library's pipeline, in turn:
//! `cargo bench --workspace --bench encode -- [TOKENIZER...]`, files or folders below `models/`.
//!
//! Kinds of text: an excerpt of 200 tokens of this repository's README.md, all of it, and as many bytes of random letters
//! and of random characters of all scripts, others in each round. Of the first two all words have come before, as most
//! have in a service that runs; of the others hardly any has.

use std::{fs, hint::black_box, path::PathBuf, time::Instant};

use anyhow::{Result, bail};
use lockstep_tokenizer_svc::{
    catalog::Model,
    error::TokenizeError,
    tokenizer::{Breaks, Tokenizer},
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// The service's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The tokenizers, if nobody names others.
const TOKENIZERS: [&str; 5] = [
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizers/gpt2",
    "tokenizers/llama3",
    "tokenizers/qwen2_5",
    "tokenizers/mistral_nemo",
];

/// Tokens of the short text.
const N_TOKENS: usize = 200;

/// How often each way is timed; the median counts.
const N_ROUNDS: usize = 41;

/// Bytes that are encoded each time, at least.
const ROUND_BYTES: usize = 32 << 10;

fn main() -> Result<()> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let long = fs::read_to_string(root.join("README.md"))?;
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let names = if named.is_empty() { TOKENIZERS.map(String::from).to_vec() } else { named };
    println!("{:<33} {:<10} {:>6} {:>9} {:>9} {:>6} {:>6}", "", "text", "bytes", "us", "library", "MB/s", "library");
    for name in names {
        let tokenizer = Model::open("bench", &root.join("models").join(&name))?.tokenizer;
        let short = excerpt(&tokenizer, &long)?;
        report(&name, "short", &tokenizer, |_| short.clone())?;
        report(&name, "long", &tokenizer, |_| long.clone())?;
        report(&name, "letters", &tokenizer, |rng| random_letters(rng, long.len()))?;
        report(&name, "characters", &tokenizer, |rng| random_characters(rng, long.len()))?;
    }
    Ok(())
}

/// The beginning of `text` that has so many tokens.
fn excerpt(tokenizer: &Tokenizer, text: &str) -> Result<String> {
    for (end, _) in text.char_indices() {
        if tokenizer.encode(&text[..end], &Breaks::NONE, true)?.len() >= N_TOKENS {
            return Ok(text[..end].to_owned());
        }
    }
    bail!("the text has fewer than {N_TOKENS} tokens")
}

/// Words such as no language has.
fn random_letters(rng: &mut ChaCha8Rng, n_bytes: usize) -> String {
    const LETTERS: &[u8] = b" etaoinshrdlu";
    (0..n_bytes).map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())])).collect()
}

/// Characters of the Basic Multilingual Plane.
fn random_characters(rng: &mut ChaCha8Rng, n_bytes: usize) -> String {
    (0..n_bytes / 3).filter_map(|_| char::from_u32(rng.random_range(0..0x1_0000))).collect()
}

/// Times both ways, in turn, and prints the medians.
fn report(name: &str, what: &str, tokenizer: &Tokenizer, text: impl Fn(&mut ChaCha8Rng) -> String) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut short_way, mut library, mut n_bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..N_ROUNDS {
        let text = text(&mut rng);
        n_bytes = text.len();
        short_way.push(time(&text, |text| tokenizer.encode(text, &Breaks::NONE, true))?);
        library.push(time(&text, |text| tokenizer.encode_by_library(text, &Breaks::NONE, true))?);
    }
    let [us, library_us] = [short_way, library].map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    let [rate, library_rate] = [us, library_us].map(|us| n_bytes as f64 / us);
    println!("{name:<33} {what:<10} {n_bytes:>6} {us:>9.1} {library_us:>9.1} {rate:>6.1} {library_rate:>6.1}");
    Ok(())
}

/// What one encoding takes. Unit: microseconds.
fn time(text: &str, encode: impl Fn(&str) -> Result<Vec<u32>, TokenizeError>) -> Result<f64> {
    let times = ROUND_BYTES.div_ceil(text.len());
    let start = Instant::now();
    for _ in 0..times {
        black_box(encode(black_box(text))?);
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / times as f64)
}
