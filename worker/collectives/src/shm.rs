//! The shared-memory transport: ranks are processes of one host.
//!
//! Rank 0 [creates](Segment::create) a segment of POSIX shared memory for each epoch, tells the others its name, and
//! [waits](Segment::meet) for them; they [`attach`]. Once all have come the name is removed, so that the memory lives
//! exactly as long as the processes that map it, however those end.
//!
//! What can stay behind: a segment whose creator was killed before all ranks had attached. Its creator held a lock on
//! it, which the kernel has released since, and by which [`remove_stale`] tells it from one that is in use.

use std::{fmt::Display, fs::File, io, sync::Arc, time::Instant};

use rustix::{
    fs::{FallocateFlags, FlockOperation, Mode, fallocate, flock, fstat},
    shm::{self, OFlags},
};

use crate::{
    CollectiveError, Endpoint, Member,
    member::Interruption,
    slots::{Region, Slots, Title, Unmet},
};

/// A segment that rank 0 has created and that still has its name. Dropping it removes the name.
#[derive(Debug)]
pub struct Segment {
    named: Named,
    member: Member,
    slots: Slots,
}

/// A segment's name, for as long as it exists.
#[derive(Debug)]
struct Named {
    name: String,
    /// Locked, so that others see that the creator lives.
    file: File,
}

/// Longest name of a segment, in bytes. A file's name has at most 255.
const NAME_LEN_MAX: usize = 200;

/// Where Linux shows the segments as files.
const DIRECTORY: &str = "/dev/shm";

const TRANSPORT: &str = "shm";

/// Attaches to the segment `name` and waits until all other ranks have.
///
/// # Errors
///
/// [`CollectiveError::Setup`] if there is no such segment, if it belongs to another epoch or world size, if this rank
/// has attached before, or naming the rank that has not come by `deadline` or has left; [`CollectiveError::Aborted`].
pub fn attach(name: &str, member: Member, deadline: Instant) -> Result<Endpoint, CollectiveError> {
    member.validate(TRANSPORT)?;
    check_name(name)?;
    let file = shm::open(name, OFlags::RDWR, Mode::empty()).map_err(failed("open", name))?;
    let region = Region::map(&File::from(file), member.world_size).map_err(failed("map", name))?;
    let expected = Title { epoch: member.epoch, world_size: member.world_size };
    match region.title() {
        Some(found) if found == expected => {}
        Some(found) => return Err(setup(format!("segment {name} is of {found}, expected {expected}"))),
        None => return Err(setup(format!("{name} is not a segment of this version"))),
    }
    let slots = take(region, &member, name)?;
    meet(slots, member, name, deadline)
}

/// Removes segments whose names begin with `prefix` and whose creators are dead. Returns how many there were.
///
/// # Errors
///
/// If the segments cannot be listed.
pub fn remove_stale(prefix: &str) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(DIRECTORY)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(prefix)) else { continue };
        // Whoever removes it at the same time, or owns it, is welcome to.
        let Ok(file) = shm::open(name, OFlags::RDWR, Mode::empty()) else { continue };
        let creator_is_dead = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if creator_is_dead && shm::unlink(name).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

// === impl Segment ===

impl Segment {
    /// Creates the segment `name` for `member`'s group and sits down in it as `member`.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] if the name is in use or cannot be one, or if memory is short.
    pub fn create(name: &str, member: Member) -> Result<Self, CollectiveError> {
        member.validate(TRANSPORT)?;
        check_name(name)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR;
        let file = shm::open(name, flags, Mode::RUSR | Mode::WUSR).map_err(failed("create", name))?;
        // From here on an error removes the name.
        let named = Named { name: name.to_owned(), file: File::from(file) };
        flock(&named.file, FlockOperation::NonBlockingLockExclusive).map_err(failed("lock", name))?;
        // Until it was locked, another leader's `remove_stale` could take it for an abandoned one.
        if fstat(&named.file).map_err(failed("inspect", name))?.st_nlink == 0 {
            return Err(setup(format!("segment {name} was removed by somebody else")));
        }
        // Unlike a mere change of length it fails now, not with a fatal signal later, if memory is short.
        let size_bytes = Region::size_bytes(member.world_size) as u64;
        fallocate(&named.file, FallocateFlags::empty(), 0, size_bytes).map_err(failed("allocate", name))?;
        let region = Region::map(&named.file, member.world_size).map_err(failed("map", name))?;
        region.set_title(Title { epoch: member.epoch, world_size: member.world_size });
        let slots = take(region, &member, name)?;
        Ok(Self { named, member, slots })
    }

    /// What the other ranks need in order to [`attach`].
    pub fn name(&self) -> &str {
        &self.named.name
    }

