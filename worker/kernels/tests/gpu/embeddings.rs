//! Embeddings, the first launch of a step, and answers, its end: rows of a table, bit for bit, of steps that come one by one,
//! behind one another, or again and again.

use std::time::{Duration, Instant};

use lockstep_checkpoint::Encoding;
use lockstep_kernels::{
    AttentionRow, EncodedRows, KvEncoding,
    cuda::{
        Answer, CHOSEN, CudaError, Gpu, GpuInput, GpuKvCache, GpuMatrix, GpuTable, MAX_CHOICES, Recording, StepRows,
        StepShape,
    },
    dequantize,
};

use crate::{assert_same_bits, gpu, random};

/// Rows of the tables: two tiles and a part of one.
const N_TOKENS: usize = 70;

/// A step of sequences of one position, one for each token, of which every row needs logits.
struct Step {
    tokens: Vec<u32>,
    slots: Vec<u32>,
    rows: Vec<AttentionRow>,
    result_rows: Vec<u32>,
    tables: Vec<Vec<u32>>,
}

impl Step {
    fn new(tokens: &[u32]) -> Self {
        let numbers = || 0..tokens.len() as u32;
        Self {
            tokens: tokens.to_vec(),
            slots: numbers().map(|i| 16 * i).collect(),
            rows: numbers().map(|i| AttentionRow { position: 0, table: i as usize }).collect(),
            result_rows: numbers().collect(),
            tables: numbers().map(|i| vec![i]).collect(),
        }
    }

    fn rows(&self) -> StepRows<'_> {
        let Self { tokens, slots, rows, result_rows, tables } = self;
        StepRows { tokens, slots, rows, result_rows, result_attention: rows, choices: &[], tables }
    }
}

/// A cache for such steps.
fn cache(gpu: &Gpu) -> GpuKvCache {
    gpu.new_kv(1, 40, 16, KvEncoding::F16).unwrap()
}

/// The encoded rows of a table, and their values.
fn table(encoding: Encoding, width: usize) -> (Vec<u8>, Vec<f32>) {
    let bytes = random::weights(&mut random::seeded(50), encoding, N_TOKENS, width);
    let mut values = vec![0.0; N_TOKENS * width];
    dequantize(encoding, &bytes, &mut values);
    (bytes, values)
}

#[test]
fn a_row_is_what_dequantize_gives() {
    let mut gpu = gpu();
    let kv = cache(&gpu);
    for encoding in Encoding::ALL {
        let width = if encoding.block_len() > 32 { 512 } else { 288 };
        let (bytes, values) = table(encoding, width);
        let table = gpu.load_table(&EncodedRows::new(encoding, &bytes, N_TOKENS, width).unwrap()).unwrap();
        let tokens: Vec<u32> = (0..N_TOKENS as u32).rev().step_by(3).chain([5, 5]).collect();
        let step = gpu.begin(&Step::new(&tokens).rows(), &kv, None).unwrap();
        let mut found = Vec::new();
        gpu.download(&gpu.embed(&table, &step).unwrap(), &mut found).unwrap();
        let row = |token: &u32| &values[*token as usize * width..][..width];
        let expected: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
        assert_same_bits(&found, &expected, &encoding);
    }
}

/// A GPU with a table of its own, and a weight that takes it some time to multiply by.
struct Queue {
    gpu: Gpu,
    kv: GpuKvCache,
    table: GpuTable,
    values: Vec<f32>,
    weight: GpuMatrix,
    input: GpuInput,
}

const WIDTH: usize = 96;

impl Queue {
    fn new() -> Self {
        let mut gpu = gpu();
        let (bytes, values) = table(Encoding::Q4_0, WIDTH);
        let table = gpu.load_table(&EncodedRows::new(Encoding::Q4_0, &bytes, N_TOKENS, WIDTH).unwrap()).unwrap();
        let (n_out, n_in) = (512, 1024);
        let weight = random::weights(&mut random::seeded(51), Encoding::Q4_0, n_out, n_in);
        let weight = gpu.load_matrix(&EncodedRows::new(Encoding::Q4_0, &weight, n_out, n_in).unwrap(), None).unwrap();
        let input = gpu.upload_input(&random::floats(&mut random::seeded(52), 64 * n_in), n_in).unwrap();
        Self { kv: cache(&gpu), gpu, table, values, weight, input }
    }

