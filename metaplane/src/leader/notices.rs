//! Notices: what primaries still have to be told, repeated until each has acked.
//!
//! In the order of their ids at each core. A core that does not answer holds up only its own: the
//! others go on, and the next round asks it again. Groups without a member, and nodes that are gone,
//! hold nothing that could be told.

use super::cores;
use super::seal::ToSeal;
use super::{Stop, seal};
use crate::service::{Service, fs_error, random};
use ebb_dataplane_protocol::control::{BATCH_MAX, Control, FlushDone};
use ebb_dataplane_protocol::{ClusterMap, InodeId, MapVersion, ShardRef, SignedGrant};
use ebb_metaplane_protocol::flush::{Notice, SealedInode};
use ebb_metaplane_protocol::{Command, FsError, FsResult};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Notices of one page.
const PAGE: usize = 1_000;
/// Pages of one round, so that those who can be told are not held up by those who can't.
const PAGES_MAX: usize = 64;
/// Limit of one call.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A message to a core, and the notices it carries.
struct Message {
    ids: Vec<u64>,
    what: What,
}

/// Views in one message at most.
const VIEWS_MAX: usize = 64;
const _: () =
    assert!(VIEWS_MAX * 2048 < ebb_dataplane_protocol::header::BODY_BYTES_MAX_DATA as usize);

enum What {
    Done(Vec<FlushDone>),
    Aborted(Vec<(InodeId, ebb_dataplane_protocol::Generation)>),
    Views(Vec<SignedGrant>),
    Drop(Vec<InodeId>),
}

impl What {
    fn len(&self) -> usize {
        match self {
            Self::Done(v) => v.len(),
            Self::Aborted(v) => v.len(),
            Self::Views(v) => v.len(),
            Self::Drop(v) => v.len(),
        }
    }
    /// `map`: by which it was chosen whom to tell.
    fn into_control(self, map: MapVersion) -> Control {
        match self {
            Self::Done(v) => Control::FlushDone(map, v),
            Self::Aborted(v) => Control::FlushAborted(map, v),
            Self::Views(v) => Control::ApplyViews(v),
            Self::Drop(v) => Control::DropInodes(map, v),
        }
    }
    /// Items of one message at most. A signed view may take 2 KiB (a key, an etag, eight cuts), and a
    /// core takes bodies of 256 KiB.
    fn room(&self) -> usize {
        match self {
            Self::Views(_) => VIEWS_MAX,
            _ => BATCH_MAX / 4,
        }
    }

    /// Adds to the last message if it is of the same kind.
    fn append(messages: &mut Vec<Message>, id: u64, what: Self) {
        if let Some(last) = messages.last_mut().filter(|m| m.what.len() < m.what.room()) {
            match (&mut last.what, what) {
                (Self::Done(a), Self::Done(b)) => a.extend(b),
                (Self::Aborted(a), Self::Aborted(b)) => a.extend(b),
                (Self::Views(a), Self::Views(b)) => a.extend(b),
                (Self::Drop(a), Self::Drop(b)) => a.extend(b),
                (_, what) => return messages.push(Message { ids: vec![id], what }),
            }
            last.ids.push(id);
        } else {
            messages.push(Message { ids: vec![id], what });
        }
    }
}

