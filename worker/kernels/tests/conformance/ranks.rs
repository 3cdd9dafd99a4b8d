//! A layer split over ranks: whatever the world size, the sum has the bits of one rank that holds everything.

use std::ops::Range;

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{Activations, Cpu, EncodedRows, Forms, PackedMatrix, SumTree};

use crate::{assert_same_bits, random};

const N_OUT: usize = 21;
const N_ROWS: usize = 3;

/// A layer whose input columns are split, and how.
struct Layer<'a> {
    source: EncodedRows<'a>,
    /// Ends of the K-segments.
    ends: Vec<usize>,
    x: Vec<f32>,
}

impl Layer<'_> {
    fn first_col(&self, segment_idx: usize) -> usize {
        if segment_idx == 0 { 0 } else { self.ends[segment_idx - 1] }
    }

    /// The subtrees that a rank adds up and their planes, each `[N_ROWS, N_OUT]`.
    fn rank(&self, cpu: &mut Cpu, owned: Range<usize>) -> (Vec<Range<usize>>, Vec<f32>) {
        let subtrees = SumTree::new(self.ends.len()).subtrees(owned.clone());
        let cols = self.first_col(owned.start)..self.ends[owned.end - 1];
        let ends: Vec<usize> = self.ends[owned.clone()].iter().map(|end| end - cols.start).collect();
        let local: Vec<Range<usize>> = subtrees.iter().map(|s| s.start - owned.start..s.end - owned.start).collect();
        let shard = self.source.cols(cols.clone()).expect("segments end on blocks");
        let packed = PackedMatrix::pack(&shard, &ends, &local).expect("segments that cover the shard");
        let rows = self.x.chunks_exact(self.source.n_cols());
        let x: Vec<f32> = rows.flat_map(|row| row[cols.clone()].iter().copied()).collect();
        let mut planes = vec![f32::NAN; packed.n_partials() * N_ROWS * N_OUT];
        let forms = if self.source.encoding().block_len() == 1 { Forms::Floats } else { Forms::Quantized };
        let mut inputs = Activations::new(forms);
        cpu.quantize(&x, cols.len(), &mut inputs);
        cpu.matmul(&packed, &inputs, &mut planes);
        (subtrees, planes)
    }

    /// The layer's output, `[N_ROWS, N_OUT]`, from ranks that own the segments between `cuts`.
    fn on_ranks(&self, cpu: &mut Cpu, cuts: &[usize]) -> Vec<f32> {
        let (mut subtrees, mut planes) = (Vec::new(), Vec::new());
        for owned in cuts.windows(2).filter(|owned| owned[0] < owned[1]) {
            let (rank_subtrees, rank_planes) = self.rank(cpu, owned[0]..owned[1]);
            subtrees.extend(rank_subtrees);
            planes.extend(rank_planes);
        }
        let mut out = vec![f32::NAN; N_ROWS * N_OUT];
        SumTree::new(self.ends.len()).order(&subtrees).add(&planes, &mut out);
        out
    }
}

/// Every world size up to 8 (even owners, and the most uneven ones) gives the bits of world size 1.
fn check(encoding: Encoding, ends: &[usize]) {
    let rng = &mut random::seeded(20);
    let n_in = ends[ends.len() - 1];
    let bytes = random::weights(rng, encoding, N_OUT, n_in);
    let source = EncodedRows::new(encoding, &bytes, N_OUT, n_in).expect("whole blocks");
    let layer = Layer { source, ends: ends.to_vec(), x: random::floats(rng, N_ROWS * n_in) };
    let mut cpu = Cpu::new(2);
    let n_segments = ends.len();
    let expected = layer.on_ranks(&mut cpu, &[0, n_segments]);
    for world_size in 2..=n_segments.min(8) {
        let even: Vec<usize> = (0..=world_size).map(|rank| n_segments * rank / world_size).collect();
        let one_each: Vec<usize> = (0..world_size).chain([n_segments]).collect();
        for cuts in [even, one_each] {
            let out = layer.on_ranks(&mut cpu, &cuts);
            assert_same_bits(&out, &expected, &format_args!("{encoding}, {n_segments} segments, cut at {cuts:?}"));
        }
    }
}

#[test]
fn any_world_size_gives_the_same_bits() {
    let even = |n: usize, len: usize| (1..=n).map(|i| i * len).collect::<Vec<_>>();
    check(Encoding::Q4_1, &even(3, 192));
    check(Encoding::Q4_1, &even(12, 128));
    check(Encoding::Q8_0, &even(8, 64));
    check(Encoding::Q4K, &even(8, 256));
    check(Encoding::Q6K, &even(9, 256));
    check(Encoding::IQ4_NL, &even(5, 96));
    check(Encoding::F32, &even(7, 13));
    check(Encoding::BF16, &[5, 16, 40, 41, 100]);
}
