//! The compiler: from a constraint to a matcher, beside the step loop and outside the async runtime's threads.

use std::{
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use lockstep_checkpoint::Checkpoint;
use lru::LruCache;
use prometheus_client::metrics::histogram::Histogram;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use super::{
    Constraint, ConstraintError, STACK_BYTES,
    grammar::Grammars,
    guide::{Compiled, MaskThreads},
    matcher::Matcher,
    trial::Trial,
};

/// Constraints that are compiled at a time. Usual ones take milliseconds.
const MAX_RUNNING: usize = 2;
/// Constraints that are compiled or wait for it.
const MAX_PENDING: usize = 64;
/// How long one waits. The first one waits for the vocabulary to be read, a second or so.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Constraints that are known to compile within the limits: callers use the same ones over and over.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not zero");

/// See the module's documentation.
#[derive(Debug)]
pub struct Compiler {
    checkpoint: Arc<Checkpoint>,
    vocab_size: usize,
    grammars: Arc<OnceLock<Result<Grammars, String>>>,
    /// What compiles a constraint that is not known, first.
    trial_program: PathBuf,
    /// Digests of constraints.
    known: Mutex<LruCache<[u8; 32], ()>>,
    pending: Semaphore,
    running: Arc<Semaphore>,
    threads: MaskThreads,
    time: Histogram,
}

impl Compiler {
    /// A compiler for the model of a checkpoint, which has `vocab_size` tokens.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn new(checkpoint: Arc<Checkpoint>, vocab_size: usize, time: Histogram) -> std::io::Result<Self> {
        Ok(Self {
            checkpoint,
            vocab_size,
            grammars: Arc::default(),
            trial_program: this_program()?,
            known: Mutex::new(LruCache::new(MAX_KNOWN)),
            pending: Semaphore::new(MAX_PENDING),
            running: Arc::new(Semaphore::new(MAX_RUNNING)),
            threads: MaskThreads::spawn()?,
            time,
        })
    }

    /// Compiles a constraint. Where the text may end, one of `stop_token_ids` may come.
    ///
    /// # Errors
    /// See [`ConstraintError`].
    pub async fn compile(&self, constraint: Constraint, stop_token_ids: Vec<u32>) -> Result<Compiled, ConstraintError> {
        let _pending = self.pending.try_acquire().map_err(|_| ConstraintError::Busy)?;
        let running = timeout(MAX_WAIT, Arc::clone(&self.running).acquire_owned()).await;
        let running = running.ok().and_then(Result::ok).ok_or(ConstraintError::Busy)?;
        let running = self.read_vocabulary(running).await?;
        let start = Instant::now();
        self.try_out(&constraint).await?;
        let grammars = Arc::clone(&self.grammars);
        let threads = self.threads.clone();
        let (compiled, _running) = on_a_thread(running, move || {
            let grammars = known_grammars(&grammars)?;
            let refused = |reason| ConstraintError::Refused { field: constraint.field(), reason };
            let (matcher, first) = Matcher::new(grammars, &constraint, &stop_token_ids).map_err(refused)?;
            Ok(Compiled::new(&constraint, matcher, first, threads))
        })
        .await?;
        self.time.observe(start.elapsed().as_secs_f64());
        Ok(compiled)
    }

    /// Reads the vocabulary, once.
    async fn read_vocabulary(&self, running: OwnedSemaphorePermit) -> Result<OwnedSemaphorePermit, ConstraintError> {
        if self.grammars.get().is_some() {
            return Ok(running);
        }
        let (grammars, checkpoint) = (Arc::clone(&self.grammars), Arc::clone(&self.checkpoint));
        let vocab_size = self.vocab_size;
        let read = move || {
            grammars.get_or_init(|| {
                let vocabulary = checkpoint.vocabulary().map_err(|error| error.to_string())?;
                Grammars::new(&vocabulary, vocab_size)
            });
            Ok(())
        };
        on_a_thread(running, read).await.map(|((), running)| running)
    }

    /// Sees to it that a constraint compiles within the limits.
    async fn try_out(&self, constraint: &Constraint) -> Result<(), ConstraintError> {
        let digest: [u8; 32] = Sha256::digest([constraint.field(), "\n", constraint.text()].concat()).into();
        // Held for a look-up or an update.
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known().get(&digest).is_some() {
            return Ok(());
        }
        let grammars = known_grammars(&self.grammars)?;
        let control_tokens = grammars.control_tokens().to_vec();
        let trial = Trial { constraint: constraint.clone(), n_ids: grammars.n_ids(), control_tokens };
        trial.run(&self.trial_program).await?;
        known().put(digest, ());
        Ok(())
    }
}

/// The file of this program, the same even if another one has taken its place since.
fn this_program() -> std::io::Result<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { Ok(running) } else { std::env::current_exe() }
}

/// The grammars, which have been read.
fn known_grammars(grammars: &OnceLock<Result<Grammars, String>>) -> Result<&Grammars, ConstraintError> {
    let read = grammars.get().ok_or(ConstraintError::Busy)?;
    read.as_ref().map_err(|why| ConstraintError::NoVocabulary(why.clone()))
}

/// Does some work on a thread with a large stack, which keeps its place among those that run even if nobody waits for it
/// any longer.
async fn on_a_thread<T: Send + 'static>(
    running: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, ConstraintError> + Send + 'static,
) -> Result<(T, OwnedSemaphorePermit), ConstraintError> {
    let (sender, answer) = oneshot::channel();
    let builder = thread::Builder::new().name("constraint".into()).stack_size(STACK_BYTES);
    let thread = builder.spawn(move || {
        let done = work().map(|done| (done, running));
        // Nobody waits any longer, then.
        let _ = sender.send(done);
    });
    thread.map_err(|error| ConstraintError::System(error.to_string()))?;
    answer.await.unwrap_or_else(|_| Err(ConstraintError::System("its thread panicked".into())))
}
