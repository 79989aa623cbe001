//! Between object metadata and the state machine's attributes.

use ebb_dataplane_protocol::ClusterId;
use ebb_metaplane_protocol::flush::{ForeignObject, IngestAttrs, StorePlan};
use ebb_metaplane_protocol::{Attr, FileKind, FsResult, Time};
use ebb_s3::{Attributes, Bucket, EbbTag, ListedObject, Metadata, ObjectInfo, Timestamp};

/// Longest target of a symbolic link.
const TARGET_BYTES_MAX: u64 = 4095;

fn kind(kind: ebb_s3::FileKind) -> FileKind {
    match kind {
        ebb_s3::FileKind::File => FileKind::File,
        ebb_s3::FileKind::Directory => FileKind::Directory,
        ebb_s3::FileKind::Symlink => FileKind::Symlink,
    }
}

/// What a LIST shows of a file.
pub(crate) fn of_listed(object: &ListedObject) -> IngestAttrs {
    of(&Attributes::default_for(&object.key, Timestamp::from(object.last_modified)), false)
}

/// A directory that is only known by the keys below it.
pub(crate) fn of_prefix(complete: bool) -> IngestAttrs {
    of(&Attributes::default_for("/", Timestamp(0)), complete)
}

fn of(a: &Attributes, complete: bool) -> IngestAttrs {
    IngestAttrs {
        kind: kind(a.kind),
        mode: a.permissions,
        uid: a.uid,
        gid: a.gid,
        mtime: Time(a.mtime.0),
        target: None,
        complete,
    }
}

/// Full attributes from a HEAD; fetches the target of a link.
pub(crate) async fn of_object(
    bucket: &Bucket,
    key: &str,
    info: &ObjectInfo,
) -> FsResult<IngestAttrs> {
    let fallback = Attributes::default_for(key, Timestamp::from(info.last_modified));
    let found = Attributes::from_metadata(key, &info.metadata, &fallback);
    let mut attrs = of(&found, true);
    if attrs.kind == FileKind::Symlink {
        if info.size == 0 || info.size > TARGET_BYTES_MAX {
            // No link of ours, nor one that can be made: shown as the file it is.
            attrs.kind = FileKind::File;
            return Ok(attrs);
        }
        let target = bucket
            .get_bytes(key, Some(&info.etag), 0..info.size)
            .await
            .map_err(|e| super::fs_error(&e))?;
        attrs.target = Some(target.to_vec());
    }
    Ok(attrs)
}

/// A stranger's object.
pub(crate) async fn foreign(
    bucket: &Bucket,
    key: &str,
    info: &ObjectInfo,
) -> FsResult<ForeignObject> {
    Ok(ForeignObject {
        etag: info.etag.as_str().to_owned(),
        size: info.size,
        attrs: of_object(bucket, key, info).await?,
    })
}

fn of_attr(attr: &Attr) -> Attributes {
    Attributes {
        kind: match attr.kind {
            FileKind::File => ebb_s3::FileKind::File,
            FileKind::Directory => ebb_s3::FileKind::Directory,
            FileKind::Symlink => ebb_s3::FileKind::Symlink,
        },
        permissions: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        mtime: Timestamp(attr.mtime.0),
        atime: Timestamp(attr.atime.0),
    }
}

/// The metadata of an object that a plan writes, the nonce included.
pub(crate) fn metadata_of(cluster: ClusterId, plan: &StorePlan) -> Metadata {
    let mut metadata = of_attr(&plan.attr).to_metadata();
    let tag = EbbTag {
        cluster: cluster.0,
        inode: plan.inode.0,
        generation: plan.generation.0,
        nonce: plan.nonce,
    };
    tag.write_to(&mut metadata);
    metadata
}

/// Whether an object is one of ours by one of these attempts.
pub(crate) fn is_ours(cluster: ClusterId, info: &ObjectInfo, nonces: &[u128]) -> bool {
    EbbTag::from_metadata(&info.metadata)
        .is_some_and(|tag| tag.cluster == cluster.0 && nonces.contains(&tag.nonce))
}
