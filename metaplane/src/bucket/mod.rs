//! What the leader asks of the bucket to answer clients: pages of listings, attributes of objects,
//! whether an object changed. What it finds enters the state machine as commands (PROTOCOL §9).

pub(crate) mod attributes;
pub(crate) mod hydrate;
pub(crate) mod list;
pub(crate) mod look;
pub(crate) mod owner;
pub(crate) mod relist;
pub(crate) mod revalidate;

use ebb_metaplane_protocol::FsError;
use ebb_s3::{ErrorKind, S3Error};

/// A failed S3 call as a client sees it.
pub(crate) fn fs_error(e: &S3Error) -> FsError {
    match e.kind {
        ErrorKind::NotFound => FsError::NotFound,
        ErrorKind::Invalid | ErrorKind::Integrity => FsError::Io(e.to_string()),
        _ => FsError::S3Unavailable(e.to_string()),
    }
}
