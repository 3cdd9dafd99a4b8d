//! A matcher: how far a choice has come under its constraint, and what may come next.

use std::{fmt, sync::Arc, time::Duration};

use llguidance::{CancellationHandle, api::StopReason};

use super::{Constraint, grammar::Grammars, millis, one_line};
use crate::sampler::TokenMask;

/// What a matcher may take for a token in the long run. Usual constraints take 0.05 to 0.5 ms for a vocabulary of 128
/// thousand; a step waits for what is not ready when it ends.
const TIME_PER_TOKEN: Duration = Duration::from_millis(20);
/// What it may take for some tokens beyond that, until others have made up for it.
const TIME_BURST: Duration = Duration::from_millis(500);

/// What may follow a choice's tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// One of these.
    Tokens(TokenMask),
    /// Nothing: the text is complete.
    Nothing,
}

/// See the module's documentation. Clones go on independently.
#[derive(Clone)]
pub struct Matcher {
    /// Large, and often moved.
    inner: Box<llguidance::Matcher>,
    /// The token by which llguidance says that the text may end.
    end: u32,
    stop_token_ids: Arc<[u32]>,
    /// Time that it may still take.
    credit: Duration,
}

impl Matcher {
    /// A matcher before its first token, and what that may be. Where the text may end, one of `stop_token_ids` may come.
    ///
    /// # Errors
    /// What is wrong with the constraint, in one line.
    pub fn new(grammars: &Grammars, constraint: &Constraint, stop_token_ids: &[u32]) -> Result<(Self, Next), String> {
        let inner = Box::new(grammars.compile(constraint)?);
        let mut matcher =
            Self { inner, end: grammars.end(), stop_token_ids: stop_token_ids.into(), credit: TIME_BURST };
        match matcher.next()? {
            Next::Nothing => Err("allows no text but the empty one".into()),
            next => Ok((matcher, next)),
        }
    }

    /// Takes in the token that was chosen, which is none of `stop_token_ids`; says what may follow.
    ///
    /// # Errors
    /// That it cannot go on, in one line: the constraint allows no way on, or is too complex.
    pub fn advance(&mut self, token_id: u32) -> Result<Next, String> {
        self.inner.consume_token(token_id).map_err(|error| one_line(&error))?;
        self.next()
    }

    /// Pays for the time that it took over a token.
    ///
    /// # Errors
    /// That it takes too long.
    pub fn pay(&mut self, took: Duration) -> Result<(), String> {
        let credit = (self.credit + TIME_PER_TOKEN).min(TIME_BURST);
        self.credit = credit.checked_sub(took).ok_or_else(|| {
            format!("takes over {} a token, and {} at once", millis(TIME_PER_TOKEN), millis(TIME_BURST))
        })?;
        Ok(())
    }

    /// Ends what it does on another thread.
    pub(super) fn cancellation(&self) -> CancellationHandle {
        self.inner.cancellation_handle().unwrap_or_default()
    }

    fn next(&mut self) -> Result<Next, String> {
        match self.inner.stop_reason() {
            StopReason::NotStopped => {}
            StopReason::NoExtension => return Ok(Next::Nothing),
            other => return Err(one_line(&other)),
        }
        let allowed = match self.inner.compute_mask() {
            Ok(allowed) => allowed,
            // It keeps the reason in the text alone.
            Err(error) if error.to_string().starts_with(&StopReason::NoExtensionBias.to_string()) => {
                return Err(no_way_on());
            }
            Err(error) => return Err(one_line(&error)),
        };
        let may_end = allowed.is_allowed(self.end);
        let mut mask = TokenMask::new(allowed.as_slice().to_vec());
        mask.set(self.end, false);
        if mask.is_empty() {
            return if may_end { Ok(Next::Nothing) } else { Err(no_way_on()) };
        }
        if may_end {
            self.stop_token_ids.iter().for_each(|id| mask.set(*id, true));
        }
        Ok(Next::Tokens(mask))
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").field("credit", &self.credit).finish_non_exhaustive()
    }
}

fn no_way_on() -> String {
    "allows no text that goes on from here".into()
}

#[cfg(test)]
mod tests;
