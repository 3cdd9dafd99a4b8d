//! What every transport must do alike, checked over all of them with ranks in threads.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use lockstep_collectives::{Collective, CollectiveError, Endpoint, Member, Op, local, shm, tcp};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[path = "emulated/gpu.rs"]
mod gpu;

/// So long that a wait which is not ended by what a test does shows as a `Timeout` error.
const LONG: Duration = Duration::from_secs(60);

struct Transport {
    name: &'static str,
    form: fn(world_size: usize, timeout: Duration) -> Vec<Endpoint>,
    /// Whether it knows of each peer whether it lives, has come and has given. NCCL knows that all have, or not.
    sees_peers: bool,
    /// Random calls to play: fewer where each goes through an emulator, with threads of its own.
    rounds: u64,
}

const TRANSPORTS: [Transport; 4] = [
    Transport { name: "local", form: local::group_with_timeout, sees_peers: true, rounds: 2_000 },
    Transport { name: "shm", form: form_shm, sees_peers: true, rounds: 2_000 },
    Transport { name: "tcp", form: form_tcp, sees_peers: true, rounds: 2_000 },
    Transport { name: "nccl", form: form_nccl, sees_peers: false, rounds: 200 },
];

fn those_that_see_peers() -> impl Iterator<Item = Transport> {
    TRANSPORTS.into_iter().filter(|transport| transport.sees_peers)
}

fn members(world_size: usize, timeout: Duration) -> impl Iterator<Item = Member> {
    (0..world_size).map(move |rank| Member { epoch: 1, rank, world_size, timeout, ..Member::default() })
}

fn form_shm(world_size: usize, timeout: Duration) -> Vec<Endpoint> {
    static SEGMENTS: AtomicU64 = AtomicU64::new(0);
    let name = format!("lockstep-test-{}-{}", std::process::id(), SEGMENTS.fetch_add(1, Ordering::Relaxed));
    let deadline = Instant::now() + LONG;
    let mut members = members(world_size, timeout);
    let segment = shm::Segment::create(&name, members.next().unwrap()).unwrap();
    thread::scope(|scope| {
        let name = &name;
        let others: Vec<_> = members.map(|rank| scope.spawn(move || shm::attach(name, rank, deadline))).collect();
        let mut ends = vec![segment.meet(deadline).unwrap()];
        ends.extend(others.into_iter().map(|end| end.join().unwrap().unwrap()));
        ends
    })
}

