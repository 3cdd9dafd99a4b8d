//! Recycled memory: what a step no longer needs goes to where the next one takes it from, so that ops allocate nothing
//! once the largest step has been seen. (The rows of the embedding come from outside.)

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

/// Things of one kind that wait at home; any more are dropped. A layer has about ten in use at a time.
const MAX_AT_HOME: usize = 16;

/// Where things go when they are dropped.
#[derive(Debug)]
pub(super) struct Home<T>(Arc<Mutex<Vec<T>>>);

/// A thing that goes home when it is dropped.
#[derive(Debug)]
pub struct Recycled<T: Default> {
    thing: T,
    home: Home<T>,
}

// === impl Home ===

impl<T> Default for Home<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Home<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Default> Home<T> {
    /// The thing that came home last, whatever it holds, or a new one.
    pub(super) fn take(&self, new: impl FnOnce() -> T) -> Recycled<T> {
        let waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        self.adopt(waiting.unwrap_or_else(new))
    }

    /// Lets a thing from elsewhere come home later.
    pub(super) fn adopt(&self, thing: T) -> Recycled<T> {
        Recycled { thing, home: self.clone() }
    }
}

// === impl Recycled ===

impl<T: Default> Deref for Recycled<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.thing
    }
}

impl<T: Default> DerefMut for Recycled<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.thing
    }
}

impl<T: Default> Drop for Recycled<T> {
    fn drop(&mut self) {
        let mut waiting = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MAX_AT_HOME {
            waiting.push(std::mem::take(&mut self.thing));
        }
    }
}
