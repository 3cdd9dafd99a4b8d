//! Measures the time of an all-gather for each transport: `cargo bench -p lockstep-collectives`.
//!
//! Ranks are threads, which to the kernel's scheduler are the same as processes. The sizes are those of a decode step
//! of a small and of a large model (a row of 576 or 4,096 floats each rank), and of a prefill chunk (64 rows of 4,096).

use std::{
    thread,
    time::{Duration, Instant},
};

use lockstep_collectives::{Collective, Endpoint, Member, local, shm, tcp};

const WORLD_SIZES: [usize; 3] = [2, 3, 4];
const FLOATS: [usize; 3] = [576, 4_096, 64 * 4_096];

/// Calls whose time is measured one by one, after as many tenths to warm up.
fn calls(floats: usize) -> usize {
    if floats > 10_000 { 500 } else { 20_000 }
}

type Form = fn(usize) -> Vec<Endpoint>;

fn main() {
    let transports: [(&str, Form); 3] = [("local", local::group), ("shm", form_shm), ("tcp", form_tcp)];
    println!("microseconds per all_gather on {} cores", thread::available_parallelism().map_or(0, usize::from));
    println!("{:>9} {:>5} {:>8} {:>9} {:>9} {:>9}", "transport", "ranks", "floats", "mean", "median", "p99");
    for (name, form) in transports {
        for world_size in WORLD_SIZES {
            for floats in FLOATS {
                let times = measure(form(world_size), floats);
                let mean = times.iter().sum::<Duration>() / times.len() as u32;
                let columns = [mean, times[times.len() / 2], times[times.len() * 99 / 100]];
                let [mean, median, p99] = columns.map(|time| time.as_secs_f64() * 1e6);
                println!("{name:>9} {world_size:>5} {floats:>8} {mean:>9.1} {median:>9.1} {p99:>9.1}");
            }
        }
    }
}

/// The times of the calls as rank 0 sees them, ascending.
fn measure(ends: Vec<Endpoint>, floats: usize) -> Vec<Duration> {
    let ranks: Vec<_> = ends.into_iter().map(|end| thread::spawn(move || time_calls(end, floats))).collect();
    let mut times: Vec<_> = ranks.into_iter().map(|rank| rank.join().expect("the rank has not panicked")).collect();
    let mut times = times.swap_remove(0);
    times.sort_unstable();
    times
}

fn time_calls(mut end: Endpoint, floats: usize) -> Vec<Duration> {
    let lengths = vec![floats; end.world_size()];
    let mut all = vec![end.rank() as f32; floats * end.world_size()];
    let mut call = || {
        let start = Instant::now();
        end.all_gather(&lengths, &mut all).expect("all ranks make the same calls");
        start.elapsed()
    };
    for _ in 0..calls(floats) / 10 {
        call();
    }
    (0..calls(floats)).map(|_| call()).collect()
}

fn form_shm(world_size: usize) -> Vec<Endpoint> {
    let name = format!("lockstep-bench-{}", std::process::id());
    let deadline = Instant::now() + Duration::from_secs(10);
    let member = |rank| Member { rank, world_size, ..Member::default() };
    let segment = shm::Segment::create(&name, member(0)).expect("the segment can be created");
    let attach = |rank| {
        let (name, member) = (name.clone(), member(rank));
        thread::spawn(move || shm::attach(&name, member, deadline).expect("the rank can attach"))
    };
    let others: Vec<_> = (1..world_size).map(attach).collect();
    let first = segment.meet(deadline).expect("all ranks come");
    [first].into_iter().chain(others.into_iter().map(|end| end.join().expect("the rank has not panicked"))).collect()
}

fn form_tcp(world_size: usize) -> Vec<Endpoint> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let bind = |_| tcp::Listener::bind("127.0.0.1:0").expect("there is a free port");
    let listeners: Vec<_> = (0..world_size).map(bind).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let connect = |(rank, listener): (usize, tcp::Listener)| {
        let (member, addresses) = (Member { rank, world_size, ..Member::default() }, addresses.clone());
        thread::spawn(move || listener.connect(member, &addresses, deadline).expect("all ranks come"))
    };
    let ends: Vec<_> = listeners.into_iter().enumerate().map(connect).collect();
    ends.into_iter().map(|end| end.join().expect("the rank has not panicked")).collect()
}
