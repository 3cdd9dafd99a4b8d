//! A local group: the ranks of a group as threads of one process, for benchmarks and tests. No servers, no sockets;
//! the same runners, plans and collectives' contract as a real group.

use std::{
    sync::mpsc::{SyncSender, sync_channel},
    thread::JoinHandle,
};

use lockstep_collectives::{Collective, CollectiveError, local};

use crate::{
    model::{StepError, output::StepOutput},
    model_runner::{RunStep, warm_up},
    scheduler::plan::StepPlan,
};

/// Orders that a follower may be behind. The leader waits in its own step long before.
const ORDER_QUEUE: usize = 4;

/// What a follower is told.
#[derive(Debug)]
enum Order {
    Run(StepPlan),
    Reset,
}

/// Ranks that share a model within this process.
#[derive(Debug)]
pub struct LocalGroup {
    leader: Box<dyn RunStep>,
    out: StepOutput,
    collective: Box<dyn Collective>,
    followers: Vec<Follower>,
}

#[derive(Debug)]
struct Follower {
    orders: SyncSender<Order>,
    thread: JoinHandle<Result<(), StepError>>,
}

impl LocalGroup {
    /// A group of one runner for each rank, by rank, warmed up.
    ///
    /// # Errors
    /// A rank that cannot compute.
    ///
    /// # Panics
    /// If there is no runner.
    pub fn start(runners: Vec<Box<dyn RunStep>>) -> Result<Self, StepError> {
        let collectives = local::group(runners.len());
        let mut ranks = runners.into_iter().zip(collectives);
        let (mut leader, collective) = ranks.next().expect("a group has at least one rank");
        let followers = ranks.map(|(runner, collective)| follow(runner, collective)).collect();
        let mut collective: Box<dyn Collective> = Box::new(collective);
        warm_up(leader.as_mut(), collective.as_mut())?;
        Ok(Self { leader, out: StepOutput::default(), collective, followers })
    }

    /// Runs one plan on every rank: what it gives on rank 0.
    ///
    /// # Errors
    /// Any rank's failure.
    pub fn run(&mut self, plan: &StepPlan) -> Result<&StepOutput, StepError> {
        self.start_plan(plan)?;
        self.finish_plan()
    }

    /// Whether a plan may have its tokens chosen and be started before the one before it is finished.
    pub fn runs_ahead(&mut self) -> bool {
        self.leader.runs_ahead(self.collective.as_mut())
    }

    /// Starts one plan on every rank. Where tokens are chosen, they are the likeliest.
    ///
    /// # Errors
    /// Any rank's failure.
    pub fn start_plan(&mut self, plan: &StepPlan) -> Result<(), StepError> {
        self.order(|| Order::Run(plan.clone()));
        self.leader.start(plan, &[], self.collective.as_mut())
    }

    /// Waits for the oldest plan that was started: what it gives on rank 0.
    ///
    /// # Errors
    /// Any rank's failure.
    pub fn finish_plan(&mut self) -> Result<&StepOutput, StepError> {
        self.leader.finish(self.collective.as_mut(), &mut self.out)?;
        Ok(&self.out)
    }

    /// Forgets every sequence on every rank, for a new scheduler to begin.
    pub fn reset(&mut self) {
        self.order(|| Order::Reset);
        self.leader.reset();
    }

    fn order(&self, order: impl Fn() -> Order) {
        for follower in &self.followers {
            // A follower that has ended has left its collective, which the leader's own step finds out.
            let _ = follower.orders.send(order());
        }
    }

    /// Ends the group.
    ///
    /// # Errors
    /// The first follower's failure.
    pub fn stop(self) -> Result<(), StepError> {
        for Follower { orders, thread } in self.followers {
            drop(orders);
            thread.join().unwrap_or(Err(StepError::Collective(CollectiveError::Aborted)))?;
        }
        Ok(())
    }
}

fn follow(mut runner: Box<dyn RunStep>, collective: impl Collective + 'static) -> Follower {
    let (orders, receiver) = sync_channel(ORDER_QUEUE);
    let thread = std::thread::spawn(move || {
        let mut collective = collective;
        warm_up(runner.as_mut(), &mut collective)?;
        let mut out = StepOutput::default();
        while let Ok(order) = receiver.recv() {
            match order {
                Order::Run(plan) => runner.run(&plan, &mut collective, &mut out)?,
                Order::Reset => runner.reset(),
            }
        }
        Ok(())
    });
    Follower { orders, thread }
}
