//! Statuses: the only place of this crate that makes a `tonic::Status`, from the table in [`lockstep_proto::error`].

use lockstep_proto::error::{Error, Reason};
use tonic::Status;

/// The status that says `error` on the wire. What is our own fault is logged here, where it is handled.
pub(crate) fn of(error: Error) -> Status {
    if error.reason() == Reason::Internal {
        tracing::error!(error = %error, "request failed");
    }
    error.into()
}
