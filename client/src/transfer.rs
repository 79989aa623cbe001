//! One range of one chunk, to or from the core that owns it, through every kind of refusal.
//!
//! A read or a write is repeated until it is answered `Ok`, an answer says it cannot succeed, or the
//! patience ends. A write keeps its (session, sequence) through all of it. While its outcome is
//! unknown (the connection broke under it) it is repeated under the same grant, so that the core's
//! window recognises it; only a definite refusal makes it go on under a fresh grant (I5, I7).

use crate::Result;
use crate::cluster::Shared;
use crate::error::ClientError;
use crate::grant::GrantState;
use crate::inode::OpenInode;
use crate::pool::Link;
use crate::sequence::Ticket;
use crate::status::{Action, action};
use bytes::{Bytes, BytesMut};
use ebb_dataplane_protocol::checksum::piece_checksums;
use ebb_dataplane_protocol::data::{DataContext, WriteReply, decode_checksums, encode_checksums};
use ebb_dataplane_protocol::header::FLAG_PREFETCH;
use ebb_dataplane_protocol::{
    BLOCK_BYTES, CHUNK_BYTES, ChunkIndex, ClusterMap, Generation, Header, Opcode, PgEntry, PgEpoch,
    PgId, Status, crc32c,
};
use ebb_metaplane_protocol::{Query, QueryReply};
use ebb_rpc::{Frame, RpcError};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Tries after `BackingChanged`, `Forbidden`, `Internal`, `Corrupt` before EIO.
const FEW_TRIES: u32 = 6;
/// Pauses between tries after a lost connection; doubles.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How often progress of flushing is asked for while waiting for space.
const SPACE_LOOK: Duration = Duration::from_secs(1);

/// Reads `start..end`, which lies in one chunk. The answer has exactly that length; its checksums
/// were compared. `hint`: what the node is told of the reads that follow, as flags of the header.
pub(crate) async fn read(inode: &OpenInode, start: u64, end: u64, hint: u16) -> Result<Bytes> {
    let mut t = Transfer::new(inode, start, end, None);
    t.flags = hint;
    loop {
        let (frame, _) = t.run().await?;
        match check_read(&frame, start, end) {
            Ok(bytes) => return Ok(bytes),
            Err(why) => {
                tracing::warn!(inode = inode.id.0, start, end, why, "damaged read reply");
                t.few(why.to_owned()).await?;
            }
        }
    }
}

/// Has the node bring what it lacks of `start..end`, which lies in one chunk, into its cache.
pub(crate) async fn prefetch(inode: &OpenInode, start: u64, end: u64) -> Result<()> {
    let mut t = Transfer::new(inode, start, end, None);
    t.flags = FLAG_PREFETCH;
    t.run().await.map(drop)
}

/// Writes `data` at `start`, inside one chunk. Answers with the generation it was taken under.
pub(crate) async fn write(inode: &OpenInode, start: u64, data: Bytes) -> Result<Generation> {
    let end = start + data.len() as u64;
    let ticket = inode.shared.cluster.data_sequences.begin();
    let crcs = encode_checksums(&piece_checksums(start % u64::from(CHUNK_BYTES), &data));
    let mut t = Transfer::new(inode, start, end, Some(Outgoing { data, crcs, ticket }));
    loop {
        let (frame, grant) = t.run().await?;
        // Not the grant's: a repeated write was taken under the tag it had the first time, and to
        // that one its end is credited (R19), else it regrows a file that was cut meanwhile.
        if let Some(reply) = WriteReply::decode(&frame.body) {
            return Ok(reply.generation);
        }
        t.unknown_under = Some(grant);
        t.unanswered();
        t.few("a write's answer names no generation".to_owned()).await?;
    }
}

/// The bytes `start..end` out of a reply that carries the blocks around them.
fn check_read(frame: &Frame, start: u64, end: u64) -> std::result::Result<Bytes, &'static str> {
    let chunk = ChunkIndex::of_offset(start).start();
    let first = chunk + u64::from(frame.header.offset);
    let last = first + frame.payload.len() as u64;
    if first > start || last < end || !first.is_multiple_of(u64::from(BLOCK_BYTES)) {
        return Err("the reply does not cover the range");
    }
    let crcs = decode_checksums(&frame.body).ok_or("the reply's checksums are malformed")?;
    if crcs.len() != frame.payload.len().div_ceil(BLOCK_BYTES as usize) {
        return Err("the reply has another number of checksums than of blocks");
    }
    for (block, crc) in frame.payload.chunks(BLOCK_BYTES as usize).zip(crcs) {
        if crc32c(block) != crc {
            return Err("a block's checksum does not match");
        }
    }
    Ok(frame.payload.slice((start - first) as usize..(end - first) as usize))
}

