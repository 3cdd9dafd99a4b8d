//! An [`Announcement`] is the line by which a service says where it listens, once its ports are bound.
//!
//! Ports may be chosen by the system (port 0), so supervisors and tests read them from the service's stdout:
//!
//! ```text
//! lockstep-gateway listening grpc=127.0.0.1:43211 http=127.0.0.1:43212 metrics=127.0.0.1:43213
//! ```

use std::{fmt, net::SocketAddr, str::FromStr};

/// Where a service listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Its short name: `gateway` for the program `lockstep-gateway`.
    pub service: String,
    /// Where it answers gRPC.
    pub grpc: SocketAddr,
    /// Where it answers HTTP, if it does.
    pub http: Option<SocketAddr>,
    /// Where it answers `/metrics`, if it does.
    pub metrics: Option<SocketAddr>,
}

/// A line that is no announcement, such as any other output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an announcement")]
pub struct NotAnnouncement;

// === impl Announcement ===

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lockstep-{} listening grpc={}", self.service, self.grpc)?;
        self.http.map_or(Ok(()), |http| write!(f, " http={http}"))?;
        self.metrics.map_or(Ok(()), |metrics| write!(f, " metrics={metrics}"))
    }
}

impl FromStr for Announcement {
    type Err = NotAnnouncement;

    fn from_str(line: &str) -> Result<Self, NotAnnouncement> {
        let (program, addresses) = line.trim_end().split_once(" listening grpc=").ok_or(NotAnnouncement)?;
        let service = program.strip_prefix("lockstep-").ok_or(NotAnnouncement)?;
        let mut addresses = addresses.split(' ');
        let grpc = addresses.next().ok_or(NotAnnouncement)?.parse().map_err(|_| NotAnnouncement)?;
        let mut announcement = Self { service: service.to_owned(), grpc, http: None, metrics: None };
        for address in addresses {
            let (port, address) = address.split_once('=').ok_or(NotAnnouncement)?;
            let address = Some(address.parse().map_err(|_| NotAnnouncement)?);
            match port {
                "http" => announcement.http = address,
                "metrics" => announcement.metrics = address,
                _ => return Err(NotAnnouncement),
            }
        }
        Ok(announcement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcement_reads_back() {
        for metrics in [None, Some("[::1]:2".parse().unwrap())] {
            for http in [None, Some("127.0.0.1:3".parse().unwrap())] {
                let grpc = "127.0.0.1:1".parse().unwrap();
                let sent = Announcement { service: "tokenizer-svc".into(), grpc, http, metrics };
                assert_eq!(format!("{sent}\n").parse(), Ok(sent));
            }
        }
    }

    #[test]
    fn other_lines_are_no_announcement() {
        for line in ["", "listening grpc=127.0.0.1:1", "lockstep-x listening grpc=here", "lockstep-x ready"] {
            assert_eq!(line.parse::<Announcement>(), Err(NotAnnouncement), "{line}");
        }
        assert!("lockstep-x listening grpc=127.0.0.1:1 metrics=none".parse::<Announcement>().is_err());
    }
}
