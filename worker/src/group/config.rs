//! The settings of a group: which rank this is, where the leader is, and how the ranks reach one another.

use std::{net::SocketAddr, time::Duration};

use lockstep_collectives::member::MAX_WORLD_SIZE;
use lockstep_proto::config::{ConfigError, Key};
use serde::{Deserialize, Serialize};

use super::failure_detector::Limits;

/// The keys of [`GroupConfig`], for settings that have it as their field `group`.
pub const KEYS: &[Key] = &[
    Key { path: "group.rank", help: "This worker's rank; 0 leads. Default: 0." },
    Key {
        path: "group.world_size",
        help: "Ranks of the group: processes that share one copy of the model. Default: 1.",
    },
    Key { path: "group.leader", help: "Where rank 0 answers gRPC, host:port; for all ranks but 0. Default: none." },
    Key {
        path: "group.transport",
        help: "How ranks exchange activations: shm (one host), tcp (any hosts), nccl (GPUs of any hosts) or auto (nccl if \
               every rank has a GPU of its own, and shm otherwise). Default: auto.",
    },
    Key {
        path: "group.collective_listen",
        help: "IP address and port where this rank takes the others' tcp connections; port 0 takes a free one. Default: 127.0.0.1:0.",
    },
    Key {
        path: "group.collective_advertise",
        help: "Host under which the others reach group.collective_listen. Default: its IP address.",
    },
    Key {
        path: "group.collective_timeout_ms",
        help: "Longest wait of a rank for the others within a step, and of a follower for its own engine once an epoch has \
               ended; then it exits. Default: 30000. It is the last resort: less may cut a slow rank.",
    },
    Key {
        path: "group.heartbeat_interval_ms",
        help: "Time between two signs of life of a rank. Default: 200. Less costs more calls.",
    },
    Key {
        path: "group.suspect_after_ms",
        help: "Silence after which a rank counts as dead. Default: 1000. Less finds a vanished host sooner and may cut a busy one.",
    },
    Key {
        path: "group.hung_after_ms",
        help: "How long a rank may keep the others waiting for its part of half a layer before it counts as hung. Default: \
               1200. Less finds a hung rank sooner and may cut one that is much slower than the others.",
    },
    Key {
        path: "group.join_timeout_ms",
        help: "How long a rank waits for the group to form before it says who is missing and tries again. Default: 30000.",
    },
];

/// How ranks exchange activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// NCCL if every rank has a GPU of its own, shared memory otherwise.
    #[default]
    Auto,
    /// Shared memory: all ranks on one host.
    Shm,
    /// TCP: ranks on any hosts.
    Tcp,
    /// NCCL: ranks compute on GPUs, on any hosts.
    Nccl,
}

/// The settings of one rank; see [`KEYS`]. Unit of every `_ms`: milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupConfig {
    /// This rank, below the world size; 0 leads.
    pub rank: usize,
    /// The number of ranks.
    pub world_size: usize,
    /// Where rank 0 answers gRPC, `host:port`.
    pub leader: Option<String>,
    /// How ranks exchange activations.
    pub transport: Transport,
    /// Where this rank takes the others' connections, for [`Transport::Tcp`].
    pub collective_listen: SocketAddr,
    /// The host under which the others reach `collective_listen`, if its IP address is not the one.
    pub collective_advertise: Option<String>,
    /// Longest wait of a rank for the others within a step.
    pub collective_timeout_ms: u64,
    /// Time between two signs of life.
    pub heartbeat_interval_ms: u64,
    /// Silence after which a rank counts as dead.
    pub suspect_after_ms: u64,
    /// Standstill of a rank, while others wait for it, after which it counts as hung.
    pub hung_after_ms: u64,
    /// How long a rank waits for the group to form at a time.
    pub join_timeout_ms: u64,
}

// === impl GroupConfig ===

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            leader: None,
            transport: Transport::default(),
            collective_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            collective_advertise: None,
            collective_timeout_ms: 30_000,
            // Five in the time after which a rank is suspected: four may be lost or late.
            heartbeat_interval_ms: 200,
            // A request must fail within two seconds of a rank's death; the other second is for the abort and the way
            // back. A killed process is seen at once anyway, by the end of its connection.
            suspect_after_ms: 1_000,
            // The same two seconds, less three heartbeats: one until the rank is seen behind, one for its next sign of
            // life, one for the detector's turn. Ranks that share a model evenly come to a collective within
            // milliseconds of one another, however long the step takes.
            hung_after_ms: 1_200,
            join_timeout_ms: 30_000,
        }
    }
}

