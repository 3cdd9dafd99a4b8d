use std::hash::{BuildHasher, RandomState};

use lockstep_kernels::KvEncoding;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{
    device::Device,
    group::failure_detector::{Limits, Symptom},
    model_runner::RunnerSettings,
    serve::attest,
};

const TURN: Duration = Duration::from_millis(200);
const SUSPECT_AFTER: Duration = Duration::from_secs(1);
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

fn attestation(digest: &str) -> Attestation {
    [("weights_digest", digest), ("engine_version", "0.1.0")].into_iter().collect()
}

fn membership(world_size: usize) -> Membership {
    let hung_after = Duration::from_millis(1_200);
    let detector = FailureDetector::new(Limits { suspect_after: SUSPECT_AFTER, hung_after, turn: TURN });
    Membership::new(world_size, attestation("ab12"), detector, ATTACH_TIMEOUT)
}

fn join(rank: usize) -> Join {
    Join { rank, attestation: attestation("ab12"), contact: contact(rank) }
}

fn contact(rank: usize) -> Contact {
    Contact { address: format!("host-{rank}:1"), device_id: format!("gpu-{rank}") }
}

fn beat(progress: u64) -> Beat {
    Beat { progress, leaving: false }
}

/// A group of `world_size` in its first epoch, which runs.
fn running(world_size: usize, now: Instant) -> Membership {
    let mut group = membership(world_size);
    group.form(now);
    for rank in 1..world_size {
        group.join(Ticket(rank as u64), join(rank), now);
    }
    for rank in 1..world_size {
        group.attach(rank, 1).unwrap();
    }
    assert_eq!(*group.phase(), Phase::Running);
    group
}

#[test]
fn the_epoch_starts_with_the_last_rank_and_runs_with_the_last_stream() {
    let (mut group, now) = (membership(3), Instant::now());
    assert_eq!(group.join(Ticket(1), join(2), now), []);
    assert_eq!(group.form(now), []);
    assert_eq!(group.missing(), [1]);
    let joiner = |rank, ticket| (rank, Joiner { ticket: Ticket(ticket), contact: contact(rank) });
    let joiners = BTreeMap::from([joiner(1, 2), joiner(2, 1)]);
    assert_eq!(group.join(Ticket(2), join(1), now), [Action::Start { epoch: 1, joiners }]);
    assert_eq!(group.attach(2, 1), Some(vec![]));
    assert_eq!(group.attach(2, 1), None, "a second stream");
    assert_eq!(group.attach(1, 2), None, "an epoch that is not");
    assert_eq!(group.attach(3, 1), None, "a rank that is not");
    assert_eq!(group.attach(1, 1), Some(vec![Action::Run { epoch: 1 }]));
}

#[test]
fn the_roster_says_who_is_there_and_when_the_others_were() {
    let (mut group, now) = (membership(3), Instant::now());
    let check = |group: &Membership, now, expected: [(RankState, Option<u64>); 3]| {
        let ranks = group.ranks(now).into_iter();
        let found: Vec<_> = ranks.map(|rank| (rank.state, rank.silence.map(|silence| silence.as_secs()))).collect();
        assert_eq!(found, expected);
    };
    let (missing, waiting, joined) = (RankState::Missing, RankState::Waiting, RankState::Joined);
    check(&group, now, [(waiting, Some(0)), (missing, None), (missing, None)]);
    group.form(now);
    group.join(Ticket(1), join(2), now);
    check(&group, now + TURN * 10, [(waiting, Some(0)), (missing, None), (waiting, Some(0))]);
    group.join(Ticket(2), join(1), now);
    check(&group, now + TURN, [(joined, Some(0)); 3]);
    group.heartbeat(1, 1, beat(1), now + TURN * 5);
    group.lost(2, 1, now + TURN * 6);
    check(&group, now + TURN * 15, [(waiting, Some(0)), (missing, Some(2)), (missing, Some(3))]);
}

#[test]
fn a_leader_alone_runs_at_once() {
    let mut group = membership(1);
    let actions = group.form(Instant::now());
    assert_eq!(actions, [Action::Start { epoch: 1, joiners: BTreeMap::new() }, Action::Run { epoch: 1 }]);
}

