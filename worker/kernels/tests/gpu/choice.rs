//! Choosing tokens: the likeliest, against a plain search. What is drawn is held against the worker's sampler, in
//! `worker/tests/choice.rs`.

use lockstep_kernels::{
    AttentionRow, KvEncoding,
    cuda::{ChoiceRule, CudaError, Gpu, GpuKvCache, MAX_CHOICES, StepRows, StepShape},
};

use crate::{gpu, random};

/// The logits of some rows, as ranks with these ends of their ranges leave them.
fn by_rank(rows: &[Vec<f32>], ends: &[u32]) -> Vec<f32> {
    let mut begin = 0;
    let mut logits = Vec::new();
    for end in ends.iter().map(|end| *end as usize) {
        logits.extend(rows.iter().flat_map(|row| &row[begin..end]));
        begin = end;
    }
    logits
}

/// Chooses for rows of logits, each of a sequence of its own; `shaped` in a step that is filled up.
fn choose(gpu: &mut Gpu, rows: &[Vec<f32>], rules: &[ChoiceRule], ends: &[u32], shaped: bool) -> Vec<u32> {
    let kv = small_kv(gpu);
    let ids: Vec<u32> = (0..rows.len() as u32).collect();
    let attention: Vec<_> = (0..rows.len()).map(|table| AttentionRow { position: 0, table }).collect();
    let step = StepRows {
        tokens: &vec![0; rows.len()],
        slots: &vec![0; rows.len()],
        rows: &attention,
        result_rows: &ids,
        result_attention: &attention,
        choices: rules,
        tables: &vec![vec![0]; rows.len()],
    };
    let shape = shaped.then(|| StepShape::of(&step).expect("no prompts"));
    let step = gpu.begin(&step, &kv, shape).expect("a sound step");
    let vocab = gpu.load_vocab(ends).expect("a vocabulary");
    let n_rows = shape.map_or(rows.len(), StepShape::n_rows);
    let filled = rows.iter().cloned().chain(std::iter::repeat(vec![f32::NAN; rows[0].len()])).take(n_rows);
    let logits = by_rank(&filled.collect::<Vec<_>>(), ends);
    let logits = gpu.upload(&logits, rows[0].len()).unwrap();
    gpu.choose(&logits, &vocab, &step).unwrap();
    gpu.download_choices(rows.len()).unwrap()
}

fn small_kv(gpu: &Gpu) -> GpuKvCache {
    gpu.new_kv(1, 1, 16, KvEncoding::F16).unwrap()
}

fn likeliest(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] || logits[best].is_nan() { i } else { best };
    let best = (0..logits.len()).reduce(better).expect("a vocabulary");
    // Nothing is likelier than what is impossible.
    if logits[best] > f32::NEG_INFINITY { best as u32 } else { 0 }
}

const EXTREMES: [f32; 9] =
    [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];

#[test]
fn the_best_token_is_the_lowest_id_of_the_highest_logit_on_any_number_of_ranks() {
    let mut gpu = gpu();
    let rng = &mut random::seeded(50);
    for (n_tokens, n_rows) in [(1, 1), (8, 3), (700, 40), (5000, 5)] {
        let mut rows: Vec<Vec<f32>> = (0..n_rows).map(|_| random::floats(rng, n_tokens)).collect();
        for (i, row) in rows.iter_mut().enumerate() {
            for (token, logit) in row.iter_mut().enumerate() {
                match i % 5 {
                    0 => {}
                    // Ties.
                    1 => *logit = logit.round(),
                    2 => *logit = EXTREMES[(*logit * 1000.0) as usize % EXTREMES.len()],
                    3 => *logit = if token % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY },
                    _ => *logit = if token % 7 == 3 { -*logit } else { f32::NAN },
                }
            }
        }
        let expected: Vec<u32> = rows.iter().map(|row| likeliest(row)).collect();
        // What else is said does not matter; and of the likeliest ones alone, the least number draws the first. (That takes
        // infinity for the largest number.)
        let rule = |i: usize| ChoiceRule {
            temperature: if i % 5 == 2 { f32::NAN } else { [0.0, 1.0, -1.0, 0.3, -0.0, 1e9][i % 6] },
            top_k: 1,
            top_p: 0.5,
            ..ChoiceRule::default()
        };
        let rules: Vec<_> = (0..n_rows).map(rule).collect();
        let n = n_tokens as u32;
        for ends in [vec![n], vec![n / 2, n], vec![0, n / 3, n / 3, n - n / 5, n]] {
            for shaped in [false, true] {
                let found = choose(&mut gpu, &rows, &rules, &ends, shaped);
                assert_eq!(found, expected, "{n_tokens} tokens, ranges up to {ends:?}, shaped: {shaped}");
            }
        }
    }
}

#[test]
fn what_cannot_be_chosen_is_refused_before_it_is_queued() {
    let mut gpu = gpu();
    for ends in [vec![], vec![0], vec![3, 2], vec![1 << 20]] {
        let refused = gpu.load_vocab(&ends).unwrap_err();
        assert!(matches!(refused, CudaError::Vocab { .. }), "{refused}");
    }
    let kv = small_kv(&gpu);
    let mut begin = |n_logits: usize, n_choices: usize| {
        let step = StepRows {
            tokens: &[0],
            slots: &[0],
            rows: &[AttentionRow { position: 0, table: 0 }],
            result_rows: &vec![0; n_logits],
            result_attention: &vec![AttentionRow { position: 0, table: 0 }; n_logits],
            choices: &vec![ChoiceRule::default(); n_choices],
            tables: &[vec![0]],
        };
        gpu.begin(&step, &kv, None).map(|_| ())
    };
    begin(MAX_CHOICES, MAX_CHOICES).unwrap();
    begin(MAX_CHOICES + 1, 0).unwrap();
    let (many, unlike) = (begin(MAX_CHOICES + 1, MAX_CHOICES + 1), begin(1, 2));
    assert!(matches!(many, Err(CudaError::Choices { n_rows: 8193 })), "{many:?}");
    assert!(matches!(unlike, Err(CudaError::Step)), "{unlike:?}");
}
