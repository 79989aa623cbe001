//! Object attributes and tags under attack: anybody may write to a bucket. For `fuzz/` and the mutation test;
//! nothing here is used by a server.

use crate::attributes::{Attributes, EbbTag, Timestamp};
use crate::types::Metadata;

/// The first line is the key, each other one `name=value`.
pub fn attributes(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines();
    let key = lines.next().unwrap_or_default();
    let metadata: Metadata = lines
        .filter_map(|l| l.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let fallback = Attributes::default_for(key, Timestamp(5));
    let found = Attributes::from_metadata(key, &metadata, &fallback);
    let again = Attributes::from_metadata(key, &found.to_metadata(), &fallback);
    assert_eq!(again, found, "what was read is written back");
    assert_eq!(found.mode() & 0o7777, found.permissions);
    let tags = metadata.values().map(String::as_str).chain([&*text]);
    for tag in tags.filter_map(EbbTag::parse) {
        assert_eq!(EbbTag::parse(&tag.to_string()), Some(tag));
    }
    if let Some(tag) = EbbTag::from_metadata(&metadata) {
        let mut written = Metadata::new();
        tag.write_to(&mut written);
        assert_eq!(EbbTag::from_metadata(&written), Some(tag));
    }
}

/// Valid inputs to begin from.
pub fn seeds() -> Vec<Vec<u8>> {
    let tag = EbbTag { cluster: 5, inode: 6, generation: 7, nonce: u128::MAX };
    vec![
        format!(
            "a/f\nfile-permissions=0100644\nfile-owner=500\nfile-group=501\n\
             file-mtime=1595002920000000000ns\nfile-atime=1595002921.5\nebb={tag}\n"
        )
        .into_bytes(),
        b"a/d/\nfile-permissions=0o40755\nfile-mtime=-1595002920000ms\n".to_vec(),
        b"l\nfile-permissions=0120777\nfile-mtime=-0.000000001\n".to_vec(),
        tag.to_string().into_bytes(),
    ]
}
