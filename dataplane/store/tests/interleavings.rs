//! The interleavings that decide whether data is safe (PROTOCOL §2–6), one by one.

mod support;

use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::*;
use support::*;

const NONE: BaseView = BaseView { content: ContentId(0), valid_bytes: 0 };
fn base(content: u64, valid_bytes: u64) -> BaseView {
    BaseView { content: ContentId(content), valid_bytes }
}
fn flushed(g: u64, content: u64, old: u64, valid: u64, old_valid: u64) -> FlushDone {
    FlushDone {
        inode: INODE,
        generation: Generation(g),
        content: ContentId(content),
        old_content: ContentId(old),
        valid_bytes: valid,
        old_valid_bytes: old_valid,
    }
}
fn rig() -> Rig {
    Rig::new(32 << 20)
}

#[test]
fn a_write_during_a_flush_survives_its_flush_done() {
    let mut r = rig();
    r.write(0, 8192, 1, b'a', NONE);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    r.write(0, 4096, 2, b'b', NONE);
    assert_eq!(r.read_pinned(1, 0..2, NONE), vec![b'a'; 8192], "the pin is the old version");
    let t = r.store.flush_done(SCOPE.pg, &flushed(1, 1, 0, 8192, 0));
    r.done(t);
    let mut want = vec![b'b'; 4096];
    want.extend(vec![b'a'; 4096]);
    for _ in 0..2 {
        assert_eq!(r.read(0..2, base(1, 8192)), want);
        let dirty = r.store.pg_status(PgId::of_chunk(INODE, CHUNK, 8));
        assert_eq!((dirty.dirty_bytes, dirty.pins), (4096, 0), "only the rewrite is dirty");
        r.reopen();
    }
}

#[test]
fn a_cut_during_a_flush_leaves_the_pins_whole() {
    let mut r = rig();
    r.write(0, 10_000, 1, b'a', NONE);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    let cut = ViewUpdate {
        scope: SCOPE,
        version: ViewVersion(2),
        base: NONE,
        cuts: vec![Cut { generation: Generation(2), at: 5000 }],
    };
    let t = r.store.apply_view(&cut);
    r.done(t);
    assert_eq!(r.read_pinned(1, 0..3, NONE)[..10_000], vec![b'a'; 10_000]);
    let now = r.read(0..3, NONE);
    assert!(now[..5000].iter().all(|b| *b == b'a') && now[5000..].iter().all(|b| *b == 0));
    let op = r.op(0, 10, 2, NONE);
    assert!(
        matches!(r.write_op(&op, 1), Err(WriteError::StaleGeneration { .. })),
        "cut is a fence"
    );
    // Committed with the new limit: nothing past the cut comes back, also after an extension.
    let t = r.store.flush_done(SCOPE.pg, &flushed(1, 1, 0, 5000, 0));
    r.done(t);
    r.write(9000, 10, 3, b'c', base(1, 5000));
    let now = r.read(0..3, base(1, 5000));
    assert!(now[..5000].iter().all(|b| *b == b'a') && now[5000..9000].iter().all(|b| *b == 0));
}

#[test]
fn the_clean_base_is_clipped_where_the_old_object_stopped_counting() {
    let mut r = rig();
    r.fill(0, 3, 1, b'o', 4096);
    r.write(40_960, 10, 1, b'n', base(1, 6000));
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    let t = r.store.flush_done(SCOPE.pg, &flushed(1, 2, 1, 40_970, 6000));
    r.done(t);
    let now = r.read(0..2, base(2, 40_970));
    assert!(now[..6000].iter().all(|b| *b == b'o') && now[6000..].iter().all(|b| *b == 0));
    // Past it the new object has zeros that are not here: a miss, never old bytes.
    let plan = r.store.plan_read(INODE, CHUNK, 2..3, base(2, 40_970));
    assert_eq!(plan.pieces[0].source, PieceSource::Miss);
}

