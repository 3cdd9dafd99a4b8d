//! A transfer: what one call moves between devices, and how NCCL is told.

use std::ffi::{c_int, c_void};

use super::library::{FLOAT32, IN_PROGRESS, Library, RawComm, ResultCode, SUCCESS, SUM, UINT32};

/// What moves, by its address in this rank's device memory. Lengths are in values.
#[derive(Debug)]
pub(crate) enum Transfer<'a> {
    /// Every rank's floats to all, which lie in `all` in rank order.
    AllGather { lengths: &'a [usize], all: u64 },
    /// Every rank's floats to `root`, the only one with an `out`, where they come in rank order.
    Gather { root: usize, mine: u64, lengths: &'a [usize], out: Option<u64> },
    /// The token ids of `root` to all.
    Broadcast { root: usize, values: u64, len: usize },
    /// Sums of floats of all, to all.
    AllReduce { values: u64, len: usize },
}

/// Where a transfer takes place.
pub(super) struct Place<'a> {
    pub(super) library: &'a Library,
    pub(super) comm: RawComm,
    pub(super) stream: *mut c_void,
    pub(super) rank: usize,
}

/// `len` floats from or to one peer.
struct Message {
    direction: Direction,
    peer: usize,
    address: u64,
    len: usize,
}

#[derive(Clone, Copy)]
enum Direction {
    Send,
    Receive,
}

// === impl Place ===

impl Place<'_> {
    /// Tells NCCL.
    ///
    /// # Safety
    ///
    /// The communicator is neither gone nor in the middle of something, and the memory is the device's and as long as the
    /// transfer says, until the stream has passed it.
    pub(super) unsafe fn start(&self, transfer: &Transfer<'_>) -> ResultCode {
        let (functions, comm, stream) = (self.library.functions(), self.comm, self.stream);
        match *transfer {
            Transfer::AllGather { lengths, all } if lengths.iter().all(|&length| length == lengths[0]) => {
                let mine = address_of_part(all, lengths, self.rank);
                let (from, to) = (mine as *const c_void, all as *mut c_void);
                // SAFETY: the caller's; `mine` lies in `all` where NCCL has it in place.
                unsafe { (functions.all_gather)(from, to, lengths[0], FLOAT32, comm, stream) }
            }
            // SAFETY: the caller's.
            Transfer::AllGather { lengths, all } => unsafe { self.exchange(&self.all_to_all(lengths, all)) },
            // SAFETY: the caller's.
            Transfer::Gather { root, mine, lengths, out } => unsafe {
                self.exchange(&self.all_to_one(root, mine, lengths, out))
            },
            Transfer::Broadcast { root, values, len } => {
                let (from, to) = (values as *const c_void, values as *mut c_void);
                // SAFETY: the caller's; NCCL broadcasts in place where the two are the same.
                unsafe { (functions.broadcast)(from, to, len, UINT32, root as c_int, comm, stream) }
            }
            Transfer::AllReduce { values, len } => {
                let (from, to) = (values as *const c_void, values as *mut c_void);
                // SAFETY: the caller's; NCCL reduces in place where the two are the same.
                unsafe { (functions.all_reduce)(from, to, len, FLOAT32, SUM, comm, stream) }
            }
        }
    }

    /// An all-gather of unequal lengths: every rank sends its part to each peer, one hop for each, as a gather does. A
    /// broadcast for each rank instead would travel all the way around NCCL's ring. It is rare: the ranks of the usual
    /// numbers share a model evenly.
    fn all_to_all(&self, lengths: &[usize], all: u64) -> Vec<Message> {
        let mine = address_of_part(all, lengths, self.rank);
        let message = |direction, peer, address, len| Message { direction, peer, address, len };
        let peers = (0..lengths.len()).filter(|&peer| peer != self.rank);
        let both = peers.flat_map(|peer| {
            [
                message(Direction::Send, peer, mine, lengths[self.rank]),
                message(Direction::Receive, peer, address_of_part(all, lengths, peer), lengths[peer]),
            ]
        });
        both.collect()
    }

    /// A gather. The root sends its part to itself, which NCCL makes a copy on the device.
    fn all_to_one(&self, root: usize, mine: u64, lengths: &[usize], out: Option<u64>) -> Vec<Message> {
        let sent = Message { direction: Direction::Send, peer: root, address: mine, len: lengths[self.rank] };
        let received = out.into_iter().flat_map(|out| {
            lengths.iter().enumerate().map(move |(peer, &len)| {
                let address = address_of_part(out, lengths, peer);
                Message { direction: Direction::Receive, peer, address, len }
            })
        });
        [sent].into_iter().chain(received).collect()
    }

    /// All messages at once, so that their order does not matter.
    ///
    /// # Safety
    ///
    /// As [`start`](Self::start).
    unsafe fn exchange(&self, messages: &[Message]) -> ResultCode {
        let functions = self.library.functions();
        let fine = |code: &ResultCode| matches!(*code, SUCCESS | IN_PROGRESS);
        // SAFETY: it is ended below, by the same thread, whatever happens between.
        let mut code = unsafe { (functions.group_start)() };
        if !fine(&code) {
            return code;
        }
        for &Message { direction, peer, address, len } in messages.iter().filter(|message| message.len > 0) {
            let (peer, comm, stream) = (peer as c_int, self.comm, self.stream);
            code = match direction {
                // SAFETY: the caller's.
                Direction::Send => unsafe {
                    (functions.send)(address as *const c_void, len, FLOAT32, peer, comm, stream)
                },
                // SAFETY: the caller's.
                Direction::Receive => unsafe {
                    (functions.recv)(address as *mut c_void, len, FLOAT32, peer, comm, stream)
                },
            };
            if !fine(&code) {
                break;
            }
        }
        // SAFETY: it was started above.
        let ended = unsafe { (functions.group_end)() };
        if fine(&code) { ended } else { code }
    }
}

/// Where `rank`'s floats lie among those of all, which begin at `all`.
fn address_of_part(all: u64, lengths: &[usize], rank: usize) -> u64 {
    all + (lengths[..rank].iter().sum::<usize>() * size_of::<f32>()) as u64
}