fn form_tcp(world_size: usize, timeout: Duration) -> Vec<Endpoint> {
    let deadline = Instant::now() + LONG;
    let listeners: Vec<_> = (0..world_size).map(|_| tcp::Listener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    thread::scope(|scope| {
        let addresses = &addresses;
        let connect = |(listener, member): (tcp::Listener, Member)| {
            scope.spawn(move || listener.connect(member, addresses, deadline).unwrap())
        };
        let ends: Vec<_> = listeners.into_iter().zip(members(world_size, timeout)).map(connect).collect();
        ends.into_iter().map(|end| end.join().unwrap()).collect()
    })
}

fn form_nccl(world_size: usize, timeout: Duration) -> Vec<Endpoint> {
    let ends = gpu::connect(&gpu::gpus(world_size), members(world_size, timeout));
    ends.into_iter().map(Result::unwrap).collect()
}

/// Runs `act` on every rank's end in a thread of its own, for every transport.
fn check<T: Send>(
    world_size: usize,
    timeout: Duration,
    act: impl Fn(&mut Endpoint) -> T + Sync,
    verify: impl Fn(&'static str, Vec<T>),
) {
    check_over(TRANSPORTS, world_size, timeout, act, verify);
}

fn check_over<T: Send>(
    transports: impl IntoIterator<Item = Transport>,
    world_size: usize,
    timeout: Duration,
    act: impl Fn(&mut Endpoint) -> T + Sync,
    verify: impl Fn(&'static str, Vec<T>),
) {
    for transport in transports {
        let ends = (transport.form)(world_size, timeout);
        let results = thread::scope(|scope| {
            let act = &act;
            let ranks: Vec<_> = ends.into_iter().map(|mut end| scope.spawn(move || act(&mut end))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        verify(transport.name, results);
    }
}

/// The floats that `rank` gives in `round`: any bits at all, not-a-number among them.
fn floats(round: u64, rank: usize, length: usize) -> Vec<f32> {
    let start = (round << 8 | rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..length as u64)
        .map(|i| f32::from_bits((start.wrapping_add(i.wrapping_mul(0xbf58_476d_1ce4_e5b9)) >> 32) as u32))
        .collect()
}

fn assert_same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differs = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differs, None, "{what}: first difference");
}

/// Another one each time, unless `LOCKSTEP_TEST_SEED` asks for an earlier one.
fn new_seed() -> u64 {
    match std::env::var("LOCKSTEP_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => RandomState::new().hash_one(0),
    }
}

/// Lengths of a random call: mostly small, some 0, some larger than any buffer of a transport.
fn random_lengths(random: &mut ChaCha8Rng, world_size: usize) -> Vec<usize> {
    let limit = match random.random_range(0..100) {
        0 => 200_000,
        1..10 => 20_000,
        _ => 700,
    };
    (0..world_size).map(|_| if random.random_ratio(1, 8) { 0 } else { random.random_range(0..=limit) }).collect()
}

/// Plays `rounds` random calls, the same on every rank of `seed`.
fn play(end: &mut Endpoint, seed: u64, rounds: u64) {
    let (rank, world_size) = (end.rank(), end.world_size());
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for round in 0..rounds {
        let op = random.random_range(0..10);
        let root = random.random_range(0..world_size);
        let lengths = random_lengths(&mut random, world_size);
        let mine = floats(round, rank, lengths[rank]);
        let expected = || (0..world_size).flat_map(|rank| floats(round, rank, lengths[rank])).collect::<Vec<_>>();
        let mut out = vec![f32::NAN; lengths.iter().sum()];
        let what = format!("rank {rank} of {world_size}, round {round}, lengths {lengths:?}, seed {seed}");
        match op {
            0 => end.barrier().unwrap_or_else(|error| panic!("{what}: {error}")),
            1..4 if rank == root => {
                end.gather(root, &mine, &lengths, Some(&mut out)).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_same_bits(&out, &expected(), &what);
            }
            1..4 => end.gather(root, &mine, &lengths, None).unwrap_or_else(|error| panic!("{what}: {error}")),
            _ => {
                let start = lengths[..rank].iter().sum::<usize>();
                out[start..start + mine.len()].copy_from_slice(&mine);
                end.all_gather(&lengths, &mut out).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_same_bits(&out, &expected(), &what);
            }
        }
    }
}

#[test]
fn every_rank_gets_bit_for_bit_what_all_gave() {
    // 10,000 rounds for most transports.
    for world_size in [1, 2, 3, 4, 8] {
        for transport in TRANSPORTS {
            let seed = new_seed();
            println!("{}, world size {world_size}, seed {seed}", transport.name);
            let rounds = transport.rounds;
            check_over([transport], world_size, LONG, |end| play(end, seed, rounds), |_, _| {});
        }
    }
}

#[test]
fn ranks_that_make_different_calls_are_told_which() {
    type Step = fn(&mut Endpoint) -> Result<(), CollectiveError>;
    let barrier: Step = |end| end.barrier();
    let three_and_one: Step = |end| end.all_gather(&[3, 1], &mut [0.0; 4]);
    let one_and_three: Step = |end| end.all_gather(&[1, 3], &mut [0.0; 4]);
    let none: Step = |end| end.all_gather(&[0, 0], &mut []);
    let chunks: Step = |end| end.all_gather(&[0, 200_000], &mut vec![0.0; 200_000]);
    for pair in [[barrier, none], [three_and_one, one_and_three], [barrier, chunks], [chunks, three_and_one]] {
        let act = |end: &mut Endpoint| {
            end.barrier().unwrap();
            let result = pair[end.rank()](end);
            assert_eq!(result, end.barrier(), "the first error stays");
            result
        };
        check(2, LONG, act, |name, results| {
            let out_of_step = results.iter().filter(|result| matches!(result, Err(CollectiveError::OutOfStep { .. })));
            assert!(out_of_step.count() > 0, "{name}: {results:?}");
            for (rank, result) in results.iter().enumerate() {
                match result {
                    Err(CollectiveError::OutOfStep { rank: peer, expected, found }) => {
                        assert_eq!((*peer, expected.index, found.index), (1 - rank, 1, 1), "{name}");
                        assert_ne!(expected, found, "{name}");
                    }
                    // It may see the other's end before the other's call.
                    Err(CollectiveError::PeerGone { rank: peer, .. }) => assert_eq!(*peer, 1 - rank, "{name}"),
                    other => panic!("{name}: {other:?}"),
                }
            }
        });
    }
}

#[test]
fn a_rank_that_skips_a_call_is_found_out() {
    let act = |end: &mut Endpoint| {
        let rank = end.rank();
        for _ in 0..5 - rank {
            end.gather(0, &[1.0], &[1, 1], (rank == 0).then_some(&mut [0.0; 2][..]))?;
        }
        end.barrier()
    };
    check(2, LONG, act, |name, results| match &results[0] {
        Err(CollectiveError::OutOfStep { rank: 1, expected, found }) => {
            assert_eq!((expected.op, found.op), (Op::Gather { root: 0 }, Op::Barrier), "{name}");
        }
        other => panic!("{name}: {other:?}"),
    });
}

#[test]
fn an_abort_ends_the_wait_and_all_calls_after_it() {
    for transport in TRANSPORTS {
        for _ in 0..20 {
            let mut ends = (transport.form)(2, LONG);
            let handle = ends[0].abort_handle();
            thread::scope(|scope| {
                let waiting = scope.spawn(|| ends[0].barrier());
                thread::yield_now();
                handle.abort();
                assert_eq!(waiting.join().unwrap(), Err(CollectiveError::Aborted), "{}", transport.name);
            });
            assert_eq!(ends[0].barrier(), Err(CollectiveError::Aborted), "{}", transport.name);
            if !transport.sees_peers {
                // Nothing ends the wait of the other but an abort of its own.
                ends[1].abort_handle().abort();
                assert_eq!(ends[1].barrier(), Err(CollectiveError::Aborted), "{}", transport.name);
                continue;
            }
            ends.remove(0);
            // In shared memory the aborted rank has said that it came to the barrier.
            let _came = ends[0].barrier();
            assert!(matches!(ends[0].barrier(), Err(CollectiveError::PeerGone { rank: 0, .. })), "{}", transport.name);
        }
    }
}

#[test]
fn a_rank_that_leaves_is_named_by_all_others() {
    let act = |end: &mut Endpoint| {
        end.barrier().unwrap();
        if end.rank() == 1 { Ok(()) } else { end.barrier() }
    };
    // The end of rank 1 is dropped with its thread; the others may then see one another leave, too.
    check_over(those_that_see_peers(), 3, LONG, act, |name, results| {
        for rank in [0, 2] {
            assert!(matches!(results[rank], Err(CollectiveError::PeerGone { .. })), "{name}: {results:?}");
        }
        let saw_it = results.iter().filter(|result| matches!(result, Err(CollectiveError::PeerGone { rank: 1, .. })));
        assert!(saw_it.count() > 0, "{name}: {results:?}");
    });
}

#[test]
fn what_a_rank_gave_before_it_left_still_counts() {
    // Over NCCL a rank that gives waits for the one that takes.
    for transport in those_that_see_peers() {
        let mut ends = (transport.form)(2, LONG);
        let mut leaver = ends.pop().unwrap();
        leaver.gather(0, &[5.0, 6.0], &[1, 2], None).unwrap();
        drop(leaver);
        let mut out = [0.0; 3];
        ends[0].gather(0, &[4.0], &[1, 2], Some(&mut out)).unwrap();
        assert_eq!(out, [4.0, 5.0, 6.0], "{}", transport.name);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_after_the_timeout() {
    for transport in TRANSPORTS {
        let mut ends = (transport.form)(2, Duration::from_millis(30));
        let error = ends[1].barrier().unwrap_err();
        if !transport.sees_peers {
            let what = "the device's work up to call 0, barrier with 0 of 0 bytes did not end within 30 ms";
            assert!(error.to_string().starts_with(what), "{error}");
            continue;
        }
        assert!(matches!(error, CollectiveError::Timeout { rank: 0, timeout_ms: 30, .. }), "{}", transport.name);
        assert_eq!(error.to_string(), "rank 0 did not come to call 0, barrier with 0 of 0 bytes within 30 ms");
    }
}
