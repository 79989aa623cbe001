//! Locks as the state machine has them (docs/PROTOCOL.md, R57): facts of the log that end with what they hang on.

mod common;
use common::{READ, World, is_again};
use ebb_dataplane_protocol::{InodeId, Sequence, SessionId};
use ebb_metaplane_protocol::command::{Command, CommandReply};
use ebb_metaplane_protocol::lock::{Lock, LockMode};
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::{FsError, FsResult};
use ebb_namespace::limits::LOCKS_PER_INODE_MAX;

const ROOT: InodeId = InodeId::ROOT;

fn lock(owner: u64, (start, end): (u64, u64), mode: LockMode) -> Lock {
    Lock { owner, start, end, mode, pid: 1 }
}

fn take(w: &mut World, s: SessionId, inode: InodeId, lock: Lock, wait: bool) -> FsResult<()> {
    w.op(s, Op::Lock { inode, lock, wait }).map(drop)
}

fn locks(w: &World) -> usize {
    w.kv.0.keys().filter(|k| matches!(k[0], b'L' | b'l')).count()
}

#[test]
fn a_lock_ends_with_its_sessions_last_handle_and_with_the_session() {
    let mut w = World::new();
    let (a, b) = (w.session(), w.session());
    let f = w.put_file(a, ROOT, "f", b"data");
    let all = lock(1, (0, u64::MAX), LockMode::Exclusive);
    assert_eq!(take(&mut w, a, f, all, false), Err(FsError::Stale), "not open");
    let (first, second) = (w.open(a, f, READ).expect("open"), w.open(a, f, READ).expect("open"));
    let other = w.open(b, f, READ).expect("open");
    take(&mut w, a, f, all, false).expect("free");
    assert_eq!(take(&mut w, b, f, all, false), Err(FsError::Locked));
    assert!(is_again(&take(&mut w, b, f, all, true)));
    w.close(first).expect("closed");
    assert_eq!(take(&mut w, b, f, all, false), Err(FsError::Locked), "it is open still");
    w.close(second).expect("closed");
    take(&mut w, b, f, all, false).expect("free");
    // The session's end, with another session's lock on the same file.
    let _third = w.open(a, f, READ).expect("open");
    take(&mut w, b, f, lock(1, (0, 9), LockMode::Unlock), false).expect("free");
    take(&mut w, a, f, lock(1, (0, 9), LockMode::Shared), false).expect("free");
    w.done(Command::EndSessions(vec![a]));
    take(&mut w, b, f, all, false).expect("free");
    w.close(other).expect("closed");
    assert_eq!(locks(&w), 0);
}

#[test]
fn an_unlinked_files_locks_go_with_it() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let open = w.open(s, f, READ).expect("open");
    take(&mut w, s, f, lock(1, (3, 5), LockMode::Exclusive), false).expect("free");
    w.unlink(s, ROOT, "f").expect("unlinked");
    take(&mut w, s, f, lock(1, (7, 8), LockMode::Exclusive), false).expect("it is open");
    w.close(open).expect("closed");
    assert_eq!(locks(&w), 0);
    assert!(w.query(ebb_metaplane_protocol::Query::GetAttr(f)).is_err(), "gone");
}

/// The answer to a lock was lost; meanwhile it was given up, and somebody else has it.
#[test]
fn a_repeated_lock_is_not_taken_again() {
    let mut w = World::new();
    let (a, b) = (w.session(), w.session());
    let f = w.put_file(a, ROOT, "f", b"data");
    let (_mine, _theirs) = (w.open(a, f, READ).expect("open"), w.open(b, f, READ).expect("open"));
    let all = lock(1, (0, u64::MAX), LockMode::Exclusive);
    let command = |n: u64, lock| Command::Client {
        session: a,
        sequence: Sequence(1_000 + n),
        answered_below: Sequence(1_000),
        op: Op::Lock { inode: f, lock, wait: false },
    };
    let first = w.apply(command(0, all));
    assert!(matches!(first, CommandReply::Op(Ok(_))));
    w.apply(command(1, lock(1, (0, u64::MAX), LockMode::Unlock)));
    take(&mut w, b, f, all, false).expect("free");
    assert_eq!(w.apply(command(0, all)), first, "what it was told");
    assert_eq!(take(&mut w, b, f, lock(1, (0, 0), LockMode::Shared), false), Ok(()));
    let found = w.read().locked(a, f, &all).expect("readable").expect("b's");
    assert_eq!((found.start, found.end, found.exclusive), (0, 0, false));
}

#[test]
fn locks_of_a_file_are_bounded() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let _open = w.open(s, f, READ).expect("open");
    for n in 0..LOCKS_PER_INODE_MAX as u64 {
        take(&mut w, s, f, lock(1, (n * 2, n * 2), LockMode::Shared), false).expect("free");
    }
    let more = lock(1, (1 << 40, 1 << 41), LockMode::Shared);
    assert_eq!(take(&mut w, s, f, more, false), Err(FsError::NoLocks));
    take(&mut w, s, f, lock(1, (0, u64::MAX), LockMode::Unlock), false).expect("unlocked");
    take(&mut w, s, f, more, false).expect("free");
    let odd = take(&mut w, s, f, lock(1, (5, 4), LockMode::Shared), false);
    assert!(matches!(odd, Err(FsError::Invalid(_))));
}
