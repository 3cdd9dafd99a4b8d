//! Admission: who may call, and how much may be under way at once.
//!
//! A caller shows one of the configured keys (`authorization: Bearer KEY`); without configured keys everyone may call.
//! Requests in flight and the bytes of their prompts are bounded, so that the gateway's memory is (but for HTTP bodies that
//! are being read, which the number of connections and streams bounds). What is over a bound is refused at once: waiting in line is the worker's business, which knows how long the line is.

use std::{fmt, sync::Arc};

use http::{HeaderMap, header::AUTHORIZATION};
use serde::{Deserialize, Serialize, Serializer};
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A key that callers may show. It does not show itself, in logs or in printed settings.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ApiKey(String);

/// What is printed for a key. With its spaces it is none, so printed settings must have theirs put in before they load.
const HIDDEN: &str = "(not shown)";

/// Bounds on what is under way.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionLimits {
    /// Requests in flight.
    pub requests: u32,
    /// Bytes of their messages.
    pub prompt_bytes: u32,
}

/// The gate.
#[derive(Debug)]
pub struct Admission {
    keys: Vec<ApiKey>,
    limits: AdmissionLimits,
    requests: Arc<Semaphore>,
    prompt_bytes: Arc<Semaphore>,
}

/// A request's place; dropping it makes room.
#[derive(Debug)]
pub struct Permit {
    _request: OwnedSemaphorePermit,
    _prompt_bytes: OwnedSemaphorePermit,
}

/// Why a request does not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No key was shown, or not in the form that is asked for.
    #[error("an API key is needed: send it as `authorization: Bearer KEY`")]
    NoKey,
    /// A key was shown that is not configured.
    #[error("the API key is not known")]
    UnknownKey,
    /// The bound on requests is reached.
    #[error("{0} requests are in flight, the most that this gateway takes")]
    Requests(u32),
    /// The bound on prompt bytes would be passed.
    #[error("prompts of {limit} bytes may be in flight, and {bytes} more do not fit now")]
    PromptBytes {
        /// What the request has.
        bytes: usize,
        /// What all may have.
        limit: u32,
    },
}

// === impl ApiKey ===

impl ApiKey {
    /// A key, if the text can be sent in a header: visible ASCII, at least one character.
    pub fn new(text: &str) -> Option<Self> {
        let visible = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        visible.then(|| Self(text.to_owned()))
    }

    /// Whether it can be sent in a header.
    pub fn is_valid(&self) -> bool {
        Self::new(&self.0).is_some()
    }
}

impl Serialize for ApiKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(HIDDEN)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ApiKey(…)")
    }
}

// === impl Admission ===

impl Admission {
    /// A gate for callers with one of `keys`; for everyone if there are none.
    pub fn new(keys: Vec<ApiKey>, limits: AdmissionLimits) -> Self {
        let places = |n: u32| Arc::new(Semaphore::new(usize::try_from(n).unwrap_or(Semaphore::MAX_PERMITS)));
        Self { keys, limits, requests: places(limits.requests), prompt_bytes: places(limits.prompt_bytes) }
    }

    /// The bounds.
    pub fn limits(&self) -> AdmissionLimits {
        self.limits
    }

    /// Whether callers must show a key.
    pub fn needs_key(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Looks at the caller's key.
    ///
    /// # Errors
    /// [`Refused::NoKey`] or [`Refused::UnknownKey`].
    pub fn authenticate(&self, headers: &HeaderMap) -> Result<(), Refused> {
        if self.keys.is_empty() {
            return Ok(());
        }
        let header = headers.get(AUTHORIZATION).ok_or(Refused::NoKey)?;
        let shown = bearer(header.as_bytes()).ok_or(Refused::NoKey)?;
        // Every key is compared, and each over its whole length, so that the time taken tells nothing about any.
        let known = self.keys.iter().fold(Choice::from(0), |known, key| known | key.0.as_bytes().ct_eq(shown));
        if known.into() { Ok(()) } else { Err(Refused::UnknownKey) }
    }

    /// Takes a place for a request whose message has `bytes`.
    ///
    /// # Errors
    /// [`Refused::Requests`] or [`Refused::PromptBytes`].
    pub fn admit(&self, bytes: usize) -> Result<Permit, Refused> {
        let no_bytes = Refused::PromptBytes { bytes, limit: self.limits.prompt_bytes };
        let request = self.requests.clone().try_acquire_owned();
        let bytes = u32::try_from(bytes).map_err(|_| no_bytes)?;
        Ok(Permit {
            _request: request.map_err(|_| Refused::Requests(self.limits.requests))?,
            _prompt_bytes: self.prompt_bytes.clone().try_acquire_many_owned(bytes).map_err(|_| no_bytes)?,
        })
    }
}

/// The key of an `authorization` header; the scheme's name may be in either case (RFC 9110, section 11.1).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = header.split_at_checked(b"bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: AdmissionLimits = AdmissionLimits { requests: 2, prompt_bytes: 100 };

    fn authenticate(keys: &[&str], header: Option<&'static str>) -> Result<(), Refused> {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(AUTHORIZATION, header.parse().unwrap());
        }
        Admission::new(keys.iter().filter_map(|key| ApiKey::new(key)).collect(), LIMITS).authenticate(&headers)
    }

    #[test]
    fn exactly_the_configured_keys_are_let_in() {
        let keys = ["alpha", "beta"];
        assert_eq!(authenticate(&keys, Some("Bearer alpha")), Ok(()));
        assert_eq!(authenticate(&keys, Some("bearer beta")), Ok(()));
        for wrong in ["Bearer Alpha", "Bearer alph", "Bearer alphaa", "Bearer ", "Bearer  alpha", "Bearer alpha "] {
            assert_eq!(authenticate(&keys, Some(wrong)), Err(Refused::UnknownKey), "{wrong:?}");
        }
        for none in [None, Some("Basic alpha"), Some("alpha"), Some("")] {
            assert_eq!(authenticate(&keys, none), Err(Refused::NoKey), "{none:?}");
        }
    }

    #[test]
    fn without_keys_everyone_is_let_in() {
        assert_eq!(authenticate(&[], None), Ok(()));
        assert_eq!(authenticate(&[], Some("Bearer whatever")), Ok(()));
    }

    #[test]
    fn keys_do_not_show_in_logs() {
        let admission = Admission::new(vec![ApiKey::new("alpha").unwrap()], LIMITS);
        assert!(!format!("{admission:?}").contains("alpha"));
    }

    #[test]
    fn requests_and_their_bytes_are_bounded_and_places_come_back() {
        let admission = Admission::new(Vec::new(), LIMITS);
        let first = admission.admit(60).unwrap();
        assert_eq!(admission.admit(41).unwrap_err(), Refused::PromptBytes { bytes: 41, limit: 100 });
        let _second = admission.admit(40).unwrap();
        assert_eq!(admission.admit(0).unwrap_err(), Refused::Requests(2));
        drop(first);
        assert!(admission.admit(60).is_ok());
        assert!(admission.admit(usize::MAX).is_err());
    }
}
