//! A handshake: how two ends of a new connection make sure that they are ranks of one epoch.
//!
//! Both ends send a [`Hello`], the dialling one first. All that comes before it has been checked comes from strangers:
//! they are few at a time, have little time, and are dropped without an answer.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, poll};

use super::SETUP_INTERVAL;
use crate::{
    Member,
    member::{Patience, timespec},
};

/// What an end says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    epoch: u64,
    world_size: u64,
    from: u64,
    to: u64,
}

/// A rank that has called.
pub(super) struct Caller {
    pub(super) rank: usize,
    pub(super) stream: TcpStream,
}

/// Those who have connected and not yet said who they are.
#[derive(Default)]
pub(super) struct Reception {
    strangers: Vec<Stranger>,
}

struct Stranger {
    stream: TcpStream,
    since: Instant,
    hello: [u8; HELLO_BYTES],
    received: usize,
}

enum Greeting {
    /// The hello is not complete.
    Pending,
    /// It is no rank of this epoch that may call this one.
    Dismissed,
    Welcome(usize),
}

const HELLO_BYTES: usize = 5 * size_of::<u64>();

/// Marks a hello of this protocol; the last byte is its version. Everything is sent in the machine's own byte order,
/// so that machines of different ones take one another for strangers: floats are sent as they lie in memory.
const MAGIC: u64 = u64::from_be_bytes(*b"lockstp\x01");

/// Strangers at a time: each rank of the largest group, twice over. The one who has waited longest makes room.
const STRANGERS_MAX: usize = 2 * crate::member::MAX_WORLD_SIZE;

/// Time for a stranger's hello, which a rank sends at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// Says hello over `stream` to rank `peer` and waits for its answer.
pub(super) fn introduce(
    mut stream: TcpStream,
    member: &Member,
    peer: usize,
    patience: &Patience,
) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    // A new connection's buffer has room for it.
    stream.write_all(&Hello::new(member, peer).encode())?;
    let mut answer = [0; HELLO_BYTES];
    let mut received = 0;
    while received < HELLO_BYTES {
        let left = patience.left().map_err(|_interruption| io::Error::from(io::ErrorKind::TimedOut))?;
        wait_readable(&mut [PollFd::new(&stream, PollFlags::IN)], left.min(SETUP_INTERVAL));
        received += read_some(&mut stream, &mut answer[received..])?;
    }
    let expected = Hello { from: peer as u64, to: member.rank as u64, ..Hello::new(member, peer) };
    match Hello::decode(&answer) {
        Some(found) if found == expected => Ok(stream),
        found => Err(io::Error::other(format!("answered by {found:?}, expected {expected:?}"))),
    }
}

// === impl Hello ===

impl Hello {
    /// What `member` says to rank `to`.
    fn new(member: &Member, to: usize) -> Self {
        Self { epoch: member.epoch, world_size: member.world_size as u64, from: member.rank as u64, to: to as u64 }
    }

    fn encode(&self) -> [u8; HELLO_BYTES] {
        bytemuck::cast([MAGIC, self.epoch, self.world_size, self.from, self.to])
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let [magic, epoch, world_size, from, to] = bytemuck::pod_read_unaligned::<[u64; 5]>(bytes);
        (magic == MAGIC).then_some(Self { epoch, world_size, from, to })
    }
}

// === impl Reception ===

impl Reception {
    /// Lets all in who are at the door.
    pub(super) fn admit(&mut self, listener: &TcpListener) {
        // An error is that nobody is there, or that somebody has gone again.
        while let Ok((stream, _address)) = listener.accept() {
            if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                continue;
            }
            if self.strangers.len() == STRANGERS_MAX {
                self.strangers.remove(0);
            }
            self.strangers.push(Stranger { stream, since: Instant::now(), hello: [0; HELLO_BYTES], received: 0 });
        }
    }

    /// Hears what the strangers say; returns the ranks among them and drops those who are none.
    pub(super) fn greet(&mut self, member: &Member) -> Vec<Caller> {
        let mut callers = Vec::new();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.greet(member) {
                Greeting::Pending => self.strangers.push(stranger),
                Greeting::Dismissed => {}
                Greeting::Welcome(rank) => callers.push(Caller { rank, stream: stranger.stream }),
            }
        }
        callers
    }

    /// Waits until somebody comes or says something, at most for `limit`.
    pub(super) fn wait(&self, listener: &TcpListener, limit: Duration) {
        let strangers = self.strangers.iter().map(|stranger| PollFd::new(&stranger.stream, PollFlags::IN));
        let mut polled: Vec<PollFd<'_>> = strangers.chain([PollFd::new(listener, PollFlags::IN)]).collect();
        wait_readable(&mut polled, limit);
    }
}

// === impl Stranger ===

impl Stranger {
    fn greet(&mut self, member: &Member) -> Greeting {
        let Ok(read) = read_some(&mut self.stream, &mut self.hello[self.received..]) else {
            return Greeting::Dismissed;
        };
        self.received += read;
        if self.received < HELLO_BYTES {
            let expired = self.since.elapsed() > HELLO_TIMEOUT;
            return if expired { Greeting::Dismissed } else { Greeting::Pending };
        }
        let Some(rank) = member.peers().filter(|&rank| rank > member.rank).find(|&rank| {
            let expected = Hello::new(&Member { rank, ..member.clone() }, member.rank);
            Hello::decode(&self.hello) == Some(expected)
        }) else {
            return Greeting::Dismissed;
        };
        // A new connection's buffer has room for it.
        match self.stream.write_all(&Hello::new(member, rank).encode()) {
            Ok(()) => Greeting::Welcome(rank),
            Err(_) => Greeting::Dismissed,
        }
    }
}

/// Reads what is there, 0 bytes if nothing is.
///
/// # Errors
///
/// If the connection has ended.
fn read_some(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    match stream.read(buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(read) => Ok(read),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Waits until one can be read, at most for `limit`. Failing to wait, by a signal say, is like having waited.
fn wait_readable(polled: &mut [PollFd<'_>], limit: Duration) {
    let _ready = poll(polled, Some(&timespec(limit)));
}
