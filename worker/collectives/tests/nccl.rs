//! What the NCCL transport does beyond the others: calls between devices, which return before they are done, and ends
//! that NCCL does not see. Over the emulator's fake of NCCL; the ranks are threads, each with a GPU.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use lockstep_collectives::{AbortHandle, Awaited, Collective, CollectiveError, Endpoint, Member, Op, Progress, nccl};

#[path = "emulated/gpu.rs"]
mod gpu;

use gpu::{Gpu, MEET};

/// So long that a wait which is not ended by what a test does shows as an error of its own.
const LONG: Duration = Duration::from_secs(60);

const SHORT: Duration = Duration::from_millis(30);

fn member(rank: usize, world_size: usize, timeout: Duration) -> Member {
    Member { epoch: 1, rank, world_size, timeout, ..Member::default() }
}

fn connect(gpus: &[Gpu], timeout: Duration) -> Vec<Endpoint> {
    let members = (0..gpus.len()).map(|rank| member(rank, gpus.len(), timeout));
    gpu::connect(gpus, members).into_iter().map(Result::unwrap).collect()
}

/// Runs `act` on every rank of a new group, each in a thread of its own.
fn on_all_ranks<T: Send>(world_size: usize, act: impl Fn(&Gpu, &mut Endpoint) -> T + Sync) -> Vec<T> {
    let gpus = gpu::gpus(world_size);
    let ends = connect(&gpus, LONG);
    thread::scope(|scope| {
        let act = &act;
        let ranks: Vec<_> =
            gpus.iter().zip(ends).map(|(gpu, mut end)| scope.spawn(move || act(gpu, &mut end))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The floats that `rank` gives.
fn floats(rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|i| (rank * 1_000 + i) as f32).collect()
}

fn floats_of_all(lengths: &[usize]) -> Vec<f32> {
    lengths.iter().enumerate().flat_map(|(rank, &length)| floats(rank, length)).collect()
}

/// What `rank` has before an all-gather: its own, and nothing of the others'.
fn own_among_all(lengths: &[usize], rank: usize) -> Vec<f32> {
    let of =
        |(peer, &length): (usize, &usize)| if peer == rank { floats(rank, length) } else { vec![f32::NAN; length] };
    lengths.iter().enumerate().flat_map(of).collect()
}

#[test]
fn devices_exchange_what_hosts_would() {
    for world_size in 1..=8 {
        let equal = vec![500; world_size];
        let unequal: Vec<usize> = (0..world_size).map(|rank| rank * 7_000 % 9_000).collect();
        on_all_ranks(world_size, |gpu, end| {
            let rank = end.rank();
            for lengths in [&equal, &unequal] {
                let what = format!("rank {rank}, lengths {lengths:?}");
                let mut all = gpu.upload(&own_among_all(lengths, rank));
                end.device().unwrap().all_gather(lengths, all.slice_mut()).unwrap();
                // The next call must find what this one leaves.
                let root = world_size - 1;
                let mine = gpu.upload(&floats(rank, lengths[rank]));
                let mut out = (rank == root).then(|| gpu.upload(&vec![f32::NAN; lengths.iter().sum()]));
                let out_slice = out.as_mut().map(|out| out.slice_mut());
                end.device().unwrap().gather(root, mine.slice(), lengths, out_slice).unwrap();
                end.device().unwrap().wait().unwrap();
                assert_eq!(all.download(), floats_of_all(lengths), "{what}");
                assert!(out.is_none_or(|out| out.download() == floats_of_all(lengths)), "{what}");
            }
            let mut ids = gpu.upload(&[rank as u32, 7, 9][..]);
            end.device().unwrap().broadcast(0, ids.slice_mut()).unwrap();
            let mut values = gpu.upload(&[1.0, rank as f32, -1.0][..]);
            end.device().unwrap().all_reduce(values.slice_mut()).unwrap();
            // A call through the host comes after what lies on the stream.
            end.barrier().unwrap();
            assert_eq!(ids.download(), [0, 7, 9]);
            let n = world_size as f32;
            assert_eq!(values.download(), [n, n * (n - 1.0) / 2.0, -n]);
        });
    }
}

#[test]
fn a_call_returns_before_its_peers_come_and_counts_then() {
    let gpus = gpu::gpus(2);
    let progress = Progress::new();
    let members = [Member { progress: progress.clone(), ..member(0, 2, SHORT) }, member(1, 2, LONG)];
    let mut ends: Vec<_> = gpu::connect(&gpus, members).into_iter().map(Result::unwrap).collect();
    let mut all = gpus[0].upload(&[1.0, f32::NAN][..]);
    for _ in 0..3 {
        ends[0].device().unwrap().all_gather(&[1, 1], all.slice_mut()).unwrap();
    }
    assert_eq!(progress.calls(), 3);
    let error = ends[0].device().unwrap().wait().unwrap_err();
    let CollectiveError::NotDone { awaited: Awaited::Device { newest: Some(call) }, timeout_ms: 30 } = error else {
        panic!("{error:?}");
    };
    assert_eq!((call.index, call.op, call.total_bytes, call.part_bytes), (2, Op::AllGather, 8, 4));
    assert_eq!(ends[0].device().unwrap().all_gather(&[1, 1], all.slice_mut()), Err(error.clone()));
    assert_eq!(ends[0].barrier(), Err(error), "the first error stays");
    // It is aborted: the stream is free again although rank 1 never came.
    gpus[0].await_idle();
}

#[test]
fn an_abort_ends_the_wait_for_the_device_and_frees_the_stream() {
    for _ in 0..20 {
        let gpus = gpu::gpus(2);
        let mut ends = connect(&gpus, LONG);
        let mut all = gpus[0].upload(&[1.0, f32::NAN][..]);
        let abort = ends[0].abort_handle();
        let (waits, is_waiting) = mpsc::channel();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut device = ends[0].device().unwrap();
                device.all_gather(&[1, 1], all.slice_mut()).unwrap();
                waits.send(()).unwrap();
                device.wait()
            });
            is_waiting.recv().unwrap();
            abort.abort();
            assert_eq!(waiting.join().unwrap(), Err(CollectiveError::Aborted));
        });
        gpus[0].await_idle();
    }
}

