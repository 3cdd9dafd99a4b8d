//! A [`Child`] is one service of the cluster, run by a task that starts it, passes on what it says, and starts it again
//! when it ends.
//!
//! Its standard input is a pipe whose other end only this process holds. Children stand in process groups of their own,
//! so that Ctrl-C reaches this process alone and the order in which they stop is ours.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use lockstep_proto::announcement::Announcement;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader},
    process::Command,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::backoff::Backoff;
use crate::failure::{EX_USAGE, Failure};

/// Longest line of a child that is passed on in one piece. Unit: bytes.
const MAX_LINE_BYTES: u64 = 16 << 10;

/// How long the last lines of a child that has ended may take to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// What to run.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// How its lines are marked.
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    /// Where it listens. Once a child has announced its ports it keeps them, as others know them.
    pub(super) listen: SocketAddr,
    /// For HTTP, if it is the gateway.
    pub(super) http_listen: Option<SocketAddr>,
    pub(super) metrics_listen: SocketAddr,
}

/// What a child is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Order {
    /// Run; if it ends, that is the end of it.
    Try,
    /// Run; if it ends, run again.
    Keep,
    /// Drain and end.
    Terminate,
    /// End at once.
    Kill,
}

/// A child that ended although it was to run.
#[derive(Debug)]
pub(super) struct Exit {
    name: String,
    how: String,
    wrong_settings: bool,
    last_line: Option<String>,
}

/// A service, and the task that runs it.
#[derive(Debug)]
pub(super) struct Child {
    name: String,
    orders: watch::Sender<Order>,
    announced: watch::Receiver<Option<Announcement>>,
    task: Option<JoinHandle<()>>,
}

/// The state of the task.
struct Keeper {
    spec: Spec,
    orders: watch::Receiver<Order>,
    announced: watch::Sender<Option<Announcement>>,
    /// What the child said last on stderr. Locked only to read or replace the line; the lock is never held across an
    /// await.
    last_line: Arc<Mutex<Option<String>>>,
}

// === impl Exit ===

impl Exit {
    /// Why the cluster cannot start, in the child's own words where it has any.
    pub(super) fn failure(self) -> Failure {
        let said = self.last_line.map(|line| format!(": {line}")).unwrap_or_default();
        let text = format!("{} {}{said}", self.name, self.how);
        if self.wrong_settings { Failure::Usage(text) } else { Failure::Failed(text) }
    }
}

// === impl Child ===

impl Child {
    pub(super) fn start(spec: Spec, exits: mpsc::Sender<Exit>) -> Self {
        let (orders, order_receiver) = watch::channel(Order::Try);
        let (announce, announced) = watch::channel(None);
        let name = spec.name.clone();
        let keeper = Keeper { spec, orders: order_receiver, announced: announce, last_line: Arc::default() };
        Self { name, orders, announced, task: Some(tokio::spawn(keeper.run(exits))) }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens, once it has said so.
    pub(super) fn announced(&mut self) -> watch::Receiver<Option<Announcement>> {
        self.announced.clone()
    }

    pub(super) fn announcement(&self) -> Option<Announcement> {
        self.announced.borrow().clone()
    }

    /// From now on it is started again when it ends.
    pub(super) fn keep(&self) {
        self.order(Order::Keep);
    }

    pub(super) fn is_kept(&self) -> bool {
        *self.orders.borrow() == Order::Keep
    }

    /// Orders only become stricter.
    pub(super) fn order(&self, order: Order) {
        self.orders.send_if_modified(|now| {
            let stricter = order > *now;
            *now = order.max(*now);
            stricter
        });
    }

    /// Waits until it has ended for good.
    pub(super) async fn ended(&mut self) {
        if let Some(task) = &mut self.task {
            if task.await.is_err() {
                eprintln!("lockstep: the task of {} failed", self.name);
            }
            self.task = None;
        }
    }
}

// === impl Keeper ===

impl Keeper {
    async fn run(mut self, exits: mpsc::Sender<Exit>) {
        let mut backoff = Backoff::new();
        loop {
            let started = Instant::now();
            let ended = self.run_once().await;
            let order = *self.orders.borrow();
            if order >= Order::Terminate {
                return;
            }
            let exit = self.exit(ended);
            if order == Order::Try {
                // The queue is read until the first exit, and one is enough.
                let _ = exits.try_send(exit);
                return;
            }
            self.keep_ports();
            let pause = backoff.after(started.elapsed());
            eprintln!("lockstep: {} {}, starting it again in {:.1} s", exit.name, exit.how, pause.as_secs_f64());
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.orders.wait_for(|order| *order >= Order::Terminate) => return,
            }
        }
    }

