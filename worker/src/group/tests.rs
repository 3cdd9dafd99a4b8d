//! Leader and followers in one process, over real connections on loopback. A follower has a runtime of its own, so that
//! it can be killed, or frozen, as a process can.

use std::{
    iter,
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use lockstep_collectives::DeviceStream;
use lockstep_kernels::cuda::{Device, KernelCache};
use lockstep_proto::{client::ClientLimits, worker::v1::group_service_server::GroupServiceServer};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;

use super::*;
use crate::scheduler::plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan};

/// So long that what takes it has hung.
const LONG: Duration = Duration::from_secs(30);

/// In which time the leader must know of a rank's death.
const DEATH_KNOWN_AFTER: Duration = Duration::from_secs(2);

/// A leader that answers on loopback.
struct Leader {
    group: LeaderGroup,
    address: String,
    runtime: Runtime,
}

/// A follower with its runtime.
struct Follower {
    group: FollowerGroup,
    runtime: Runtime,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn attestation(digest: &str) -> Attestation {
    [("weights_digest", digest)].into_iter().collect()
}

fn config(world_size: usize, transport: Transport) -> GroupConfig {
    GroupConfig { world_size, transport, ..GroupConfig::default() }
}

/// The stream of an emulated GPU.
fn gpu(ordinal: usize) -> DeviceStream {
    static EMULATOR: OnceLock<()> = OnceLock::new();
    EMULATOR.get_or_init(|| lockstep_cuda_emulator::load_into_this_process().unwrap());
    Device::open(ordinal, KernelCache::new(None)).unwrap().collective_stream().unwrap()
}

/// For NCCL, every rank has a GPU of its own.
fn gpu_of(config: &GroupConfig) -> Option<DeviceStream> {
    (config.transport == Transport::Nccl).then(|| gpu(config.rank))
}

impl Leader {
    fn start(config: GroupConfig) -> Self {
        let stream = gpu_of(&config);
        Self::start_on(config, stream)
    }

    fn start_on(config: GroupConfig, stream: Option<DeviceStream>) -> Self {
        let runtime = runtime();
        let (group, rpc) = LeaderGroup::new(config, attestation("ab12"), stream, runtime.handle()).unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder().add_service(GroupServiceServer::new(rpc));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { group, address, runtime }
    }

    fn follower(&self, rank: usize, config: GroupConfig) -> Follower {
        self.follower_with(rank, config, "ab12")
    }

    fn follower_with(&self, rank: usize, config: GroupConfig, digest: &str) -> Follower {
        let stream = gpu_of(&GroupConfig { rank, ..config.clone() });
        self.follower_on(rank, config, digest, stream)
    }

    fn follower_on(&self, rank: usize, config: GroupConfig, digest: &str, stream: Option<DeviceStream>) -> Follower {
        let runtime = runtime();
        let config = GroupConfig { rank, leader: Some(self.address.clone()), ..config };
        let group = FollowerGroup::new(config, attestation(digest), stream, &ClientLimits::default(), runtime.handle());
        Follower { group: group.unwrap(), runtime }
    }

    /// Forms an epoch with `followers`, the ranks from 1.
    fn form(&mut self, followers: &mut [Follower]) -> Vec<Epoch> {
        thread::scope(|scope| {
            let joining: Vec<_> = followers.iter_mut().map(|f| scope.spawn(|| f.group.join().unwrap())).collect();
            let mut epochs = vec![self.group.form().unwrap()];
            epochs.extend(joining.into_iter().map(|epoch| epoch.join().unwrap()));
            epochs
        })
    }
}

impl Follower {
    /// As a process that is killed: its connections end, without a word.
    fn kill(self) {
        self.runtime.shutdown_background();
    }

    /// As a host that vanishes: its connections stay and nothing comes through them, until the result is dropped.
    fn freeze(&self) -> mpsc::Sender<()> {
        let (frozen, is_frozen) = mpsc::channel();
        let (thaw, thawed) = mpsc::channel::<()>();
        self.runtime.spawn(async move {
            frozen.send(()).unwrap();
            let _dropped = thawed.recv();
        });
        is_frozen.recv().unwrap();
        thaw
    }
}

fn plan(step_id: u64, n_rows: usize) -> StepPlan {
    let sequence = SequenceStep {
        id: SeqId(step_id + 100),
        start_position: 0,
        token_ids: (0..n_rows as u32).collect(),
        new_blocks: vec![BlockId(step_id as u32)],
        results: RowResults::LastLogits,
    };
    StepPlan { step_id, released: vec![SeqId(step_id)], sequences: vec![sequence], chooses: false }
}

/// Waits until `group` knows that its epoch has ended, and returns why.
fn why_ended(mut is_broken: impl FnMut() -> Option<GroupError>, limit: Duration) -> String {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(error) = is_broken() {
            return error.to_string();
        }
        assert!(Instant::now() < deadline, "the epoch has not ended within {limit:?}");
        thread::yield_now();
    }
}