#[test]
fn a_second_seal_merges_what_the_first_could_not_flush() {
    let mut r = rig();
    r.write(0, 4096, 1, b'a', NONE);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    r.write(8192, 4096, 2, b'b', NONE);
    let t = r.store.seal(SCOPE, Generation(2));
    r.done(t);
    let one = r.store.sealed(SCOPE, Generation(1)).expect("still pinned");
    assert_eq!((one.extents, one.high_water), (vec![ByteRange { start: 0, end: 4096 }], 4096));
    let two = r.store.sealed(SCOPE, Generation(2)).expect("pinned");
    assert_eq!(two.extents.len(), 2);
    assert_eq!(two.high_water, 12_288);
    let t = r.store.flush_aborted(SCOPE, Generation(1));
    r.done(t);
    assert!(r.store.sealed(SCOPE, Generation(1)).is_none());
    assert_eq!(r.read_pinned(2, 0..1, NONE), vec![b'a'; 4096]);
    r.checkpoint();
    r.reopen();
    assert_eq!(r.store.sealed(SCOPE, Generation(2)).expect("kept").high_water, 12_288);
    let t = r.store.flush_done(SCOPE.pg, &flushed(2, 1, 0, 12_288, 0));
    r.done(t);
    assert_eq!(r.store.stats().dirty_bytes, 0);
}

#[test]
fn a_seal_answers_the_same_when_repeated_and_refuses_older_tags() {
    let mut r = rig();
    r.write(100, 50, 1, b'a', NONE);
    let begun = r.op(8192, 4, 1, NONE);
    let plan = r.store.begin_write(&begun).expect("accepted");
    let t = r.store.seal(SCOPE, Generation(1));
    assert!(
        matches!(
            r.store.commit_write(plan.id, &[crc32c(&[0; 4096])], &[0; 4096]),
            Err(WriteError::StaleGeneration { floor: Generation(2) })
        ),
        "a write that was begun before the seal and committed after it"
    );
    r.done(t);
    let first = r.store.sealed(SCOPE, Generation(1));
    assert_eq!(first.as_ref().expect("sealed").high_water, 150);
    assert_eq!(r.store.seal(SCOPE, Generation(1)), Ok(None));
    r.reopen();
    assert_eq!(r.store.seal(SCOPE, Generation(1)), Ok(None));
    assert_eq!(r.store.sealed(SCOPE, Generation(1)), first);
}

#[test]
fn flush_done_never_cleans_what_was_not_sealed_here() {
    let mut r = rig();
    r.write(0, 4096, 3, b'a', NONE);
    let early = flushed(3, 1, 0, 4096, 0);
    assert!(matches!(r.store.flush_done(SCOPE.pg, &early), Err(ControlError::NotSealed { .. })));
    let t = r.store.flush_done(SCOPE.pg, &flushed(2, 1, 0, 4096, 0));
    r.done(t);
    assert_eq!(r.store.stats().dirty_bytes, 4096);
}

#[test]
fn a_delayed_duplicate_never_lands_over_a_newer_write() {
    let mut r = rig();
    let old = WriteOp { answered_below: Sequence(0), ..r.op(0, 4096, 1, NONE) };
    r.write_op(&old, b'a').expect("accepted");
    assert_eq!(r.store.begin_write(&old), Err(WriteError::Wait(WaitFor::Overlap)), "in flight");
    r.settle();
    r.write(0, 4096, 1, b'b', NONE);
    assert_eq!(r.store.begin_write(&old), Err(WriteError::Answered));
    r.checkpoint();
    r.reopen();
    assert_eq!(r.store.begin_write(&old), Err(WriteError::Answered));
    assert_eq!(r.read(0..1, NONE), vec![b'b'; 4096]);
}

#[test]
fn a_frozen_group_refuses_begun_writes_and_only_its_epoch_thaws() {
    let mut r = rig();
    let pg = PgId::of_chunk(INODE, CHUNK, 8);
    let op = r.op(0, 4096, 1, NONE);
    let plan = r.store.begin_write(&op).expect("accepted");
    let t = r.store.freeze(pg, PgEpoch(5));
    assert!(matches!(
        r.store.commit_write(plan.id, &[crc32c(&[0; 4096])], &[0; 4096]),
        Err(WriteError::Frozen { .. })
    ));
    r.done(t);
    r.reopen();
    assert_eq!(r.store.thaw(pg, PgEpoch(4)), Ok(None));
    assert_eq!(r.store.frozen(pg), Some(PgEpoch(5)));
    let t = r.store.thaw(pg, PgEpoch(5));
    r.done(t);
    r.write(0, 4096, 1, b'a', NONE);
    assert!(matches!(r.store.release_pg(pg, PgEpoch(6)), Err(ControlError::StillDirty { .. })));
    let t = r.store.drop_inode(SCOPE);
    r.done(t);
    let t = r.store.release_pg(pg, PgEpoch(6));
    r.done(t);
    assert_eq!(r.store.frozen(pg), None);
}

