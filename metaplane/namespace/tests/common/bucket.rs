//! A bucket that obeys conditions.

use ebb_dataplane_protocol::InodeId;
use ebb_dataplane_protocol::control::PutCondition;
use ebb_metaplane_protocol::flush::LinkTag;
use ebb_metaplane_protocol::xattr::Xattrs;
use ebb_metaplane_protocol::{FileKind, Query, QueryReply, Time};
use ebb_namespace::Machine;
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub etag: String,
    pub body: Vec<u8>,
    pub nonce: Option<u128>,
    pub mode: u32,
    pub kind: FileKind,
    pub mtime: Time,
    pub xattrs: Xattrs,
    /// Of which file it is one of several names, and the key for which that was said.
    pub link: Option<(LinkTag, String)>,
}

/// A bucket that obeys conditions.
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    pub objects: BTreeMap<String, Object>,
    pub puts: u64,
    /// Bodies of strangers.
    pub foreign: Vec<Vec<u8>>,
}

impl Bucket {
    fn holds(&self, key: &str, condition: &PutCondition) -> bool {
        match (condition, self.objects.get(key)) {
            (PutCondition::None, _) | (PutCondition::IfAbsent, None) => true,
            (PutCondition::IfMatch(e), Some(o)) => *e == o.etag,
            _ => false,
        }
    }
    pub fn put(&mut self, key: &str, condition: &PutCondition, mut o: Object) -> bool {
        if !self.holds(key, condition) {
            return false;
        }
        self.puts += 1;
        // As S3 does it: equal content, equal etag.
        o.etag = format!("\"{:02x?}\"", o.body);
        self.objects.insert(key.into(), o);
        true
    }
    pub fn delete(&mut self, key: &str, condition: &PutCondition) -> bool {
        if !self.holds(key, condition) {
            return false;
        }
        self.objects.remove(key);
        true
    }
    pub fn foreign_put(&mut self, key: &str, body: &[u8]) -> String {
        let o = Object {
            etag: String::new(),
            body: body.to_vec(),
            nonce: None,
            mode: 0o644,
            kind: FileKind::File,
            mtime: Time(5),
            xattrs: Xattrs::new(),
            link: None,
        };
        self.foreign.push(body.to_vec());
        self.put(key, &PutCondition::None, o);
        self.objects[key].etag.clone()
    }
}

impl super::World {
    /// The extended attributes of an inode; its attributes say whether there are any.
    pub fn xattrs(&self, inode: InodeId) -> Xattrs {
        let reply = Machine::query(&self.kv, &Query::Xattrs(inode));
        let Ok(QueryReply::Xattrs(xattrs)) = reply else { panic!("{inode}: {reply:?}") };
        assert_eq!(self.attr(inode).xattrs, !xattrs.is_empty());
        xattrs
    }
}
