use std::hash::{BuildHasher, RandomState};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const TURN: Duration = Duration::from_millis(200);

const LIMITS: Limits =
    Limits { suspect_after: Duration::from_secs(1), hung_after: Duration::from_millis(1_200), turn: TURN };

/// Asks after each of `turns`; ranks of `beating` are heard of before, with their progress.
fn run(
    detector: &mut FailureDetector,
    now: &mut Instant,
    turns: &[Duration],
    beating: &[(usize, u64)],
) -> Vec<Suspicion> {
    let mut suspicions = Vec::new();
    for turn in turns {
        *now += *turn;
        beating.iter().for_each(|&(rank, progress)| detector.heard(rank, progress, *now));
        suspicions.extend(detector.tick(*now));
    }
    suspicions
}

/// A detector that watches ranks 1 and 2.
fn watching() -> (FailureDetector, Instant) {
    let (mut detector, now) = (FailureDetector::new(LIMITS), Instant::now());
    detector.tick(now);
    detector.watch(1, now);
    detector.watch(2, now);
    (detector, now)
}

fn suspicion(rank: usize, symptom: Symptom, ms: u64, progress: u64) -> Suspicion {
    Suspicion { rank, symptom, lasted: Duration::from_millis(ms), progress }
}

#[test]
fn a_silent_rank_is_suspected_once_and_a_beating_one_never() {
    let (mut detector, mut now) = watching();
    let suspicions = run(&mut detector, &mut now, &[TURN; 50], &[(1, 0)]);
    assert_eq!(suspicions, [suspicion(2, Symptom::Silent, 1_000, 0)]);
}

#[test]
fn a_rank_that_keeps_others_waiting_is_suspected_once() {
    let (mut detector, mut now) = watching();
    let suspicions = run(&mut detector, &mut now, &[TURN; 50], &[(1, 8), (2, 7)]);
    assert_eq!(suspicions, [suspicion(2, Symptom::Hung, 1_200, 7)]);
    assert_eq!(suspicions[0].to_string(), "rank 2 hangs: the others wait for 1200 ms, after 7 collectives");
}

#[test]
fn ranks_that_are_equally_slow_are_not_suspected() {
    let (mut detector, mut now) = watching();
    assert_eq!(run(&mut detector, &mut now, &[TURN; 500], &[(1, 7), (2, 7)]), []);
    // Nor is the one that then comes later: its time begins when another is ahead.
    assert_eq!(run(&mut detector, &mut now, &[TURN; 6], &[(1, 8), (2, 7)]), []);
    assert_eq!(run(&mut detector, &mut now, &[TURN; 500], &[(1, 8), (2, 8)]), []);
}

#[test]
fn a_rank_that_is_behind_but_moves_is_not_suspected() {
    let (mut detector, mut now) = watching();
    for progress in 1..20 {
        assert_eq!(run(&mut detector, &mut now, &[TURN; 5], &[(1, progress + 1), (2, progress)]), []);
    }
}

#[test]
fn of_two_that_stand_still_the_one_behind_is_suspected() {
    let (mut detector, mut now) = watching();
    detector.watch(0, now);
    let suspicions = run(&mut detector, &mut now, &[TURN; 7], &[(0, 9), (1, 8), (2, 7)]);
    assert_eq!(suspicions, [suspicion(2, Symptom::Hung, 1_200, 7)]);
}

#[test]
fn a_silence_does_not_count_as_standing_still() {
    let limits = Limits { suspect_after: Duration::from_secs(60), ..LIMITS };
    let (mut detector, mut now) = (FailureDetector::new(limits), Instant::now());
    detector.watch(1, now);
    detector.watch(2, now);
    assert_eq!(run(&mut detector, &mut now, &[TURN], &[(1, 8), (2, 7)]), []);
    assert_eq!(run(&mut detector, &mut now, &[TURN; 20], &[(1, 8)]), []);
    assert_eq!(run(&mut detector, &mut now, &[TURN], &[(1, 8), (2, 8)]), [], "it had moved meanwhile");
}