#[test]
fn all_ranks_meet_and_get_every_plan_in_order() {
    for transport in [Transport::Shm, Transport::Tcp, Transport::Nccl] {
        let config = config(3, transport);
        let mut leader = Leader::start(config.clone());
        let mut followers = [1, 2].map(|rank| leader.follower(rank, config.clone()));
        let mut epochs = leader.form(&mut followers);
        assert_eq!(epochs.iter().map(|epoch| epoch.number).collect::<Vec<_>>(), [1, 1, 1]);
        thread::scope(|scope| {
            for epoch in &mut epochs {
                scope.spawn(|| epoch.collective.barrier().unwrap());
            }
        });
        // No more than fit the queues, so that the leader needs not wait.
        for step_id in 0..PLAN_QUEUE as u64 {
            leader.group.send_plan(&plan(step_id, 3), Vec::new()).unwrap();
        }
        for Follower { group, .. } in &mut followers {
            for step_id in 0..PLAN_QUEUE as u64 {
                assert_eq!(group.next_plan().unwrap(), plan(step_id, 3));
            }
        }
        assert_eq!(leader.group.is_broken(), None);
    }
}

#[test]
fn a_killed_follower_ends_the_epoch_at_once_and_the_next_forms_when_it_returns() {
    for transport in [Transport::Shm, Transport::Tcp, Transport::Nccl] {
        let config = config(3, transport);
        let mut leader = Leader::start(config.clone());
        let mut followers = vec![leader.follower(1, config.clone()), leader.follower(2, config.clone())];
        let mut epochs = leader.form(&mut followers);
        // The others wait in a step that rank 2 will never take part in; its end of the collective stays open, so
        // that it is the failure detector that ends their wait.
        let (first, rest) = epochs.split_at_mut(1);
        let results = thread::scope(|scope| {
            let waiting =
                [&mut first[0], &mut rest[0]].map(|epoch| scope.spawn(|| epoch.collective.barrier().unwrap_err()));
            followers.pop().unwrap().kill();
            let reason = why_ended(|| leader.group.is_broken(), DEATH_KNOWN_AFTER);
            assert_eq!(reason, "epoch 1 has ended: rank 2 is gone");
            waiting.map(|rank| rank.join().unwrap())
        });
        for error in results {
            let died = matches!(error, CollectiveError::Aborted | CollectiveError::PeerGone { .. });
            assert!(died, "{error}");
        }
        drop(epochs);
        assert!(leader.group.send_plan(&plan(0, 1), Vec::new()).is_err());
        assert_eq!(followers[0].group.next_plan().unwrap_err().to_string(), "epoch 1 has ended: rank 2 is gone");
        followers.push(leader.follower(2, config));
        let epochs = leader.form(&mut followers);
        assert_eq!(epochs.iter().map(|epoch| epoch.number).collect::<Vec<_>>(), [2, 2, 2]);
    }
}

/// Ranks on the given GPUs that leave the transport open meet over NCCL, or through host memory.
fn check_auto(gpus: [Option<usize>; 3], over_nccl: bool) {
    let config = config(3, Transport::Auto);
    let [first, rest @ ..] = gpus.map(|ordinal| ordinal.map(gpu));
    let mut leader = Leader::start_on(config.clone(), first);
    let mut rank = 0;
    let mut followers = rest.map(|stream| {
        rank += 1;
        leader.follower_on(rank, config.clone(), "ab12", stream)
    });
    let mut epochs = leader.form(&mut followers);
    thread::scope(|scope| {
        for epoch in &mut epochs {
            scope.spawn(|| {
                epoch.collective.barrier().unwrap();
                assert_eq!(epoch.collective.device().is_some(), over_nccl, "{gpus:?}");
            });
        }
    });
}

#[test]
fn ranks_meet_over_nccl_if_each_has_a_gpu_of_its_own() {
    check_auto([Some(0), Some(1), Some(2)], true);
    check_auto([Some(0), Some(1), Some(0)], false);
    check_auto([Some(0), None, Some(2)], false);
    check_auto([None; 3], false);
}

#[test]
fn nccl_needs_a_gpu_and_a_leader_that_uses_it() {
    let error =
        LeaderGroup::new(config(2, Transport::Nccl), attestation("ab12"), None, runtime().handle()).unwrap_err();
    assert_eq!(error.to_string(), "cannot set up the nccl transport: this rank does not compute on a GPU");
    let mut leader = Leader::start(config(2, Transport::Shm));
    let mut follower = leader.follower(1, config(2, Transport::Nccl));
    thread::scope(|scope| {
        // It leaves then, or the leader would wait for it until the ranks had to have met.
        let joining = scope.spawn(move || follower.group.join().unwrap_err().to_string());
        leader.group.form().unwrap_err();
        let error = joining.join().unwrap();
        assert!(error.ends_with("the leader uses another transport: group.transport must be equal"), "{error}");
    });
}

