//! The local transport: ranks are threads of one process, for tests and benchmarks without servers.

use std::{sync::Arc, time::Duration};

use crate::{
    CollectiveError, Endpoint, Member,
    endpoint::{Exchange, Link},
    member::{DEFAULT_TIMEOUT, MAX_WORLD_SIZE, Patience},
    slots::{Region, Slots},
};

/// The link of a rank that has no peers: what it gives is what it takes.
struct Alone;

/// The end of a group of one rank, which moves nothing.
pub fn solo() -> Endpoint {
    Endpoint::new(Member::default(), Alone)
}

/// The ends of a group of `world_size` ranks, in rank order, with [`DEFAULT_TIMEOUT`].
///
/// # Panics
///
/// As [`group_with_timeout`].
pub fn group(world_size: usize) -> Vec<Endpoint> {
    group_with_timeout(world_size, DEFAULT_TIMEOUT)
}

/// The ends of a group of `world_size` ranks, in rank order, whose calls wait at most for `timeout`.
///
/// # Panics
///
/// If the world size is not in `1..=MAX_WORLD_SIZE`, or memory runs out.
pub fn group_with_timeout(world_size: usize, timeout: Duration) -> Vec<Endpoint> {
    assert!((1..=MAX_WORLD_SIZE).contains(&world_size), "the world size is {world_size}");
    let region = Arc::new(Region::anonymous(world_size).expect("the process has memory left"));
    let endpoint = |rank| {
        let member = Member { rank, world_size, timeout, ..Member::default() };
        let slots = Slots::take(Arc::clone(&region), member.clone()).expect("the desks of a new region are free");
        Endpoint::new(member, slots)
    };
    (0..world_size).map(endpoint).collect()
}

// === impl Alone ===

impl Link for Alone {
    fn exchange(&mut self, _exchange: Exchange<'_>, _patience: &Patience) -> Result<(), CollectiveError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Collective;

    #[test]
    fn every_thread_gathers_what_all_gave() {
        let ranks: Vec<_> = group(3)
            .into_iter()
            .map(|mut end| {
                std::thread::spawn(move || {
                    let me = end.rank() as f32;
                    let mut all = [1.0, 2.0, 2.0].map(|rank| if rank == me { rank } else { f32::NAN });
                    end.all_gather(&[0, 1, 2], &mut all).unwrap();
                    all
                })
            })
            .collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), [1.0, 2.0, 2.0]);
        }
    }

    #[test]
    fn a_rank_alone_gathers_its_own() {
        let mut end = solo();
        let mut out = [1.0, 2.0];
        end.all_gather(&[2], &mut out).unwrap();
        assert_eq!(out, [1.0, 2.0]);
        end.gather(0, &[3.0, 4.0], &[2], Some(&mut out)).unwrap();
        assert_eq!(out, [3.0, 4.0]);
        end.barrier().unwrap();
        end.abort_handle().abort();
        assert_eq!(end.barrier(), Err(CollectiveError::Aborted));
    }
}