#[test]
fn an_end_that_is_dropped_after_an_abort_frees_the_stream() {
    let gpus = gpu::gpus(2);
    let mut ends = connect(&gpus, LONG);
    let mut all = gpus[0].upload(&[1.0, f32::NAN][..]);
    ends[0].device().unwrap().all_gather(&[1, 1], all.slice_mut()).unwrap();
    ends[0].abort_handle().abort();
    assert!(!gpus[0].is_idle());
    drop(ends);
    gpus[0].await_idle();
}

#[test]
fn an_end_that_is_dropped_gives_what_it_has_enqueued() {
    let gpus = gpu::gpus(2);
    let mut ends = connect(&gpus, LONG);
    let mut leaver = ends.pop().unwrap();
    let mine = gpus[1].upload(&[5.0, 6.0][..]);
    leaver.device().unwrap().gather(0, mine.slice(), &[1, 2], None).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| drop(leaver));
        let own = gpus[0].upload(&[4.0][..]);
        let mut out = gpus[0].upload(&[f32::NAN; 3][..]);
        let mut device = ends[0].device().unwrap();
        device.gather(0, own.slice(), &[1, 2], Some(out.slice_mut())).unwrap();
        device.wait().unwrap();
        assert_eq!(out.download(), [4.0, 5.0, 6.0]);
    });
}

#[test]
fn a_set_up_ends_by_an_abort_and_by_its_deadline() {
    let gpu = Gpu::open(0);
    let id = nccl::UniqueId::new().unwrap();
    let soon = Instant::now() + SHORT;
    let error = nccl::connect(&id, gpu.stream(), member(0, 2, LONG), soon).unwrap_err();
    assert_eq!(error.to_string(), "cannot set up the nccl transport: not all ranks have come in time");
    let abort = AbortHandle::new();
    let alone = Member { abort: abort.clone(), ..member(0, 2, LONG) };
    let id = nccl::UniqueId::new().unwrap();
    let waiting = thread::spawn(move || nccl::connect(&id, gpu.stream(), alone, Instant::now() + MEET));
    thread::yield_now();
    abort.abort();
    assert_eq!(waiting.join().unwrap().unwrap_err(), CollectiveError::Aborted);
}

#[test]
fn two_ranks_on_one_gpu_are_refused_as_nccl_refuses_them() {
    let gpu = Gpu::open(3);
    for end in gpu::connect(&[gpu, gpu], (0..2).map(|rank| member(rank, 2, LONG))) {
        let error = end.unwrap_err().to_string();
        assert!(
            error.starts_with("cannot set up the nccl transport: invalid usage (Duplicate GPU detected"),
            "{error}"
        );
    }
}

#[test]
fn a_new_epoch_has_a_new_communicator_on_the_same_streams() {
    let gpus = gpu::gpus(3);
    for epoch in 1..=5 {
        let aborts = [(); 3].map(|()| AbortHandle::new());
        let members = (0..3).map(|rank| Member { epoch, abort: aborts[rank].clone(), ..member(rank, 3, LONG) });
        let ends = gpu::connect(&gpus, members);
        let (gathered, all_have_gathered) = mpsc::channel();
        thread::scope(|scope| {
            let ranks: Vec<_> = gpus
                .iter()
                .zip(ends)
                .map(|(gpu, end)| {
                    let gathered = gathered.clone();
                    scope.spawn(move || {
                        let mut end = end.unwrap();
                        let rank = end.rank();
                        let mut all = gpu.upload(&own_among_all(&[2; 3], rank));
                        let mut device = end.device().unwrap();
                        device.all_gather(&[2; 3], all.slice_mut()).unwrap();
                        device.wait().unwrap();
                        assert_eq!(all.download(), floats_of_all(&[2; 3]));
                        gathered.send(()).unwrap();
                        // Rank 2 dies; the others wait for it in the next call.
                        if rank == 2 { Ok(()) } else { end.barrier() }
                    })
                })
                .collect();
            all_have_gathered.iter().take(3).for_each(drop);
            aborts.iter().for_each(AbortHandle::abort);
            for rank in ranks {
                let result = rank.join().unwrap();
                assert!(matches!(result, Ok(()) | Err(CollectiveError::Aborted)), "{result:?}");
            }
        });
    }
}

#[test]
fn a_wait_ends_with_what_it_waits_for_or_its_failure() {
    on_all_ranks(2, |gpu, end| {
        let mut all = gpu.upload(&own_among_all(&[3; 2], end.rank()));
        let mut device = end.device().unwrap();
        device.all_gather(&[3; 2], all.slice_mut()).unwrap();
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok(looks == 3)
        };
        device.wait_until(third).unwrap();
        assert_eq!(looks, 3);
        device.wait().unwrap();
        let error = device.wait_until(|| Err("out of order".to_owned())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the device's work up to call 0, all_gather with 12 of 24 bytes failed: out of order"
        );
        assert_eq!(device.wait(), Err(error));
    });
}

#[test]
fn transports_through_the_host_have_no_devices() {
    assert!(lockstep_collectives::local::solo().device().is_none());
}