#[test]
fn a_follower_that_falls_silent_ends_the_epoch() {
    let config = config(2, Transport::Shm);
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let _epochs = leader.form(&mut followers);
    let thaw = followers[0].freeze();
    let reason = why_ended(|| leader.group.is_broken(), LONG);
    assert!(reason.starts_with("epoch 1 has ended: rank 1 is silent for "), "{reason}");
    drop(thaw);
    assert_eq!(followers[0].group.next_plan().unwrap_err().to_string(), reason, "it is told when it returns");
}

#[test]
fn a_leader_that_is_gone_or_silent_ends_the_epoch_of_its_followers() {
    let config = config(2, Transport::Shm);
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let mut epochs = leader.form(&mut followers);
    leader.runtime.shutdown_background();
    let error = followers[0].group.next_plan().unwrap_err().to_string();
    assert!(error.starts_with("epoch 1 has ended: the connection to the leader has ended"), "{error}");
    // The leader's end of the collective is still there.
    assert_eq!(epochs[1].collective.barrier(), Err(CollectiveError::Aborted));
}

/// The engine of rank `hung` of two does not come to a collective in which the other waits; both ranks' runtimes live.
fn check_hung(transport: Transport, hung: usize) {
    let config = config(2, transport);
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let mut epochs = leader.form(&mut followers);
    let waiting = &mut epochs[1 - hung].collective;
    thread::scope(|scope| {
        let waited = scope.spawn(|| waiting.barrier().unwrap_err());
        let reason = why_ended(|| leader.group.is_broken(), LONG);
        let expected = format!("epoch 1 has ended: rank {hung} hangs: the others wait for ");
        assert!(reason.starts_with(&expected) && reason.ends_with(" ms, after 0 collectives"), "{reason}");
        assert_eq!(followers[0].group.next_plan().unwrap_err().to_string(), reason);
        let error = waited.join().unwrap();
        assert!(matches!(error, CollectiveError::Aborted | CollectiveError::PeerGone { .. }), "{error}");
    });
    assert_eq!(leader.group.hung().is_cancelled(), hung == 0, "a leader that hangs knows it");
}

#[test]
fn a_rank_whose_engine_hangs_ends_the_epoch_although_it_beats() {
    for transport in [Transport::Shm, Transport::Tcp, Transport::Nccl] {
        check_hung(transport, 1);
        check_hung(transport, 0);
    }
}

#[test]
fn a_follower_whose_engine_never_leaves_an_ended_epoch_knows_that_it_hangs() {
    let config = GroupConfig { collective_timeout_ms: 500, ..config(2, Transport::Shm) };
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    // One that leaves in time does not.
    drop(leader.form(&mut followers));
    leader.group.give_up("out of memory");
    let _epochs = leader.form(&mut followers);
    let hung = followers[0].group.hung();
    leader.group.give_up("out of memory");
    assert!(!hung.is_cancelled());
    let deadline = Instant::now() + LONG;
    while !hung.is_cancelled() {
        assert!(Instant::now() < deadline, "it does not know");
        thread::yield_now();
    }
}

#[test]
fn a_follower_that_restarts_ends_the_epoch_that_it_was_in() {
    let config = config(2, Transport::Tcp);
    let mut leader = Leader::start(config.clone());
    let mut before = [leader.follower(1, config.clone())];
    let epochs = leader.form(&mut before);
    let thaw = before[0].freeze();
    let mut after = leader.follower(1, config);
    let next = thread::scope(|scope| {
        let joining = scope.spawn(|| after.group.join().unwrap());
        assert_eq!(why_ended(|| leader.group.is_broken(), LONG), "epoch 1 has ended: rank 1 has restarted");
        drop(epochs);
        [leader.group.form().unwrap(), joining.join().unwrap()]
    });
    assert_eq!(next.map(|epoch| epoch.number), [2, 2]);
    drop(thaw);
}

#[test]
fn a_follower_that_differs_is_refused_with_both_values() {
    let config = config(2, Transport::Shm);
    let leader = Leader::start(config.clone());
    let refused = |rank, digest| {
        let config = GroupConfig { world_size: rank + 1, ..config.clone() };
        leader.follower_with(rank, config, digest).group.join().unwrap_err().to_string()
    };
    let differs = "refused by the leader: rank 1 differs in weights_digest: leader ab12, rank 1 cd34";
    assert_eq!(refused(1, "cd34"), differs);
    assert_eq!(refused(2, "ab12"), "refused by the leader: rank 2 is no follower in a group of 2 ranks");
}

