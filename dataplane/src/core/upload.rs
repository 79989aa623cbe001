//! Flushing: reading a sealed generation and sending it to S3 (I3 stays with the metadata plane).
//!
//! A body is the pinned dirty data of generation g over the clean base that the read-mode grant's view
//! names; what is in neither and past the valid bytes is zero. Bodies are put together chunk by chunk
//! in memory that the core counts (`flush_bytes`), then one job sends them. What S3 said goes back as it
//! is: whether to try again, to look, or to give up is the leader's decision.

use super::assembly::{Assembled, For, Wanted};
use super::placement::Refusal;
use super::{Buffer, Command, Job, Owed, Pending, Piece, Purpose, ShardCore, Work};
use ebb_dataplane_protocol::control::{
    ControlReply, CopyPart, PutCondition, PutObject, StoreOutcome, UploadPart,
};
use ebb_dataplane_protocol::{
    CHUNK_BYTES, ChunkIndex, Generation, InodeId, RUN_BYTES, RunIndex, SignedGrant, Status,
};
use ebb_store::BLOCK;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct UploadId(u64);

/// A `PutObjects` batch.
#[derive(Debug)]
pub(crate) struct PutTask {
    owed: Owed,
    items: Vec<PutObject>,
    results: Vec<Option<StoreOutcome>>,
}

impl PutTask {
    pub(crate) fn new(owed: Owed, items: Vec<PutObject>) -> Self {
        let results = items.iter().map(|_| None).collect();
        Self { owed, items, results }
    }
}

/// Who asked for an upload.
#[derive(Clone, Copy, Debug)]
enum Asker {
    Put(u64, usize),
    Part(Owed),
}

/// What an upload becomes once its body is there.
#[derive(Clone, Debug)]
enum Kind {
    Put { key: String, metadata: Vec<(String, String)>, condition: PutCondition },
    Part { key: String, upload_id: String, part_number: u32 },
    Copy(CopyPart),
}

#[derive(Debug)]
pub(crate) struct Upload<B> {
    asker: Asker,
    kind: Kind,
    inode: InodeId,
    generation: Generation,
    grant: Option<SignedGrant>,
    /// First byte in the file, and bytes.
    start: u64,
    bytes: u64,
    parts: Vec<Option<Piece<B>>>,
    outstanding: usize,
    failed: Option<StoreOutcome>,
    started: bool,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn put_objects(&mut self, task: PutTask) {
        let id = self.next_id();
        let items = task.items.clone();
        self.puts.insert(id, task);
        if items.is_empty() {
            return self.put_progress(id);
        }
        for (i, item) in items.into_iter().enumerate() {
            if item.size > RUN_BYTES {
                self.settle(Asker::Put(id, i), StoreOutcome::Failed("larger than a run".into()));
                continue;
            }
            let kind =
                Kind::Put { key: item.key, metadata: item.metadata, condition: item.condition };
            self.queue_upload(Upload {
                asker: Asker::Put(id, i),
                kind,
                inode: item.inode,
                generation: item.generation,
                grant: Some(item.grant),
                start: 0,
                bytes: item.size,
                parts: Vec::new(),
                outstanding: 0,
                failed: None,
                started: false,
            });
        }
    }

