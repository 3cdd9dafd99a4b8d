//! Programs: kernel sources with the values of their compile-time constants.

use std::fmt;

use sha2::{Digest, Sha256};

use super::{
    Architecture,
    gpu::table_programs,
    matrix::{DEQUANTIZE_ENTRIES, dequantize_program},
    packing::Form,
    product::ProductKernel,
};

/// The headers of all sources, under the names that they include them by.
pub(super) const HEADERS: [(&str, &str); 5] = [
    ("device.cuh", include_str!("../../cuda/device.cuh")),
    ("input.cuh", include_str!("../../cuda/input.cuh")),
    ("kv_cache.cuh", include_str!("../../cuda/kv_cache.cuh")),
    ("matrix.cuh", include_str!("../../cuda/matrix.cuh")),
    ("product.cuh", include_str!("../../cuda/product.cuh")),
];

/// A file of `worker/kernels/cuda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Attention over the paged cache.
    Attention,
    /// Choosing tokens.
    Choose,
    /// Weights to bf16.
    Dequantize,
    /// What is done row by row.
    Elementwise,
    /// Rows of the embedding table.
    Embed,
    /// Writing keys and values.
    KvCache,
    /// Products of few rows with weights.
    Matmul,
    /// Products of many rows with weights.
    MatmulRows,
    /// The smallest kernel, for tests.
    Probe,
}

/// A source and its compile-time constants: what is compiled as one, and loaded as one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Program {
    /// The source.
    pub source: Source,
    /// Macros that are defined for it.
    pub defines: Vec<(&'static str, i64)>,
}

/// A program that is used, for those that compile all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The program.
    pub program: Program,
    /// Its entry points.
    pub entries: &'static [&'static str],
    /// Whether time is spent in it: then registers must suffice, without spills and without local memory.
    pub hot: bool,
}

/// Attention of the models in sight: width of a head, and query heads that share a KV head.
const HEADS: [(i64, i64); 6] = [(64, 3), (64, 4), (64, 8), (128, 1), (128, 4), (128, 8)];

/// Programs that models in sight use, in the order of their sources. Others, of other heads, are compiled when a model
/// wants them.
pub fn variants() -> Vec<Variant> {
    let mut variants = vec![
        Variant { program: Program::new(Source::Probe, &[("FACTOR", 1)]), entries: &["axpy"], hot: true },
        Variant {
            program: Program::new(Source::Elementwise, &[]),
            entries: &["rms_norm", "silu_mul", "select_rows", "join_columns"],
            hot: true,
        },
    ];
    variants.extend(table_programs().into_iter().map(|program| Variant { program, entries: &["embed"], hot: true }));
    variants.push(Variant { program: Program::new(Source::Choose, &[]), entries: &["choose"], hot: true });
    for kv_bits in [16, 8] {
        for head_dim in [64, 128] {
            let program = Program::new(Source::KvCache, &[("HEAD_DIM", head_dim), ("KV_BITS", kv_bits)]);
            variants.push(Variant { program, entries: &["write_kv"], hot: true });
        }
        for (head_dim, group_size) in HEADS {
            let defines = [("HEAD_DIM", head_dim), ("KV_BITS", kv_bits), ("GROUP_SIZE", group_size)];
            variants.push(Variant {
                program: Program::new(Source::Attention, &defines),
                entries: &["attend_splits", "attend_rows", "merge_splits"],
                hot: true,
            });
        }
    }
    for form in Form::all() {
        variants.push(Variant { program: dequantize_program(form), entries: DEQUANTIZE_ENTRIES, hot: true });
        for kernel in ProductKernel::ALL {
            for gated in [false, true] {
                let program = kernel.program(form, gated);
                variants.push(Variant { program, entries: kernel.entries(), hot: true });
            }
        }
    }
    variants
}

impl Source {
    /// The file's name without its extension.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Choose => "choose",
            Self::Dequantize => "dequantize",
            Self::Elementwise => "elementwise",
            Self::Embed => "embed",
            Self::KvCache => "kv_cache",
            Self::Matmul => "matmul",
            Self::MatmulRows => "matmul_rows",
            Self::Probe => "probe",
        }
    }

    /// What the file says.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Attention => include_str!("../../cuda/attention.cu"),
            Self::Choose => include_str!("../../cuda/choose.cu"),
            Self::Dequantize => include_str!("../../cuda/dequantize.cu"),
            Self::Elementwise => include_str!("../../cuda/elementwise.cu"),
            Self::Embed => include_str!("../../cuda/embed.cu"),
            Self::KvCache => include_str!("../../cuda/kv_cache.cu"),
            Self::Matmul => include_str!("../../cuda/matmul.cu"),
            Self::MatmulRows => include_str!("../../cuda/matmul_rows.cu"),
            Self::Probe => include_str!("../../cuda/probe.cu"),
        }
    }
}

impl Program {
    /// A source with macros.
    pub fn new(source: Source, defines: &[(&'static str, i64)]) -> Self {
        Self { source, defines: defines.to_vec() }
    }

    /// Everything that the compiler is told beside source and header. Sums are fused only where the source says `fmaf`,
    /// since the lockstep rule leaves no choice to a compiler.
    pub(super) fn options(&self, architecture: Architecture) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={architecture}"),
            "--std=c++17".into(),
            "--fmad=false".into(),
            "--generate-line-info".into(),
        ];
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    /// What the machine code is called on disk: a name, and a digest of all that it is made from.
    pub(super) fn stem(&self, architecture: Architecture) -> String {
        let mut digest = Sha256::new();
        let options = self.options(architecture);
        let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
        let parts = [self.source.name(), self.source.text()];
        for part in parts.into_iter().chain(headers).chain(options.iter().map(String::as_str)) {
            // Its length first, so that no two lists of parts read the same.
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{architecture}-{hex}", self.source.name())
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.cu", self.source.name())?;
        self.defines.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_file_name_changes_with_whatever_the_code_is_made_from() {
        let (sm_80, sm_90a) = ("sm_80".parse().unwrap(), "sm_90a".parse().unwrap());
        let programs: [&[(&str, i64)]; 5] =
            [&[], &[("A", 1)], &[("A", 11)], &[("A", 1), ("B", 1)], &[("B", 1), ("A", 1)]];
        let stems = programs.iter().flat_map(|defines| {
            let program = Program::new(Source::Probe, defines);
            [program.stem(sm_80), program.stem(sm_90a)]
        });
        assert_eq!(stems.collect::<HashSet<_>>().len(), 2 * programs.len());
    }

    #[test]
    fn variants_are_different_programs() {
        let variants = variants();
        let programs: HashSet<_> = variants.iter().map(|variant| &variant.program).collect();
        assert_eq!(programs.len(), variants.len());
    }

    #[test]
    fn every_entry_point_stands_in_its_source() {
        for variant in variants() {
            for entry in variant.entries {
                assert!(variant.program.source.text().contains(&format!(" {entry}(")), "{}: {entry}", variant.program);
            }
        }
    }
}