#[test]
fn a_rank_that_differs_is_refused_with_both_values() {
    let (mut group, now) = (membership(2), Instant::now());
    let mut refusal = |join: Join| match group.join(Ticket(7), join, now).as_slice() {
        [Action::Refuse { ticket: Ticket(7), refusal }] => refusal.to_string(),
        other => panic!("{other:?}"),
    };
    let differs = Join { attestation: attestation("cd34"), ..join(1) };
    assert_eq!(refusal(differs), "rank 1 differs in weights_digest: leader ab12, rank 1 cd34");
    let lacks = Join { attestation: Attestation::default(), ..join(1) };
    assert_eq!(refusal(lacks), "rank 1 differs in engine_version: leader 0.1.0, rank 1 has none");
    assert_eq!(refusal(join(0)), "rank 0 is no follower in a group of 2 ranks");
    assert_eq!(refusal(join(2)), "rank 2 is no follower in a group of 2 ranks");
}

#[test]
fn a_rank_whose_settings_differ_is_refused_by_name() {
    let settings = RunnerSettings {
        device: Device::Cpu,
        threads: 1,
        n_blocks: 8,
        block_size: 16,
        kv_encoding: KvEncoding::F16,
        context_length: 128,
        deterministic: true,
    };
    let encoded = RunnerSettings { kv_encoding: KvEncoding::Int8, ..settings.clone() };
    let unordered = RunnerSettings { deterministic: false, ..settings.clone() };
    for (other, why) in [
        (encoded, "rank 1 differs in kv_cache_encoding: leader f16, rank 1 int8"),
        (unordered, "rank 1 differs in deterministic: leader true, rank 1 false"),
    ] {
        let mut group = Membership { attestation: attest("ab12", &settings, 2), ..membership(2) };
        let differs = Join { attestation: attest("ab12", &other, 2), ..join(1) };
        let actions = group.join(Ticket(7), differs, Instant::now());
        let [Action::Refuse { refusal, .. }] = actions.as_slice() else { panic!("{actions:?}") };
        assert_eq!(refusal.to_string(), why);
    }
}

#[test]
fn a_rank_that_joins_again_breaks_its_epoch_and_waits_for_the_next() {
    let now = Instant::now();
    let mut group = running(3, now);
    let broken = Action::Break { epoch: 1, reason: BreakReason::Restarted { rank: 1 } };
    assert_eq!(group.join(Ticket(10), join(1), now), [broken]);
    assert_eq!(group.join(Ticket(11), join(2), now), []);
    let superseded = Action::Refuse { ticket: Ticket(11), refusal: Refusal::Superseded { rank: 2 } };
    assert_eq!(group.join(Ticket(12), join(2), now), [superseded]);
    assert!(matches!(group.form(now).as_slice(), [Action::Start { epoch: 2, .. }]));
}

#[test]
fn a_silent_rank_breaks_the_epoch_and_a_dead_epoch_says_so() {
    let mut now = Instant::now();
    let mut group = running(3, now);
    let mut broken = None;
    for _ in 0..20 {
        now += TURN;
        assert_eq!(group.heartbeat(1, 1, beat(9), now), broken.is_none());
        broken = broken.or(group.tick(9, now));
    }
    let silent = Suspicion { rank: 2, symptom: Symptom::Silent, lasted: SUSPECT_AFTER, progress: 0 };
    let silent = BreakReason::Suspected(silent);
    assert_eq!(silent.to_string(), "rank 2 is silent for 1000 ms, after 0 collectives");
    assert_eq!(broken, Some(Action::Break { epoch: 1, reason: silent }));
    assert_eq!(group.lost(1, 1, now), None, "an epoch ends once");
}

/// Ranks 0 to 2 come to as many collectives, again and again, until one of them is found to hang.
fn hung(progress: [u64; 3]) -> Option<Action> {
    let mut now = Instant::now();
    let mut group = running(3, now);
    (0..20).find_map(|_| {
        now += TURN;
        (1..3).for_each(|rank| assert!(group.heartbeat(rank, 1, beat(progress[rank]), now)));
        group.tick(progress[0], now)
    })
}

