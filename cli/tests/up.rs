//! `lockstep up` with stand-ins for the services: order, restarts, and that nothing is ever left behind.
#![allow(clippy::unwrap_used, reason = "a test's helpers panic as tests do")]

use std::{
    fs,
    io::{BufRead as _, BufReader, pipe},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Far longer than anything here takes: a test that would hang fails instead.
const HANG: Duration = Duration::from_secs(60);

/// A running `lockstep up`, all of whose output is read.
struct Up {
    process: Child,
    lines: Receiver<String>,
    /// What has been read so far.
    seen: Vec<String>,
    _folder: TempDir,
}

impl Up {
    /// Starts it in a folder of its own, with stand-ins beside it.
    fn start(model: &str, flags: &[&str]) -> Self {
        // Beside the programs, so that links reach them. A fresh copy could still be open for writing in a child that
        // another test is just about to start, and then cannot be run.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let lockstep = folder.path().join("lockstep");
        fs::hard_link(env!("CARGO_BIN_EXE_lockstep"), &lockstep).unwrap();
        for service in ["tokenizer-svc", "worker", "gateway"] {
            fs::hard_link(stand_in(), folder.path().join(format!("lockstep-{service}"))).unwrap();
        }
        fs::write(folder.path().join("model.gguf"), model).unwrap();
        // One pipe for both, so that lines stay in order.
        let (read, output) = pipe().unwrap();
        let process = Command::new(&lockstep)
            .arg("up")
            .arg(folder.path().join("model.gguf"))
            .args(default_listen(flags))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || BufReader::new(read).lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Self { process, lines, seen: Vec::new(), _folder: folder }
    }

    /// Reads until a line holds all of these.
    fn wait_for(&mut self, parts: &[&str]) -> String {
        let deadline = Instant::now() + HANG;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if parts.iter().all(|part| line.contains(part)) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("no line with {parts:?} in:\n{}", self.seen.join("\n"))
                }
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(pid_of(self.process.id()), signal).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        let status = self.process.wait().unwrap();
        self.seen.extend(self.lines.iter());
        status
    }

    /// The processes that said their ids, with their names, oldest first.
    fn children(&self) -> Vec<(String, Pid)> {
        let line = |line: &String| {
            let (name, rest) = line.split_once('|')?;
            let pid = rest.trim().strip_prefix("pid ")?.parse().ok()?;
            Some((name.trim().to_owned(), pid_of(pid)))
        };
        self.seen.iter().filter_map(line).collect()
    }

    fn position(&self, parts: &[&str]) -> usize {
        let found = self.seen.iter().position(|line| parts.iter().all(|part| line.contains(part)));
        found.unwrap_or_else(|| panic!("no line with {parts:?} in:\n{}", self.seen.join("\n")))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port of the system's choice, unless the test has one.
fn default_listen(flags: &[&str]) -> &'static [&'static str] {
    if flags.contains(&"--gateway-listen") { &[] } else { &["--gateway-listen", "127.0.0.1:0"] }
}

/// The example that stands in for every service; cargo builds it with the tests.
fn stand_in() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_lockstep")).with_file_name("examples").join("fake_service");
    assert!(path.is_file(), "{} is built by `cargo test`", path.display());
    path
}

fn pid_of(id: u32) -> Pid {
    Pid::from_raw(id.try_into().unwrap()).unwrap()
}

/// Whether a process still runs. One that has ended and that nobody has waited for does not: an orphan in a container
/// without an init stays so for ever.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    // `pid (name) state …`, and the name may hold anything.
    stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z')))
}

/// Waits until none of these processes runs.
fn assert_gone(children: &[(String, Pid)]) {
    let deadline = Instant::now() + HANG;
    for (name, pid) in children {
        while runs(*pid) {
            assert!(Instant::now() < deadline, "{name} is left behind");
            thread::yield_now();
        }
    }
}

#[test]
fn cluster_starts_in_order_and_stops_in_the_other() {
    let mut up = Up::start("model", &["--world-size", "2", "--replicas", "2"]);
    up.wait_for(&["Ctrl-C ends the cluster"]);
    let names: Vec<String> = up.children().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["tokenizer", "worker-0.0", "worker-0.1", "worker-1.0", "worker-1.1", "gateway"]);
    let text = up.seen.join("\n");
    for part in ["Lockstep serves model at 127.0.0.1:", "chat --target 127.0.0.1:", "buf curl", "/metrics"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    up.signal(Signal::TERM);
    assert!(up.ended().success(), "{}", up.seen.join("\n"));
    let drains = ["gateway", "worker-0.0", "worker-1.1", "tokenizer"].map(|name| up.position(&[name, "draining"]));
    assert!(drains[0] < drains[1] && drains[0] < drains[2], "the gateway stops first");
    assert!(drains[1] < drains[3] && drains[2] < drains[3], "the tokenizer service stops last");
    assert_gone(&up.children());
}

#[test]
fn child_that_is_killed_comes_back_where_it_was() {
    let mut up = Up::start("model", &[]);
    let before = up.wait_for(&["gateway", "listening grpc="]);
    up.wait_for(&["Ctrl-C ends the cluster"]);
    let gateway = up.children().into_iter().find(|(name, _)| name == "gateway").unwrap().1;
    kill_process(gateway, Signal::KILL).unwrap();
    up.wait_for(&["gateway ended with signal: 9", "starting it again"]);
    assert_eq!(up.wait_for(&["gateway", "listening grpc="]), before);
    up.signal(Signal::INT);
    assert!(up.ended().success());
    assert_eq!(up.children().len(), 4);
    assert_gone(&up.children());
}

#[test]
fn nothing_is_left_when_the_command_itself_is_killed() {
    let mut up = Up::start("model", &["--world-size", "2"]);
    up.wait_for(&["Ctrl-C ends the cluster"]);
    up.signal(Signal::KILL);
    up.ended();
    assert_eq!(up.children().len(), 4);
    assert_gone(&up.children());
}

#[test]
fn child_that_cannot_start_ends_it_all_with_its_own_words() {
    let mut up = Up::start("", &[]);
    assert_eq!(up.ended().code(), Some(1));
    up.position(&["lockstep: worker-0.0 ended with exit status: 1: lockstep-worker: the model is empty"]);
    assert_gone(&up.children());
}

#[test]
fn cluster_is_not_up_before_its_groups_are() {
    let mut up = Up::start("unready", &["--ready-timeout", "1"]);
    up.wait_for(&["lockstep: the cluster is not ready after 1 s"]);
    assert_eq!(up.ended().code(), Some(1));
    assert_gone(&up.children());
}

#[test]
fn taken_port_is_named_by_the_gateway() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut up = Up::start("model", &["--gateway-listen", &address]);
    assert_eq!(up.ended().code(), Some(1));
    up.position(&[&format!(
        "lockstep: gateway ended with exit status: 1: lockstep-gateway: cannot listen on {address}"
    )]);
    assert_gone(&up.children());
}

#[test]
fn model_that_is_not_there_is_wrong_usage() {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["up", "/nonexistent/m.gguf"]).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("model /nonexistent/m.gguf: No such file"), "{text}");
}

#[test]
fn cluster_that_does_not_answer_is_unavailable() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for command in [&["status"][..], &["generate", "x"], &["bench", "serve"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(command).args(["--target", &free]).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(69), "{command:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.starts_with(&format!("lockstep: {free} does not answer: ")), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
