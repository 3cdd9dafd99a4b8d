//! Live embeddings: the prompts that the leader has admitted to be embedded. Hidden states come in as steps give them, and
//! the mean of each prompt's goes out, once.
//!
//! They are added up in f64, one after the other in the order of positions, so that no bit depends on where a prompt was
//! cut. The mean of one is itself: that is all there is to a prompt that is embedded by its last token.

use std::{collections::HashMap, time::Instant};

use tokio::sync::oneshot;

use super::{EmbeddingJob, EngineError};
use crate::scheduler::{
    NewSequence, Refusal, Scheduler,
    plan::{SeqId, StepPlan},
};

/// Who waits for an embedding.
pub(super) type Answer = oneshot::Sender<Result<Vec<f32>, EngineError>>;

/// A prompt and how far it has come.
#[derive(Debug)]
struct LiveEmbedding {
    request_id: String,
    answer: Answer,
    /// The sum of the hidden states so far, `[hidden_dim]` once there is one.
    sum: Vec<f64>,
    n_rows: usize,
    /// Whether the followers know whose it is.
    announced: bool,
}

/// All embeddings that run or wait in the scheduler.
#[derive(Debug, Default)]
pub(super) struct LiveEmbeddings(HashMap<SeqId, LiveEmbedding>);

// === impl LiveEmbedding ===

impl LiveEmbedding {
    /// `rows`: hidden states `[n, hidden_dim]`.
    fn add(&mut self, rows: &[f32], hidden_dim: usize) {
        self.sum.resize(hidden_dim, 0.0);
        for row in rows.chunks_exact(hidden_dim) {
            self.sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
            self.n_rows += 1;
        }
    }

    fn mean(&self) -> Vec<f32> {
        self.sum.iter().map(|sum| (sum / self.n_rows as f64) as f32).collect()
    }
}

// === impl LiveEmbeddings ===

impl LiveEmbeddings {
    /// Hands a prompt to the scheduler. Who is refused is told so.
    pub(super) fn admit(
        &mut self,
        scheduler: &mut Scheduler,
        job: EmbeddingJob,
        answer: Answer,
        now: Instant,
    ) -> Result<(), Refusal> {
        let EmbeddingJob { request_id, prompt, pooling, deadline } = job;
        let new = NewSequence { prompt, pooling: Some(pooling), deadline, ..NewSequence::default() };
        match scheduler.add(new, now) {
            Ok(id) => {
                let live = LiveEmbedding { request_id, answer, sum: Vec::new(), n_rows: 0, announced: false };
                self.0.insert(id, live);
                Ok(())
            }
            Err(refusal) => {
                send(answer, Err(refusal.clone().into()));
                Err(refusal)
            }
        }
    }

    /// Whether nothing runs or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The request ids of the embeddings whose first rows are in `plan`: followers write them to their logs.
    pub(super) fn announce(&mut self, plan: &StepPlan) -> Vec<(SeqId, String)> {
        let mut announced = Vec::new();
        for id in plan.sequences.iter().map(|step| step.id) {
            let Some(live) = self.0.get_mut(&id).filter(|live| !live.announced) else { continue };
            live.announced = true;
            announced.push((id, live.request_id.clone()));
        }
        announced
    }

    /// Drops the embeddings that nobody waits for any more. Returns how many.
    pub(super) fn drop_abandoned(&mut self, scheduler: &mut Scheduler) -> usize {
        let abandoned: Vec<SeqId> =
            self.0.iter().filter(|(_, live)| live.answer.is_closed()).map(|(id, _)| *id).collect();
        for id in &abandoned {
            self.0.remove(id);
            scheduler.abort(*id);
        }
        abandoned.len()
    }

    /// Takes in the hidden states that a step gives, `[n_hidden_rows, hidden_dim]`.
    pub(super) fn take(&mut self, plan: &StepPlan, hidden: &[f32]) {
        let Some(hidden_dim) = hidden.len().checked_div(plan.n_hidden_rows()) else { return };
        let mut rest = hidden;
        for step in &plan.sequences {
            let (rows, after) = rest.split_at(step.n_hidden_rows() * hidden_dim);
            rest = after;
            // One that has been dropped since has no use for its rows.
            if let Some(live) = self.0.get_mut(&step.id) {
                live.add(rows, hidden_dim);
            }
        }
    }

    /// Answers one, all of whose prompt is computed.
    pub(super) fn finish(&mut self, id: SeqId) {
        if let Some(live) = self.0.remove(&id) {
            let mean = live.mean();
            send(live.answer, Ok(mean));
        }
    }

    /// Ends one whose deadline has passed, if it is one of these.
    pub(super) fn expire(&mut self, id: SeqId) {
        if let Some(live) = self.0.remove(&id) {
            send(live.answer, Err(EngineError::Expired));
        }
    }

    /// Ends all with an error.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        self.0.drain().for_each(|(_, live)| send(live.answer, Err(error.clone())));
    }
}