    /// Gives the device something to do: for longer than it takes the host to queue two steps.
    fn keep_busy(&self) {
        // A GPU takes some 5 us for a product, the emulator milliseconds.
        let n_products = if std::env::var_os("LOCKSTEP_TEST_GPU").is_some() { 2_000 } else { 1 };
        let multiply = || self.gpu.matmul([&self.weight], &self.input).map(|_| ());
        multiply().unwrap();
        let mut graph = self.gpu.device().capture(|| (0..n_products).try_for_each(|_| multiply())).unwrap();
        // SAFETY: weights, inputs and the pool of the outputs are there as long as this is.
        unsafe { graph.launch() }.unwrap();
    }

    /// Queues a step, and the answer.
    fn queue(&mut self, tokens: &[u32]) -> Result<Answer<f32>, CudaError> {
        let step = self.gpu.begin(&Step::new(tokens).rows(), &self.kv, None)?;
        let x = self.gpu.embed(&self.table, &step)?;
        self.gpu.queue_rows(&x, 0..tokens.len())
    }

    fn check(&self, tokens: &[u32], found: &[f32], what: &str) {
        let row = |token: &u32| &self.values[*token as usize * WIDTH..][..WIDTH];
        let expected: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
        assert_same_bits(found, &expected, &what);
    }
}

#[test]
fn steps_are_queued_behind_one_another_and_answered_late() {
    let mut queue = Queue::new();
    let steps: [&[u32]; 3] = [&[1, 2, 3], &[4], &[5, 6, 7]];
    queue.keep_busy();
    let first = queue.queue(steps[0]).unwrap();
    let second = queue.queue(steps[1]).unwrap();
    // The words of a third step go where those of the first may still be.
    let third = queue.gpu.begin(&Step::new(steps[2]).rows(), &queue.kv, None).unwrap();
    let third = queue.gpu.embed(&queue.table, &third).unwrap();
    let mut found = Vec::new();
    queue.gpu.download(&third, &mut found).unwrap();
    queue.check(steps[2], &found, "the third step");
    queue.check(steps[1], second.wait().unwrap(), "the second step");
    queue.check(steps[0], first.wait().unwrap(), "the first step");
}

#[test]
fn two_steps_are_queued_while_the_device_is_busy() {
    let mut queue = Queue::new();
    let done = queue.gpu.device().event().unwrap();
    // A thread may be kept from running for as long as the device is busy, but not again and again.
    let queued_ahead = (0..100).any(|_| {
        queue.keep_busy();
        done.record().unwrap();
        let (first, second) = (queue.queue(&[2]).unwrap(), queue.queue(&[3]).unwrap());
        let is_there = first.is_there().unwrap() || second.is_there().unwrap();
        let is_done = done.is_done().unwrap();
        assert!(is_done || !is_there, "an answer before its time");
        second.wait().unwrap();
        assert!(first.is_there().unwrap() && second.is_there().unwrap());
        !is_done
    });
    assert!(queued_ahead, "the host waits");
}

