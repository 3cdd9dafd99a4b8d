//! Slots: the protocol by which ranks exchange floats through memory that all of them see.
//!
//! A call takes one round for each [`SLOT_FLOATS`] of its largest part, at least one. In a round every rank writes its
//! chunk into a slot of its own and then publishes the round's number. Each rank has two slots and uses them in turn:
//! it writes round `n` once every peer has published `n - 1`, for a rank publishes only after it has taken what it
//! needed of the round before, so that nobody reads round `n - 2`, whose slot is written again, any more. An all-gather
//! of one chunk thus costs a write and one wait for each peer, and no barrier. A rank runs at most one round ahead of
//! the others, also where it takes nothing itself ([`Op::Gather`](crate::Op::Gather)).
//!
//! A wait spins for a moment, yields for a while, and then sleeps at its own desk's doorbell, which rings when the peer
//! that it waits for publishes or leaves, and when this rank is aborted. While it sleeps it looks now and then whether
//! the peer's process still lives.

mod desk;
mod liveness;
mod region;

use std::{
    fmt, hint,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

pub(crate) use self::region::{Region, SLOT_FLOATS, Title};
use self::{
    desk::{Desk, Tenant},
    liveness::Liveness,
};
use crate::{
    CollectiveError, Member,
    endpoint::{Exchange, Link},
    member::{Interruption, Patience},
};

/// Looks at a peer's desk before the core is offered to others: about 2 µs, the time that a peer in step needs. A
/// longer spin starves peers that wait for this core: with 1,000 looks an all-gather of 2, 3 and 4 ranks on 2 busy
/// cores took 57, 87 and 115 µs (median), with 64 looks 7, 11 and 15 µs (`benches/all_gather.rs`, 576 floats, Zen 5).
const SPINS: usize = 64;

/// How long the core is offered to others before the rank sleeps. A peer that waits for the core gets it, which is
/// cheaper than a sleep; if none does, the rank goes on looking and saves the wake-up, tens of microseconds on a
/// virtual machine. Peers in step come within this time unless their shares of the model differ much.
const YIELD_FOR: Duration = Duration::from_micros(50);

/// Longest sleep between two looks at whether the peer's process lives: bounds how late its death is seen.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(20);

/// One rank's place at the slots.
pub(crate) struct Slots {
    member: Member,
    region: Arc<Region>,
    liveness: Liveness,
    /// The next round to write. Wraps; a desk that nobody has used counts as having published round 0.
    round: u32,
}

/// The rank's desk has a tenant already.
#[derive(Debug)]
pub(crate) struct DeskTaken;

/// A rank that was not met, and why.
#[derive(Debug)]
pub(crate) struct Unmet {
    pub(crate) rank: usize,
    pub(crate) interruption: Interruption,
}

// === impl Slots ===

impl Slots {
    /// Takes the rank's desk; dropping the result leaves it, for good.
    pub(crate) fn take(region: Arc<Region>, member: Member) -> Result<Self, DeskTaken> {
        if !region.desk(member.rank).take(&Tenant::this_process()) {
            return Err(DeskTaken);
        }
        let observed = Arc::downgrade(&region);
        let rank = member.rank;
        member.abort.on_abort(move || {
            if let Some(region) = observed.upgrade() {
                region.desk(rank).ring();
            }
        });
        let slots = Self { liveness: Liveness::new(member.world_size), member, region, round: 1 };
        slots.ring_waiting_peers();
        Ok(slots)
    }

    /// Waits until all peers have taken their desks, and begins to watch their processes.
    pub(crate) fn meet(&mut self, patience: &Patience) -> Result<(), Unmet> {
        for peer in self.member.peers() {
            let met = self.wait(peer, |desk| desk.tenant().is_some(), patience);
            let unmet = |interruption| Unmet { rank: peer, interruption };
            met.map_err(unmet)?;
            if let Some(tenant) = self.region.desk(peer).tenant() {
                self.liveness.watch(peer, &tenant).map_err(|_dead| unmet(Interruption::PeerGone))?;
            }
        }
        Ok(())
    }

    /// One round: gives chunk `chunk` of this rank's floats and takes the peers' if the operation says so.
    fn round(&self, exchange: &mut Exchange<'_>, chunk: usize, patience: &Patience) -> Result<(), CollectiveError> {
        let me = self.member.rank;
        for peer in self.peers_from_next() {
            self.wait_for_round(peer, self.round.wrapping_sub(1), exchange, patience)?;
        }
        let mine = chunk_of(exchange.mine.len(), chunk);
        // SAFETY: all peers have published the round before, so none reads this slot until this rank publishes; no
        // other rank writes it.
        unsafe { self.region.write_slot(me, self.round, &exchange.call(me), &exchange.mine[mine]) };
        self.region.desk(me).publish(self.round);
        self.ring_waiting_peers();
        if !exchange.op.receives(me) {
            return Ok(());
        }
        for peer in self.peers_from_next() {
            self.wait_for_round(peer, self.round, exchange, patience)?;
            exchange.check(peer, self.region.slot_call(peer, self.round))?;
            let theirs = chunk_of(exchange.length(peer), chunk);
            let out = &mut exchange.part(me, peer)[theirs];
            // SAFETY: the peer has published this round, and writes the slot again only once this rank has published
            // the next one.
            unsafe { self.region.read_slot(peer, self.round, out) };
        }
        Ok(())
    }

    /// The peers in the order in which to look at them: another one first on every rank, so that they don't all crowd
    /// around one desk.
    fn peers_from_next(&self) -> impl Iterator<Item = usize> + use<> {
        let Member { rank, world_size, .. } = self.member;
        (1..world_size).map(move |distance| (rank + distance) % world_size)
    }

    fn wait_for_round(
        &self,
        peer: usize,
        round: u32,
        exchange: &Exchange<'_>,
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        self.wait(peer, |desk| desk.has_published(round), patience)
            .map_err(|interruption| interruption.during(exchange.call(peer), peer, patience))
    }

    fn wait(&self, peer: usize, ready: impl Fn(&Desk) -> bool, patience: &Patience) -> Result<(), Interruption> {
        let theirs = self.region.desk(peer);
        for _ in 0..SPINS {
            if ready(theirs) {
                return Ok(());
            }
            hint::spin_loop();
        }
        let start = Instant::now();
        while start.elapsed() < YIELD_FOR {
            if ready(theirs) {
                return Ok(());
            }
            thread::yield_now();
        }
        let mine = self.region.desk(self.member.rank);
        mine.wait_for(Some(peer));
        let result = self.sleep_until(peer, ready, patience);
        mine.wait_for(None);
        result
    }

    fn sleep_until(&self, peer: usize, ready: impl Fn(&Desk) -> bool, patience: &Patience) -> Result<(), Interruption> {
        let (mine, theirs) = (self.region.desk(self.member.rank), self.region.desk(peer));
        let mut rang = true;
        loop {
            // Read before anything is looked at: a ring after this moment ends the sleep below at once.
            let doorbell = mine.doorbell();
            let gone = theirs.is_left() || (!rang && self.liveness.is_dead(peer));
            // Looked at after `gone`, for a peer may publish its last round and leave.
            if ready(theirs) {
                return Ok(());
            }
            if gone {
                return Err(Interruption::PeerGone);
            }
            rang = mine.sleep(doorbell, patience.left()?.min(LIVENESS_INTERVAL));
        }
    }

    fn ring_waiting_peers(&self) {
        for peer in self.member.peers() {
            let desk = self.region.desk(peer);
            if desk.waits_for(self.member.rank) {
                desk.ring();
            }
        }
    }
}

impl Link for Slots {
    fn exchange(&mut self, mut exchange: Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError> {
        let longest = exchange.lengths.iter().copied().max().unwrap_or(0);
        for chunk in 0..longest.div_ceil(SLOT_FLOATS).max(1) {
            self.round(&mut exchange, chunk, patience)?;
            self.round = self.round.wrapping_add(1);
        }
        Ok(())
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.region.desk(self.member.rank).leave();
        self.ring_waiting_peers();
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("member", &self.member).field("round", &self.round).finish_non_exhaustive()
    }
}

/// Which of a rank's `length` floats chunk `chunk` holds: `[chunk * SLOT_FLOATS, (chunk + 1) * SLOT_FLOATS)`, as far as
/// there are any.
fn chunk_of(length: usize, chunk: usize) -> std::ops::Range<usize> {
    length.min(chunk * SLOT_FLOATS)..length.min((chunk + 1) * SLOT_FLOATS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::Theirs;

    #[test]
    fn rounds_go_on_when_their_number_wraps() {
        let region = Arc::new(Region::anonymous(2).unwrap());
        let mut ranks: Vec<Slots> = (0..2)
            .map(|rank| {
                let mut slots =
                    Slots::take(Arc::clone(&region), Member { rank, world_size: 2, ..Member::default() }).unwrap();
                slots.round = u32::MAX - 3;
                region.desk(rank).publish(slots.round - 1);
                slots
            })
            .collect();
        thread::scope(|scope| {
            for slots in &mut ranks {
                scope.spawn(|| {
                    for index in 0..10 {
                        let rank = slots.member.rank;
                        let mine = [(index * 2 + rank as u64) as f32];
                        let mut other = [f32::NAN];
                        let theirs = match rank {
                            0 => Theirs { higher: &mut other, ..Theirs::default() },
                            _ => Theirs { lower: &mut other, ..Theirs::default() },
                        };
                        let exchange =
                            Exchange { index, op: crate::Op::AllGather, mine: &mine, lengths: &[1, 1], theirs };
                        let patience = slots.member.patience();
                        slots.exchange(exchange, &patience).unwrap();
                        assert_eq!(other, [(index * 2 + 1 - rank as u64) as f32]);
                    }
                });
            }
        });
        assert_eq!(ranks[0].round, 6);
    }

    #[test]
    fn a_desk_is_taken_once() {
        let region = Arc::new(Region::anonymous(2).unwrap());
        let member = Member { rank: 1, world_size: 2, ..Member::default() };
        let first = Slots::take(Arc::clone(&region), member.clone()).unwrap();
        assert!(Slots::take(Arc::clone(&region), member.clone()).is_err());
        drop(first);
        assert!(Slots::take(region, member).is_err(), "a desk that was left stays left");
    }
}
