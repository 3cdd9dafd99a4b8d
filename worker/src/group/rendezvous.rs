//! A rendezvous: how the ranks of a new epoch meet in their collective transport.
//!
//! For shared memory the leader creates a segment and tells its name; for TCP every rank tells its address when it
//! joins, and the leader tells all of them; for NCCL the leader makes a unique id and tells that. Which of shared memory
//! and NCCL it is, the leader decides for an epoch where `auto` leaves it open: every rank tells which GPU it has.

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use lockstep_collectives::{
    Collective, CollectiveError, DeviceStream, Member, local,
    nccl::{self, UniqueId},
    shm::{self, Segment},
    tcp::Listener,
};

use super::{
    config::{GroupConfig, Transport},
    membership::Contact,
};

/// What every segment's name begins with.
const SEGMENT_PREFIX: &str = "lockstep-group-";

/// How long the ranks of an epoch have to meet, unless it is over NCCL.
const MEET_TIMEOUT: Duration = Duration::from_secs(10);

/// How long they have over NCCL, which looks at the machine, allocates on the device and loads its kernels before it
/// connects: seconds on a machine with many GPUs, more on several. A rank that dies meanwhile is noticed otherwise.
const NCCL_MEET_TIMEOUT: Duration = Duration::from_secs(60);

/// One rank's place to meet the others, epoch after epoch.
#[derive(Debug)]
pub(super) enum Rendezvous {
    /// There are no others.
    Solo,
    /// In shared memory; over NCCL instead if this rank could, and every other, too, on a GPU of its own.
    Host {
        /// Makes the names of this process' segments its own.
        nonce: u64,
        stream: Option<DeviceStream>,
    },
    Tcp {
        listener: Listener,
        address: String,
    },
    Nccl {
        stream: DeviceStream,
    },
}

/// Where all ranks of an epoch meet, as the leader tells them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The segment's name.
    pub(super) name: String,
    /// By rank.
    pub(super) addresses: Vec<String>,
    /// NCCL's unique id; empty if it is not over NCCL.
    pub(super) nccl_id: Vec<u8>,
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
    /// Takes the rank's address, if it needs one, and opens NCCL. `stream` is the GPU's, if there is one.
    pub(super) fn new(config: &GroupConfig, stream: Option<DeviceStream>) -> Result<Self, CollectiveError> {
        if config.world_size == 1 {
            return Ok(Self::Solo);
        }
        let nonce = || RandomState::new().hash_one(std::process::id());
        match config.transport {
            Transport::Auto => Ok(Self::Host { nonce: nonce(), stream: stream.filter(has_nccl) }),
            Transport::Shm => Ok(Self::Host { nonce: nonce(), stream: None }),
            Transport::Tcp => {
                let listener = Listener::bind(&config.collective_listen.to_string())?;
                let bound = listener.address();
                let address = match &config.collective_advertise {
                    Some(host) => format!("{host}:{}", bound.port()),
                    None => bound.to_string(),
                };
                Ok(Self::Tcp { listener, address })
            }
            Transport::Nccl => {
                let stream = stream.ok_or_else(|| no_nccl("this rank does not compute on a GPU"))?;
                let version = nccl::version()?;
                tracing::info!(%version, device = stream.device_id(), "opened NCCL");
                Ok(Self::Nccl { stream })
            }
        }
    }

    /// How this rank can be met.
    pub(super) fn contact(&self) -> Contact {
        match self {
            Self::Solo | Self::Host { stream: None, .. } => Contact::default(),
            Self::Tcp { address, .. } => Contact { address: address.clone(), ..Contact::default() },
            Self::Host { stream: Some(stream), .. } | Self::Nccl { stream } => {
                Contact { device_id: stream.device_id().to_owned(), ..Contact::default() }
            }
        }
    }

    /// Opens the place of an epoch, as its leader. `contacts` are the other ranks', in rank order.
    pub(super) fn host(&self, member: Member, contacts: Vec<Contact>) -> Result<Hosted<'_>, CollectiveError> {
        let (mut place, mut segment) = (Place::default(), None);
        let contacts: Vec<Contact> = [self.contact()].into_iter().chain(contacts).collect();
        match self {
            Self::Solo => {}
            Self::Host { .. } if each_has_a_gpu(&contacts) => place.nccl_id = UniqueId::new()?.as_bytes().to_vec(),
            Self::Nccl { .. } => place.nccl_id = UniqueId::new()?.as_bytes().to_vec(),
            Self::Host { nonce, .. } => {
                match shm::remove_stale(SEGMENT_PREFIX) {
                    Ok(0) => {}
                    Ok(removed) => tracing::info!(removed, "removed segments of leaders that were killed"),
                    Err(error) => tracing::warn!(%error, "cannot look for segments of leaders that were killed"),
                }
                place.name = format!("{SEGMENT_PREFIX}{nonce:016x}-{}", member.epoch);
                segment = Some(Segment::create(&place.name, member.clone())?);
            }
            Self::Tcp { .. } => place.addresses = contacts.into_iter().map(|contact| contact.address).collect(),
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
            Self::Host { stream: Some(stream), .. } | Self::Nccl { stream } if place.is_nccl() => {
                let id = UniqueId::from_bytes(&place.nccl_id)?;
                Box::new(nccl::connect(&id, stream.clone(), member, deadline)?)
            }
            Self::Nccl { .. } => {
                return Err(no_nccl("the leader uses another transport: group.transport must be equal"));
            }
            Self::Host { .. } => Box::new(shm::attach(&place.name, member, deadline)?),
            Self::Tcp { listener, .. } => Box::new(listener.connect(member, &place.addresses, deadline)?),
        })
    }
}

/// Whether NCCL can be used; if not, it says why in the log.
fn has_nccl(stream: &DeviceStream) -> bool {
    match nccl::version() {
        Ok(version) => {
            tracing::info!(%version, device = stream.device_id(), "opened NCCL");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "ranks exchange activations through host memory");
            false
        }
    }
}

fn each_has_a_gpu(contacts: &[Contact]) -> bool {
    let devices: BTreeSet<&str> = contacts.iter().map(|contact| contact.device_id.as_str()).collect();
    devices.len() == contacts.len() && !devices.contains("")
}

fn no_nccl(reason: &str) -> CollectiveError {
    CollectiveError::Setup { transport: "nccl", reason: reason.to_owned() }
}

// === impl Place ===

impl Place {
    fn is_nccl(&self) -> bool {
        !self.nccl_id.is_empty()
    }

    /// How long the ranks have to meet.
    pub(super) fn timeout(&self) -> Duration {
        if self.is_nccl() { NCCL_MEET_TIMEOUT } else { MEET_TIMEOUT }
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