#[test]
fn a_discarded_group_leaves_nothing_dirty_or_pinned_and_no_other_group_is_touched() {
    let mut r = rig();
    let pg = PgId::of_chunk(INODE, CHUNK, 8);
    r.write(0, 4096, 1, b'a', NONE);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    r.write(0, 4096, 2, b'b', NONE);
    let op = r.op(8192, 4096, 2, NONE);
    let begun = r.store.begin_write(&op).expect("accepted");
    assert!(matches!(r.store.release_pg(pg, PgEpoch(6)), Err(ControlError::StillDirty { .. })));
    let busy = r.store.discard_pg(pg, PgEpoch(6));
    assert!(matches!(busy, Err(ControlError::StillDirty { .. })), "a write is in flight: {busy:?}");
    r.store.abort_write(begun.id);
    let t = r.store.discard_pg(PgId((pg.0 + 1) % 8), PgEpoch(6));
    r.done(t);
    assert!(r.store.pg_status(pg).dirty_bytes > 0, "another group");
    let t = r.store.discard_pg(pg, PgEpoch(6));
    r.done(t);
    for reopened in [false, true] {
        let held = r.store.pg_status(pg);
        assert_eq!((held.dirty_bytes, held.pins, held.frozen), (0, 0, false), "{reopened}");
        assert_eq!(r.store.stats().dirty_bytes, 0, "{reopened}");
        r.reopen();
    }
    // Neither its seals nor its ends come back with the group.
    assert!(r.store.sealed(SCOPE, Generation(1)).is_none());
    let t = r.store.seal(SCOPE, Generation(3));
    r.done(t);
    assert_eq!(r.store.sealed(SCOPE, Generation(3)).expect("sealed").high_water, 0);
}

#[test]
fn a_repeated_write_is_answered_under_its_first_tag_whatever_came_between() {
    let mut r = rig();
    let first = WriteOp { answered_below: Sequence(0), ..r.op(0, 9000, 1, NONE) };
    r.write_op(&first, b'a').expect("accepted");
    r.settle();
    // Its reply is lost; somebody truncates, somebody writes.
    let cut = ViewUpdate {
        scope: SCOPE,
        version: ViewVersion(2),
        base: NONE,
        cuts: vec![Cut { generation: Generation(1), at: 100 }],
    };
    let t = r.store.apply_view(&cut);
    r.done(t);
    let other = WriteOp { session: SessionId(2), ..r.op(0, 10, 3, NONE) };
    r.write_op(&other, b'b').expect("accepted");
    r.settle();
    for how in 0..4 {
        for g in [1, 2, 3] {
            let again = WriteOp { generation: Generation(g), ..first };
            let answer = r.store.begin_write(&again);
            assert_eq!(answer, Err(WriteError::Duplicate { generation: Generation(1) }), "{how}");
        }
        if how == 1 {
            r.checkpoint();
        }
        r.reopen();
    }
    let mut want = vec![0; 4096];
    want[..100].fill(b'a');
    want[..10].fill(b'b');
    assert_eq!(r.read(0..1, NONE), want, "applied once, and cut");
}

