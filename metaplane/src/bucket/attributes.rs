//! Between object metadata and the state machine's attributes.

use ebb_dataplane_protocol::ClusterId;
use ebb_metaplane_protocol::flush::{ForeignObject, IngestAttrs, LinkTag, More, StorePlan};
use ebb_metaplane_protocol::xattr::{self, Xattrs};
use ebb_metaplane_protocol::{Attr, FileKind, FsResult, Time};
use ebb_s3::attributes::XATTRS;
use ebb_s3::{Attributes, Bucket, EbbTag, LinkMark, ListedObject, Metadata, ObjectInfo, Timestamp};

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
        more: More::None,
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
    let xattrs = xattrs_of(&info.metadata);
    let link = LinkMark::from_metadata(key, &info.metadata).map(|m| LinkTag {
        cluster: m.cluster,
        file: m.file,
        content: m.content,
        meta_version: m.meta_version,
    });
    if attrs.kind == FileKind::Symlink {
        if info.size == 0 || info.size > TARGET_BYTES_MAX {
            // No link of ours, nor one that can be made: shown as the file it is.
            attrs.kind = FileKind::File;
            attrs.more = More::of(None, xattrs, link);
            return Ok(attrs);
        }
        let target = bucket
            .get_bytes(key, Some(&info.etag), 0..info.size)
            .await
            .map_err(|e| super::fs_error(&e))?;
        attrs.more = More::of(Some(target.to_vec()), xattrs, link);
    } else {
        attrs.more = More::of(None, xattrs, link);
    }
    Ok(attrs)
}

/// Extended attributes from an object's metadata: none if anybody wrote there what is not ours.
fn xattrs_of(metadata: &Metadata) -> Xattrs {
    metadata.get(XATTRS).and_then(|text| xattr::of_text(text)).unwrap_or_default()
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
            FileKind::File | FileKind::HardLink => ebb_s3::FileKind::File,
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
    if !plan.xattrs.is_empty() {
        metadata.insert(XATTRS.to_owned(), xattr::text(&plan.xattrs));
    }
    if let Some(l) = plan.link {
        let mark = LinkMark {
            cluster: cluster.0,
            file: l.file,
            content: l.content,
            meta_version: l.meta_version,
        };
        mark.write_to(&plan.key, &mut metadata);
    }
    metadata
}

/// Whether an object is one of ours by one of these attempts.
pub(crate) fn is_ours(cluster: ClusterId, info: &ObjectInfo, nonces: &[u128]) -> bool {
    EbbTag::from_metadata(&info.metadata)
        .is_some_and(|tag| tag.cluster == cluster.0 && nonces.contains(&tag.nonce))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::control::PutCondition;
    use ebb_dataplane_protocol::{ContentId, FileView, Generation, InodeId, Lineage};
    use ebb_metaplane_protocol::xattr::{XATTRS_TEXT_BYTES_MAX, XattrMode};

    /// What S3 allows, names and values together.
    const USER_METADATA_BYTES_MAX: usize = 2_048;

    /// Everything at its longest, with room to spare for what a later version says; some count the names of the headers.
    #[test]
    fn an_objects_metadata_is_never_too_long() {
        let mut xattrs = Xattrs::new();
        let room = XATTRS_TEXT_BYTES_MAX - "user.a=".len();
        xattr::change(&mut xattrs, b"user.a", Some(&vec![b'x'; room]), XattrMode::Any)
            .expect("to the last byte");
        let attr = Attr {
            inode: InodeId(u64::MAX),
            kind: FileKind::Symlink,
            mode: 0o7777,
            uid: u32::MAX,
            gid: u32::MAX,
            nlink: 1,
            size: u64::MAX,
            atime: Time(i64::MIN),
            mtime: Time(i64::MIN),
            ctime: Time(i64::MIN),
            generation: Generation(u64::MAX),
            content: ContentId(u64::MAX),
            lineage: Lineage(u64::MAX),
            dirty: true,
            xattrs: true,
        };
        let plan = StorePlan {
            inode: InodeId(u64::MAX),
            generation: Generation(u64::MAX),
            attr,
            key: "k".repeat(1_024),
            condition: PutCondition::None,
            nonce: u128::MAX,
            view: FileView::default(),
            has_data: true,
            target: None,
            xattrs: xattrs.clone(),
            link: Some(LinkTag {
                cluster: 0,
                file: u64::MAX,
                content: u64::MAX,
                meta_version: u64::MAX,
            }),
        };
        let metadata = metadata_of(ClusterId(u128::MAX), &plan);
        let header = |name: &String| "x-amz-meta-".len() + name.len();
        let bytes: usize = metadata.iter().map(|(name, value)| header(name) + value.len()).sum();
        assert!(bytes + 64 <= USER_METADATA_BYTES_MAX, "{bytes}");
        assert!(metadata.values().all(|v| v.bytes().all(|b| b.is_ascii_graphic())));
        assert_eq!(xattrs_of(&metadata), xattrs);
    }

    #[test]
    fn what_strangers_write_there_is_no_attribute() {
        for bad in ["nonsense", "user.a=1,user.a=2", "user.a=\u{1F600}", &"x".repeat(100_000)] {
            let metadata = [(XATTRS.to_owned(), bad.to_owned())].into();
            assert_eq!(xattrs_of(&metadata), Xattrs::new());
        }
    }
}