#[test]
fn whoever_is_missing_is_named_and_may_come_later() {
    let patient = config(3, Transport::Shm);
    let hasty = GroupConfig { join_timeout_ms: 20, ..patient.clone() };
    let mut leader = Leader::start(hasty.clone());
    assert_eq!(leader.group.form().unwrap_err(), GroupError::Missing { ranks: vec![1, 2], waited_ms: 20 });
    let error = leader.follower(1, hasty).group.join().unwrap_err();
    assert!(matches!(error, GroupError::NotJoined { .. }), "{error}");
    let mut followers = [1, 2].map(|rank| leader.follower(rank, patient.clone()));
    thread::scope(|scope| {
        let joining = followers.each_mut().map(|follower| scope.spawn(|| follower.group.join().unwrap().number));
        let formed = iter::repeat_with(|| leader.group.form()).find(|formed| {
            let still_missing = matches!(formed, Err(GroupError::Missing { .. }));
            !still_missing
        });
        assert_eq!(formed.unwrap().unwrap().number, 1);
        assert_eq!(joining.map(|follower| follower.join().unwrap()), [1, 1]);
    });
}

#[test]
fn a_follower_that_does_not_take_its_plans_ends_the_epoch() {
    let config = config(2, Transport::Shm);
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let _epochs = leader.form(&mut followers);
    // Far more than the connection buffers.
    let ended = (0..100_000).find_map(|step_id| leader.group.send_plan(&plan(step_id, 1_000), Vec::new()).err());
    assert_eq!(ended.unwrap().to_string(), "epoch 1 has ended: rank 1 does not take its plans");
}

#[test]
fn a_follower_that_leaves_says_so_at_once_and_follows_to_the_end() {
    // So seldom that only a beat out of turn comes within this test.
    let config = config(2, Transport::Shm);
    let config = GroupConfig { heartbeat_interval_ms: 120_000, suspect_after_ms: 240_000, ..config };
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let _epochs = leader.form(&mut followers);
    let Follower { group, .. } = &mut followers[0];
    leader.group.idle();
    assert_eq!((leader.group.leaving(), leader.group.is_broken()), (None, None));
    group.leave_handle().stop();
    let deadline = Instant::now() + LONG;
    while leader.group.leaving() != Some(1) {
        assert!(Instant::now() < deadline, "the leader was not told");
        thread::yield_now();
    }
    // What runs goes on.
    leader.group.send_plan(&plan(0, 3), Vec::new()).unwrap();
    assert_eq!(group.next_plan().unwrap(), plan(0, 3));
    leader.group.idle();
    assert_eq!(leader.group.is_broken().unwrap().to_string(), "epoch 1 has ended: rank 1 shuts down");
    assert_eq!(group.next_plan().unwrap_err(), GroupError::Stopped);
    assert_eq!(group.join().unwrap_err(), GroupError::Stopped);
}

#[test]
fn an_engine_that_fails_tells_the_others_why() {
    let config = config(2, Transport::Shm);
    let mut leader = Leader::start(config.clone());
    let mut followers = [leader.follower(1, config)];
    let _epochs = leader.form(&mut followers);
    leader.group.give_up("out of memory");
    assert_eq!(followers[0].group.next_plan().unwrap_err().to_string(), "epoch 1 has ended: out of memory");
}

#[test]
fn a_stop_ends_every_wait() {
    let config = config(3, Transport::Shm);
    let mut leader = Leader::start(config.clone());
    let mut follower = leader.follower(1, config);
    let stops = [leader.group.stop_handle(), follower.group.stop_handle()];
    thread::scope(|scope| {
        let forming = scope.spawn(|| leader.group.form().unwrap_err());
        let joining = scope.spawn(|| follower.group.join().unwrap_err());
        stops.iter().for_each(StopHandle::stop);
        assert_eq!(forming.join().unwrap(), GroupError::Stopped);
        assert_eq!(joining.join().unwrap(), GroupError::Stopped);
    });
    assert_eq!(leader.group.form().unwrap_err(), GroupError::Stopped);
    assert_eq!(follower.group.next_plan().unwrap_err(), GroupError::Stopped);
}

#[test]
fn a_leader_alone_needs_nobody() {
    let mut leader = Leader::start(config(1, Transport::Tcp));
    for number in 1..3 {
        let mut epoch = leader.group.form().unwrap();
        assert_eq!(epoch.number, number);
        epoch.collective.barrier().unwrap();
        leader.group.send_plan(&plan(0, 1), Vec::new()).unwrap();
        assert_eq!(leader.group.is_broken(), None);
    }
}
