//! Liveness: whether the processes of the other ranks still run, as the kernel knows it.

use std::time::Duration;

use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::OwnedFd,
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::desk::Tenant;
use crate::member::timespec;

/// Watches the processes of peers through process file descriptors, which, unlike process ids, never come to mean
/// another process.
///
/// A peer in this very process, or in another process-id namespace (another container that shares this one's memory),
/// is not watched: it is seen to leave, and its death is the failure detector's to see.
pub(crate) struct Liveness {
    /// By rank.
    processes: Vec<Option<OwnedFd>>,
}

/// The process has ended already.
#[derive(Debug)]
pub(crate) struct Dead;

// === impl Liveness ===

impl Liveness {
    pub(crate) fn new(world_size: usize) -> Self {
        Self { processes: (0..world_size).map(|_| None).collect() }
    }

    /// Watches `tenant` for rank `peer`.
    pub(crate) fn watch(&mut self, peer: usize, tenant: &Tenant) -> Result<(), Dead> {
        let this = Tenant::this_process();
        if tenant.pid == this.pid || tenant.pid_namespace != this.pid_namespace {
            return Ok(());
        }
        let Some(pid) = i32::try_from(tenant.pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => self.processes[peer] = Some(process),
            Err(Errno::SRCH) => return Err(Dead),
            // An old kernel, or no file descriptors left: the failure detector has to do.
            Err(_) => {}
        }
        Ok(())
    }

    /// Whether rank `peer`'s process has ended.
    pub(crate) fn is_dead(&self, peer: usize) -> bool {
        let Some(process) = &self.processes[peer] else { return false };
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        poll(&mut polled, Some(&timespec(Duration::ZERO))).is_ok_and(|ended| ended > 0)
    }
}
