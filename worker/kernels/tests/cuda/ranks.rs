//! Graphs that hold calls of a group. The ranks are threads, each with a GPU of the emulator.

use std::{
    ops::Range,
    path::Path,
    sync::{Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use lockstep_collectives::{
    AbortHandle, Awaited, Captured, Collective, CollectiveError, Endpoint, Member, Op, Progress, nccl,
};
use lockstep_cuda_emulator as emulator;
use lockstep_kernels::cuda::{Arg, Buffer, CudaError, Device, Graph, Kernel, KernelCache};

use crate::{PATIENCE, program, wait_for};

/// Why a step of these tests fails.
#[derive(Debug)]
enum StepError {
    Collective(CollectiveError),
    #[allow(dead_code, reason = "for the message of a panic")]
    Cuda(CudaError),
}

impl From<CollectiveError> for StepError {
    fn from(error: CollectiveError) -> Self {
        Self::Collective(error)
    }
}

impl From<CudaError> for StepError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(error)
    }
}

/// One rank's device, and what its steps work on.
struct Rank {
    device: Device,
    axpy: Kernel,
    /// Of each rank, in `all`.
    lengths: Vec<usize>,
    all: Buffer<f32>,
    mine: Buffer<f32>,
    /// On the last rank: where `mine` of all ranks come together.
    gathered: Option<Buffer<f32>>,
    ids: Buffer<u32>,
    sums: Buffer<f32>,
}

/// Calls of a step.
const N_CALLS: u64 = 5;

/// Values of `mine` on each rank, and in `sums`.
const LEN: usize = 4;

impl Rank {
    fn new(rank: usize, world_size: usize, cache: &Path) -> Self {
        emulator::load_into_this_process().unwrap();
        let device = Device::open(rank, KernelCache::new(Some(cache.to_owned()))).unwrap();
        // Unequal, so that it is no all-gather of NCCL's own, and none of one rank.
        let lengths: Vec<usize> = (0..world_size).map(|rank| 3 * rank % 5).collect();
        Self {
            axpy: device.kernel(&program(), "axpy").unwrap(),
            all: device.zeros(lengths.iter().sum()).unwrap(),
            mine: device.zeros(LEN).unwrap(),
            gathered: (rank + 1 == world_size).then(|| device.zeros(LEN * world_size).unwrap()),
            ids: device.zeros(3).unwrap(),
            sums: device.upload_new(&[1.0 + rank as f32; LEN]).unwrap(),
            lengths,
            device,
        }
    }

    /// `mine += 3 sums`, `all` and the last rank's `gathered` from all, rank 0's `ids` to all, and two sums over all ranks.
    fn step(&mut self, end: &mut Endpoint) -> Result<(), StepError> {
        let world_size = end.world_size();
        let (my_part, n_all) = (part(&self.lengths, end.rank()), self.all.len());
        let args = [Arg::F32(1.0), Arg::Ptr(self.sums.pointer()), Arg::Ptr(self.mine.pointer()), Arg::U32(LEN as u32)];
        // SAFETY: these are the parameters of `axpy`, and both buffers have so many values.
        unsafe { self.axpy.launch([1, 1, 1], 32, 0, &args)? };
        let args = [
            Arg::F32(1.0),
            Arg::Ptr(self.sums.pointer()),
            Arg::Ptr(self.all.at(my_part.start, my_part.len())?),
            Arg::U32(my_part.len() as u32),
        ];
        // SAFETY: as above, for no rank has more than `LEN`.
        unsafe { self.axpy.launch([1, 1, 1], 32, 0, &args)? };
        let mut group = end.device().expect("a device collective");
        group.all_gather(&self.lengths, self.all.collective_slice_mut(0..n_all)?)?;
        let out = self.gathered.as_mut().map(|out| out.collective_slice_mut(0..LEN * world_size)).transpose()?;
        group.gather(world_size - 1, self.mine.collective_slice(0..LEN)?, &vec![LEN; world_size], out)?;
        group.broadcast(0, self.ids.collective_slice_mut(1..3)?)?;
        // Two in a row, whose order and number show.
        group.all_reduce(self.sums.collective_slice_mut(0..LEN)?)?;
        group.all_reduce(self.sums.collective_slice_mut(1..2)?)?;
        Ok(())
    }

    fn capture(&mut self, end: &mut Endpoint) -> Result<(Graph, Captured), StepError> {
        end.device().unwrap().begin_capture();
        let device = self.device.clone();
        let graph = device.capture(|| self.step(end))?;
        Ok((graph, end.device().unwrap().end_capture()))
    }

    fn values<T: bytemuck::Pod>(&self, buffer: &Buffer<T>) -> Vec<T> {
        let mut values = vec![T::zeroed(); buffer.len()];
        self.device.download(buffer, 0..buffer.len(), &mut values).unwrap();
        values
    }
}

