//! A guide holds the matcher of one choice. As soon as a token is chosen, the matcher goes to a thread that finds the
//! mask for the next token, while the next step is computed; the step loop takes it back when it samples.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use llguidance::CancellationHandle;

use super::{
    Constraint, ConstraintError, STACK_BYTES,
    matcher::{Matcher, Next},
    millis,
};

/// How long a step waits for all masks that it needs. Whoever has none by then is ended.
pub const MASK_WAIT: Duration = Duration::from_millis(500);

/// Masks that may be asked for and not begun. A choice asks for one at a time, so this is more than run on any device.
const QUEUE: usize = 4096;

/// What is said of a matcher whose thread has panicked.
const LOST: &str = "its matcher was lost";

/// Threads that find masks.
const MAX_THREADS: usize = 4;

/// A constraint that is compiled, for any number of choices.
#[derive(Clone, Debug)]
pub struct Compiled {
    field: &'static str,
    matcher: Matcher,
    first: Next,
    threads: MaskThreads,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Guide {
    field: &'static str,
    threads: MaskThreads,
    state: State,
}

#[derive(Debug)]
enum State {
    /// What may come next is known.
    Ready(Matcher, Next),
    /// It is being found out.
    Busy { answer: Receiver<Answer>, cancellation: CancellationHandle },
    /// The constraint cannot be held any longer.
    Failed(String),
}

/// The threads. They end when nobody can ask them any more.
#[derive(Clone, Debug)]
pub struct MaskThreads {
    tasks: SyncSender<Task>,
}

type Answer = Result<(Matcher, Next), String>;

/// A token that a matcher is to take in.
#[derive(Debug)]
struct Task {
    matcher: Matcher,
    token_id: u32,
    answer: SyncSender<Answer>,
}

// === impl Compiled ===

impl Compiled {
    /// A constraint whose choices are guided on these threads.
    pub fn new(constraint: &Constraint, matcher: Matcher, first: Next, threads: MaskThreads) -> Self {
        Self { field: constraint.field(), matcher, first, threads }
    }

    /// The guide of one choice.
    pub fn guide(&self) -> Guide {
        let state = State::Ready(self.matcher.clone(), self.first.clone());
        Guide { field: self.field, threads: self.threads.clone(), state }
    }
}

// === impl Guide ===

impl Guide {
    /// What may come next; waits for it no longer than `until`.
    ///
    /// # Errors
    /// That the constraint cannot be held any longer.
    pub fn next(&mut self, until: Instant) -> Result<&Next, ConstraintError> {
        if let State::Busy { answer, cancellation } = &self.state {
            let answer = answer.recv_timeout(until.saturating_duration_since(Instant::now()));
            let answer = answer.map_err(|error| match error {
                RecvTimeoutError::Timeout => format!("a mask takes over {}", millis(MASK_WAIT)),
                RecvTimeoutError::Disconnected => LOST.to_owned(),
            });
            let state = answer.flatten().map(|(matcher, next)| State::Ready(matcher, next));
            self.state = state.unwrap_or_else(|reason| {
                cancellation.cancel();
                State::Failed(reason)
            });
        }
        match &self.state {
            State::Ready(_, next) => Ok(next),
            State::Failed(reason) => Err(ConstraintError::Refused { field: self.field, reason: reason.clone() }),
            State::Busy { .. } => unreachable!("it was waited for"),
        }
    }

    /// Takes in the token that was chosen from what [`next`](Self::next) said. Does not wait.
    pub fn advance(&mut self, token_id: u32) {
        self.state = match std::mem::replace(&mut self.state, State::Failed(LOST.into())) {
            State::Ready(matcher, _) => self.threads.advance(matcher, token_id),
            other => other,
        };
    }
}

impl Drop for Guide {
    /// Nobody works for who is gone.
    fn drop(&mut self) {
        if let State::Busy { cancellation, .. } = &self.state {
            cancellation.cancel();
        }
    }
}

// === impl MaskThreads ===

impl MaskThreads {
    /// Has one of them find out what may follow a token.
    fn advance(&self, matcher: Matcher, token_id: u32) -> State {
        let (sender, answer) = sync_channel(1);
        let cancellation = matcher.cancellation();
        match self.tasks.try_send(Task { matcher, token_id, answer: sender }) {
            Ok(()) => State::Busy { answer, cancellation },
            Err(TrySendError::Full(_)) => State::Failed(format!("{QUEUE} other masks are waited for")),
            Err(TrySendError::Disconnected(_)) => State::Failed(LOST.into()),
        }
    }

    /// Starts them.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn spawn() -> io::Result<Self> {
        let (tasks, receiver) = sync_channel(QUEUE);
        let receiver = Arc::new(Mutex::new(receiver));
        let n_threads = thread::available_parallelism()?.get().min(MAX_THREADS);
        for _ in 0..n_threads {
            let receiver = Arc::clone(&receiver);
            let builder = thread::Builder::new().name("mask".into()).stack_size(STACK_BYTES);
            builder.spawn(move || {
                while let Some(task) = next_task(&receiver) {
                    task.run()
                }
            })?;
        }
        Ok(Self { tasks })
    }
}

/// The next task, whichever thread is first. None: nobody can ask any more.
fn next_task(receiver: &Mutex<Receiver<Task>>) -> Option<Task> {
    // A receiver is sound whoever panicked while it had it.
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

// === impl Task ===

impl Task {
    fn run(self) {
        let Self { mut matcher, token_id, answer } = self;
        let start = Instant::now();
        let next = matcher.advance(token_id);
        let paid = matcher.pay(start.elapsed());
        // Who does not wait any longer has gone.
        let _ = answer.send(next.and_then(|next| paid.map(|()| (matcher, next))));
    }
}

#[cfg(test)]
mod tests;