/// Who has gone needs no answer.
fn send(answer: Answer, result: Result<Vec<f32>, EngineError>) {
    let _ = answer.send(result);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::scheduler::{Pooling, SchedulerConfig, speculation::Speculation};

    const WIDTH: usize = 3;

    /// An engine without a model: the hidden state of a token is a function of it and its position.
    struct Engine {
        live: LiveEmbeddings,
        scheduler: Scheduler,
    }

    type Waiting = oneshot::Receiver<Result<Vec<f32>, EngineError>>;

    fn hidden(token_id: u32, position: usize) -> [f32; WIDTH] {
        // Sums of these in another order, or in f32, are others.
        [1e8, 1.0, -1e8].map(|value| value / (token_id as f32 + 0.3) + position as f32)
    }

    impl Engine {
        fn new(max_prefill_chunk: usize) -> Self {
            let config = SchedulerConfig {
                max_step_tokens: 16,
                max_prefill_chunk,
                max_prompt_logits_rows: 1,
                max_running: 8,
                max_waiting: 8,
                n_blocks: 64,
                block_size: 2,
                context_length: 16,
                speculation: Speculation::Off,
            };
            Self { live: LiveEmbeddings::default(), scheduler: Scheduler::new(config).unwrap() }
        }

        fn admit(&mut self, job: EmbeddingJob) -> Waiting {
            let (answer, waiting) = oneshot::channel();
            let _refused = self.live.admit(&mut self.scheduler, job, answer, Instant::now());
            waiting
        }

        fn step(&mut self) {
            let Some(plan) = self.scheduler.schedule(Instant::now()).plan else { return };
            let mut rows = Vec::new();
            for step in &plan.sequences {
                let positions = step.start_position as usize..;
                let of_step: Vec<f32> =
                    step.token_ids.iter().zip(positions).flat_map(|(id, position)| hidden(*id, position)).collect();
                rows.extend(&of_step[of_step.len() - step.n_hidden_rows() * WIDTH..]);
            }
            self.live.take(&plan, &rows);
            self.scheduler.commit(&[]).into_iter().for_each(|(id, _)| self.live.finish(id));
            self.scheduler.check_integrity();
        }

        /// The embedding of a prompt, and the step that it ends with.
        fn embed(&mut self, job: EmbeddingJob) -> (Vec<u32>, usize) {
            let mut waiting = self.admit(job);
            for n_steps in 1..100 {
                self.step();
                if let Ok(answer) = waiting.try_recv() {
                    return (answer.unwrap().into_iter().map(f32::to_bits).collect(), n_steps);
                }
            }
            panic!("no answer")
        }
    }

    fn job(prompt: &[u32], pooling: Pooling) -> EmbeddingJob {
        EmbeddingJob { request_id: "r".into(), prompt: prompt.to_vec(), pooling, deadline: None }
    }

    #[test]
    fn a_mean_is_that_of_all_rows_in_f64_wherever_the_prompt_is_cut() {
        let prompt = [1, 2, 3, 4, 5, 6, 7];
        let mut expected = [0.0f64; WIDTH];
        for (position, id) in prompt.iter().enumerate() {
            let row = hidden(*id, position);
            (0..WIDTH).for_each(|i| expected[i] += f64::from(row[i]));
        }
        let expected: Vec<u32> = expected.iter().map(|sum| ((sum / 7.0) as f32).to_bits()).collect();
        for (chunk, n_steps) in [(16, 1), (3, 3), (1, 7)] {
            let mut engine = Engine::new(chunk);
            assert_eq!(engine.embed(job(&prompt, Pooling::Mean)), (expected.clone(), n_steps));
            // Nothing comes from the cache, although all of it is there.
            assert_eq!(engine.embed(job(&prompt, Pooling::Mean)), (expected.clone(), n_steps));
        }
    }

    #[test]
    fn the_last_hidden_state_is_itself_and_the_rest_may_be_cached() {
        let mut engine = Engine::new(1);
        let expected = hidden(5, 4).map(f32::to_bits).to_vec();
        assert_eq!(engine.embed(job(&[1, 2, 3, 4, 5], Pooling::Last)), (expected.clone(), 5));
        assert_eq!(engine.embed(job(&[1, 2, 3, 4, 5], Pooling::Last)), (expected, 1));
    }

    #[test]
    fn a_prompt_may_fill_the_context_and_no_more() {
        let mut engine = Engine::new(16);
        engine.embed(job(&[1; 16], Pooling::Mean));
        let answer = engine.admit(job(&[1; 17], Pooling::Mean)).try_recv().unwrap().unwrap_err();
        assert!(matches!(answer, EngineError::Refused(Refusal::PromptTooLong { n_tokens: 17, limit: 16 })));
    }

    #[test]
    fn who_goes_away_frees_the_place_and_who_stays_is_not_mixed_up() {
        let mut engine = Engine::new(2);
        let leaver = engine.admit(job(&[9, 8, 7, 6, 5], Pooling::Mean));
        let mut waiting = engine.admit(job(&[1, 2, 3], Pooling::Last));
        engine.step();
        drop(leaver);
        assert_eq!(engine.live.drop_abandoned(&mut engine.scheduler), 1);
        engine.step();
        assert_eq!(waiting.try_recv().unwrap().unwrap(), hidden(3, 2));
        assert!(engine.live.is_empty());
        assert_eq!(engine.scheduler.stats().blocks.referenced, 0);
    }

    #[test]
    fn who_is_late_and_who_is_lost_is_told_so() {
        let mut engine = Engine::new(1);
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut late = engine.admit(EmbeddingJob { deadline: Some(deadline), ..job(&[1, 2, 3], Pooling::Mean) });
        let mut lost = engine.admit(job(&[1, 2, 3], Pooling::Mean));
        engine.step();
        let expired = engine.scheduler.schedule(deadline).expired;
        expired.into_iter().for_each(|id| engine.live.expire(id));
        assert!(matches!(late.try_recv().unwrap(), Err(EngineError::Expired)));
        engine.live.fail_all(&EngineError::GroupLost("a rank is gone".into()));
        assert!(matches!(lost.try_recv().unwrap(), Err(EngineError::GroupLost(_))));
        assert!(engine.live.is_empty());
    }
}