fn part(lengths: &[usize], rank: usize) -> Range<usize> {
    let start = lengths[..rank].iter().sum();
    start..start + lengths[rank]
}

/// What [`Rank::step`] does, on all ranks.
struct Expected {
    world_size: usize,
    sums: Vec<[f32; 2]>,
    mine: Vec<f32>,
    all: Vec<f32>,
}

impl Expected {
    fn new(world_size: usize) -> Self {
        let sums = (0..world_size).map(|rank| [1.0 + rank as f32; 2]).collect();
        Self { world_size, sums, mine: vec![0.0; world_size], all: vec![0.0; world_size] }
    }

    fn step(&mut self) {
        for rank in 0..self.world_size {
            self.mine[rank] += 3.0 * self.sums[rank][0];
            self.all[rank] += 3.0 * self.sums[rank][0];
        }
        let total: f32 = self.sums.iter().map(|sums| sums[0]).sum();
        let second: f32 = self.sums.iter().map(|sums| sums[1]).sum();
        self.sums = vec![[total, second * self.world_size as f32]; self.world_size];
    }

    /// `all`'s first value of each rank stands for the rest but where `sums` differ.
    fn check(&self, rank: &Rank, idx: usize, ids: &[u32]) {
        let [first, second] = self.sums[idx];
        assert_eq!(rank.values(&rank.sums), [first, second, first, first]);
        assert_eq!(rank.values(&rank.mine)[0], self.mine[idx]);
        let all = rank.values(&rank.all);
        for peer in 0..self.world_size {
            let part = part(&rank.lengths, peer);
            assert!(part.is_empty() || all[part.start] == self.all[peer], "{all:?} of {:?}", self.all);
        }
        if let Some(gathered) = &rank.gathered {
            let firsts: Vec<f32> = rank.values(gathered).chunks_exact(LEN).map(|mine| mine[0]).collect();
            assert_eq!(firsts, self.mine);
        }
        assert_eq!(rank.values(&rank.ids), ids);
    }
}

/// Runs `act` on every rank of a group of an epoch.
fn on_all_ranks(ranks: &mut [Rank], members: Vec<Member>, act: impl Fn(&mut Rank, Endpoint) + Sync) {
    let id = nccl::UniqueId::new().unwrap();
    let deadline = Instant::now() + PATIENCE;
    thread::scope(|scope| {
        for (rank, member) in ranks.iter_mut().zip(members) {
            let act = &act;
            scope.spawn(move || {
                let stream = rank.device.collective_stream().unwrap();
                act(rank, nccl::connect(&id, stream, member, deadline).unwrap());
            });
        }
    });
}

fn members(world_size: usize, timeout: Duration) -> Vec<Member> {
    (0..world_size).map(|rank| Member { rank, world_size, timeout, ..Member::default() }).collect()
}

fn ranks(world_size: usize) -> Vec<Rank> {
    let cache = tempfile::tempdir().unwrap();
    (0..world_size).map(|rank| Rank::new(rank, world_size, cache.path())).collect()
}

fn launch(end: &mut Endpoint, (graph, captured): &mut (Graph, Captured)) -> Result<(), CollectiveError> {
    // SAFETY: the rank's buffers are still there.
    end.device().unwrap().launch(captured, || unsafe { graph.launch() }.map_err(|error| error.to_string()))
}

/// One step outside of a graph, then one that is captured and launched: the calls are connected and go round.
fn check_that_graphs_work(rank: &mut Rank, end: &mut Endpoint) -> (Graph, Captured) {
    rank.step(end).unwrap();
    let mut recorded = rank.capture(end).unwrap();
    launch(end, &mut recorded).unwrap();
    end.device().unwrap().wait().unwrap();
    recorded
}

#[test]
fn a_graph_makes_its_calls_at_each_launch_and_mixes_with_others() {
    for world_size in [2, 3] {
        let members = members(world_size, PATIENCE);
        let progress: Vec<Progress> = members.iter().map(|member| member.progress.clone()).collect();
        on_all_ranks(&mut ranks(world_size), members, |rank, mut end| {
            let idx = end.rank();
            let mut expected = Expected::new(world_size);
            rank.device.upload(&mut rank.ids, 0, &[90 + idx as u32, 7 + idx as u32, 8]).unwrap();
            rank.step(&mut end).unwrap();
            expected.step();
            let mut recorded = rank.capture(&mut end).unwrap();
            assert_eq!(recorded.1.n_calls(), N_CALLS);
            end.device().unwrap().wait().unwrap();
            // To capture does nothing.
            expected.check(rank, idx, &[90 + idx as u32, 7, 8]);
            if idx == 0 {
                rank.device.upload(&mut rank.ids, 1, &[5, 6]).unwrap();
            }
            let mut n_made = 2 * N_CALLS;
            for launches in [1, 3, 0, 2] {
                for _ in 0..launches {
                    launch(&mut end, &mut recorded).unwrap();
                    expected.step();
                }
                // Nobody has waited for the graph.
                rank.step(&mut end).unwrap();
                expected.step();
                n_made += (launches + 1) * N_CALLS;
            }
            // Compares the calls' numbers with the others'.
            end.barrier().unwrap();
            expected.check(rank, idx, &[90 + idx as u32, 5, 6]);
            assert_eq!(progress[idx].calls(), n_made + 1);
        });
    }
}