impl GroupConfig {
    /// Checks what the types do not say.
    ///
    /// # Errors
    ///
    /// The first broken rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let invalid = |key: &str, value: &dyn std::fmt::Display, rule: String| {
            Err(ConfigError::invalid(format!("group.{key}"), value, rule))
        };
        if self.world_size == 0 || self.world_size > MAX_WORLD_SIZE {
            return invalid("world_size", &self.world_size, format!("must be 1 to {MAX_WORLD_SIZE}"));
        }
        if self.rank >= self.world_size {
            return invalid("rank", &self.rank, format!("must be below group.world_size, {}", self.world_size));
        }
        if self.rank > 0 && self.leader.is_none() {
            return invalid("leader", &"nothing", format!("rank {} needs the address of rank 0", self.rank));
        }
        if self.transport == Transport::Tcp
            && self.world_size > 1
            && self.collective_listen.ip().is_unspecified()
            && self.collective_advertise.is_none()
        {
            let rule = "nobody can call it; set group.collective_advertise to this host's name".to_owned();
            return invalid("collective_listen", &self.collective_listen, rule);
        }
        if self.hung_after_ms < self.heartbeat_interval_ms {
            let rule = format!("must be at least group.heartbeat_interval_ms, {}", self.heartbeat_interval_ms);
            return invalid("hung_after_ms", &self.hung_after_ms, rule);
        }
        let times = [
            ("collective_timeout_ms", self.collective_timeout_ms),
            ("heartbeat_interval_ms", self.heartbeat_interval_ms),
            ("join_timeout_ms", self.join_timeout_ms),
        ];
        if let Some((key, value)) = times.iter().find(|(_, value)| *value == 0) {
            return invalid(key, value, "must be at least 1".to_owned());
        }
        if self.suspect_after_ms < 2 * self.heartbeat_interval_ms {
            let rule = format!("must be at least twice group.heartbeat_interval_ms, {}", self.heartbeat_interval_ms);
            return invalid("suspect_after_ms", &self.suspect_after_ms, rule);
        }
        Ok(())
    }

    /// [`collective_timeout_ms`](Self::collective_timeout_ms).
    pub fn collective_timeout(&self) -> Duration {
        Duration::from_millis(self.collective_timeout_ms)
    }

    /// [`heartbeat_interval_ms`](Self::heartbeat_interval_ms).
    pub fn heartbeat_interval(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval_ms)
    }

    /// [`suspect_after_ms`](Self::suspect_after_ms).
    pub fn suspect_after(&self) -> Duration {
        Duration::from_millis(self.suspect_after_ms)
    }

    /// When a rank is suspected.
    pub fn detector_limits(&self) -> Limits {
        Limits {
            suspect_after: self.suspect_after(),
            hung_after: Duration::from_millis(self.hung_after_ms),
            turn: self.heartbeat_interval(),
        }
    }

    /// [`join_timeout_ms`](Self::join_timeout_ms).
    pub fn join_timeout(&self) -> Duration {
        Duration::from_millis(self.join_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: GroupConfig, message: &str) {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn every_rule_names_its_key_and_value() {
        let two = || GroupConfig { world_size: 2, ..GroupConfig::default() };
        assert!(two().validate().is_ok());
        check(GroupConfig { world_size: 0, ..two() }, "`group.world_size` = 0");
        check(GroupConfig { world_size: 65, ..two() }, "`group.world_size` = 65");
        check(GroupConfig { rank: 2, ..two() }, "`group.rank` = 2");
        check(GroupConfig { rank: 1, ..two() }, "`group.leader` = nothing");
        check(GroupConfig { join_timeout_ms: 0, ..two() }, "`group.join_timeout_ms` = 0");
        check(GroupConfig { hung_after_ms: 199, ..two() }, "`group.hung_after_ms` = 199");
        check(GroupConfig { suspect_after_ms: 399, ..two() }, "`group.suspect_after_ms` = 399");
        let anywhere = SocketAddr::from(([0, 0, 0, 0], 7000));
        let tcp = GroupConfig { transport: Transport::Tcp, collective_listen: anywhere, ..two() };
        check(tcp.clone(), "`group.collective_listen` = 0.0.0.0:7000");
        assert!(GroupConfig { collective_advertise: Some("worker-0".into()), ..tcp }.validate().is_ok());
    }

    #[test]
    fn every_field_has_its_key() {
        let defaults = serde_json::to_value(GroupConfig::default()).unwrap();
        let fields: Vec<String> = defaults.as_object().unwrap().keys().map(|field| format!("group.{field}")).collect();
        assert_eq!(fields, KEYS.iter().map(|key| key.path).collect::<Vec<_>>());
    }
}
