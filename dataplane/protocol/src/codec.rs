//! `rkyv` with its checks, in one place: what comes from a socket or a disk is validated before use.

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error as Rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

/// Bytes that are not a valid archive of the expected type.
#[derive(Debug, thiserror::Error)]
#[error("malformed {what}: {reason}")]
pub struct Malformed {
    /// The type that was expected.
    pub what: &'static str,
    /// What the validator said.
    pub reason: String,
}

/// Serialises a value. Fails only when memory does.
pub fn encode<T>(value: &T) -> Vec<u8>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Rancor>>,
{
    rkyv::to_bytes::<Rancor>(value).expect("serialising to memory cannot fail").into_vec()
}

/// Validates and deserialises a value; `bytes` need not be aligned.
pub fn decode<T>(bytes: &[u8]) -> Result<T, Malformed>
where
    T: Archive,
    T::Archived:
        for<'a> CheckBytes<HighValidator<'a, Rancor>> + Deserialize<T, HighDeserializer<Rancor>>,
{
    // rkyv wants the archive aligned to its strictest member; sockets and disks do not promise that.
    let mut aligned = AlignedVec::<16>::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    rkyv::from_bytes::<T, Rancor>(&aligned).map_err(|e| Malformed {
        what: std::any::type_name::<T>().rsplit("::").next().unwrap_or("value"),
        reason: e.to_string(),
    })
}
