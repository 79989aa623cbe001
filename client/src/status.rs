//! What a chunk server's status means for the caller: the one table (PROTOCOL §2–6).

use ebb_dataplane_protocol::Status;
use std::time::Duration;

/// What to do next with a data request that was not answered `Ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Show the grant to the core, then send again.
    Present,
    /// Fetch a fresh grant, then send again.
    Regrant,
    /// Fetch the cluster map, then a fresh grant, then send again.
    MapAndRegrant,
    /// Wait, then send again.
    Wait(Duration),
    /// Wait, fetch the map, then send again.
    WaitThenMap(Duration),
    /// The nodes are full: wait while flushing progresses.
    WaitForSpace(Duration),
    /// The object changed underneath: the metadata plane compares it with S3, then a fresh grant
    /// (ESTALE if it was an outside change) and a few more tries, then EIO.
    BackingChanged,
    /// The payload was damaged on the way: send it again.
    SendAgain,
    /// A new connection, then send again.
    Reconnect,
    /// A few more tries, since it may be a race with a change of session or map; then EIO.
    FewTries,
    /// EIO now.
    Fail,
}

/// Pause when the server names none.
const PAUSE_DEFAULT: Duration = Duration::from_millis(20);
/// Longest pause, whatever the server says.
const PAUSE_MAX: Duration = Duration::from_secs(2);

fn pause(retry_after_ms: u32) -> Duration {
    match retry_after_ms {
        0 => PAUSE_DEFAULT,
        ms => Duration::from_millis(ms.into()).min(PAUSE_MAX),
    }
}

/// The table. `None`: it is `Ok`.
pub(crate) fn action(status: Status, retry_after_ms: u32) -> Option<Action> {
    Some(match status {
        Status::Ok => return None,
        Status::NeedGrant => Action::Present,
        Status::StaleView | Status::StaleGeneration => Action::Regrant,
        Status::StaleEpoch => Action::MapAndRegrant,
        Status::NoLease => Action::WaitThenMap(pause(retry_after_ms)),
        Status::Frozen => Action::WaitThenMap(pause(retry_after_ms)),
        Status::Busy => Action::Wait(pause(retry_after_ms)),
        Status::S3Unavailable => Action::Wait(pause(retry_after_ms.max(250))),
        Status::NoSpace => Action::WaitForSpace(pause(retry_after_ms.max(100))),
        Status::BackingChanged => Action::BackingChanged,
        Status::Corrupt => Action::SendAgain,
        Status::Superseded => Action::Reconnect,
        Status::Forbidden | Status::Internal => Action::FewTries,
        Status::Io
        | Status::BadRequest
        | Status::NotLeader
        | Status::Answered
        | Status::NotHere => Action::Fail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ok_is_success_and_every_other_status_has_an_action() {
        for number in 0..64 {
            let Some(status) = Status::from_u16(number) else { continue };
            assert_eq!(action(status, 0).is_none(), status == Status::Ok, "{status:?}");
        }
    }

    #[test]
    fn pauses_are_bounded_whatever_the_server_says() {
        for status in [Status::Busy, Status::Frozen, Status::NoLease, Status::NoSpace] {
            let Some(Action::Wait(d) | Action::WaitThenMap(d) | Action::WaitForSpace(d)) =
                action(status, u32::MAX)
            else {
                panic!("{status:?} waits");
            };
            assert!(d <= PAUSE_MAX && !d.is_zero());
        }
    }
}
