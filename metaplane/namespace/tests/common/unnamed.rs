//! Clients that make files before they name them (R49 to R51).

use super::{OpenFile, WRITE, World};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::op::{CommitWrite, Delegation, Op, Publish};
use ebb_metaplane_protocol::{Attr, FsResult};

impl World {
    /// Creates a file, and wants the names of its directory.
    pub fn create_for_names(
        &mut self,
        s: SessionId,
        parent: InodeId,
        name: &str,
    ) -> FsResult<(OpenFile, Option<Delegation>)> {
        let op = Op::Create {
            parent,
            name: name.into(),
            mode: 0o644,
            uid: 1,
            gid: 1,
            exclusive: false,
            open: WRITE,
            delegate: true,
        };
        match self.op(s, op)? {
            OpOutcome::Opened { attr, handle, grant, delegation, .. } => {
                self.expect_known(attr.inode, &grant.view);
                let inode = attr.inode;
                Ok((OpenFile { session: s, handle, inode, grant, ends: Vec::new() }, delegation))
            }
            other => panic!("{other:?}"),
        }
    }
    pub fn reserve(&mut self, s: SessionId, files: u32) -> FsResult<Vec<OpenFile>> {
        match self.op(s, Op::Reserve { files })? {
            OpOutcome::Reserved(made) => Ok(made
                .into_iter()
                .map(|(attr, handle, grant)| {
                    self.expected.insert(attr.inode, Vec::new());
                    OpenFile { session: s, handle, inode: attr.inode, grant, ends: Vec::new() }
                })
                .collect()),
            other => panic!("{other:?}"),
        }
    }
    /// Names a reserved file, with all that was written.
    pub fn publish(&mut self, f: &mut OpenFile, parent: InodeId, name: &str) -> FsResult<Attr> {
        let publish = Publish {
            handle: f.handle,
            parent,
            name: name.into(),
            mode: 0o640,
            uid: 3,
            gid: 4,
            commit: CommitWrite {
                inode: f.inode,
                ends: f.ends.clone(),
                mtime: None,
                set: SetAttr::default(),
            },
        };
        match self.op(f.session, Op::Publish(publish))? {
            OpOutcome::Attr(attr) => {
                f.ends.clear();
                Ok(attr)
            }
            other => panic!("{other:?}"),
        }
    }
}