#[test]
fn a_tag_below_one_that_was_taken_is_refused() {
    let mut r = rig();
    // Two plans are out when the flush of 1 is given up; the newer one is taken first.
    let old = r.op(0, 4096, 1, NONE);
    let plan = r.store.begin_write(&old).expect("nothing newer was taken yet");
    let new = WriteOp { answered_below: Sequence(0), ..r.op(8192, 4096, 2, NONE) };
    r.write_op(&new, b'b').expect("accepted");
    let stale = Err(WriteError::StaleGeneration { floor: Generation(2) });
    let zeros = vec![0u8; 4096];
    assert_eq!(r.store.commit_write(plan.id, &[crc32c(&zeros)], &zeros), stale);
    assert_eq!(r.store.begin_write(&old).map(|_| ()), stale.map(|_| ()), "not durable yet");
    r.settle();
    for _ in 0..3 {
        let stale = Err(WriteError::StaleGeneration { floor: Generation(2) });
        assert_eq!(r.store.begin_write(&old).map(|_| ()), stale);
        // What was never sealed here is no flush's: the floor of tags is not that of seals.
        let done = r.store.flush_done(SCOPE.pg, &flushed(2, 1, 0, 0, 0));
        assert!(matches!(done, Err(ControlError::NotSealed { .. })), "{done:?}");
        r.checkpoint();
        r.reopen();
    }
    let again = WriteOp { generation: Generation(2), ..old };
    r.write_op(&again, b'a').expect("under a fresh grant");
    r.settle();
    assert_eq!(r.read(0..1, NONE), vec![b'a'; 4096]);
}

#[test]
fn nothing_is_visible_before_it_is_durable() {
    let mut r = rig();
    let op = r.op(0, 4096, 1, NONE);
    r.write_op(&op, b'a').expect("accepted");
    assert_eq!(r.read(0..1, NONE), vec![0; 4096]);
    let batch = r.store.take_batch().expect("waits");
    assert_eq!(r.read(0..1, NONE), vec![0; 4096]);
    assert_eq!(r.store.seen(op.session, op.sequence), Seen::New);
    r.disk.write_at(batch.offset, &batch.bytes).expect("memory");
    assert_eq!(r.store.batch_durable(batch.id).expect("in flight").len(), 1);
    assert_eq!(r.read(0..1, NONE), vec![b'a'; 4096]);
}

#[test]
fn a_block_known_to_be_a_hole_is_zero_and_one_in_the_object_is_a_miss() {
    let mut r = rig();
    let at = |r: &mut Rig, b| {
        r.store.plan_read(INODE, CHUNK, b..b + 1, base(1, 4097)).pieces[0].source.clone()
    };
    assert_eq!(at(&mut r, 0), PieceSource::Miss);
    assert_eq!(at(&mut r, 1), PieceSource::Miss);
    assert_eq!(at(&mut r, 2), PieceSource::Zero);
    // An edge needs S3 only where the object has bytes that the write does not cover.
    let op = r.op(4097, 10, 1, base(1, 4097));
    let plan = r.store.begin_write(&op).expect("accepted");
    assert_eq!(plan.edges[0].source, EdgeSource::Miss { valid: 1 });
    r.store.abort_write(plan.id);
    let op = r.op(4096, 10, 1, base(1, 4097));
    let plan = r.store.begin_write(&op).expect("accepted");
    assert_eq!(plan.edges[0].source, EdgeSource::Zero);
}

#[test]
fn a_full_device_evicts_checkpoints_and_takes_writes_again() {
    let mut r = Rig::with(Geometry {
        device_bytes: 9 << 20,
        journal_bytes: 1 << 20,
        checkpoint_bytes: 256 << 10,
    });
    r.fill(0, 600, 1, b'c', 4096);
    let mut g = 1;
    let mut offset = 0;
    // Inline writes until nothing is left, dirty data only.
    loop {
        let op = WriteOp { chunk: ChunkIndex(4), ..r.op(offset, 32 << 10, g, NONE) };
        match r.write_op(&op, b'd') {
            Ok(_) => offset += 32 << 10,
            Err(WriteError::NoSpace { evictable: 0, .. }) => break,
            Err(WriteError::NoSpace { .. }) => {
                r.store.evict(1 << 20).expect("journals").expect("something is clean");
            }
            Err(WriteError::Wait(_)) => {}
            Err(e) => panic!("{e}"),
        }
        r.settle();
        if offset == CHUNK_BYTES {
            break;
        }
    }
    assert!(offset >= 3 << 20, "clean data went before a writer saw a full device");
    assert!(r.store.stats().checkpoints > 0);
    // Full of dirty data: a checkpoint still finds room for what is inline.
    r.checkpoint();
    assert_eq!(r.store.stats().inline_bytes, 0);
    for scope in r.store.scopes(INODE) {
        let t = r.store.seal(scope, Generation(g));
        r.done(t);
        let t = r.store.flush_done(scope.pg, &flushed(g, 2, 1, 1 << 30, 0));
        r.done(t);
    }
    g += 1;
    r.store.evict(1 << 20).expect("journals").expect("clean now");
    r.settle();
    r.write(0, 4096, g, b'e', NONE);
    let report = verify(&mut r.disk).expect("sound");
    assert_eq!((report.bad.len(), report.used_blocks), (0, report.reachable_blocks));
}

