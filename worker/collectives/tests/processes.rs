//! What happens to the other ranks when a rank's process is killed.
//!
//! The test is rank 0; the others are this test's own binary, started again to run [`rank_in_a_process`].
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use lockstep_collectives::{Collective, CollectiveError, Endpoint, Member, shm, tcp};

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
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["rank_in_a_process", "--exact", "--ignored", "--nocapture", "--quiet"])
            .env("LOCKSTEP_TEST_RANK", rank.to_string())
            .env("LOCKSTEP_TEST_TRANSPORT", transport)
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
        _ => {
            let listener = tcp::Listener::bind("127.0.0.1:0").unwrap();
            println!("\naddress: {}", listener.address());
            let addresses: Vec<String> = input.take(WORLD_SIZE).collect();
            listener.connect(member(rank), &addresses, deadline).unwrap()
        }
    };
    println!("\nfailed: {}", gather_until_it_fails(&mut end, |_| {}));
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