#[test]
fn a_rank_that_keeps_the_others_waiting_breaks_the_epoch_the_leader_like_any_other() {
    for (progress, expected) in [([4, 4, 4], None), ([0, 0, 0], None), ([4, 4, 3], Some(2)), ([3, 4, 4], Some(0))] {
        let found = hung(progress).map(|action| match action {
            Action::Break { epoch: 1, reason: BreakReason::Suspected(suspicion) } => {
                assert_eq!(suspicion.symptom, Symptom::Hung);
                suspicion.rank
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(found, expected, "{progress:?}");
    }
}

#[test]
fn a_rank_that_never_asks_for_plans_breaks_the_epoch() {
    let mut now = Instant::now();
    let mut group = membership(2);
    group.form(now);
    group.join(Ticket(1), join(1), now);
    let broken = (0..100).find_map(|_| {
        now += TURN;
        group.heartbeat(1, 1, beat(0), now);
        group.tick(0, now)
    });
    assert_eq!(broken, Some(Action::Break { epoch: 1, reason: BreakReason::NotAttached { rank: 1 } }));
}

#[test]
fn a_rank_that_leaves_ends_the_epoch_once_nothing_runs() {
    let now = Instant::now();
    let mut group = running(3, now);
    assert_eq!(group.idle(now), None, "nobody leaves");
    let leaving = Beat { leaving: true, ..beat(1) };
    assert!(!group.heartbeat(2, 2, leaving, now), "an epoch that is not");
    assert!(!group.heartbeat(3, 1, leaving, now), "a rank that is not");
    assert_eq!(group.leaving(), None);
    assert!(group.heartbeat(2, 1, leaving, now));
    assert!(group.heartbeat(2, 1, beat(2), now), "a beat that was overtaken");
    assert_eq!((group.leaving(), group.phase()), (Some(2), &Phase::Running));
    let left = BreakReason::Left { rank: 2 };
    assert_eq!(left.to_string(), "rank 2 shuts down");
    assert_eq!(group.idle(now), Some(Action::Break { epoch: 1, reason: left }));
    assert_eq!((group.leaving(), group.idle(now)), (None, None), "an epoch ends once");
}

/// What the simulation knows of the group from its actions alone.
#[derive(Default)]
struct Observer {
    /// Requests that have had no answer.
    open: BTreeMap<Ticket, Join>,
    epoch: u64,
    alive: bool,
    running: bool,
    attached: BTreeSet<usize>,
    leaving: BTreeSet<usize>,
    epochs_run: u64,
}

impl Observer {
    fn observe(&mut self, group: &Membership, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Start { epoch, joiners } => {
                    assert!(!self.alive, "two epochs alive");
                    assert!(epoch > self.epoch, "an epoch's number used twice");
                    assert!(joiners.keys().copied().eq(1..group.world_size), "a rank is missing");
                    for (rank, joiner) in joiners {
                        let join = self.open.remove(&joiner.ticket).expect("a request answered twice");
                        assert_eq!((join.rank, join.contact), (rank, joiner.contact));
                        assert_eq!(join.attestation, attestation("ab12"), "a rank that differs let in");
                    }
                    (self.epoch, self.alive, self.running) = (epoch, true, false);
                    self.attached.clear();
                }
                Action::Refuse { ticket, .. } => {
                    self.open.remove(&ticket).expect("a request answered twice");
                }
                Action::Run { epoch } => {
                    assert!(self.alive && !self.running && epoch == self.epoch);
                    assert!(self.attached.iter().copied().eq(1..group.world_size), "running without a rank");
                    self.running = true;
                    self.epochs_run += 1;
                }
                Action::Break { epoch, .. } => {
                    assert!(self.alive && epoch == self.epoch, "an epoch broken twice");
                    (self.alive, self.running) = (false, false);
                    self.leaving.clear();
                }
            }
        }
        let waiting: Vec<_> = group.waiting.values().map(|joiner| joiner.ticket).collect();
        assert!(waiting.iter().all(|ticket| self.open.contains_key(ticket)), "an answered request still waits");
        assert_eq!(waiting.len(), self.open.len(), "a request forgotten");
        assert_eq!(self.alive, matches!(group.phase(), Phase::Attaching { .. } | Phase::Running));
        assert_eq!(self.running, *group.phase() == Phase::Running);
        assert_eq!(self.leaving.first().copied(), group.leaving());
    }
}

/// One random event.
fn step(group: &mut Membership, seen: &mut Observer, now: &mut Instant, ticket: u64, random: &mut ChaCha8Rng) {
    let rank = random.random_range(0..=group.world_size);
    // Mostly the newest epoch, sometimes one before or after it.
    let epoch = (group.epoch + 1).saturating_sub(*[1, 1, 1, 1, 0, 2].choose(random).unwrap());
    *now += Duration::from_millis(random.random_range(0..40));
    let actions = match random.random_range(0..100) {
        0..25 => {
            let digest = if random.random_ratio(1, 10) { "cd34" } else { "ab12" };
            // In an epoch, ranks seldom restart.
            if seen.alive && random.random_ratio(9, 10) {
                return;
            }
            let join = Join { attestation: attestation(digest), ..join(rank) };
            seen.open.insert(Ticket(ticket), join.clone());
            group.join(Ticket(ticket), join, *now)
        }
        25..28 => {
            if let Some(ticket) = seen.open.keys().copied().collect::<Vec<_>>().choose(random) {
                group.withdraw(*ticket);
                seen.open.remove(ticket);
            }
            Vec::new()
        }
        28..55 => {
            // Mostly a rank that has not attached, or a large group never would.
            let next = (1..group.world_size).find(|rank| !seen.attached.contains(rank));
            let rank = next.filter(|_| random.random_ratio(3, 4)).unwrap_or(rank);
            let actions = group.attach(rank, epoch);
            if actions.is_some() {
                assert!(seen.alive && epoch == seen.epoch && seen.attached.insert(rank), "attached wrongly");
            }
            actions.unwrap_or_default()
        }
        55..75 => {
            for rank in 0..=group.world_size {
                if random.random_ratio(1, 4) {
                    continue;
                }
                let leaving = random.random_ratio(1, 50);
                let alive = group.heartbeat(rank, epoch, Beat { progress: ticket, leaving }, *now);
                let is_follower = (1..group.world_size).contains(&rank);
                assert_eq!(alive, seen.alive && epoch == seen.epoch && is_follower);
                if alive && leaving {
                    seen.leaving.insert(rank);
                }
            }
            Vec::new()
        }
        75..88 => group.tick(random.random_range(0..ticket + 1), *now).into_iter().collect(),
        88..90 => {
            let ended = group.idle(*now);
            assert_eq!(ended.is_some(), !seen.leaving.is_empty());
            ended.into_iter().collect()
        }
        90..92 => group.lost(rank, epoch, *now).into_iter().collect(),
        92 => group.behind(rank, epoch, *now).into_iter().collect(),
        93 => group.end("the engine failed", *now),
        94 => {
            group.withdraw_leader();
            Vec::new()
        }
        _ if seen.alive && random.random_ratio(19, 20) => Vec::new(),
        _ => group.form(*now),
    };
    seen.observe(group, actions);
}

/// With ranks that behave, the group comes to run from whatever state it is in.
fn settle(group: &mut Membership, seen: &mut Observer, now: Instant, ticket: u64) {
    let actions = group.form(now);
    seen.observe(group, actions);
    let missing = if seen.alive { Vec::new() } else { group.missing() };
    for rank in missing {
        let ticket = Ticket(ticket + rank as u64);
        seen.open.insert(ticket, join(rank));
        let actions = group.join(ticket, join(rank), now);
        seen.observe(group, actions);
    }
    for rank in 1..group.world_size {
        seen.attached.insert(rank);
        let actions = group.attach(rank, group.epoch).expect("the epoch has begun");
        seen.observe(group, actions);
    }
    assert!(seen.running);
}

#[test]
fn no_order_of_events_breaks_the_rules() {
    let seed = match std::env::var("LOCKSTEP_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => RandomState::new().hash_one(0),
    };
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for world_size in [1, 2, 3, 4, 8] {
        let (mut group, mut seen, mut now) = (membership(world_size), Observer::default(), Instant::now());
        for event in 0..60_000 {
            step(&mut group, &mut seen, &mut now, event, &mut random);
        }
        assert!(seen.epochs_run > 20, "world size {world_size}: the simulation ran {} epochs only", seen.epochs_run);
        settle(&mut group, &mut seen, now, 1_000_000);
    }
}
