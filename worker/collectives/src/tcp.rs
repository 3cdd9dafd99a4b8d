//! The TCP transport: ranks are processes on several hosts.
//!
//! Every rank [binds](Listener::bind) a listener, the ranks learn one another's addresses by other means, and then each
//! [connects](Listener::connect) to all others: it dials the lower ranks and accepts the higher ones. A connection
//! begins with a handshake; those who do not know the epoch, the world size and the ranks are dropped.
//!
//! A peer's death shows as the end of its connections if its host lives on. A host that vanishes sends nothing, so it
//! is the failure detector that sees it, and aborts.

mod handshake;
mod mesh;

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

use self::{
    handshake::{Caller, Reception},
    mesh::Mesh,
};
use crate::{
    CollectiveError, Endpoint, Member,
    member::{Interruption, Patience},
};

/// Where a rank can be reached by the others, before and between epochs.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

/// Longest attempt to open a connection, after which the deadline and the abort are looked at again.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two attempts, and longest wait between two looks at the abort, during set-up.
const SETUP_INTERVAL: Duration = Duration::from_millis(20);

const TRANSPORT: &str = "tcp";

// === impl Listener ===

impl Listener {
    /// Listens at `address`, `host:port`; port 0 stands for any free one.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] if the address cannot be had.
    pub fn bind(address: &str) -> Result<Self, CollectiveError> {
        let failed = |error: io::Error| setup(format!("cannot listen at {address}: {error}"));
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects `member` to all others. `addresses[r]`, `host:port`, is where rank `r` listens; the one at this rank is
    /// not used.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] naming a rank that could not be reached, or did not call, by `deadline`;
    /// [`CollectiveError::Aborted`], at most a second after the abort.
    pub fn connect(
        &self,
        member: Member,
        addresses: &[String],
        deadline: Instant,
    ) -> Result<Endpoint, CollectiveError> {
        member.validate(TRANSPORT)?;
        if addresses.len() != member.world_size {
            return Err(setup(format!("{} addresses for {} ranks", addresses.len(), member.world_size)));
        }
        let patience = member.patience_until(deadline);
        let mut streams: Vec<Option<TcpStream>> = (0..member.world_size).map(|_| None).collect();
        for (rank, address) in addresses.iter().enumerate().take(member.rank) {
            streams[rank] = Some(dial(&member, rank, address, &patience)?);
        }
        self.accept(&member, &mut streams, &patience)?;
        Ok(Endpoint::new(member.clone(), Mesh::new(member, streams)))
    }

    /// Takes calls until all higher ranks are among them.
    fn accept(
        &self,
        member: &Member,
        streams: &mut [Option<TcpStream>],
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        let mut reception = Reception::default();
        while let Some(missing) = (member.rank + 1..member.world_size).find(|&rank| streams[rank].is_none()) {
            let left = patience.left().map_err(|interruption| match interruption {
                Interruption::Aborted => CollectiveError::Aborted,
                _ => setup(format!("rank {missing} did not call in time")),
            })?;
            reception.admit(&self.listener);
            for Caller { rank, stream } in reception.greet(member) {
                // A rank that calls again has given its first call up.
                streams[rank] = Some(stream);
            }
            reception.wait(&self.listener, left.min(SETUP_INTERVAL));
        }
        Ok(())
    }
}

/// Calls rank `peer` until it answers.
fn dial(member: &Member, peer: usize, address: &str, patience: &Patience) -> Result<TcpStream, CollectiveError> {
    let mut problem = io::Error::from(io::ErrorKind::TimedOut);
    loop {
        let left = patience.left().map_err(|interruption| match interruption {
            Interruption::Aborted => CollectiveError::Aborted,
            _ => setup(format!("rank {peer} at {address}: {problem}")),
        })?;
        match call(member, peer, address, left.min(DIAL_TIMEOUT), patience) {
            Ok(stream) => return Ok(stream),
            Err(error) => problem = error,
        }
        thread::sleep(left.min(SETUP_INTERVAL));
    }
}

/// Calls rank `peer` once. Having got through, it waits for the answer as long as there is patience: a peer answers
/// only once it has itself got through to the ranks below.
fn call(member: &Member, peer: usize, address: &str, limit: Duration, patience: &Patience) -> io::Result<TcpStream> {
    let mut last_error = io::Error::other("the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => return handshake::introduce(stream, member, peer, patience),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

fn setup(reason: String) -> CollectiveError {
    CollectiveError::Setup { transport: TRANSPORT, reason }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::Shutdown};

    use super::*;
    use crate::Collective;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn member(rank: usize) -> Member {
        Member { epoch: 3, rank, world_size: 2, ..Member::default() }
    }

    #[test]
    fn strangers_are_dropped_and_do_not_keep_the_ranks_apart() {
        let listeners: Vec<Listener> = (0..2).map(|_| Listener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
        let _silent = TcpStream::connect(&addresses[0]).unwrap();
        let mut rude = TcpStream::connect(&addresses[0]).unwrap();
        rude.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").unwrap();
        TcpStream::connect(&addresses[0]).unwrap().shutdown(Shutdown::Both).unwrap();
        let deadline = Instant::now() + TIMEOUT;
        thread::scope(|scope| {
            let (first, second) = (&listeners[0], &listeners[1]);
            // Of an epoch that nobody else is in: it must not get through, and must not disturb.
            let lost = Member { epoch: 2, abort: crate::AbortHandle::new(), ..member(1) };
            let abort = lost.abort.clone();
            let lost = scope.spawn(|| Listener::bind("127.0.0.1:0")?.connect(lost, &addresses, deadline));
            let ranks = [
                scope.spawn(|| first.connect(member(0), &addresses, deadline)),
                scope.spawn(|| second.connect(member(1), &addresses, deadline)),
            ];
            let [mut zero, mut one] = ranks.map(|rank| rank.join().unwrap().unwrap());
            scope.spawn(move || one.barrier().unwrap());
            zero.barrier().unwrap();
            abort.abort();
            assert_eq!(lost.join().unwrap().unwrap_err(), CollectiveError::Aborted);
        });
    }

    #[test]
    fn the_rank_that_is_missing_is_named() {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let addresses = [nobody.clone(), nobody];
        let soon = Instant::now() + Duration::from_millis(50);
        let error = listener.connect(member(0), &addresses, soon).unwrap_err().to_string();
        assert!(error.contains("rank 1 did not call in time"), "{error}");
        let soon = Instant::now() + Duration::from_millis(50);
        let error = listener.connect(member(1), &addresses, soon).unwrap_err().to_string();
        assert!(error.contains("rank 0 at 127.0.0.1") && error.contains("refused"), "{error}");
        let error = listener.connect(member(1), &addresses[..1], soon).unwrap_err().to_string();
        assert!(error.contains("1 addresses for 2 ranks"), "{error}");
    }

    #[test]
    fn an_address_that_is_taken_is_named() {
        let taken = Listener::bind("127.0.0.1:0").unwrap().address();
        let _holder = Listener::bind(&taken.to_string()).unwrap();
        let error = Listener::bind(&taken.to_string()).unwrap_err().to_string();
        assert!(error.contains(&taken.to_string()), "{error}");
    }
}
