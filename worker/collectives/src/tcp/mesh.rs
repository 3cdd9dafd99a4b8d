//! A mesh: one connection between each two ranks, and the frames on them.
//!
//! A frame is a call and the sender's floats. In a call a rank sends and receives all its frames at the same time,
//! without blocking, for two ranks that first sent and then received would wait for each other once their frames
//! exceed what the connections buffer.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    Call, CollectiveError, Member,
    call::CALL_WORDS,
    endpoint::{Exchange, Link, Theirs},
    member::{Interruption, Patience, timespec},
};

/// One rank's connections.
pub(super) struct Mesh {
    member: Member,
    connections: Arc<Connections>,
}

/// By rank; none to the rank itself.
struct Connections(Vec<Option<TcpStream>>);

/// The frames of one call that are not through yet.
struct Frames<'a> {
    outgoing: Vec<Outgoing<'a>>,
    incoming: Vec<Incoming<'a>>,
}

/// A frame on its way to a peer.
struct Outgoing<'a> {
    peer: usize,
    stream: &'a TcpStream,
    head: [u8; HEAD_BYTES],
    floats: &'a [u8],
    sent: usize,
}

/// A frame on its way from a peer.
struct Incoming<'a> {
    peer: usize,
    stream: &'a TcpStream,
    head: [u8; HEAD_BYTES],
    floats: &'a mut [u8],
    received: usize,
}

const HEAD_BYTES: usize = CALL_WORDS * size_of::<u64>();

/// Times that the core is offered to others before the rank sleeps in the kernel. On one host the peer may be the one
/// who gets it.
const YIELDS: usize = 16;

// === impl Mesh ===

impl Mesh {
    /// Takes over `streams`, by rank, which must not block.
    pub(super) fn new(member: Member, streams: Vec<Option<TcpStream>>) -> Self {
        let connections = Arc::new(Connections(streams));
        let observed = Arc::downgrade(&connections);
        member.abort.on_abort(move || {
            if let Some(connections) = observed.upgrade() {
                connections.shut_down();
            }
        });
        Self { member, connections }
    }

    /// The frames that this rank sends and receives in a call.
    fn frames<'a>(&'a self, exchange: &Exchange<'a>, theirs: Theirs<'a>) -> Frames<'a> {
        let me = self.member.rank;
        let head = bytemuck::cast(exchange.call(me).encode());
        let floats = bytemuck::cast_slice(exchange.mine);
        let outgoing = (self.connections.iter())
            .filter(|&(peer, _)| exchange.op.receives(peer))
            .map(|(peer, stream)| Outgoing { peer, stream, head, floats, sent: 0 });
        let mut frames = Frames { outgoing: outgoing.collect(), incoming: Vec::new() };
        if exchange.op.receives(me) {
            let Theirs { mut lower, mut higher } = theirs;
            for (peer, stream) in self.connections.iter() {
                let rest = if peer < me { &mut lower } else { &mut higher };
                // As long as the ranks' lengths together, so it is long enough.
                let floats = rest.split_off_mut(..exchange.length(peer)).unwrap_or_default();
                let floats = bytemuck::cast_slice_mut(floats);
                frames.incoming.push(Incoming { peer, stream, head: [0; HEAD_BYTES], floats, received: 0 });
            }
        }
        frames
    }
}

impl Link for Mesh {
    fn exchange(&mut self, mut exchange: Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError> {
        let theirs = std::mem::take(&mut exchange.theirs);
        let mut frames = self.frames(&exchange, theirs);
        let mut idle_turns = 0;
        while let Some(next) = frames.next_peer() {
            if frames.advance(&exchange, patience)? {
                idle_turns = 0;
            } else if idle_turns < YIELDS {
                idle_turns += 1;
                thread::yield_now();
            } else {
                let left = patience.left();
                let left = left.map_err(|interruption| interruption.during(exchange.call(next), next, patience))?;
                frames.wait(left);
            }
        }
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.connections.shut_down();
    }
}

// === impl Connections ===

impl Connections {
    fn iter(&self) -> impl Iterator<Item = (usize, &TcpStream)> {
        self.0.iter().enumerate().filter_map(|(peer, stream)| Some((peer, stream.as_ref()?)))
    }

