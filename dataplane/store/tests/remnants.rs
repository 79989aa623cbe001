//! What a released group leaves: readable under its content until the space is needed, never in the way
//! of anything, and unknown to a restart.

mod support;

use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::*;
use support::*;

const VALID: u64 = 64 * 4096 - 100;

fn base(content: u64, valid_bytes: u64) -> BaseView {
    BaseView { content: ContentId(content), valid_bytes }
}

/// A store that held 64 clean blocks of content 7, the last one short, and gave their group away.
fn released() -> Rig {
    let mut r = Rig::new(32 << 20);
    r.fill(0, 64, 7, b'a', 4096 - 100);
    let before = r.store.stats();
    let t = r.store.release_pg(SCOPE.pg, PgEpoch(2));
    r.done(t);
    let s = r.store.stats();
    assert_eq!((s.clean_bytes, s.remnant_bytes), (0, 64 * 4096));
    assert_eq!(s.free_bytes, before.free_bytes + 64 * 4096, "it counts as free");
    r
}

fn left(r: &mut Rig, blocks: std::ops::Range<u32>, base: BaseView) -> Option<Vec<u8>> {
    let plan = r.store.plan_remnant(INODE, CHUNK, blocks, base)?;
    Some(r.bytes(plan))
}

#[test]
fn what_is_left_is_read_by_content_and_only_whole() {
    let mut r = released();
    let mut want = vec![b'a'; 64 * 4096];
    want[VALID as usize..].fill(0);
    assert_eq!(left(&mut r, 0..64, base(7, VALID)), Some(want.clone()));
    assert_eq!(left(&mut r, 10..20, base(7, VALID)), Some(want[10 * 4096..20 * 4096].to_vec()));
    // The asker's view counts less: what it cuts is zero.
    let mut cut = want[..4096].to_vec();
    cut[50..].fill(0);
    assert_eq!(left(&mut r, 0..1, base(7, 50)), Some(cut));
    for none in [
        left(&mut r, 0..64, base(8, VALID)),
        left(&mut r, 0..64, base(6, VALID)),
        // More counts than was ever here: the end was cut here, or never came.
        left(&mut r, 63..64, base(7, VALID + 1)),
        left(&mut r, 60..70, base(7, 1 << 20)),
    ] {
        assert_eq!(none, None);
    }
    // To the index it is gone.
    assert_eq!(r.read(0..1, base(7, VALID)), vec![b'S'; 4096]);
}

/// The new holder may ask before the group was released: what is clean is there, what is dirty is nobody else's.
#[test]
fn what_is_not_released_yet_is_read_by_content_too() {
    let mut r = Rig::new(32 << 20);
    r.fill(0, 64, 7, b'a', 4096 - 100);
    assert_eq!(left(&mut r, 10..20, base(7, VALID)), Some(vec![b'a'; 10 * 4096]));
    assert_eq!(left(&mut r, 10..20, base(8, VALID)), None);
    r.write(12 * 4096, 4096, 1, b'b', base(7, VALID));
    assert_eq!(left(&mut r, 10..20, base(7, VALID)), None);
    assert_eq!(left(&mut r, 13..20, base(7, VALID)), Some(vec![b'a'; 7 * 4096]));
}

#[test]
fn a_restart_a_flush_and_a_return_know_nothing_of_it() {
    let mut r = released();
    // The group comes back, the file is written and flushed: what is left stays what it was.
    r.write(0, 4096, 1, b'b', base(7, VALID));
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    let done = FlushDone {
        inode: INODE,
        generation: Generation(1),
        content: ContentId(8),
        old_content: ContentId(7),
        valid_bytes: VALID,
        old_valid_bytes: VALID,
    };
    let t = r.store.flush_done(SCOPE.pg, &done);
    r.done(t);
    assert_eq!(left(&mut r, 0..1, base(8, VALID)), None);
    assert_eq!(left(&mut r, 0..1, base(7, VALID)), Some(vec![b'a'; 4096]));
    assert_eq!(r.read(0..1, base(8, VALID)), vec![b'b'; 4096]);
    assert_eq!(r.read(1..2, base(8, VALID)), vec![b'S'; 4096]);
    // Given away again, in another state: the newer one is what is left.
    r.checkpoint();
    let t = r.store.release_pg(SCOPE.pg, PgEpoch(4));
    r.done(t);
    assert_eq!(left(&mut r, 0..1, base(7, VALID)), None);
    r.reopen();
    assert_eq!((r.store.stats().remnant_bytes, left(&mut r, 0..1, base(8, VALID))), (0, None));
}

