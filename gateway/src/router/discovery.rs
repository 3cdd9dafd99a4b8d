//! Discovery: what a group reports about itself, kept flowing.
//!
//! One task per group holds a `WatchStatus` stream and feeds the router. A group reports at least once a second, so a
//! stream that is silent for longer than its limit is as good as broken: the group is lost until a new one speaks.

use std::{sync::Arc, time::Duration};

use lockstep_proto::worker::v1::WatchStatusRequest;
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::GroupId;
use crate::{backoff::Backoff, groups::Groups};

/// Watches one group, for ever. Dropping the future ends it.
pub async fn watch(groups: Arc<Groups>, group: GroupId, silence: Duration) {
    let mut backoff = Backoff::new();
    loop {
        let cause = follow(&groups, group, silence, &mut backoff).await;
        groups.lost(group);
        let wait = backoff.wait(fastrand::f64());
        tracing::warn!(group = groups.address(group), cause, wait_ms = wait.as_millis(), "a group's reports stopped");
        sleep(wait).await;
    }
}

/// Feeds the router from one stream; answers why the stream ended.
async fn follow(groups: &Groups, group: GroupId, silence: Duration, backoff: &mut Backoff) -> String {
    let mut client = groups.client(group);
    let mut reports = match timeout(silence, client.watch_status(WatchStatusRequest {})).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return describe(&status),
        Err(_) => return format!("no answer for {silence:?}"),
    };
    loop {
        match timeout(silence, reports.message()).await {
            Ok(Ok(Some(report))) => {
                if let Some(status) = report.status {
                    groups.report(group, status);
                    backoff.reset();
                }
            }
            Ok(Ok(None)) => return "the stream ended".to_owned(),
            Ok(Err(status)) => return describe(&status),
            Err(_) => return format!("no report for {silence:?}"),
        }
    }
}

fn describe(status: &tonic::Status) -> String {
    match status.code() {
        Code::Unavailable => "cannot be reached".to_owned(),
        code => format!("{code:?}: {}", status.message()),
    }
}
