//! Room for keys and values: how many tokens fit, where nobody says.
//!
//! All ranks of a group must come to the same number, and each before it has spoken to the others. So a rank reckons for
//! all of them, from the shard plan: a GPU's memory, less the weights of each rank, by what a token takes there; the
//! smallest counts. Ranks on GPUs of different sizes come to different numbers, and their attestation says so.

use std::sync::Arc;

use lockstep_kernels::{KvEncoding, cuda};

use crate::{
    device::Device,
    model::{LoadError, embedding::EmbeddingTable, load::Source},
};

/// Tokens where memory is the system's, which gives it only when it is used.
const CPU_TOKENS: usize = 32_768;

/// As many as a setting may ask for.
const MAX_TOKENS: usize = 1 << 30;

/// What one rank takes of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    weight_bytes: usize,
    kv_bytes_per_token: usize,
}

/// Tokens whose keys and values fit into the cache of `source`'s group on such a device, of whose memory `fraction` may be
/// taken. The rest is for the driver, NCCL, and what steps compute on their way.
///
/// # Errors
/// Not even one block of `block_size` tokens fits beside the weights.
pub fn tokens(
    source: &Source,
    device: &Device,
    encoding: KvEncoding,
    fraction: f64,
    block_size: usize,
) -> Result<usize, LoadError> {
    let Device::Cuda(gpu) = device else { return Ok(CPU_TOKENS) };
    let world_size = source.plan().world_size;
    let shares = (0..world_size).map(|rank| {
        let source = Source::open(Arc::clone(source.checkpoint()), rank, world_size)?;
        Ok(Share::of(&source, encoding))
    });
    let shares = shares.collect::<Result<Vec<_>, LoadError>>()?;
    let memory_bytes = gpu.info().memory_bytes;
    let budget_bytes = (memory_bytes as f64 * fraction) as usize;
    match fit(budget_bytes, &shares) {
        tokens if tokens >= block_size => Ok(tokens),
        _ => Err(LoadError::NoKvRoom {
            memory_mib: memory_bytes >> 20,
            fraction,
            weights_mib: shares.iter().map(|share| share.weight_bytes).max().unwrap_or(0) >> 20,
        }),
    }
}

/// The most tokens that fit on every rank.
fn fit(budget_bytes: usize, shares: &[Share]) -> usize {
    let on_rank = |share: &Share| budget_bytes.saturating_sub(share.weight_bytes) / share.kv_bytes_per_token.max(1);
    shares.iter().map(on_rank).min().unwrap_or(0).min(MAX_TOKENS)
}

impl Share {
    fn of(source: &Source, encoding: KvEncoding) -> Self {
        let bytes = source.checkpoint().tensors().map(|tensor| {
            // On the device a weight may take more bits than in the file, or fewer.
            let file_bits = 8.0 * tensor.encoding.block_bytes() as f64 / tensor.encoding.block_len() as f64;
            source.held_bytes(&tensor) as f64 * cuda::bits_per_weight(tensor.encoding) / file_bits
        });
        // Every rank has the whole embedding table, beside its part of the output matrix, even if they are one in the file.
        let table = source.checkpoint().find(EmbeddingTable::TENSOR).map_or(0.0, |table| {
            let n_values = table.n_rows() as f64 * table.n_cols() as f64;
            n_values * cuda::table_bits_per_weight(table.encoding) / 8.0
        });
        let config = source.config();
        let head_bytes = encoding.head_bytes(config.head_dim);
        Self {
            weight_bytes: (bytes.sum::<f64>() + table).ceil() as usize,
            kv_bytes_per_token: config.n_layers * source.plan().kv_heads.len() * head_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_with_the_least_room_decides() {
        let share = |weight_bytes, kv_bytes_per_token| Share { weight_bytes, kv_bytes_per_token };
        assert_eq!(fit(1000, &[share(100, 10)]), 90);
        assert_eq!(fit(1000, &[share(100, 10), share(200, 10)]), 80);
        assert_eq!(fit(1000, &[share(100, 20), share(200, 10)]), 45);
        assert_eq!(fit(1000, &[share(100, 10), share(1001, 10)]), 0);
        assert_eq!(fit(usize::MAX, &[share(0, 1)]), MAX_TOKENS);
    }
}
