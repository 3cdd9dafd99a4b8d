//! A follower's loop: joins epochs, and runs the plans that rank 0 sends.

use std::time::Duration;

use lockstep_collectives::Collective;
use lockstep_proto::server::Readiness;
use tracing::warn;

use super::{
    EngineFailure,
    metrics::{Metrics, StepClock},
};
use crate::{
    group::{Epoch, FollowerGroup, GroupError},
    model::{StepError, output::StepOutput},
    model_runner::{RunStep, warm_up},
};

/// How often a follower looks, while it waits for the next plan, whether the step that is under way has been computed.
const PATIENCE: Duration = Duration::from_millis(5);

/// The engine of a rank that is not 0.
#[derive(Debug)]
pub struct Follower {
    group: FollowerGroup,
    runner: Box<dyn RunStep>,
    metrics: Metrics,
    readiness: Readiness,
}

/// Why an epoch ended.
#[derive(Debug, thiserror::Error)]
enum EpochEnd {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Step(#[from] StepError),
}

impl Follower {
    /// An engine that follows `group`'s leader. `readiness` says whether it does.
    pub fn new(group: FollowerGroup, runner: Box<dyn RunStep>, metrics: Metrics, readiness: Readiness) -> Self {
        Self { group, runner, metrics, readiness }
    }

    /// Follows until this rank's part in the group has ended, or until the leader refuses the rank for good. Blocks: the
    /// thread is the engine's own.
    ///
    /// # Errors
    /// The leader's refusal, or a GPU that has failed.
    pub fn run(mut self) -> Result<(), EngineFailure> {
        loop {
            let end = match self.group.join() {
                Ok(epoch) => {
                    self.metrics.epochs.inc();
                    let Err(end) = self.follow(epoch);
                    end
                }
                Err(refusal @ GroupError::Refused { .. }) => return Err(refusal.into()),
                Err(error) => error.into(),
            };
            let end = match end {
                EpochEnd::Step(failure) if failure.is_of_device() => return Err(EngineFailure::Device(failure)),
                // A collective that was aborted does not know why; the group does.
                EpochEnd::Step(_) => self.group.is_broken().map_or(end, EpochEnd::Group),
                other => other,
            };
            self.readiness.set_ready(false);
            if matches!(end, EpochEnd::Group(GroupError::Stopped)) {
                return Ok(());
            }
            warn!(reason = %end, "not in the group");
        }
    }

    fn follow(&mut self, epoch: Epoch) -> Result<std::convert::Infallible, EpochEnd> {
        let Epoch { mut collective, .. } = epoch;
        let Err(end) = self.run_plans(collective.as_mut());
        self.runner.reset();
        Err(end)
    }

    fn run_plans(&mut self, collective: &mut dyn Collective) -> Result<std::convert::Infallible, EpochEnd> {
        let runner = self.runner.as_mut();
        warm_up(runner, collective)?;
        self.readiness.set_ready(true);
        let (mut clock, mut out) = (StepClock::default(), StepOutput::default());
        let max_under_way = if runner.runs_ahead(collective) { 2 } else { 1 };
        let mut n_under_way = 0;
        loop {
            let plan = match n_under_way {
                0 => Some(self.group.next_plan()?),
                n if n < max_under_way => self.group.next_plan_within(PATIENCE)?,
                _ => None,
            };
            if let Some(plan) = plan {
                clock.start(collective, |collective| runner.start(&plan, &[], collective))?;
                n_under_way += 1;
            } else if n_under_way == max_under_way || runner.is_finished()? {
                clock.finish(&self.metrics, collective, |collective| runner.finish(collective, &mut out)).0?;
                n_under_way -= 1;
            }
        }
    }
}