    fn shut_down(&self) {
        for (_peer, stream) in self.iter() {
            // Fails if the peer has ended the connection: just as well.
            let _already_ended = stream.shutdown(Shutdown::Both);
        }
    }
}

// === impl Frames ===

impl Frames<'_> {
    /// A peer that the call still waits for, if it is not through.
    fn next_peer(&self) -> Option<usize> {
        let receiving = self.incoming.first().map(|frame| frame.peer);
        receiving.or_else(|| self.outgoing.first().map(|frame| frame.peer))
    }

    /// Moves every frame as far as it goes, and returns whether any moved.
    fn advance(&mut self, exchange: &Exchange<'_>, patience: &Patience) -> Result<bool, CollectiveError> {
        let ended = |peer| {
            // An abort shuts the connections down, which looks like the peer's end.
            let gone = if patience.abort.is_aborted() { Interruption::Aborted } else { Interruption::PeerGone };
            gone.during(exchange.call(peer), peer, patience)
        };
        let mut moved = false;
        for frame in &mut self.outgoing {
            moved |= frame.advance().map_err(|_error| ended(frame.peer))?;
        }
        for frame in &mut self.incoming {
            moved |= frame.advance().map_err(|_error| ended(frame.peer))?;
            if let Some(found) = frame.call() {
                exchange.check(frame.peer, found)?;
            }
        }
        self.outgoing.retain(|frame| frame.sent < HEAD_BYTES + frame.floats.len());
        self.incoming.retain(|frame| frame.received < HEAD_BYTES + frame.floats.len());
        Ok(moved)
    }

    /// Waits until some frame can move, at most for `limit`. Failing to wait, by a signal say, is like having waited.
    fn wait(&self, limit: Duration) {
        let outgoing = self.outgoing.iter().map(|frame| PollFd::new(frame.stream, PollFlags::OUT));
        let incoming = self.incoming.iter().map(|frame| PollFd::new(frame.stream, PollFlags::IN));
        let mut polled: Vec<PollFd<'_>> = outgoing.chain(incoming).collect();
        let _ready = poll(&mut polled, Some(&timespec(limit)));
    }
}

// === impl Outgoing ===

impl Outgoing<'_> {
    /// Sends what the connection takes, and returns whether it took anything.
    fn advance(&mut self) -> io::Result<bool> {
        let before = self.sent;
        while self.sent < HEAD_BYTES + self.floats.len() {
            let head = IoSlice::new(&self.head[self.sent.min(HEAD_BYTES)..]);
            let floats = IoSlice::new(&self.floats[self.sent.saturating_sub(HEAD_BYTES)..]);
            match moved(self.stream.write_vectored(&[head, floats]))? {
                Some(sent) => self.sent += sent,
                None => break,
            }
        }
        Ok(self.sent > before)
    }
}

// === impl Incoming ===

impl Incoming<'_> {
    /// Receives what is there, of this frame only, and returns whether anything was.
    fn advance(&mut self) -> io::Result<bool> {
        let before = self.received;
        while self.received < HEAD_BYTES + self.floats.len() {
            let head = IoSliceMut::new(&mut self.head[self.received.min(HEAD_BYTES)..]);
            let floats = IoSliceMut::new(&mut self.floats[self.received.saturating_sub(HEAD_BYTES)..]);
            match moved(self.stream.read_vectored(&mut [head, floats]))? {
                Some(received) => self.received += received,
                None => break,
            }
        }
        Ok(self.received > before)
    }

    /// The call that the peer makes, once it is known.
    fn call(&self) -> Option<Call> {
        (self.received >= HEAD_BYTES).then(|| Call::decode(bytemuck::cast(self.head)))
    }
}

/// The bytes that a read or write moved; `None`: it would have blocked.
fn moved(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // An interrupted call moved nothing; the frame's next turn makes it again.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}