struct Outgoing {
    data: Bytes,
    crcs: Vec<u8>,
    ticket: Ticket,
}

struct Transfer<'a> {
    inode: &'a OpenInode,
    shared: &'a Shared,
    start: u64,
    end: u64,
    outgoing: Option<Outgoing>,
    /// Of the request's header.
    flags: u16,
    deadline: Instant,
    /// When NoSpace becomes ENOSPC; set at the first one.
    space: Option<Space>,
    /// A grant a core refused.
    bad: Option<Arc<GrantState>>,
    /// The grant under which the outcome of this write is unknown.
    unknown_under: Option<Arc<GrantState>>,
    /// The group's epoch of the last attempt.
    sent_in: PgEpoch,
    /// The first epoch of an attempt that was not answered: a group whose windows began anew since then can't tell
    /// whether it was applied (R27).
    unanswered_in: Option<PgEpoch>,
    tries: u32,
    regrants: u32,
    pause: Duration,
}

struct Space {
    until: Instant,
    looked: Instant,
    dirty: Option<u64>,
}

impl<'a> Transfer<'a> {
    fn new(inode: &'a OpenInode, start: u64, end: u64, outgoing: Option<Outgoing>) -> Self {
        let shared = &inode.shared.cluster;
        Self {
            inode,
            shared,
            start,
            end,
            outgoing,
            flags: 0,
            deadline: Instant::now() + shared.config.patience,
            space: None,
            bad: None,
            unknown_under: None,
            sent_in: PgEpoch(0),
            unanswered_in: None,
            tries: 0,
            regrants: 0,
            pause: PAUSE_MIN,
        }
    }

    /// The last attempt of a write may have been applied. Refusals of later ones don't take that back.
    fn unanswered(&mut self) {
        self.unanswered_in.get_or_insert(self.sent_in);
    }

    fn failed(&self, why: String) -> ClientError {
        ClientError::Data {
            what: if self.outgoing.is_some() { "write" } else { "read" },
            inode: self.inode.id.0,
            start: self.start,
            end: self.end,
            why,
        }
    }