    /// One life of the process. It is killed if this future is dropped.
    async fn run_once(&mut self) -> std::io::Result<ExitStatus> {
        let spec = &self.spec;
        let mut process = Command::new(&spec.program)
            .args(&spec.args)
            .args(["--listen", &spec.listen.to_string(), "--metrics-listen", &spec.metrics_listen.to_string()])
            .args(spec.http_listen.iter().flat_map(|address| ["--http-listen".to_owned(), address.to_string()]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        // Kept open, and never written to: its end tells the child that this process is gone.
        let _stdin = process.stdin.take();
        let pid = process.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
        let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
        let lines = async { tokio::join!(self.follow_stdout(stdout), self.follow_stderr(stderr)) };
        let mut lines = std::pin::pin!(lines);
        let mut orders = self.orders.clone();
        let (mut spoken, mut obeyed) = (false, Order::Keep);
        let status = loop {
            tokio::select! {
                status = process.wait() => break status?,
                _ = &mut lines, if !spoken => spoken = true,
                Ok(order) = orders.wait_for(|order| *order > obeyed) => {
                    obeyed = *order;
                    match obeyed {
                        Order::Kill => send(pid, Signal::KILL),
                        _ => send(pid, Signal::TERM),
                    }
                }
            }
        };
        if !spoken {
            let _ = timeout(LAST_LINES, lines).await;
        }
        Ok(status)
    }

    /// The next life listens where this one did.
    fn keep_ports(&mut self) {
        if let Some(announcement) = &*self.announced.borrow() {
            self.spec.listen = announcement.grpc;
            self.spec.http_listen = announcement.http.or(self.spec.http_listen);
            self.spec.metrics_listen = announcement.metrics.unwrap_or(self.spec.metrics_listen);
        }
    }

    async fn follow_stdout(&self, pipe: Option<impl AsyncRead + Unpin>) {
        follow(pipe, |line| match line.parse::<Announcement>() {
            Ok(announcement) => {
                eprintln!("{:<12} | {announcement}", self.spec.name);
                self.announced.send_replace(Some(announcement));
            }
            Err(_) => eprintln!("{:<12} | {line}", self.spec.name),
        })
        .await;
    }

    async fn follow_stderr(&self, pipe: Option<impl AsyncRead + Unpin>) {
        follow(pipe, |line| {
            eprintln!("{:<12} | {line}", self.spec.name);
            *self.last_line.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.to_owned());
        })
        .await;
    }

    fn exit(&self, ended: std::io::Result<ExitStatus>) -> Exit {
        let (how, code) = match ended {
            Ok(status) => (format!("ended with {status}"), status.code()),
            Err(error) => (format!("cannot run: {error}"), None),
        };
        Exit {
            name: self.spec.name.clone(),
            how,
            wrong_settings: code == Some(EX_USAGE.into()),
            last_line: self.last_line.lock().unwrap_or_else(PoisonError::into_inner).take(),
        }
    }
}

/// Passes on each line that is not empty. A line over the limit comes in pieces.
async fn follow(pipe: Option<impl AsyncRead + Unpin>, mut pass: impl FnMut(&str)) {
    let Some(pipe) = pipe else { return };
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end();
                if !text.is_empty() {
                    pass(text);
                }
            }
        }
    }
}

/// The process may have ended by itself, which is what the signal is for.
fn send(pid: Option<Pid>, signal: Signal) {
    if let Some(pid) = pid {
        let _ = kill_process(pid, signal);
    }
}