#[test]
fn an_answer_that_is_dropped_early_makes_room() {
    let mut queue = Queue::new();
    queue.keep_busy();
    drop(queue.queue(&[1, 2]).unwrap());
    drop(queue.queue(&[3, 4]).unwrap());
    // In the pages of both, the second of which has to grow.
    let third = queue.queue(&[5, 6]).unwrap();
    let fourth = queue.queue(&[7, 8, 9, 10, 11]).unwrap();
    let refused = queue.queue(&[12]).unwrap_err();
    assert_eq!(refused.to_string(), "2 answers of a kind are under way, no more are possible");
    queue.check(&[5, 6], third.wait().unwrap(), "the third step");
    queue.check(&[7, 8, 9, 10, 11], fourth.wait().unwrap(), "the fourth step");
    let choices = queue.gpu.queue_choices(3).expect("choices have pages of their own");
    assert_eq!(choices.wait().unwrap(), [0; 3], "nothing was chosen");
    drop(third);
    let fifth = queue.queue(&[12]).unwrap();
    let Queue { gpu, .. } = queue;
    drop(gpu);
    assert_eq!(fifth.wait().unwrap().len(), WIDTH, "an answer outlives its GPU");
}

#[test]
fn an_answer_knows_how_long_the_device_took() {
    let mut queue = Queue::new();
    let begun = Instant::now();
    let step = queue.gpu.begin(&Step::new(&[1]).rows(), &queue.kv, None).unwrap();
    queue.keep_busy();
    let x = queue.gpu.embed(&queue.table, &step).unwrap();
    let busy = queue.gpu.queue_rows(&x, 0..1).unwrap();
    // Its beginning is not that of the next.
    let next = queue.queue(&[2]).unwrap();
    next.wait().unwrap();
    let elapsed = begun.elapsed();
    let time = |answer: &Answer<f32>| answer.device_time().unwrap().unwrap_or_default();
    let (busy, next) = (time(&busy), time(&next));
    assert!(busy > Duration::ZERO && next > Duration::ZERO, "{busy:?}, {next:?}");
    assert!(busy + next <= elapsed + Duration::from_millis(1), "{busy:?} and {next:?} of {elapsed:?}");
}

#[test]
fn a_recorded_step_embeds_other_tokens_each_time() {
    let mut queue = Queue::new();
    let tokens = [3, 69, 0];
    let rows = Step::new(&tokens);
    let shape = StepShape::of(&rows.rows()).expect("no prompt");
    assert_eq!(shape.n_rows(), 4);
    let step = queue.gpu.begin(&rows.rows(), &queue.kv, Some(shape)).unwrap();
    let x = queue.gpu.embed(&queue.table, &step).unwrap();
    let filled_up = queue.gpu.queue_rows(&x, 0..4).unwrap();
    queue.check(&[3, 69, 0, 0], filled_up.wait().unwrap(), "a filled-up step");
    drop((x, filled_up));
    let (gpu, table) = (&queue.gpu, &queue.table);
    let recording = Recording::new(gpu.device(), shape, || Ok::<_, CudaError>((gpu.embed(table, &step)?, step)));
    let mut recording = recording.unwrap();
    queue.keep_busy();
    let mut answers = Vec::new();
    for tokens in [[1, 2, 3, 4], [5, 6, 7, 8]] {
        queue.gpu.replay(&mut recording, &Step::new(&tokens).rows(), &queue.kv).unwrap();
        answers.push((tokens, queue.gpu.queue_result(&recording, 4).unwrap()));
    }
    for (tokens, answer) in answers {
        queue.check(&tokens, answer.wait().unwrap(), "a replayed step");
    }
    let refused = queue.gpu.replay(&mut recording, &Step::new(&[1; 5]).rows(), &queue.kv);
    assert!(matches!(refused, Err(CudaError::Step)), "a step of another shape");
}

#[test]
fn tokens_that_are_not_there_are_refused() {
    let mut queue = Queue::new();
    let last = CHOSEN | (MAX_CHOICES as u32 - 1);
    queue.queue(&[N_TOKENS as u32 - 1, last]).unwrap();
    for token in [N_TOKENS as u32, CHOSEN - 1, last + 1, u32::MAX] {
        assert!(matches!(queue.queue(&[0, token]), Err(CudaError::Step)), "{token:#x}");
    }
    let step = Step::new(&[1, 2]);
    let short = StepRows { tokens: &[1], ..step.rows() };
    assert!(matches!(queue.gpu.begin(&short, &queue.kv, None), Err(CudaError::Step)), "a row without a token");
}