fn bounds(notice: &Notice) -> (InodeId, u64) {
    match notice {
        Notice::FlushDone { inode, alloc_limit, .. }
        | Notice::FlushAborted { inode, alloc_limit, .. }
        | Notice::ApplyView { inode, alloc_limit, .. }
        | Notice::Drop { inode, alloc_limit }
        | Notice::Fence { inode, alloc_limit, .. } => (*inode, *alloc_limit),
    }
}

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_notices(&self, stop: Stop) {
        let tick = self.config.timings.tick();
        loop {
            match self.deliver_round(&stop).await {
                // Something is stuck: try again after a pause, however much is woken meanwhile.
                Ok(true) => {
                    if stop.sleep(tick).await {
                        return;
                    }
                }
                Ok(false) => {
                    if stop.wait(&self.wakes.notices, tick).await {
                        return;
                    }
                }
                Err(e) => {
                    tracing::debug!(error = %e, "delivering notices");
                    if stop.sleep(tick).await {
                        return;
                    }
                }
            }
        }
    }

    /// Delivers what there is. `true`: some could not be.
    async fn deliver_round(&self, stop: &Stop) -> FsResult<bool> {
        let mut after = 0;
        let mut stuck = false;
        let mut silent = HashSet::new();
        for _ in 0..PAGES_MAX {
            if stop.is_set() {
                return Ok(false);
            }
            let page = self.voter.peek(|_, r| r.notices(after, PAGE)).map_err(fs_error)??;
            let Some((last, _)) = page.last() else { break };
            after = *last;
            let n = page.len();
            let acked = self.deliver(page, &mut silent).await?;
            stuck |= acked.len() < n;
            self.counts.notices.fetch_add(acked.len() as u64, Ordering::Relaxed);
            if !acked.is_empty() {
                self.voter.submit(Command::NoticesDone(acked)).await.map_err(fs_error)?;
                // Cuts were acked: truncates that waited for them are answered, flushes may begin.
                self.wakes.acked.notify_waiters();
                self.wakes.flush.notify_one();
            }
        }
        Ok(stuck)
    }

    /// Tells the cores of a page of notices; gives the ids that everybody acked.
    async fn deliver(
        &self,
        page: Vec<(u64, Notice)>,
        silent: &mut HashSet<ShardRef>,
    ) -> FsResult<Vec<u64>> {
        let map = self.map()?;
        let mut by_core: BTreeMap<ShardRef, Vec<Message>> = BTreeMap::new();
        let mut pending: BTreeSet<u64> = BTreeSet::new();
        let mut fences = Vec::new();
        let mut ids = Vec::with_capacity(page.len());
        for (id, notice) in page {
            ids.push(id);
            if let Notice::Fence { inode, generation, alloc_limit } = notice {
                fences.push((id, ToSeal { inode, generation, alloc_limit }));
                continue;
            }
            let (inode, limit) = bounds(&notice);
            for core in cores::primaries(&map, inode, limit) {
                let Some(what) = self.message(&notice)? else { break };
                What::append(by_core.entry(core).or_default(), id, what);
                pending.insert(id);
            }
        }
        let refused: HashSet<ShardRef> = silent.clone();
        let map_ref: &ClusterMap = &map;
        let refused_ref = &refused;
        let told = by_core.into_iter().map(|(core, messages)| async move {
            let mut missed = Vec::new();
            let mut failed = refused_ref.contains(&core);
            for m in messages {
                if failed {
                    missed.extend(m.ids);
                    continue;
                }
                let request = m.what.into_control(map_ref.version);
                if let Err(e) = self.cores.order(map_ref, core, &request, TIMEOUT).await {
                    tracing::debug!(error = %e, "a notice was not delivered");
                    failed = true;
                    missed.extend(m.ids);
                }
            }
            (core, missed)
        });
        let mut missed: HashSet<u64> = HashSet::new();
        for (core, ids) in futures::future::join_all(told).await {
            if !ids.is_empty() {
                silent.insert(core);
                missed.extend(ids);
            }
        }
        missed.extend(self.fence(&fences).await?);
        Ok(ids.into_iter().filter(|id| !missed.contains(id)).collect())
    }

    fn message(&self, notice: &Notice) -> FsResult<Option<What>> {
        Ok(Some(match notice {
            Notice::FlushDone {
                inode,
                generation,
                content,
                old_content,
                valid_bytes,
                old_valid_bytes,
                ..
            } => What::Done(vec![FlushDone {
                inode: *inode,
                generation: *generation,
                content: *content,
                old_content: *old_content,
                valid_bytes: *valid_bytes,
                old_valid_bytes: *old_valid_bytes,
            }]),
            Notice::FlushAborted { inode, generation, .. } => {
                What::Aborted(vec![(*inode, *generation)])
            }
            Notice::ApplyView { inode, .. } => {
                match self.voter.peek(|_, r| r.grant_view(*inode)).map_err(fs_error)? {
                    Ok(grant) => What::Views(vec![SignedGrant::sign(&grant, &self.key)]),
                    // Gone meanwhile; a Drop follows.
                    Err(FsError::Stale) => return Ok(None),
                    Err(e) => return Err(e),
                }
            }
            Notice::Drop { inode, .. } => What::Drop(vec![*inode]),
            Notice::Fence { .. } => return Ok(None),
        }))
    }

    /// Seals what dead sessions wrote and reports its size; gives the ids that were not.
    async fn fence(&self, fences: &[(u64, ToSeal)]) -> FsResult<Vec<u64>> {
        if fences.is_empty() {
            return Ok(Vec::new());
        }
        let mut missed = Vec::new();
        let mut reports = Vec::new();
        // Two fences of one inode are sealed one after the other: the answer is by inode.
        let mut rest: Vec<&(u64, ToSeal)> = fences.iter().collect();
        while !rest.is_empty() {
            let mut seen = HashSet::new();
            let (round, later): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|(_, s)| seen.insert(s.inode));
            rest = later;
            let items: Vec<ToSeal> = round.iter().map(|(_, s)| *s).collect();
            let mut sealed: HashMap<InodeId, Result<seal::Sealed, String>> =
                self.seal(&items).await?;
            for (id, item) in round {
                match sealed.remove(&item.inode) {
                    Some(Ok(found)) => reports.push(SealedInode {
                        inode: item.inode,
                        generation: item.generation,
                        has_data: !found.extents.is_empty(),
                        high_water: found.high_water,
                        nonce: random(),
                    }),
                    _ => missed.push(*id),
                }
            }
        }
        if !reports.is_empty() {
            self.submit(Command::Fenced(reports)).await?;
        }
        Ok(missed)
    }
}
