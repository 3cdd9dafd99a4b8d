//! A rendezvous: how the ranks of a new epoch meet in their collective transport.
//!
//! For shared memory the leader creates a segment and tells its name; for TCP every rank tells its address when it
//! joins, and the leader tells all of them.

use std::{
    hash::{BuildHasher, RandomState},
    time::Instant,
};

use lockstep_collectives::{
    Collective, CollectiveError, Member, local,
    shm::{self, Segment},
    tcp::Listener,
};

use super::config::{GroupConfig, Transport};

/// What every segment's name begins with.
const SEGMENT_PREFIX: &str = "lockstep-group-";

/// One rank's place to meet the others, epoch after epoch.
#[derive(Debug)]
pub(super) enum Rendezvous {
    /// There are no others.
    Solo,
    Shm {
        /// Makes the names of this process' segments its own.
        nonce: u64,
    },
    Tcp {
        listener: Listener,
        address: String,
    },
}

/// Where all ranks of an epoch meet, as the leader tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The segment's name.
    pub(super) name: String,
    /// By rank.
    pub(super) addresses: Vec<String>,
}

/// A place that the leader keeps open for the others.
pub(super) struct Hosted<'a> {
    rendezvous: &'a Rendezvous,
    member: Member,
    place: Place,
    segment: Option<Segment>,
}

// === impl Rendezvous ===

impl Rendezvous {
    /// Takes the rank's address, if it needs one.
    pub(super) fn new(config: &GroupConfig) -> Result<Self, CollectiveError> {
        if config.world_size == 1 {
            return Ok(Self::Solo);
        }
        match config.transport {
            Transport::Shm => Ok(Self::Shm { nonce: RandomState::new().hash_one(std::process::id()) }),
            Transport::Tcp => {
                let listener = Listener::bind(&config.collective_listen.to_string())?;
                let bound = listener.address();
                let address = match &config.collective_advertise {
                    Some(host) => format!("{host}:{}", bound.port()),
                    None => bound.to_string(),
                };
                Ok(Self::Tcp { listener, address })
            }
        }
    }

    /// Where this rank can be reached; empty if it needs no address.
    pub(super) fn address(&self) -> &str {
        match self {
            Self::Solo | Self::Shm { .. } => "",
            Self::Tcp { address, .. } => address,
        }
    }

    /// Opens the place of an epoch, as its leader. `addresses` are the other ranks', in rank order.
    pub(super) fn host(&self, member: Member, addresses: Vec<String>) -> Result<Hosted<'_>, CollectiveError> {
        let (mut place, mut segment) = (Place::default(), None);
        match self {
            Self::Solo => {}
            Self::Shm { nonce } => {
                match shm::remove_stale(SEGMENT_PREFIX) {
                    Ok(0) => {}
                    Ok(removed) => tracing::info!(removed, "removed segments of leaders that were killed"),
                    Err(error) => tracing::warn!(%error, "cannot look for segments of leaders that were killed"),
                }
                place.name = format!("{SEGMENT_PREFIX}{nonce:016x}-{}", member.epoch);
                segment = Some(Segment::create(&place.name, member.clone())?);
            }
            Self::Tcp { address, .. } => {
                place.addresses = [address.clone()].into_iter().chain(addresses).collect();
            }
        }
        Ok(Hosted { rendezvous: self, member, place, segment })
    }

    /// Meets the others at `place`, as a follower.
    pub(super) fn meet(
        &self,
        member: Member,
        place: &Place,
        deadline: Instant,
    ) -> Result<Box<dyn Collective>, CollectiveError> {
        Ok(match self {
            Self::Solo => Box::new(local::solo()),
            Self::Shm { .. } => Box::new(shm::attach(&place.name, member, deadline)?),
            Self::Tcp { listener, .. } => Box::new(listener.connect(member, &place.addresses, deadline)?),
        })
    }
}

// === impl Hosted ===

impl Hosted<'_> {
    /// What the others need to know.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Meets the others.
    pub(super) fn meet(self, deadline: Instant) -> Result<Box<dyn Collective>, CollectiveError> {
        match self.segment {
            Some(segment) => Ok(Box::new(segment.meet(deadline)?)),
            None => self.rendezvous.meet(self.member, &self.place, deadline),
        }
    }
}