/// Has the last rank of a group not launch what the others launch, and ends their wait in one of two ways. After that,
/// graphs of the next epoch work.
fn check_an_end(world_size: usize, timeout: Duration, aborts: bool, check: impl Fn(&CollectiveError) + Sync) {
    let mut ranks = ranks(world_size);
    let started = Instant::now();
    for epoch in 0..3 {
        let handles: Vec<AbortHandle> = (0..world_size).map(|_| AbortHandle::new()).collect();
        let launched = Barrier::new(world_size);
        let members = members(world_size, timeout).into_iter().zip(&handles);
        let members = members.map(|(member, abort)| Member { epoch, abort: abort.clone(), ..member }).collect();
        on_all_ranks(&mut ranks, members, |rank, mut end| {
            let mut recorded = check_that_graphs_work(rank, &mut end);
            if end.rank() + 1 == world_size {
                launched.wait();
                handles.iter().filter(|_| aborts).for_each(AbortHandle::abort);
                return;
            }
            launch(&mut end, &mut recorded).unwrap();
            launched.wait();
            let error = end.device().unwrap().wait().unwrap_err();
            check(&error);
            // The call that failed has freed the stream.
            let event = rank.device.event().unwrap();
            event.record().unwrap();
            wait_for(&event);
            let again = end.device().unwrap().launch(&recorded.1, || panic!("it is launched after an error"));
            assert_eq!(again, Err(error));
            if epoch % 2 == 0 {
                drop(recorded);
                drop(end);
            } else {
                drop(end);
                drop(recorded);
            }
        });
    }
    // NCCL waits for graphs without an end, which must not be waited for: 5 s and more, each time.
    assert!(started.elapsed() < Duration::from_secs(10), "an epoch waits for the end of its graphs");
}

#[test]
fn an_abort_ends_the_wait_for_a_graph_and_the_next_epoch_has_its_own() {
    for world_size in [2, 3] {
        check_an_end(world_size, PATIENCE, true, |error| assert_eq!(*error, CollectiveError::Aborted));
    }
}

#[test]
fn the_deadline_ends_the_wait_for_a_graph_and_names_its_last_call() {
    for world_size in [2, 3] {
        check_an_end(world_size, Duration::from_millis(300), false, |error| {
            let CollectiveError::NotDone { awaited: Awaited::Device { newest: Some(call) }, timeout_ms: 300 } = error
            else {
                panic!("{error:?}");
            };
            // One step outside, one captured, two launches.
            assert_eq!((call.index, call.op, call.part_bytes), (4 * N_CALLS - 1, Op::AllReduce, 4));
        });
    }
}

#[test]
fn a_graph_of_another_epoch_is_refused() {
    let mut ranks = ranks(1);
    let kept = Mutex::new(None);
    on_all_ranks(&mut ranks, members(1, PATIENCE), |rank, mut end| {
        *kept.lock().unwrap() = Some(check_that_graphs_work(rank, &mut end));
    });
    on_all_ranks(&mut ranks, members(1, PATIENCE), |_, mut end| {
        let (_graph, captured) = kept.lock().unwrap().take().unwrap();
        let launching = std::panic::AssertUnwindSafe(|| end.device().unwrap().launch(&captured, || Ok(())));
        let panic = std::panic::catch_unwind(launching).unwrap_err();
        assert!(panic.downcast_ref::<&str>().is_some_and(|why| why.contains("a graph of this epoch")));
    });
}

#[test]
fn a_capture_that_an_abort_interrupts_leaves_the_device_usable() {
    let mut ranks = ranks(2);
    let aborted = members(2, PATIENCE);
    let handles: Vec<AbortHandle> = aborted.iter().map(|member| member.abort.clone()).collect();
    on_all_ranks(&mut ranks, aborted, |rank, mut end| {
        rank.step(&mut end).unwrap();
        end.device().unwrap().wait().unwrap();
        handles[end.rank()].abort();
        let error = rank.capture(&mut end).unwrap_err();
        assert!(matches!(error, StepError::Collective(CollectiveError::Aborted)), "{error:?}");
    });
    on_all_ranks(&mut ranks, members(2, PATIENCE), |rank, mut end| {
        check_that_graphs_work(rank, &mut end);
    });
}