    pub(crate) fn upload_part(&mut self, owed: Owed, part: UploadPart) {
        if u64::from(part.length) > RUN_BYTES || part.length == 0 {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        let kind =
            Kind::Part { key: part.key, upload_id: part.upload_id, part_number: part.part_number };
        self.queue_upload(Upload {
            asker: Asker::Part(owed),
            kind,
            inode: part.inode,
            generation: part.generation,
            grant: Some(part.grant),
            start: RunIndex(part.run.0).start(),
            bytes: u64::from(part.length),
            parts: Vec::new(),
            outstanding: 0,
            failed: None,
            started: false,
        });
    }

    pub(crate) fn copy_part(&mut self, owed: Owed, part: CopyPart) {
        if part.range.start >= part.range.end {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        self.queue_upload(Upload {
            asker: Asker::Part(owed),
            kind: Kind::Copy(part),
            inode: InodeId(0),
            generation: Generation(0),
            grant: None,
            start: 0,
            bytes: 0,
            parts: Vec::new(),
            outstanding: 0,
            failed: None,
            started: false,
        });
    }

    fn queue_upload(&mut self, upload: Upload<B>) {
        let id = UploadId(self.next_id());
        self.uploads.insert(id, upload);
        self.upload_queue.push_back(id);
        self.start_uploads();
    }

    /// Starts uploads in order while there is room for one more body.
    pub(crate) fn start_uploads(&mut self) {
        while let Some(&id) = self.upload_queue.front() {
            let Some(upload) = self.uploads.get(&id) else {
                self.upload_queue.pop_front();
                continue;
            };
            let fits = self.flush_bytes + upload.bytes <= self.limits.flush_bytes;
            let room = self.uploads_active < self.limits.uploads.max(1);
            if self.uploads_active > 0 && !(fits && room) {
                return;
            }
            self.upload_queue.pop_front();
            self.start_upload(id);
        }
    }

    fn start_upload(&mut self, id: UploadId) {
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        upload.started = true;
        self.uploads_active += 1;
        self.flush_bytes += upload.bytes;
        let Some(signed) = upload.grant.take() else { return self.send_upload(id) };
        let (inode, generation) = (upload.inode, upload.generation);
        let (start, bytes) = (upload.start, upload.bytes);
        let Some(grant) = self.open_meta_grant(&signed, Some(inode)) else {
            return self.end_upload(id, StoreOutcome::Failed("the grant is refused".into()));
        };
        let scope = self.store.scope_of(inode, ChunkIndex::of_offset(start));
        if self.store.sealed(scope, generation).is_none() {
            return self.end_upload(id, StoreOutcome::NotSealed);
        }
        let view = std::sync::Arc::new(grant.view);
        let chunks: Vec<(ChunkIndex, u32)> = (0..bytes.div_ceil(u64::from(CHUNK_BYTES)))
            .map(|i| {
                let at = i * u64::from(CHUNK_BYTES);
                let len = (bytes - at).min(u64::from(CHUNK_BYTES)) as u32;
                (ChunkIndex::of_offset(start + at), len)
            })
            .collect();
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        upload.parts = chunks.iter().map(|(_, len)| Some(Piece::Zeros(*len as usize))).collect();
        // One more, so that parts that are there at once do not send the upload early.
        upload.outstanding = chunks.len() + 1;
        for (part, (chunk, len)) in chunks.into_iter().enumerate() {
            let wanted = Wanted {
                inode,
                chunk,
                blocks: 0..len.div_ceil(BLOCK as u32),
                view: std::sync::Arc::clone(&view),
                pinned: Some(generation),
                remnant: false,
                purpose: Purpose::Flush,
                sequential: true,
            };
            self.assemble(wanted, For::Upload(id, part));
        }
        self.part_settled(id);
    }

    pub(crate) fn part_assembled(
        &mut self,
        id: UploadId,
        part: usize,
        outcome: Result<Assembled<B>, Refusal>,
    ) {
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        match outcome {
            Ok(Assembled { buf: Some(buf), .. }) => {
                let slot = &mut upload.parts[part];
                let len = slot.as_ref().map_or(0, Piece::len);
                *slot = Some(Piece::Buf(buf, 0..len));
            }
            Ok(Assembled { buf: None, .. }) => {}
            Err(refusal) => {
                upload.failed = Some(match refusal.status {
                    Status::BackingChanged => StoreOutcome::BaseGone,
                    Status::StaleGeneration => StoreOutcome::NotSealed,
                    Status::Io => StoreOutcome::Damaged(format!(
                        "inode {}: a block does not match its checksum, or the device fails",
                        upload.inode
                    )),
                    status => StoreOutcome::Failed(format!("reading the body: {status:?}")),
                });
            }
        }
        self.part_settled(id);
    }

    fn part_settled(&mut self, id: UploadId) {
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        upload.outstanding -= 1;
        if upload.outstanding > 0 {
            return;
        }
        match upload.failed.take() {
            Some(outcome) => self.end_upload(id, outcome),
            None => self.send_upload(id),
        }
    }

    fn send_upload(&mut self, id: UploadId) {
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        let body: Vec<Piece<B>> = upload.parts.iter_mut().filter_map(Option::take).collect();
        debug_assert_eq!(body.iter().map(Piece::len).sum::<usize>() as u64, upload.bytes);
        let work = match upload.kind.clone() {
            Kind::Put { key, metadata, condition } => Work::Put { key, body, metadata, condition },
            Kind::Part { key, upload_id, part_number } => {
                Work::UploadPart { key, upload_id, part_number, body }
            }
            Kind::Copy(part) => Work::CopyPart {
                key: part.key,
                upload_id: part.upload_id,
                part_number: part.part_number,
                source_key: part.source_key,
                source_etag: part.source_etag,
                range: part.range.start..part.range.end,
            },
        };
        let token = self.expect(Pending::Upload(id));
        self.out.push(Command::Job(Job { token, work }));
    }

    pub(crate) fn uploaded(&mut self, id: UploadId, outcome: StoreOutcome) {
        self.end_upload(id, outcome);
    }

    fn end_upload(&mut self, id: UploadId, outcome: StoreOutcome) {
        let Some(upload) = self.uploads.remove(&id) else { return };
        debug_assert!(upload.started);
        self.uploads_active -= 1;
        self.flush_bytes -= upload.bytes;
        self.settle(upload.asker, outcome);
    }

    fn settle(&mut self, asker: Asker, outcome: StoreOutcome) {
        match asker {
            Asker::Part(owed) => self.control_reply(owed, &ControlReply::Part(outcome)),
            Asker::Put(id, item) => {
                if let Some(task) = self.puts.get_mut(&id) {
                    task.results[item] = Some(outcome);
                }
                self.put_progress(id);
            }
        }
    }

    fn put_progress(&mut self, id: u64) {
        if !self.puts.get(&id).is_some_and(|t| t.results.iter().all(Option::is_some)) {
            return;
        }
        let Some(task) = self.puts.remove(&id) else { return };
        let results = task.results.into_iter().flatten().collect();
        self.control_reply(task.owed, &ControlReply::Stored(results));
    }
}
