//! The log against openraft's own suite, and against what a crash leaves behind.

use super::super::disk::{Disk, Machine};
use super::super::state::StateStore;
use super::super::{Entry, LeaderId, LogId, Proposal, TypeConfig, Vote};
use super::{LogOptions, LogStore, frame, segment};
use ebb_metaplane_protocol::{Command, LogEntry, Time};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, RaftLogReader, StorageError};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

fn disk() -> Arc<dyn Disk> {
    Arc::new(Machine)
}

/// One segment takes a whole recorded log.
fn medium() -> LogOptions {
    // Written by the thread.
    LogOptions { segment_bytes: 16 << 10, cache_bytes_max: 1 << 20, load: None }
}

fn small() -> LogOptions {
    // Written by the caller where nothing is queued.
    LogOptions { segment_bytes: 4096, cache_bytes_max: 2048, load: Some(Arc::default()) }
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let commands = vec![Command::KeyBegin(vec![("k".repeat(bytes), 1)])];
    let proposal = Proposal::new(LogEntry { now: Time(index as i64), commands });
    Entry {
        log_id: LogId::new(LeaderId { term, node_id: 1 }, index),
        payload: EntryPayload::Normal(proposal),
    }
}

async fn append(log: &mut LogStore, entries: Vec<Entry>) {
    let (tx, rx) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(tx)).await.expect("append");
    rx.await.expect("answered").expect("stable");
}

async fn ids(log: &mut LogStore) -> Vec<LogId> {
    log.try_get_log_entries(0..u64::MAX).await.expect("read").iter().map(|e| e.log_id).collect()
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = LogStore::open(&disk(), &dir.path().join("log"), small()).expect("a log");
        let state = StateStore::open(&disk(), dir.path(), 1 << 20).expect("a store");
        Ok((dir, log, state))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openrafts_storage_suite_passes() {
    Suite::test_all(Builder).await.expect("the suite");
}

#[tokio::test]
async fn entries_survive_reopening_across_segments_and_beyond_the_cache() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut expected = Vec::new();
    for round in 0..3u64 {
        let mut log = LogStore::open(&disk(), dir.path(), small()).expect("reopened");
        assert_eq!(ids(&mut log).await, expected);
        for i in 0..20 {
            let e = entry(round + 1, round * 20 + i, 300);
            expected.push(e.log_id);
            append(&mut log, vec![e]).await;
        }
        let read = log.try_get_log_entries(0..u64::MAX).await.expect("read");
        for e in read {
            assert_eq!(e, entry(e.log_id.leader_id.term, e.log_id.index, 300));
        }
    }
    assert!(
        segment::list(&Machine, dir.path()).expect("listed").len() > 2,
        "the test means to rotate"
    );
}

#[tokio::test]
async fn purge_removes_segments_and_survives_reopening() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("opened");
    for i in 0..60 {
        append(&mut log, vec![entry(1, i, 300)]).await;
    }
    let before = segment::list(&Machine, dir.path()).expect("listed");
    let purged = LogId::new(LeaderId { term: 1, node_id: 1 }, 40);
    log.purge(purged).await.expect("purged");
    log.flush().await.expect("stable");
    let after = segment::list(&Machine, dir.path()).expect("listed");
    assert!(after.len() < before.len() && after.last() == before.last(), "{before:?} {after:?}");
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("reopened");
    let state = log.get_log_state().await.expect("state");
    assert_eq!(state.last_purged_log_id, Some(purged));
    assert_eq!(state.last_log_id.map(|id| id.index), Some(59));
    assert_eq!(ids(&mut log).await.first().map(|id| id.index), Some(41));
}

#[tokio::test]
async fn truncated_entries_stay_away_after_reopening() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("opened");
    append(&mut log, (0..10).map(|i| entry(1, i, 10)).collect()).await;
    log.truncate_after(Some(LogId::new(LeaderId { term: 1, node_id: 1 }, 4))).await.expect("cut");
    append(&mut log, (5..8).map(|i| entry(2, i, 10)).collect()).await;
    let expected = ids(&mut log).await;
    assert_eq!(expected.len(), 8);
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("reopened");
    assert_eq!(ids(&mut log).await, expected);
}

#[tokio::test]
async fn votes_survive_reopening_and_damage_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let vote = Vote::new(3, 1);
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("opened");
    assert_eq!(log.read_vote().await.expect("read"), None);
    log.save_vote(&vote).await.expect("saved");
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("reopened");
    assert_eq!(log.read_vote().await.expect("read"), Some(vote));
    std::fs::write(dir.path().join("vote"), b"00000000 {}").expect("damaged on purpose");
    assert!(LogStore::open(&disk(), dir.path(), small()).is_err());
}