    async fn wait(&self, pause: Duration, why: String) -> Result<()> {
        if Instant::now() + pause >= self.deadline {
            return Err(self.failed(why));
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Waits with growing pauses (a lost connection, an absent node).
    async fn wait_longer(&mut self, why: String) -> Result<()> {
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE_MAX);
        self.wait(pause, why).await
    }

    /// One of a few tries.
    async fn few(&mut self, why: String) -> Result<()> {
        self.tries += 1;
        if self.tries >= FEW_TRIES {
            return Err(self.failed(why));
        }
        self.wait(PAUSE_MIN * (1 << self.tries), why).await
    }

    async fn map_newer_than(&self, map: &ClusterMap, wake: bool) -> Result<Arc<ClusterMap>> {
        let deadline = self.deadline.max(Instant::now() + PAUSE_MAX);
        self.shared.map.refresh(&self.shared.meta, map.version, wake, deadline).await
    }

    /// Sends until it is answered `Ok`.
    async fn run(&mut self) -> Result<(Frame, Arc<GrantState>)> {
        loop {
            let grant = match &self.unknown_under {
                Some(grant) if grant.epoch == self.shared.session.current().1 => Arc::clone(grant),
                Some(_) => return Err(ClientError::WriteLost { inode: self.inode.id.0 }),
                None => {
                    let write_end = self.outgoing.as_ref().map(|_| self.end);
                    self.inode.grant(write_end, self.bad.as_ref(), self.deadline).await?
                }
            };
            let mut map = self.shared.map.get();
            if map.version < grant.grant.least_map_version {
                map = self.map_newer_than(&map, false).await?;
                if map.version < grant.grant.least_map_version {
                    self.wait_longer("the cluster map is older than the grant".into()).await?;
                    continue;
                }
            }
            let chunk = ChunkIndex::of_offset(self.start);
            let Some((pg, entry)) = map.pg_of(self.inode.id, chunk) else {
                self.wait_longer("the cluster is not formatted yet".into()).await?;
                self.map_newer_than(&map, false).await?;
                continue;
            };
            if self.unanswered_in.is_some_and(|sent| entry.windows_since > sent) {
                return Err(ClientError::WriteLost { inode: self.inode.id.0 });
            }
            let Some(shard) = entry.primary() else {
                // Scale zero: this is the first request that brings the nodes back.
                self.map_newer_than(&map, true).await?;
                self.wait_longer("no data node holds this part of the file".into()).await?;
                continue;
            };
            let Some((host, port)) = map.address(shard) else {
                self.map_newer_than(&map, false).await?;
                self.wait_longer(format!("node {} is not in the map", shard.node)).await?;
                continue;
            };
            let address = format!("{host}:{port}");
            let lane = chunk.0 % self.shared.config.lanes.max(1);
            let (session, epoch) = self.shared.session.current();
            if epoch != grant.epoch {
                continue;
            }
            let identity = self.shared.identity(map.cluster, session, lane);
            let link = match self.shared.pool.link(&map, shard, &address, &identity, epoch).await {
                Ok(link) => link,
                Err(e @ RpcError::WrongKey { .. }) => return Err(e.into()),
                Err(e) => {
                    self.wait_longer(e.to_string()).await?;
                    self.map_newer_than(&map, false).await?;
                    continue;
                }
            };
            self.sent_in = entry.epoch;
            match self.exchange(&link, &grant, &map, pg, entry).await {
                Ok((status, frame, retry)) => {
                    self.unknown_under = None;
                    match action(status, retry) {
                        None => return Ok((frame, grant)),
                        Some(a) => self.react(a, status, &frame, &link, grant, &map).await?,
                    }
                }
                Err(e) => {
                    if self.outgoing.is_some() && e.may_have_happened() {
                        self.unknown_under = Some(grant);
                        self.unanswered();
                    }
                    link.close();
                    self.wait_longer(e.to_string()).await?;
                    self.map_newer_than(&map, false).await?;
                }
            }
        }
    }

    /// One attempt: the grant, if this connection has not carried it yet, and right behind it the
    /// request, without waiting in between.
    async fn exchange(
        &self,
        link: &Link,
        grant: &GrantState,
        map: &ClusterMap,
        pg: PgId,
        entry: &PgEntry,
    ) -> std::result::Result<(Status, Frame, u32), RpcError> {
        let timeout = self.shared.config.request_timeout;
        let chunk = ChunkIndex::of_offset(self.start);
        let opcode = if self.outgoing.is_some() { Opcode::Write } else { Opcode::Read };
        let header = Header {
            pg,
            inode: self.inode.id,
            chunk,
            offset: (self.start - chunk.start()) as u32,
            length: (self.end - self.start) as u32,
            flags: self.flags,
            ..Header::request(opcode, 0)
        };
        let mut context = DataContext {
            generation: grant.grant.generation,
            view_version: grant.grant.view.version,
            map_version: map.version,
            pg_epoch: entry.epoch,
            content: grant.grant.view.content,
            session: grant.grant.session,
            ..DataContext::default()
        };
        let (body, payload) = match &self.outgoing {
            None => (Bytes::copy_from_slice(&context.encode()), Bytes::new()),
            Some(out) => {
                context.sequence = out.ticket.sequence();
                context.answered_below = self.shared.data_sequences.answered_below();
                let mut body = BytesMut::with_capacity(64 + out.crcs.len());
                body.extend_from_slice(&context.encode());
                body.extend_from_slice(&out.crcs);
                (body.freeze(), out.data.clone())
            }
        };
        let request = link.call(header, body, payload, timeout);
        let tag = grant.tag();
        if link.was_shown(self.inode.id, tag) {
            let frame = request.await?;
            return Ok((frame.header.status, frame.clone(), frame.header.retry_after_ms));
        }
        // Optimistic: others may send under it at once, right behind it.
        link.mark_shown(self.inode.id, Some(tag));
        let (shown, answered) =
            tokio::join!(link.present(&grant.signed, self.inode.id, timeout), request);
        let frame = answered?;
        let (status, retry) = (frame.header.status, frame.header.retry_after_ms);
        if let Ok((refusal, retry)) = shown
            && refusal != Status::Ok
        {
            link.mark_shown(self.inode.id, None);
            if status == Status::NeedGrant {
                return Ok((refusal, frame, retry));
            }
        }
        Ok((status, frame, retry))
    }

    /// Carries out an action of the table, so that the next turn may succeed.
    async fn react(
        &mut self,
        action: Action,
        status: Status,
        frame: &Frame,
        link: &Link,
        grant: Arc<GrantState>,
        map: &ClusterMap,
    ) -> Result<()> {
        let said = String::from_utf8_lossy(&frame.body[..frame.body.len().min(200)]).into_owned();
        let why = format!("{status:?} {said}").trim_end().to_owned();
        tracing::debug!(inode = self.inode.id.0, start = self.start, ?status, ?action, "refused");
        match action {
            Action::Present => {
                link.mark_shown(self.inode.id, None);
                self.regrant_slowly(why).await?;
            }
            Action::Regrant => {
                self.bad = Some(grant);
                self.regrant_slowly(why).await?;
            }
            Action::MapAndRegrant => {
                self.map_newer_than(map, false).await?;
                self.bad = Some(grant);
                self.regrant_slowly(why).await?;
            }
            Action::Wait(pause) => self.wait(pause, why).await?,
            Action::WaitThenMap(pause) => {
                self.wait(pause, why).await?;
                self.map_newer_than(map, false).await?;
            }
            Action::WaitForSpace(pause) => self.wait_for_space(pause).await?,
            Action::BackingChanged => {
                // An outside change ends this handle (`Stale`, at the next grant); a flush or a
                // rename of ours has another view by now, or soon.
                let _ = self.shared.query(Query::Compare(self.inode.id)).await;
                self.bad = Some(grant);
                self.few(why).await?;
            }
            Action::SendAgain => self.few(why).await?,
            Action::FewTries => {
                self.bad = Some(grant);
                self.few(why).await?;
            }
            Action::Reconnect => {
                link.close();
                self.wait_longer(why).await?;
            }
            Action::Fail => return Err(self.failed(why)),
        }
        Ok(())
    }

    /// The first refusals of a grant are the ordinary course of things; further ones come from a
    /// race with seals or truncates of others, and wait a little longer each time.
    async fn regrant_slowly(&mut self, why: String) -> Result<()> {
        self.regrants += 1;
        match self.regrants {
            0..=2 => Ok(()),
            n => self.wait((PAUSE_MIN * n.min(50)).min(PAUSE_MAX), why).await,
        }
    }

    async fn wait_for_space(&mut self, pause: Duration) -> Result<()> {
        let now = Instant::now();
        let patience = self.shared.config.space_patience;
        let space =
            self.space.get_or_insert(Space { until: now + patience, looked: now, dirty: None });
        if now >= space.until {
            return Err(ClientError::NoSpace);
        }
        tokio::time::sleep(pause).await;
        if space.dirty.is_none() || space.looked.elapsed() >= SPACE_LOOK {
            space.looked = Instant::now();
            if let Ok(QueryReply::StatFs(s)) = self.shared.query(Query::StatFs).await {
                // Full nodes take nothing new, so a change means that flushing goes on.
                if space.dirty.is_some_and(|before| before != s.dirty_bytes) {
                    space.until = Instant::now() + patience;
                    self.deadline = self.deadline.max(space.until + PAUSE_MAX);
                }
                space.dirty = Some(s.dirty_bytes);
            }
        }
        self.deadline = self.deadline.max(space.until + PAUSE_MAX);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn reply(offset: u32, payload: Vec<u8>) -> Frame {
        let crcs: Vec<u32> = payload.chunks(BLOCK_BYTES as usize).map(crc32c).collect();
        let header = Header { offset, ..Header::request(Opcode::Read, 1) };
        Frame::new(header, encode_checksums(&crcs).into(), payload.into())
    }

    #[test]
    fn any_flipped_bit_of_a_read_is_noticed() {
        for seed in 0..50 {
            let mut rng = StdRng::seed_from_u64(seed);
            let data: Vec<u8> = (0..3 * 4096).map(|_| rng.random()).collect();
            let base = 2 * u64::from(CHUNK_BYTES) + 4096;
            let good = reply(4096, data.clone());
            let (a, b) = (rng.random_range(0..data.len()), rng.random_range(0..data.len()));
            let (a, b) = (a.min(b), a.max(b) + 1);
            let got = check_read(&good, base + a as u64, base + b as u64).expect("intact");
            assert_eq!(got, data[a..b], "seed {seed}");
            let mut bad = data;
            let at = rng.random_range(0..bad.len());
            bad[at] ^= 1 << rng.random_range(0..8);
            let damaged = Frame { payload: bad.into(), ..good };
            assert!(check_read(&damaged, base, base + 100).is_err(), "seed {seed}");
        }
    }

    #[test]
    fn a_reply_that_covers_less_than_asked_is_refused() {
        let frame = reply(4096, vec![7; 4096]);
        assert!(check_read(&frame, 4096, 8192).is_ok());
        assert!(check_read(&frame, 4095, 8192).is_err());
        assert!(check_read(&frame, 4096, 8193).is_err());
        let mut short = frame.clone();
        short.body = Bytes::new();
        assert!(check_read(&short, 4096, 8192).is_err());
    }
}