#[test]
fn inline_neighbours_become_one_extent() {
    let mut r = rig();
    for i in 0..64 {
        r.write(i * 4096, 4096, 1, b'a', NONE);
    }
    assert_eq!(r.store.stats().inline_bytes, 64 * 4096);
    r.checkpoint();
    let stats = r.store.stats();
    assert_eq!((stats.inline_bytes, stats.extents), (0, 1));
    r.reopen();
    assert_eq!(r.read(0..64, NONE), vec![b'a'; 64 * 4096]);
}

#[test]
fn a_failed_device_takes_nothing_more() {
    let mut r = rig();
    r.store.fail();
    let op = r.op(0, 1, 1, NONE);
    assert_eq!(r.store.begin_write(&op), Err(WriteError::Failed));
    assert_eq!(r.store.seal(SCOPE, Generation(1)), Err(ControlError::Failed));
    assert!(r.store.take_batch().is_none());
}

/// Groups change hands one by one, and a core may be primary of one and backup of another: what was
/// said of an inode in one of them says nothing about its part in the others.
#[test]
fn what_ends_in_one_group_goes_on_in_another() {
    let mut r = rig();
    let far = (1..)
        .map(|run| ChunkIndex(run * 4))
        .find(|chunk| Scope::of(INODE, *chunk, 8) != SCOPE)
        .expect("another group");
    let other = Scope::of(INODE, far, 8);
    r.write(0, 4096, 1, b'a', NONE);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    // Sealed here, not there: a write of the same generation is taken, and is no part of the pins.
    let late = r.op(0, 10, 1, NONE);
    assert!(matches!(r.write_op(&late, b'x'), Err(WriteError::StaleGeneration { .. })));
    let op = WriteOp { chunk: far, ..r.op(0, 4096, 1, NONE) };
    r.write_op(&op, b'b').expect("another group's floor is its own");
    r.settle();
    for _ in 0..2 {
        assert_eq!(r.store.scopes(INODE).len(), 2);
        assert_eq!(r.store.floor(SCOPE), Generation(2));
        assert_eq!(r.store.floor(other), Generation(1));
        assert!(r.store.sealed(other, Generation(1)).is_none(), "nobody sealed it");
        let sealed = r.store.sealed(SCOPE, Generation(1)).expect("sealed");
        assert_eq!(sealed.extents, vec![ByteRange { start: 0, end: 4096 }]);
        r.checkpoint();
        r.reopen();
    }
    // Its own seal pins it; the flush of one ends nothing in the other.
    let t = r.store.seal(other, Generation(1));
    r.done(t);
    let start = far.start();
    let sealed = r.store.sealed(other, Generation(1)).expect("sealed");
    assert_eq!(sealed.extents, vec![ByteRange { start, end: start + 4096 }]);
    let t = r.store.flush_done(SCOPE.pg, &flushed(1, 1, 0, start + 4096, 0));
    r.done(t);
    assert_eq!(r.store.stats().dirty_bytes, 4096);
    assert!(r.store.sealed(other, Generation(1)).is_some());
    let t = r.store.drop_inode(SCOPE);
    r.done(t);
    assert_eq!(r.store.scopes(INODE), vec![other]);
    let held = r.store.pg_status(other.pg);
    assert_eq!((held.dirty_bytes, held.pins), (4096, 1));
}
