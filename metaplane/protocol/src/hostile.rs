//! The metadata plane's payloads under attack (`ebb_dataplane_protocol::hostile`): requests, answers, and
//! what is in the Raft log. Nothing here is used by a server.

use crate::check::Repair;
use crate::dump::{LoadStep, Object, Record};
use crate::lease::{Watch, Watched};
use crate::lock::{Lock, LockMode};
use crate::*;
use ebb_dataplane_protocol::hostile::{Decoder, archive};
use ebb_dataplane_protocol::{Generation, HandleId, InodeId, codec};

/// Requests on a metadata port.
pub fn request(bytes: &[u8]) {
    archive::<Request>(bytes);
}
/// Their answers, which clients and nodes decode.
pub fn response(bytes: &[u8]) {
    archive::<Response>(bytes);
}
/// Entries of the Raft log, and what applying them gives.
pub fn log_entry(bytes: &[u8]) {
    archive::<LogEntry>(bytes);
    archive::<CommandReply>(bytes);
}

fn create() -> Op {
    Op::Create {
        parent: InodeId(1),
        name: b"name".to_vec(),
        mode: 0o644,
        uid: 1,
        gid: 2,
        exclusive: true,
        open: op::OpenMode { write: true, truncate: false },
        delegate: true,
    }
}

fn publish() -> Op {
    Op::Publish(op::Publish {
        handle: HandleId(3),
        parent: InodeId(1),
        name: b"name".to_vec(),
        mode: 0o644,
        uid: 1,
        gid: 2,
        commit: op::CommitWrite {
            inode: InodeId(2),
            ends: vec![(Generation(1), 4096)],
            mtime: Some(Time(5)),
            set: attr::SetAttr::default(),
        },
    })
}

fn commit() -> Op {
    Op::Release {
        handle: HandleId(3),
        commit: Some(op::CommitWrite {
            inode: InodeId(2),
            ends: vec![(Generation(1), 4096), (Generation(2), 9)],
            mtime: Some(Time(5)),
            set: attr::SetAttr::default(),
        }),
    }
}

fn set_xattr() -> Op {
    let (name, value) = (b"user.a".to_vec(), Some(b"value".to_vec()));
    Op::SetXattr { inode: InodeId(2), name, value, how: xattr::XattrMode::Create }
}

fn record() -> Record {
    let object = Object { key: "a/b".into(), etag: "e".into(), length: 5, valid: 4 };
    Record {
        path: "a/b".into(),
        kind: FileKind::File,
        mode: 0o644,
        uid: 1,
        gid: 2,
        size: 4,
        atime: Time(1),
        mtime: Time(2),
        ctime: Time(3),
        target: Vec::new(),
        object: Some(object),
        unseen: false,
        dirty: true,
        unstored: false,
        lost: false,
        listed: false,
        xattrs: "user.a=b".into(),
    }
}

fn requests() -> Vec<Vec<u8>> {
    let mutate = |op| Request::Mutate {
        session: SessionId(1),
        sequence: Sequence(2),
        answered_below: Sequence(2),
        op,
        dropped: vec![(InodeId(3), 9)],
    };
    let open = SessionCall::Open { client: 7, label: "host".into() };
    let query = Request::Query { session: SessionId(1), query: Query::GetAttr(InodeId(2)) };
    [
        mutate(create()),
        mutate(commit()),
        mutate(publish()),
        mutate(Op::Reserve { files: 3 }),
        mutate(Op::ReturnNames { dirs: vec![(InodeId(1), 2)] }),
        mutate(Op::Lock {
            inode: InodeId(2),
            lock: Lock { owner: 3, start: 4, end: 5, mode: LockMode::Exclusive, pid: 6 },
            wait: true,
        }),
        mutate(set_xattr()),
        query,
        Request::Session(open),
        Request::Session(SessionCall::Watch(
            SessionId(1),
            Watch { epoch: 1, call: 2, forgotten: 3, returned: vec![(InodeId(4), 5)], settled: 6 },
        )),
        Request::Admin(AdminCall::Repair(vec![
            Repair::Name(InodeId(2), b"n".to_vec()),
            Repair::Key("a/b".into()),
            Repair::Record(b"Habc".to_vec()),
        ])),
        Request::Admin(AdminCall::Load(LoadStep::Records, vec![record()])),
        Request::Admin(AdminCall::Dump(Some((1, vec![7; 9])))),
    ]
    .iter()
    .map(codec::encode)
    .collect()
}

fn responses() -> Vec<Vec<u8>> {
    let opened = SessionReply::Opened { session: SessionId(1), ttl_ms: 9 };
    let recalled = vec![InodeId(4), InodeId(5)];
    let wanted = vec![(InodeId(8), 9)];
    let watched = Watched { epoch: 1, lease_ms: 1_000, recalled, through: 7, wanted };
    let link = QueryReply::Link(b"target".to_vec());
    let xattrs = QueryReply::Xattrs(vec![(b"user.a".to_vec(), b"value".to_vec())]);
    [
        Response::Session(Ok(opened)),
        Response::Session(Ok(SessionReply::Watched(watched))),
        Response::Query(Ok(link)),
        Response::Query(Ok(xattrs)),
        Response::Op(Err(FsError::NotFound)),
    ]
    .iter()
    .map(codec::encode)
    .collect()
}

fn log_entries() -> Vec<Vec<u8>> {
    let client = |op| Command::Client {
        session: SessionId(1),
        sequence: Sequence(2),
        answered_below: Sequence(2),
        op,
    };
    let commands = vec![
        client(create()),
        client(commit()),
        client(set_xattr()),
        Command::KeyBegin(vec![("a/b".into(), 9), ("c".into(), 8)]),
        Command::EndSessions(vec![SessionId(4)]),
    ];
    let reply = CommandReply::Keys(vec!["a".into()]);
    vec![codec::encode(&LogEntry { now: Time(1), commands }), codec::encode(&reply)]
}

/// This crate's decoders.
pub const DECODERS: [Decoder; 3] = [
    Decoder { name: "request", seeds: requests, run: request },
    Decoder { name: "response", seeds: responses, run: response },
    Decoder { name: "log_entry", seeds: log_entries, run: log_entry },
];