/// Records a log of small batches; gives the segment's bytes and, per batch, the offset at which it
/// is complete.
async fn recorded(dir: &Path) -> (u64, Vec<u8>, Vec<(u64, Vec<LogId>)>) {
    let mut log = LogStore::open(&disk(), dir, medium()).expect("opened");
    let mut complete = Vec::new();
    let mut next = 0;
    let number = 1;
    for batch in 0..8u64 {
        if batch == 5 {
            let keep = LogId::new(LeaderId { term: 1, node_id: 1 }, next - 2);
            log.truncate_after(Some(keep)).await.expect("cut");
            next -= 1;
        } else {
            let entries: Vec<Entry> = (0..=batch % 3)
                .map(|i| entry(1 + batch / 6, next + i, 7 * batch as usize))
                .collect();
            next += entries.len() as u64;
            append(&mut log, entries).await;
        }
        let bytes = std::fs::read(segment::path(dir, number)).expect("read");
        let mut end = frame::SEGMENT_HEADER_BYTES;
        while let Some(f) = frame::decode_frame(number, &bytes[end..]) {
            end += f.bytes;
        }
        complete.push((end as u64, ids(&mut log).await));
    }
    let bytes = std::fs::read(segment::path(dir, number)).expect("read");
    (number, bytes, complete)
}

#[tokio::test]
async fn a_log_cut_at_any_offset_recovers_every_whole_batch_before_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (number, bytes, complete) = recorded(dir.path()).await;
    let end = complete.last().map_or(0, |c| c.0);
    for cut in 0..=end {
        for zero_filled in [false, true] {
            if zero_filled && cut % 4 != 0 {
                // Sectors are zero or not; every fourth byte is more than enough of them.
                continue;
            }
            let crashed = tempfile::tempdir().expect("a temporary directory");
            let mut left = bytes[..cut as usize].to_vec();
            if zero_filled {
                if cut < frame::SEGMENT_HEADER_BYTES as u64 {
                    // The header is synced before the file has its name.
                    continue;
                }
                left.resize(bytes.len(), 0);
            }
            // Zeros may be just what was cut off (padding): such a batch is whole.
            let whole = |end: u64| left.get(..end as usize) == Some(&bytes[..end as usize]);
            let expected = complete.iter().rev().find(|c| whole(c.0)).map(|c| c.1.clone());
            std::fs::write(segment::path(crashed.path(), number), &left).expect("written");
            let mut log = LogStore::open(&disk(), crashed.path(), medium())
                .unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
            assert_eq!(ids(&mut log).await, expected.unwrap_or_default(), "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn a_log_goes_on_after_a_torn_tail() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (number, mut bytes, complete) = recorded(dir.path()).await;
    let end = complete.last().expect("batches").0 as usize;
    bytes[end - 1] ^= 0xff;
    std::fs::write(segment::path(dir.path(), number), &bytes).expect("written");
    let before = &complete[complete.len() - 2].1;
    let mut log = LogStore::open(&disk(), dir.path(), medium()).expect("recovered");
    assert_eq!(&ids(&mut log).await, before);
    let next = entry(9, before.last().expect("entries").index + 1, 1);
    append(&mut log, vec![next.clone()]).await;
    let mut log = LogStore::open(&disk(), dir.path(), medium()).expect("reopened");
    assert_eq!(ids(&mut log).await.last(), Some(&next.log_id));
}

#[tokio::test]
async fn damage_before_acknowledged_entries_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (number, bytes, complete) = recorded(dir.path()).await;
    let last_good = complete[complete.len() - 2].0;
    for at in (0..last_good as usize).step_by(3) {
        let crashed = tempfile::tempdir().expect("a temporary directory");
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        std::fs::write(segment::path(crashed.path(), number), damaged).expect("written");
        let opened = LogStore::open(&disk(), crashed.path(), medium());
        assert!(opened.is_err(), "damage at {at} went unnoticed");
    }
}

#[tokio::test]
async fn a_missing_segment_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut log = LogStore::open(&disk(), dir.path(), small()).expect("opened");
    for i in 0..60 {
        append(&mut log, vec![entry(1, i, 300)]).await;
    }
    let numbers = segment::list(&Machine, dir.path()).expect("listed");
    segment::remove(&Machine, dir.path(), numbers[numbers.len() / 2]).expect("removed");
    assert!(LogStore::open(&disk(), dir.path(), small()).is_err());
}