    /// Waits until all other ranks have attached, then removes the name.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] naming the rank that has not come by `deadline` or has left;
    /// [`CollectiveError::Aborted`].
    pub fn meet(self, deadline: Instant) -> Result<Endpoint, CollectiveError> {
        meet(self.slots, self.member, &self.named.name, deadline)
    }
}

// === impl Named ===

impl Drop for Named {
    fn drop(&mut self) {
        // Somebody may have tidied up by hand; nothing is left to do then.
        let _already_removed = shm::unlink(self.name.as_str());
    }
}

fn take(region: Region, member: &Member, name: &str) -> Result<Slots, CollectiveError> {
    Slots::take(Arc::new(region), member.clone())
        .map_err(|_taken| setup(format!("segment {name}: rank {} has attached before", member.rank)))
}

fn meet(mut slots: Slots, member: Member, name: &str, deadline: Instant) -> Result<Endpoint, CollectiveError> {
    slots.meet(&member.patience_until(deadline)).map_err(|Unmet { rank, interruption }| match interruption {
        Interruption::Aborted => CollectiveError::Aborted,
        Interruption::TimedOut => setup(format!("segment {name}: rank {rank} did not attach in time")),
        Interruption::PeerGone => setup(format!("segment {name}: rank {rank} has left")),
    })?;
    Ok(Endpoint::new(member, slots))
}

/// A name comes from the leader, so it must not reach files elsewhere.
fn check_name(name: &str) -> Result<(), CollectiveError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.len() <= NAME_LEN_MAX
        && name.bytes().all(plain)
    {
        return Ok(());
    }
    Err(setup(format!(
        "{name:?} cannot name a segment: 1 to {NAME_LEN_MAX} letters, digits, '-', '_' and '.', a letter or digit first"
    )))
}

fn failed<E: Display>(verb: &'static str, name: &str) -> impl Fn(E) -> CollectiveError {
    move |error| setup(format!("cannot {verb} segment {name}: {error}"))
}

fn setup(reason: String) -> CollectiveError {
    CollectiveError::Setup { transport: TRANSPORT, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments are visible to the whole machine, so every test run has names of its own.
    fn unique(name: &str) -> String {
        format!("lockstep-test-{}-{name}", std::process::id())
    }

    fn check_refused(result: Result<Endpoint, CollectiveError>, reason: &str) {
        let error = result.expect_err("refused").to_string();
        assert!(error.contains(reason), "{error}");
    }

    fn member(rank: usize) -> Member {
        Member { epoch: 7, rank, world_size: 2, ..Member::default() }
    }

    #[test]
    fn a_segment_of_another_epoch_or_size_is_refused_by_name() {
        let name = unique("title");
        let _segment = Segment::create(&name, member(0)).unwrap();
        let now = Instant::now();
        let reason = "is of epoch 7 for 2 ranks, expected epoch 8 for 2 ranks";
        check_refused(attach(&name, Member { epoch: 8, ..member(1) }, now), reason);
        check_refused(attach(&name, Member { world_size: 3, ..member(1) }, now), "bytes, expected");
        check_refused(attach(&name, member(0), now), "rank 0 has attached before");
        check_refused(Segment::create(&name, member(0)).and_then(|again| again.meet(now)), "cannot create segment");
        check_refused(attach(&unique("absent"), member(1), now), "cannot open segment");
        check_refused(attach("../etc/passwd", member(1), now), "cannot name a segment");
        check_refused(attach("", member(1), now), "cannot name a segment");
    }

    #[test]
    fn a_segment_in_use_is_not_stale_and_its_name_goes_with_it() {
        let name = unique("stale");
        let segment = Segment::create(&name, member(0)).unwrap();
        assert_eq!(remove_stale(&name).unwrap(), 0);
        let missing = segment.meet(Instant::now()).unwrap_err().to_string();
        assert!(missing.contains("rank 1 did not attach in time"), "{missing}");
        check_refused(attach(&name, member(1), Instant::now()), "cannot open segment");
        // A creator that was killed leaves its segment without a lock.
        drop(shm::open(&name, OFlags::CREATE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap());
        assert_eq!(remove_stale(&name).unwrap(), 1);
        assert_eq!(remove_stale(&name).unwrap(), 0);
    }

    #[test]
    fn an_abort_ends_the_wait_for_the_others() {
        let member = member(0);
        let segment = Segment::create(&unique("abort"), member.clone()).unwrap();
        let waiter = std::thread::spawn(|| segment.meet(Instant::now() + crate::member::DEFAULT_TIMEOUT));
        member.abort.abort();
        assert_eq!(waiter.join().unwrap().unwrap_err(), CollectiveError::Aborted);
    }
}
