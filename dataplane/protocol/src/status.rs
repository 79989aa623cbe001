//! The outcome of a request, and what the caller does about it.

/// Status of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done; for a write: durable.
    Ok = 0,
    /// Malformed request; the connection closes.
    BadRequest = 1,
    /// Not proved, or a forged grant; the request is refused and counted.
    Forbidden = 2,
    /// The core holds no grant for (inode, session, generation) at this view: present one, retry.
    NeedGrant = 3,
    /// The core knows a newer view of the inode: fetch a fresh grant from the metadata plane.
    StaleView = 4,
    /// The generation is sealed or cut: fetch a fresh grant.
    StaleGeneration = 5,
    /// Another epoch or another owner: fetch the cluster map.
    StaleEpoch = 6,
    /// The core has no live lease for the group: wait `retry_after_ms`.
    NoLease = 7,
    /// The group is changing hands: wait `retry_after_ms`, then fetch the map.
    Frozen = 8,
    /// Too much in flight: wait `retry_after_ms`.
    Busy = 9,
    /// No space and nothing to evict: wait while flushing progresses, else ENOSPC.
    NoSpace = 10,
    /// A device error or a checksum that could not be repaired (I10).
    Io = 11,
    /// The object in S3 is gone or another one (404, 412): fetch a fresh view, retry, else EIO.
    BackingChanged = 12,
    /// S3 does not answer; retry later.
    S3Unavailable = 13,
    /// A superseded connection of the session: reconnect. Of a metadata node: its lead ended while it worked on the
    /// request, which may yet be carried out; the body names who leads.
    Superseded = 14,
    /// A bug or a condition nobody foresaw; the body says more.
    Internal = 15,
    /// This metadata node does not lead: the body names who does.
    NotLeader = 16,
    /// The checksum of a received payload does not match: send again.
    Corrupt = 17,
    /// The session called this write answered before it came: it isn't taken. Nobody should be waiting.
    Answered = 18,
    /// What another node's core asked for is not here (any more): it goes to S3.
    NotHere = 19,
}

impl Status {
    /// The status of a number.
    pub const fn from_u16(v: u16) -> Option<Self> {
        Some(match v {
            0 => Self::Ok,
            1 => Self::BadRequest,
            2 => Self::Forbidden,
            3 => Self::NeedGrant,
            4 => Self::StaleView,
            5 => Self::StaleGeneration,
            6 => Self::StaleEpoch,
            7 => Self::NoLease,
            8 => Self::Frozen,
            9 => Self::Busy,
            10 => Self::NoSpace,
            11 => Self::Io,
            12 => Self::BackingChanged,
            13 => Self::S3Unavailable,
            14 => Self::Superseded,
            15 => Self::Internal,
            16 => Self::NotLeader,
            17 => Self::Corrupt,
            18 => Self::Answered,
            19 => Self::NotHere,
            _ => return None,
        })
    }
}
