//! A trial compiles a constraint in a process of its own, which may end badly.
//!
//! llguidance bounds much of what a constraint may cost, and not all: some schemas of 64 KiB take seconds to compile. A
//! thread cannot be stopped, and a stack that overflows ends the process. So what has not been compiled before is
//! compiled by this program's `try-constraint` first, under limits, and killed if need be; what passes is compiled once
//! more where it is needed.

use std::{
    io::{self, Read as _, Write as _},
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

use super::{Constraint, ConstraintError, STACK_BYTES, grammar::Grammars, millis};

/// The word by which the program knows that it is such a process.
pub const COMMAND: &str = "try-constraint";

/// What a constraint may take to compile.
const MAX_TIME: Duration = Duration::from_millis(100);
/// The same. Unit: bytes.
const MAX_MEMORY_BYTES: u64 = 32 << 20;

/// When a process that has not answered is killed: it measures [`MAX_TIME`] by itself, from when it begins to compile,
/// and a busy machine may take a while to start it.
const KILL_AFTER: Duration = Duration::from_secs(1);

/// Largest message to such a process: a constraint and the names of control tokens. Unit: bytes.
const MAX_MESSAGE_BYTES: u64 = 16 << 20;

/// What such a process is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct Trial {
    /// What to compile.
    pub constraint: Constraint,
    /// Ids that it may mention are below this.
    pub n_ids: usize,
    /// Control tokens that it may mention.
    pub control_tokens: Vec<(u32, String)>,
}

impl Trial {
    /// Has `program` compile the constraint.
    ///
    /// # Errors
    /// What is wrong with it, or that there is no such process.
    pub async fn run(&self, program: &Path) -> Result<(), ConstraintError> {
        let system = |error: io::Error| ConstraintError::System(error.to_string());
        let refused = |reason: String| ConstraintError::Refused { field: self.constraint.field(), reason };
        let mut command = Command::new(program);
        command.arg(COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(system)?;
        let message = serde_json::to_vec(self).map_err(|error| system(error.into()))?;
        let stdin = child.stdin.take();
        let answered = async {
            if let Some(mut stdin) = stdin {
                // One that is gone says why by its end.
                let _ = stdin.write_all(&message).await;
            }
            child.wait_with_output().await
        };
        let output = timeout(KILL_AFTER, answered).await.map_err(|_| refused(too_slow()))?.map_err(system)?;
        if !output.status.success() {
            let mib = MAX_MEMORY_BYTES >> 20;
            return Err(refused(format!("takes over {mib} MiB to compile")));
        }
        let reason = String::from_utf8_lossy(&output.stdout);
        if reason.is_empty() { Ok(()) } else { Err(refused(reason.into_owned())) }
    }

    /// Compiles the constraint here, on a thread with a large stack.
    fn compile(self) -> Result<(), String> {
        let work = move || {
            let grammars = Grammars::of_bytes(self.n_ids, self.control_tokens)?;
            limit_process();
            let start = Instant::now();
            grammars.compile(&self.constraint)?;
            if start.elapsed() > MAX_TIME { Err(too_slow()) } else { Ok(()) }
        };
        let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn(work).map_err(|error| error.to_string())?;
        thread.join().map_err(|_| "cannot be compiled".to_owned())?
    }
}

/// What such a process does: reads a [`Trial`], says what is wrong with the constraint or nothing.
///
/// # Errors
/// If it was told nothing that it knows.
pub fn answer() -> anyhow::Result<()> {
    let mut message = Vec::new();
    io::stdin().take(MAX_MESSAGE_BYTES).read_to_end(&mut message)?;
    let trial: Trial = serde_json::from_slice(&message)?;
    if let Err(reason) = trial.compile() {
        io::stdout().write_all(reason.as_bytes())?;
    }
    Ok(())
}

/// Lets this process have no more than [`MAX_MEMORY_BYTES`] beyond what it has (what it has is known on Linux alone), end
/// by itself should nobody be left to kill it, and leave no core behind.
fn limit_process() {
    let data_bytes = || -> Option<u64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmData:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    let limits = [
        (Resource::Data, data_bytes().map(|data_bytes| data_bytes + MAX_MEMORY_BYTES)),
        (Resource::Cpu, Some(2 * KILL_AFTER.as_secs())),
        (Resource::Core, Some(0)),
    ];
    for (resource, current) in limits {
        // A limit that is lower already holds, too.
        let _ = current.map(|_| setrlimit(resource, Rlimit { current, ..getrlimit(resource) }));
    }
}

fn too_slow() -> String {
    format!("takes over {} to compile", millis(MAX_TIME))
}
