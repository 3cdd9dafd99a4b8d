//! Containment: the tokenizers library run so that a panic in it becomes an error.
//!
//! Version 0.23 of the library indexes, subtracts and unwraps by what a `tokenizer.json` says, and so panics on hostile
//! ones. A thread of its own catches that, and gives deeply nested descriptions a stack of known size.

use std::{any::Any, thread};

use crate::error::LoadError;

/// Stack of the loading thread. Deserialization recurses at most 128 levels deep (serde_json's limit) with frames of a
/// few hundred bytes, regex compilation a little more.
const STACK_BYTES: usize = 16 << 20;

/// Runs `load` on a thread of its own and waits for it.
///
/// # Errors
/// What `load` returns, or [`LoadError::Panicked`] with the panic's message.
pub(crate) fn contain<T: Send>(load: impl FnOnce() -> Result<T, LoadError> + Send) -> Result<T, LoadError> {
    thread::scope(|scope| {
        let loading = thread::Builder::new().name("load-tokenizer".into()).stack_size(STACK_BYTES);
        let loading = loading
            .spawn_scoped(scope, load)
            .map_err(|source| LoadError::Invalid(format!("cannot start a thread to load it: {source}")))?;
        loading.join().unwrap_or_else(|panic| Err(LoadError::Panicked(message(panic.as_ref()))))
    })
}

/// The text of a panic, on one line.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("the library panicked").lines().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        let outcome = contain::<()>(|| panic!("index {} out of\nbounds", 7));
        assert_eq!(outcome.unwrap_err().to_string(), "the tokenizer's description is malformed: index 7 out of bounds");
    }

    #[test]
    fn a_value_comes_back() {
        assert_eq!(contain(|| Ok(7)).unwrap(), 7);
    }
}
