//! How the ranks of a tensor-parallel group exchange floats and keep in step.
//!
//! Every rank makes the same calls in the same order. A call carries its number, its kind and its sizes; a rank that
//! makes another call is an error that names both, so that ranks out of step never compute garbage. There is no
//! reduction here on purpose: a sum's order must not depend on the transport, so ranks gather and then add in an order
//! of their own.
//!
//! Every wait ends: with what was waited for, with the peer's death, with [`AbortHandle::abort`], or, as a last resort,
//! with [`Member::timeout`]. After an error a rank's end of the group is of no more use; all that is left is to drop
//! it, upon which its peers see [`CollectiveError::PeerGone`].
//!
//! # Layout
//!
//! * [`collective`]: what a transport offers; [`call`] and [`error`]: the words of it; [`abort`]: ending a wait.
//! * [`member`]: who a rank is in its group; [`progress`]: how far it is, for other threads to see.
//! * [`endpoint`]: what every transport does alike: counts calls, checks arguments, remembers an error.
//! * [`device`]: the same between the memories of the ranks' GPUs.
//! * [`timed`]: any of them, with a stopwatch.
//! * [`local`], [`shm`], [`tcp`], [`nccl`]: the transports, for threads, processes of one host, hosts, and GPUs. The
//!   first two share `slots`, the protocol over memory that all ranks see.

pub mod abort;
pub mod call;
pub mod collective;
pub mod device;
pub mod endpoint;
pub mod error;
pub mod local;
pub mod member;
pub mod nccl;
pub mod progress;
pub mod shm;
mod slots;
pub mod tcp;
pub mod timed;

pub use abort::AbortHandle;
pub use call::{Call, Op};
pub use collective::Collective;
pub use device::{Captured, DeviceCollective, DeviceSlice, DeviceSliceMut, DeviceStream};
pub use endpoint::Endpoint;
pub use error::{Awaited, CollectiveError};
pub use member::Member;
pub use progress::Progress;
pub use timed::Timed;
