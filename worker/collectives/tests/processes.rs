//! What happens to the other ranks when a rank's process is killed, and, over NCCL, when its GPU misbehaves.
//!
//! The test is rank 0; the others are this test's own binary, started again to run [`rank_in_a_process`].
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_collectives::{AbortHandle, Collective, CollectiveError, Endpoint, Member, nccl, shm, tcp};

#[path = "emulated/gpu.rs"]
mod gpu;

use gpu::Gpu;

/// So long that a wait which is not ended by a peer's death shows as a `Timeout` error.
const LONG: Duration = Duration::from_secs(60);

const WORLD_SIZE: usize = 3;

/// A rank in a process of its own, killed at the end.
struct Rank {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Rank {
    fn spawn(rank: usize, transport: &str) -> Self {
        Self::spawn_with(rank, transport, &[])
    }

    /// With more in its environment.
    fn spawn_with(rank: usize, transport: &str, environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["rank_in_a_process", "--exact", "--ignored", "--nocapture", "--quiet"])
            .env("LOCKSTEP_TEST_RANK", rank.to_string())
            .env("LOCKSTEP_TEST_TRANSPORT", transport)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// What follows `key` in the first line of output that begins with it.
    fn hear(&mut self, key: &str) -> String {
        let mut lines = (&mut self.output).lines().map(Result::unwrap);
        lines.find_map(|line| line.strip_prefix(key).map(str::to_owned)).unwrap_or_else(|| panic!("no {key} heard"))
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn member(rank: usize) -> Member {
    Member { epoch: 5, rank, world_size: WORLD_SIZE, timeout: LONG, ..Member::default() }
}

fn segment_name(purpose: &str) -> String {
    format!("lockstep-test-{}-{purpose}", std::process::id())
}

/// Gathers until something fails; `after_each` is told the number of calls made.
fn gather_until_it_fails(end: &mut Endpoint, mut after_each: impl FnMut(u64)) -> CollectiveError {
    let rank = end.rank();
    for call in 1.. {
        let mut all = [f32::NAN; WORLD_SIZE];
        all[rank] = rank as f32;
        if let Err(error) = end.all_gather(&[1; WORLD_SIZE], &mut all) {
            return error;
        }
        assert_eq!(all, [0.0, 1.0, 2.0]);
        after_each(call);
    }
    unreachable!("calls are not counted to the end")
}

/// Rank 0's part: kills rank 2 in the middle, and sees that every survivor notices.
fn check_kill(mut end: Endpoint, mut others: [Rank; WORLD_SIZE - 1]) {
    let error = gather_until_it_fails(&mut end, |call| {
        if call == 1_000 {
            // Killed, and not waited for: the survivors must not take the zombie for alive.
            others[1].child.kill().unwrap();
        }
    });
    assert!(matches!(error, CollectiveError::PeerGone { rank: 2, .. }), "{error}");
    drop(end);
    let error = others[0].hear("failed: ");
    assert!(error.starts_with("rank 2 is gone") || error.starts_with("rank 0 is gone"), "{error}");
}

#[test]
#[ignore = "it is one of the processes that the other tests start"]
fn rank_in_a_process() {
    let rank = env::var("LOCKSTEP_TEST_RANK").unwrap().parse().unwrap();
    let mut input = std::io::stdin().lines().map(Result::unwrap);
    let deadline = Instant::now() + LONG;
    let mut end = match env::var("LOCKSTEP_TEST_TRANSPORT").unwrap().as_str() {
        "shm" => shm::attach(&input.next().unwrap(), member(rank), deadline).unwrap(),
        "shm creator" => {
            let segment = shm::Segment::create(&input.next().unwrap(), member(rank)).unwrap();
            println!("\ncreated: {}", segment.name());
            segment.meet(deadline).unwrap()
        }
        "nccl" => {
            let id = input.next().unwrap();
            // What follows is for the thread that aborts.
            drop(input);
            connect_over_nccl(rank, &id)
        }
        _ => {
            let listener = tcp::Listener::bind("127.0.0.1:0").unwrap();
            println!("\naddress: {}", listener.address());
            let addresses: Vec<String> = input.take(WORLD_SIZE).collect();
            listener.connect(member(rank), &addresses, deadline).unwrap()
        }
    };
    let tell_first = |call| {
        if call == 1 {
            println!("\ngathered: ");
        }
    };
    println!("\nfailed: {}", gather_until_it_fails(&mut end, tell_first));
    drop(end);
    println!("\nleft: ");
}

/// The end of a rank over NCCL in a process of its own. It is told the unique id, and by a further line to abort.
fn connect_over_nccl(rank: usize, id: &str) -> Endpoint {
    let abort = AbortHandle::new();
    let number = |name| env::var(name).ok().map(|value| value.parse().unwrap());
    let timeout = number("LOCKSTEP_TEST_TIMEOUT_MS").map_or(LONG, Duration::from_millis);
    let gpu = number("LOCKSTEP_TEST_GPU").unwrap_or(rank as u64);
    let member = Member { abort: abort.clone(), timeout, ..member(rank) };
    std::thread::spawn(move || {
        std::io::stdin().lines().next();
        abort.abort();
    });
    let stream = Gpu::open(gpu as usize).stream();
    nccl::connect(&id_from_hex(id), stream, member, Instant::now() + LONG).unwrap()
}

fn id_to_hex(id: &nccl::UniqueId) -> String {
    id.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn id_from_hex(hex: &str) -> nccl::UniqueId {
    let bytes: Vec<u8> =
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    nccl::UniqueId::from_bytes(&bytes).unwrap()
}

/// Ranks 1 and 2 over NCCL, the first with `environment`, and what rank 0 connects by.
fn spawn_over_nccl(environment: &[(&str, &str)]) -> (nccl::UniqueId, [Rank; WORLD_SIZE - 1]) {
    let _loaded = Gpu::open(0);
    let id = nccl::UniqueId::new().unwrap();
    let mut others = [Rank::spawn_with(1, "nccl", environment), Rank::spawn(2, "nccl")];
    others.iter_mut().for_each(|other| other.tell(&id_to_hex(&id)));
    (id, others)
}

/// Forms a group of which rank 1 misbehaves as `environment` says, and returns what it sees itself.
fn check_misbehaviour(environment: &[(&str, &str)]) -> String {
    let (id, mut others) = spawn_over_nccl(&[environment, &[("LOCKSTEP_TEST_TIMEOUT_MS", "2000")]].concat());
    let member = member(0);
    let abort = member.abort.clone();
    let mut end = nccl::connect(&id, Gpu::open(0).stream(), member, Instant::now() + LONG).unwrap();
    let healthy = std::thread::spawn(move || gather_until_it_fails(&mut end, |_| {}));
    let error = others[0].hear("failed: ");
    // Nothing tells the others but their failure detector.
    abort.abort();
    assert_eq!(healthy.join().unwrap(), CollectiveError::Aborted);
    error
}

#[test]
fn shm_survivors_notice_a_killed_process() {
    let name = segment_name("kill");
    let segment = shm::Segment::create(&name, member(0)).unwrap();
    let mut others = [1, 2].map(|rank| Rank::spawn(rank, "shm"));
    others.iter_mut().for_each(|other| other.tell(&name));
    let end = segment.meet(Instant::now() + LONG).unwrap();
    assert_eq!(shm::remove_stale(&name).unwrap(), 0, "the name is gone once all have come");
    check_kill(end, others);
}

#[test]
fn tcp_survivors_notice_a_killed_process() {
    let listener = tcp::Listener::bind("127.0.0.1:0").unwrap();
    let mut others = [1, 2].map(|rank| Rank::spawn(rank, "tcp"));
    let mut addresses = vec![listener.address().to_string()];
    addresses.extend(others.iter_mut().map(|other| other.hear("address: ")));
    others.iter_mut().for_each(|other| other.tell(&addresses.join("\n")));
    let end = listener.connect(member(0), &addresses, Instant::now() + LONG).unwrap();
    check_kill(end, others);
}

#[test]
fn the_segment_of_a_killed_creator_is_found_and_removed() {
    let name = segment_name("creator");
    let mut creator = Rank::spawn(0, "shm creator");
    creator.tell(&name);
    assert_eq!(creator.hear("created: "), name);
    assert_eq!(shm::remove_stale(&name).unwrap(), 0, "its creator lives");
    drop(creator);
    assert_eq!(shm::remove_stale(&name).unwrap(), 1);
}

#[test]
fn nccl_survivors_of_a_killed_process_are_freed_by_an_abort() {
    let (id, mut others) = spawn_over_nccl(&[]);
    let member = member(0);
    let abort = member.abort.clone();
    let gpu = Gpu::open(0);
    let mut end = nccl::connect(&id, gpu.stream(), member, Instant::now() + LONG).unwrap();
    let (killed, is_killed) = std::sync::mpsc::channel();
    let detector = std::thread::spawn(move || {
        is_killed.recv().unwrap();
        abort.abort();
    });
    let error = gather_until_it_fails(&mut end, |call| {
        if call == 100 {
            others[1].child.kill().unwrap();
            killed.send(()).unwrap();
        }
    });
    assert_eq!(error, CollectiveError::Aborted);
    detector.join().unwrap();
    gpu.await_idle();
    others[0].tell("abort");
    assert_eq!(others[0].hear("failed: "), "aborted");
}

#[test]
fn a_device_that_hangs_or_fails_ends_its_rank_by_name_of_the_call() {
    // Every call through the host is two operations of NCCL's.
    let hung = check_misbehaviour(&[("LOCKSTEP_EMULATOR_NCCL_HANG_AT", "7")]);
    let expected = "the device's work up to call 3, all_gather with 4 of 12 bytes did not end within 2000 ms";
    assert!(hung.starts_with(expected), "{hung}");
    let stalled = check_misbehaviour(&[("LOCKSTEP_EMULATOR_NCCL_STALL_AT", "8")]);
    let expected = "enqueueing call 3, all_gather with 4 of 12 bytes did not end within 2000 ms";
    assert!(stalled.starts_with(expected), "{stalled}");
    let failed = check_misbehaviour(&[("LOCKSTEP_EMULATOR_NCCL_FAIL_AT", "7")]);
    let expected = "call 3, all_gather with 4 of 12 bytes failed: remote process exited or there was a network error \
                    (connection closed by remote peer)";
    assert!(failed.ends_with(expected), "{failed}");
}

#[test]
fn a_communicator_that_cannot_be_ended_is_left_behind() {
    let environment = [("LOCKSTEP_EMULATOR_NCCL_HANG_AT", "1"), ("LOCKSTEP_EMULATOR_NCCL_STUCK", "1")];
    let (id, mut others) = spawn_over_nccl(&[&environment[..], &[("LOCKSTEP_TEST_TIMEOUT_MS", "100")]].concat());
    let _end = nccl::connect(&id, Gpu::open(0).stream(), member(0), Instant::now() + LONG).unwrap();
    let error = others[0].hear("failed: ");
    assert!(error.contains("did not end within 100 ms"), "{error}");
    assert_eq!(others[0].hear("left: "), "");
}

#[test]
fn ranks_that_come_late_are_waited_for() {
    let (id, _others) = spawn_over_nccl(&[("LOCKSTEP_EMULATOR_NCCL_INIT_DELAY_MS", "300")]);
    let mut end = nccl::connect(&id, Gpu::open(0).stream(), member(0), Instant::now() + LONG).unwrap();
    let mut all = [0.0, f32::NAN, f32::NAN];
    end.all_gather(&[1; WORLD_SIZE], &mut all).unwrap();
    assert_eq!(all, [0.0, 1.0, 2.0]);
}

/// Ranks of which each has a process, and all have one GPU.
fn check_shared_gpu(version: nccl::Version) {
    let _loaded = Gpu::open(0);
    let id = nccl::UniqueId::new().unwrap();
    let code = (version.major * 10_000 + version.minor * 100 + version.patch).to_string();
    let mut ranks = [0, 1, 2].map(|rank| {
        let (name, value) = nccl::shared_gpu_environment(version, rank);
        let environment =
            [(name, value.as_str()), ("LOCKSTEP_EMULATOR_NCCL_VERSION", &code), ("LOCKSTEP_TEST_GPU", "5")];
        Rank::spawn_with(rank, "nccl", &environment)
    });
    ranks.iter_mut().for_each(|rank| rank.tell(&id_to_hex(&id)));
    ranks.iter_mut().for_each(|rank| assert_eq!(rank.hear("gathered: "), "", "{version}"));
}

#[test]
fn ranks_share_a_gpu_in_the_environment_that_their_nccl_wants() {
    for (minor, patch) in [(29, 7), (30, 4)] {
        check_shared_gpu(nccl::Version { major: 2, minor, patch });
    }
}