#[test]
fn it_goes_before_anybody_hears_no_space_and_not_under_a_reader() {
    let mut r = released();
    let reader = r.store.plan_remnant(INODE, CHUNK, 0..64, base(7, VALID)).expect("left");
    // Other chunks take all there is, what is left included.
    let capacity = r.store.stats().capacity_bytes;
    let mut written = 0u64;
    let fits = |r: &mut Rig, n: u64| {
        let chunk = ChunkIndex(1 + (n / 64) as u32);
        let offset = (n % 64) as u32 * 65_536;
        let op = WriteOp { chunk, ..r.op(offset, 65_536, 1, base(0, 0)) };
        r.write_op(&op, b'w').map(drop)
    };
    // Batches only: the reader also holds the journal's tail, so a checkpoint would not end.
    let batches = |r: &mut Rig| {
        while let Some(b) = r.store.take_batch() {
            r.disk.write_at(b.offset, &b.bytes).expect("memory");
            r.store.batch_durable(b.id).expect("in flight");
        }
    };
    loop {
        match fits(&mut r, written) {
            Ok(()) => written += 1,
            Err(WriteError::NoSpace { .. }) => break,
            Err(e) => panic!("{e}"),
        }
        if written.is_multiple_of(32) {
            batches(&mut r);
        }
        assert!(written * 65_536 <= capacity, "it never fills");
    }
    batches(&mut r);
    assert_eq!(r.store.stats().remnant_bytes, 0, "the first to go");
    assert!(left(&mut r, 0..1, base(7, VALID)).is_none());
    // Its blocks are nobody's until the reader is done with them; then a write has them.
    assert_eq!(r.store.stats().waiting_bytes, 64 * 4096);
    let mut want = vec![b'a'; 64 * 4096];
    want[VALID as usize..].fill(0);
    assert_eq!(r.bytes(reader), want);
    assert!(fits(&mut r, written).is_ok());
}

/// A member needs the space as a primary does.
#[test]
fn it_goes_for_what_a_primary_sends_too() {
    for copied in [false, true] {
        let mut r = released();
        let mut n = 0u32;
        let mut op = |r: &mut Rig| {
            n += 1;
            let chunk = ChunkIndex(1 + n / 64);
            WriteOp { chunk, ..r.op(n % 64 * 65_536, 65_536, 1, base(0, 0)) }
        };
        // Nothing is free but what is left of the other group, and less than one of these.
        while r.store.stats().free_bytes >= r.store.stats().remnant_bytes + 65_536 {
            let write = op(&mut r);
            r.write_op(&write, b'w').expect("there is room");
            r.settle();
        }
        assert!(r.store.stats().remnant_bytes > 65_536);
        if copied {
            let staged = r.store.stage(16).expect("what is left goes");
            r.store.unstage(vec![staged], &Default::default());
        } else {
            let write = op(&mut r);
            let plan = r.store.begin_shipped(&write).expect("what is left goes");
            r.store.abort_write(plan.id);
        }
        assert_eq!(r.store.stats().remnant_bytes, 0);
    }
}

#[test]
fn an_eviction_of_everything_takes_it_too() {
    for all in [true, false] {
        let mut r = released();
        let t = match all {
            true => r.store.evict_clean(&[]),
            false => {
                r.store.drop_remnants(SCOPE.pg);
                Ok(None)
            }
        };
        r.done(t);
        let s = r.store.stats();
        assert_eq!((s.remnant_bytes, s.free_bytes + s.waiting_bytes), (0, s.capacity_bytes));
    }
}
