//! Stories and a seeded simulation of the router.

use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    affinity::{BLOCK_TOKENS, PrefixHasher},
    *,
};

const SETTINGS: RouterSettings = RouterSettings {
    affinity_slack_tokens: 100,
    breaker: BreakerSettings { failures: 3, pause: Duration::from_secs(1), max_pause: Duration::from_secs(8) },
};

fn status(outstanding_tokens: u64) -> Status {
    Status { ready: true, model: "m".into(), outstanding_tokens, epoch: 1, ..Status::default() }
}

fn router(loads: &[u64]) -> Router {
    let mut router = Router::new(SETTINGS, loads.len());
    for (group, &load) in router.groups().zip(loads) {
        router.report(group, status(load));
    }
    router
}

fn ask<'a>(prefix: &'a Prefix, tried: &'a [GroupId]) -> Ask<'a> {
    Ask { model: "m", prefix, cost: 10, tried }
}

fn chosen(router: &mut Router, prefix: &Prefix, tried: &[GroupId], now: Instant) -> Result<usize, NoGroup> {
    let lease = router.choose(&ask(prefix, tried), now)?;
    let group = lease.group().index();
    router.end(lease, Outcome::Worked, now);
    Ok(group)
}

#[test]
fn the_least_loaded_group_takes_the_request_and_equals_take_turns() {
    let (now, none) = (Instant::now(), Prefix::default());
    assert_eq!(chosen(&mut router(&[30, 20, 40]), &none, &[], now), Ok(1));
    let mut equal = router(&[0, 0, 0]);
    let turns: Vec<_> = (0..6).map(|_| chosen(&mut equal, &none, &[], now).unwrap()).collect();
    assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_prompt_goes_where_its_beginning_was_served_while_that_costs_little() {
    let now = Instant::now();
    let prefix = PrefixHasher::default().prefix("m", &[1; BLOCK_TOKENS]);
    let mut router = router(&[1, 0]);
    assert_eq!(chosen(&mut router, &prefix, &[], now), Ok(1));
    router.report(GroupId(1), status(101));
    assert_eq!(chosen(&mut router, &prefix, &[], now), Ok(1), "within the slack of 100");
    router.report(GroupId(1), status(102));
    assert_eq!(chosen(&mut router, &prefix, &[], now), Ok(0), "over the slack");
    assert_eq!(chosen(&mut router, &prefix, &[], now), Ok(0), "the beginning is now there");
}

#[test]
fn groups_that_refused_failed_drain_or_went_away_are_left_out() {
    let (now, none) = (Instant::now(), Prefix::default());
    let mut router = router(&[0, 0, 0, 0]);
    router.lost(GroupId(1));
    router.report(GroupId(2), Status { draining: true, ..status(0) });
    router.report(GroupId(3), Status { ready: false, ..status(0) });
    assert_eq!(chosen(&mut router, &none, &[], now), Ok(0));
    assert_eq!(chosen(&mut router, &none, &[GroupId(0)], now), Err(NoGroup::NoneReady));
    router.report(GroupId(1), status(0));
    assert_eq!(chosen(&mut router, &none, &[GroupId(0)], now), Ok(1));
}

#[test]
fn a_model_that_nobody_serves_is_unknown_and_one_whose_groups_are_lost_is_not() {
    let (now, none) = (Instant::now(), Prefix::default());
    let mut router = router(&[0]);
    router.lost(GroupId(0));
    assert_eq!(chosen(&mut router, &none, &[], now), Err(NoGroup::NoneReady));
    let other = Ask { model: "other", ..ask(&none, &[]) };
    assert_eq!(router.choose(&other, now).unwrap_err(), NoGroup::UnknownModel);
}

#[test]
fn models_are_described_by_what_all_their_groups_can_do() {
    let mut router = Router::new(SETTINGS, 3);
    router.report(GroupId(0), Status { context_length: 8_192, vocab_size: 10, ..status(0) });
    router.report(GroupId(1), Status { context_length: 4_096, vocab_size: 10, ready: false, ..status(0) });
    let models = router.models();
    let model = &models["m"];
    assert_eq!((model.context_length, model.replicas, model.ready_replicas), (4_096, 2, 1));
    assert_eq!(models.len(), 1);
}

/// What the simulation knows and the router must find out.
struct World {
    router: Router,
    rng: ChaCha8Rng,
    now: Instant,
    hasher: PrefixHasher,
    leases: Vec<(Lease, u64)>,
    watched: Vec<bool>,
    ready: Vec<bool>,
    requests: u32,
    retries: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let n_groups = rng.random_range(1..6);
        Self {
            router: Router::new(SETTINGS, n_groups),
            rng,
            now: Instant::now(),
            hasher: PrefixHasher::default(),
            leases: Vec::new(),
            watched: vec![false; n_groups],
            ready: vec![false; n_groups],
            requests: 0,
            retries: 0,
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.random_range(0..400));
        let group = GroupId(self.rng.random_range(0..self.watched.len()));
        match self.rng.next_u32() % 8 {
            0 => {
                let ready = self.rng.random_bool(0.8);
                let load = self.rng.random_range(0..1_000);
                let epoch = self.rng.random_range(0..3);
                self.router.report(group, Status { ready, epoch, ..status(load) });
                (self.watched[group.0], self.ready[group.0]) = (true, ready);
            }
            1 if self.rng.random_bool(0.3) => {
                self.router.lost(group);
                self.watched[group.0] = false;
            }
            2 => {
                self.retries += u32::from(self.router.may_retry());
            }
            3 | 4 if !self.leases.is_empty() => self.end_one(),
            _ => self.request(),
        }
        self.check();
    }

    fn request(&mut self) {
        self.router.arrived();
        self.requests += 1;
        let prompt = vec![self.rng.random_range(0..4); BLOCK_TOKENS * self.rng.random_range(0..3usize)];
        let prefix = self.hasher.prefix("m", &prompt);
        let tried: Vec<GroupId> = self.router.groups().filter(|_| self.rng.random_bool(0.1)).collect();
        let cost = self.rng.random_range(1..500);
        let ask = Ask { model: "m", prefix: &prefix, cost, tried: &tried };
        let loads: Vec<(GroupId, u64)> =
            self.open_groups(&tried).into_iter().map(|group| (group, self.router.load(group))).collect();
        let Some(least) = loads.iter().map(|&(_, load)| load).min() else {
            self.router.choose(&ask, self.now).expect_err("no group can take it");
            return;
        };
        let lease = self.router.choose(&ask, self.now).expect("some group can take it");
        let load = loads.iter().find(|(group, _)| *group == lease.group()).expect("only such a group is chosen").1;
        assert!(load <= least + SETTINGS.affinity_slack_tokens, "preference is bounded");
        self.leases.push((lease, cost));
    }

    /// Groups that may be chosen, from what the world knows and each breaker's own word.
    fn open_groups(&self, tried: &[GroupId]) -> Vec<GroupId> {
        let open = |group: &GroupId| {
            self.watched[group.0]
                && self.ready[group.0]
                && !tried.contains(group)
                && self.router.groups[group.0].breaker.check(self.now).is_some()
        };
        self.router.groups().filter(open).collect()
    }

    fn end_one(&mut self) {
        let (lease, _) = self.leases.swap_remove(self.rng.random_range(0..self.leases.len()));
        let outcome = match self.rng.next_u32() % 4 {
            0 | 1 => Outcome::Failed,
            2 => Outcome::Unknown,
            _ => Outcome::Worked,
        };
        self.router.end(lease, outcome, self.now);
    }

    fn check(&self) {
        for group in self.router.groups() {
            let mine = self.leases.iter().filter(|(lease, _)| lease.group() == group);
            assert_eq!(self.router.own_tokens(group), mine.clone().map(|(_, cost)| cost).sum::<u64>());
            let probes = mine.filter(|(lease, _)| lease.pass == Pass::Probe).count();
            assert!(probes <= 1, "group {group:?} has {probes} probes");
        }
        assert!(self.retries <= 20 + self.requests / 10, "retries keep to their budget");
    }

    /// When all is well again, every group takes work again.
    fn recover(&mut self) {
        while !self.leases.is_empty() {
            self.end_one();
        }
        self.now += SETTINGS.breaker.max_pause;
        for group in self.router.groups() {
            self.router.report(group, status(0));
            let others: Vec<GroupId> = self.router.groups().filter(|&other| other != group).collect();
            let taken = chosen(&mut self.router, &Prefix::default(), &others, self.now);
            assert_eq!(taken, Ok(group.index()));
        }
        self.check();
    }
}

#[test]
fn a_thousand_random_histories_keep_the_invariants() {
    let first = fastrand::u64(..u64::MAX - 1_000);
    for seed in first..first + 1_000 {
        println!("seed {seed}");
        let mut world = World::new(seed);
        (0..300).for_each(|_| world.step());
        world.recover();
    }
}