#[test]
fn nobody_is_suspected_of_the_time_in_which_the_detector_stood_still() {
    let (mut detector, mut now) = watching();
    // Each of these turns counts as one of 200 ms.
    let stalled = [Duration::from_secs(60), TURN, Duration::from_secs(5), TURN];
    assert_eq!(run(&mut detector, &mut now, &stalled, &[(1, 0)]), []);
    assert_eq!(run(&mut detector, &mut now, &[TURN], &[(1, 0)]).len(), 1, "its silence in between adds up");
    let (mut detector, mut now) = watching();
    let behind = [(1, 8), (2, 7)];
    assert_eq!(run(&mut detector, &mut now, &[TURN], &behind), []);
    assert_eq!(run(&mut detector, &mut now, &stalled, &behind), []);
    assert_eq!(run(&mut detector, &mut now, &[TURN; 2], &behind).len(), 1, "so does its standstill");
}

#[test]
fn who_is_not_watched_is_not_suspected() {
    let (mut detector, mut now) = watching();
    detector.clear();
    detector.heard(1, 1, now);
    assert_eq!(run(&mut detector, &mut now, &[TURN; 20], &[]), []);
}

/// A rank that computes and meets the others, again and again.
#[derive(Clone, Default)]
struct Rank {
    progress: u64,
    /// Until when it computes, in milliseconds; `None`: it waits for the others.
    computes_until: Option<u64>,
    next_beat: u64,
    hung: bool,
}

/// Runs ranks whose shares of a layer take up to three seconds, and up to one second longer on one than on another.
/// One of them hangs at `hang_at`. Times in milliseconds; returns what is suspected, and when.
fn simulate(random: &mut ChaCha8Rng, n_ranks: usize, hang_at: u64, end: u64) -> Option<(usize, Suspicion, u64)> {
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    // Beats may be lost here as often as they like.
    let limits = Limits { suspect_after: Duration::from_secs(3_600), ..LIMITS };
    let mut detector = FailureDetector::new(limits);
    let mut ranks = vec![Rank::default(); n_ranks];
    (0..n_ranks).for_each(|rank| detector.watch(rank, start));
    let culprit = random.random_range(0..n_ranks);
    let (mut next_turn, mut layer) = (0, 100);
    for ms in 0..end {
        if ranks.iter().all(|rank| rank.computes_until.is_none()) {
            layer = if random.random_ratio(1, 10) { random.random_range(0..3_000) } else { random.random_range(0..50) };
        }
        let behind = ranks.iter().map(|rank| rank.progress).min().unwrap_or(0);
        for (index, rank) in ranks.iter_mut().enumerate() {
            rank.hung |= index == culprit && ms >= hang_at;
            match rank.computes_until {
                Some(until) if ms >= until && !rank.hung => {
                    rank.progress += 1;
                    rank.computes_until = None;
                }
                None if rank.progress == behind && !rank.hung => {
                    rank.computes_until = Some(ms + layer + random.random_range(0..1_000));
                }
                _ => {}
            }
            if ms >= rank.next_beat {
                rank.next_beat = ms + random.random_range(150..250);
                if index == 0 || random.random_ratio(4, 5) {
                    detector.heard(index, rank.progress, at(ms));
                }
            }
        }
        if ms >= next_turn {
            next_turn = ms + if random.random_ratio(1, 50) { random.random_range(0..2_000) } else { 200 };
            detector.heard(0, ranks[0].progress, at(ms));
            if let Some(suspicion) = detector.tick(at(ms)) {
                return Some((culprit, suspicion, ms));
            }
        }
    }
    None
}

#[test]
fn only_a_rank_that_hangs_is_suspected_however_long_layers_take() {
    let seed = match std::env::var("LOCKSTEP_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => RandomState::new().hash_one(0),
    };
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for n_ranks in [2, 3, 4, 8] {
        for _ in 0..20 {
            let hang_at = random.random_range(0..60_000);
            let found = simulate(&mut random, n_ranks, hang_at, 120_000);
            let (culprit, suspicion, ms) = found.expect("it hangs, and is not suspected");
            assert_eq!((suspicion.rank, suspicion.symptom), (culprit, Symptom::Hung));
            assert!(ms >= hang_at, "suspected {} ms before it hung", hang_at - ms);
        }
    }
}
