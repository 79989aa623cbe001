//! Putting a range of blocks together from the device, from S3 and from known zeros.
//!
//! An assembly has one target buffer. The kernel owns a buffer while it reads into it, so one device
//! piece at a time goes straight to the target and the others, when temporary buffers are to be had,
//! go to those in parallel and are copied when the target is home. With no temporary buffer free the
//! pieces go one after another: slower, never stuck (the target is all an assembly ever waits for).
//!
//! Every device block is checked against the index (I10). A mismatch is read again once; clean data
//! that stays wrong is dropped and taken from S3, dirty data is `Io`.

use super::dram::Dram;
use super::fill::Target;
use super::grants::base_of;
use super::placement::Refusal;
use super::{
    Buffer, Buffers, Command, Pending, Piece, Purpose, RETRY_BUSY_MS, ShardCore, Starved, Waiter,
};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_dataplane_protocol::{ChunkIndex, FileView, Generation, InodeId, Status};
use ebb_store::{BLOCK, PieceSource, ReadGuard, ReadPlan, zero_block_crc};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Pieces above this are read into the target only.
const TEMPORARY_BYTES_MAX: usize = 64 << 10;
/// Temporary buffers of one assembly.
const TEMPORARIES_MAX: usize = 32;
/// Attempts to read what the index says, the repair included.
const ATTEMPTS_MAX: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AsmId(pub(crate) u64);

/// What to put together.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
    pub(crate) blocks: Range<u32>,
    pub(crate) view: Arc<FileView>,
    /// A sealed generation, or what is current.
    pub(crate) pinned: Option<Generation>,
    /// Not what is held here, but what is left of a group that others hold now.
    pub(crate) remnant: bool,
    pub(crate) purpose: Purpose,
    /// A client reads sequentially: fetch ahead.
    pub(crate) sequential: bool,
}

/// Who wants it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum For {
    Read(u64),
    Upload(super::upload::UploadId, usize),
    Peer(u64),
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Assembled<B> {
    /// `None`: all zeros, if there are no copies either.
    pub(crate) buf: Option<B>,
    /// Where all of it is in memory: instead of the buffer.
    pub(crate) copies: Vec<Piece<B>>,
    /// One per block.
    pub(crate) crcs: Vec<u32>,
    /// Some of it came from S3.
    pub(crate) missed: bool,
}

impl<B> Assembled<B> {
    /// The `bytes` bytes of it.
    pub(crate) fn into_pieces(self, bytes: usize) -> Vec<Piece<B>> {
        match self.buf {
            Some(buf) => vec![Piece::Buf(buf, 0..bytes)],
            None if self.copies.is_empty() => vec![Piece::Zeros(bytes)],
            None => self.copies,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct DevicePiece {
    offset: u64,
    /// First block, relative to the assembly's range.
    at: u32,
    crcs: Vec<u32>,
    tail_valid: u32,
    dirty: bool,
}

impl DevicePiece {
    fn bytes(&self) -> usize {
        self.crcs.len() * BLOCK
    }
    fn range(&self) -> Range<usize> {
        let start = self.at as usize * BLOCK;
        start..start + self.bytes()
    }
}

#[derive(Debug)]
pub(crate) struct Assembly<B> {
    wanted: Wanted,
    then: For,
    guard: Option<ReadGuard>,
    has_target: bool,
    /// The target, while it is home.
    buf: Option<B>,
    /// Instead of a target.
    copies: Vec<Piece<B>>,
    crcs: Vec<u32>,
    todo: VecDeque<DevicePiece>,
    /// Read into temporaries while the target was away: (buffer, source bytes, target byte).
    parked: Vec<(Source<B>, Range<usize>, usize)>,
    device_reads: usize,
    temporaries: usize,
    fills: usize,
    missed: bool,
    failed: Option<Refusal>,
    /// A block did not match; whether any of the kind was dirty.
    rot: Option<bool>,
    attempts: u8,
}

#[derive(Debug)]
enum Source<B> {
    Own(B),
    Shared(Arc<B>),
}

impl<B: Buffer> ShardCore<B> {
    /// Starts putting a range together; the result goes to `assembled`.
    pub(crate) fn assemble(&mut self, wanted: Wanted, then: For) {
        assert!(wanted.blocks.start < wanted.blocks.end);
        let id = AsmId(self.next_id());
        let blocks = wanted.blocks.len();
        let assembly = Assembly {
            wanted,
            then,
            guard: None,
            has_target: false,
            buf: None,
            copies: Vec::new(),
            crcs: vec![zero_block_crc(); blocks],
            todo: VecDeque::new(),
            parked: Vec::new(),
            device_reads: 0,
            temporaries: 0,
            fills: 0,
            missed: false,
            failed: None,
            rot: None,
            attempts: 1,
        };
        self.assemblies.insert(id, assembly);
        if !self.start_assembly(id) {
            self.starve(Starved::Assembly(id));
        }
    }

    fn plan(&mut self, wanted: &Wanted) -> Option<ReadPlan> {
        let base = base_of(&wanted.view);
        let blocks = wanted.blocks.clone();
        if wanted.remnant {
            return self.store.plan_remnant(wanted.inode, wanted.chunk, blocks, base);
        }
        match wanted.pinned {
            None => Some(self.store.plan_read(wanted.inode, wanted.chunk, blocks, base)),
            Some(g) => self.store.plan_read_pinned(wanted.inode, g, wanted.chunk, blocks, base),
        }
    }

    /// `false`: no buffer now; ask again.
    pub(crate) fn start_assembly(&mut self, id: AsmId) -> bool {
        let Some(a) = self.assemblies.get(&id) else { return true };
        let wanted = a.wanted.clone();
        let current = wanted.pinned.is_none() && !wanted.remnant;
        if current && !self.is_current(wanted.inode, &wanted.view) {
            self.fail_assembly(id, Refusal::of(Status::StaleView));
            return true;
        }
        let Some(plan) = self.plan(&wanted) else {
            self.fail_assembly(id, Refusal::of(Status::StaleGeneration));
            return true;
        };
        let all_zero = plan.pieces.iter().all(|p| p.source == PieceSource::Zero);
        if !all_zero && wanted.purpose == Purpose::Reply && self.copies_serve(id, &plan) {
            if let Some(guard) = plan.guard {
                self.store.release(guard);
            }
            self.assembly_ended(id);
            return true;
        }
        let Some(a) = self.assemblies.get_mut(&id) else { return true };
        if !all_zero && !a.has_target {
            let Some(buf) = self.buffers.take(wanted.blocks.len() * BLOCK, wanted.purpose) else {
                // Planned anew when a buffer is there: nothing is held back meanwhile.
                if let Some(guard) = plan.guard {
                    self.store.release(guard);
                }
                return false;
            };
            a.buf = Some(buf);
            a.has_target = true;
        }
        a.guard = plan.guard;
        a.rot = None;
        let mut misses = Vec::new();
        let mut at = wanted.blocks.start;
        for piece in plan.pieces {
            assert_eq!(piece.blocks.start, at, "pieces cover the range in order");
            at = piece.blocks.end;
            let relative = piece.blocks.start - wanted.blocks.start;
            match piece.source {
                PieceSource::Zero => {
                    let bytes = relative as usize * BLOCK;
                    if let Some(buf) = a.buf.as_mut() {
                        buf.bytes_mut()[bytes..bytes + piece.blocks.len() * BLOCK].fill(0);
                    }
                    let crcs = &mut a.crcs[relative as usize..][..piece.blocks.len()];
                    crcs.fill(zero_block_crc());
                }
                PieceSource::Device { offset, crcs, tail_valid, dirty } => {
                    assert_eq!(crcs.len(), piece.blocks.len(), "one checksum per block");
                    let piece = DevicePiece { offset, at: relative, crcs, tail_valid, dirty };
                    let copied = a.buf.as_mut().is_some_and(|target| {
                        let bytes = &mut target.bytes_mut()[piece.range()];
                        let crcs = &mut a.crcs[relative as usize..][..piece.crcs.len()];
                        let copied =
                            copy_all(&mut self.dram, &piece, bytes) && is_sound(&piece, bytes);
                        if copied {
                            finish_piece(&piece, bytes, crcs);
                        }
                        copied
                    });
                    if !copied {
                        a.todo.push_back(piece);
                    }
                }
                PieceSource::Miss => {
                    a.missed = true;
                    misses.push(piece.blocks);
                }
            }
        }
        assert_eq!(at, wanted.blocks.end, "pieces cover the range");
        // One more than there are, so that fills that answer at once do not end the assembly early.
        a.fills += 1;
        for blocks in misses {
            let to = Target::Assembly(id);
            let seq = wanted.sequential;
            self.want_fill(wanted.inode, wanted.chunk, &wanted.view, blocks, seq, to);
        }
        if let Some(a) = self.assemblies.get_mut(&id) {
            a.fills -= 1;
        }
        self.pump_assembly(id);
        true
    }

    /// Answers with copies in memory alone, if they are all there and count whole.
    fn copies_serve(&mut self, id: AsmId, plan: &ReadPlan) -> bool {
        let dram = &mut self.dram;
        let served = plan.pieces.iter().all(|p| match &p.source {
            PieceSource::Zero => true,
            PieceSource::Device { offset, crcs, tail_valid, .. } => {
                *tail_valid as usize == BLOCK && dram.has_all(*offset, crcs)
            }
            PieceSource::Miss => false,
        });
        let Some(a) = self.assemblies.get_mut(&id).filter(|a| served && !a.has_target) else {
            return false;
        };
        a.crcs.clear();
        for piece in &plan.pieces {
            match &piece.source {
                PieceSource::Device { offset, crcs, .. } => {
                    a.crcs.extend_from_slice(crcs);
                    for (n, crc) in crcs.iter().enumerate() {
                        let copy = dram.get(offset + (n * BLOCK) as u64, *crc);
                        a.copies.extend(copy.map(|c| Piece::Shared(Arc::clone(c), 0..BLOCK)));
                    }
                }
                _ => {
                    a.crcs.extend(piece.blocks.clone().map(|_| zero_block_crc()));
                    a.copies.push(Piece::Zeros(piece.blocks.len() * BLOCK));
                }
            }
        }
        self.stats.dram_hits += 1;
        true
    }

    /// A fill will bring some of it.
    pub(crate) fn assembly_waits(&mut self, id: AsmId) {
        if let Some(a) = self.assemblies.get_mut(&id) {
            a.fills += 1;
        }
    }

    /// A fill brought blocks of the chunk: `from` is the first one's byte in the fill's buffer.
    pub(crate) fn assembly_filled(
        &mut self,
        id: AsmId,
        blocks: Range<u32>,
        buf: &Arc<B>,
        from: usize,
        crcs: &[u32],
    ) {
        let Some(a) = self.assemblies.get_mut(&id) else { return };
        a.fills -= 1;
        let at = (blocks.start - a.wanted.blocks.start) as usize;
        a.crcs[at..at + blocks.len()].copy_from_slice(crcs);
        let source = from..from + blocks.len() * BLOCK;
        match a.buf.as_mut() {
            Some(target) => target.bytes_mut()[at * BLOCK..][..source.len()]
                .copy_from_slice(&buf.bytes()[source]),
            None => a.parked.push((Source::Shared(Arc::clone(buf)), source, at * BLOCK)),
        }
        self.pump_assembly(id);
    }

    pub(crate) fn assembly_fill_failed(&mut self, id: AsmId, refusal: Refusal) {
        if let Some(a) = self.assemblies.get_mut(&id) {
            a.fills -= 1;
            a.failed = Some(refusal);
        }
        self.pump_assembly(id);
    }

    /// Issues what can be issued; ends the assembly when all is there.
    fn pump_assembly(&mut self, id: AsmId) {
        let Some(a) = self.assemblies.get_mut(&id) else { return };
        if let Some(target) = a.buf.as_mut() {
            for (source, range, to) in a.parked.drain(..) {
                let bytes = match &source {
                    Source::Own(b) => &b.bytes()[range],
                    Source::Shared(b) => &b.bytes()[range],
                };
                target.bytes_mut()[to..to + bytes.len()].copy_from_slice(bytes);
                if matches!(source, Source::Own(_)) {
                    a.temporaries -= 1;
                }
            }
        }
        if a.failed.is_some() {
            a.todo.clear();
        }
        while let Some(front) = a.todo.front() {
            let bytes = front.bytes();
            let (buf, range, target) = if let Some(buf) = a.buf.take() {
                (buf, front.range(), true)
            } else if a.temporaries < TEMPORARIES_MAX
                && bytes <= TEMPORARY_BYTES_MAX
                && let Some(buf) = self.buffers.take(bytes, Purpose::Edge)
            {
                a.temporaries += 1;
                (buf, 0..bytes, false)
            } else {
                break;
            };
            let Some(piece) = a.todo.pop_front() else { break };
            a.device_reads += 1;
            let offset = piece.offset;
            let what =
                if target { Pending::Target(id, piece) } else { Pending::Temporary(id, piece) };
            self.last_id += 1;
            let token = super::Token(self.last_id);
            self.pending.insert(token, what);
            self.out.push(Command::Read { token, offset, buf, range });
        }
        if a.device_reads == 0 && a.todo.is_empty() {
            if let Some(guard) = a.guard.take() {
                self.store.release(guard);
                // A writer may wait for the blocks it held.
                self.retry_waiting = true;
            }
            if a.fills == 0 {
                self.assembly_ended(id);
            }
        }
    }

    pub(crate) fn target_read(&mut self, id: AsmId, piece: DevicePiece, mut buf: B, ok: bool) {
        let Some(a) = self.assemblies.get_mut(&id) else { return };
        a.device_reads -= 1;
        let range = piece.range();
        let crcs = &mut a.crcs[piece.at as usize..][..piece.crcs.len()];
        let bytes = &mut buf.bytes_mut()[range];
        let dram = (a.wanted.purpose == Purpose::Reply).then_some(&mut self.dram);
        if !ok || !take_piece(&piece, bytes, crcs, dram, &mut *self.buffers) {
            a.rot = Some(a.rot.unwrap_or(false) | piece.dirty);
            self.stats.checksum_errors += 1;
        }
        a.buf = Some(buf);
        self.pump_assembly(id);
    }

    pub(crate) fn temporary_read(&mut self, id: AsmId, piece: DevicePiece, mut buf: B, ok: bool) {
        let Some(a) = self.assemblies.get_mut(&id) else { return };
        a.device_reads -= 1;
        let len = piece.bytes();
        let crcs = &mut a.crcs[piece.at as usize..][..piece.crcs.len()];
        let bytes = &mut buf.bytes_mut()[..len];
        let dram = (a.wanted.purpose == Purpose::Reply).then_some(&mut self.dram);
        if !ok || !take_piece(&piece, bytes, crcs, dram, &mut *self.buffers) {
            a.rot = Some(a.rot.unwrap_or(false) | piece.dirty);
            self.stats.checksum_errors += 1;
            a.temporaries -= 1;
        } else {
            a.parked.push((Source::Own(buf), 0..len, piece.range().start));
        }
        self.pump_assembly(id);
    }

    fn assembly_ended(&mut self, id: AsmId) {
        let Some(a) = self.assemblies.get_mut(&id) else { return };
        debug_assert!(a.parked.is_empty() && a.temporaries == 0);
        if a.failed.is_none()
            && let Some(dirty) = a.rot
        {
            a.attempts += 1;
            let (attempts, inode, chunk) = (a.attempts, a.wanted.inode, a.wanted.chunk);
            let remnant = a.wanted.remnant;
            // Freed and written anew between plan and read is ruled out by the guard; so the second
            // look tells a bad transfer from bad data.
            if attempts == 2 {
                return self.replan(id);
            }
            if remnant {
                self.store.drop_remnant(inode, chunk);
            } else if !dirty && attempts <= ATTEMPTS_MAX {
                match self.store.evict_clean(&[inode]) {
                    Ok(Some(ticket)) => {
                        self.stats.checksum_repairs += 1;
                        return self.wait_ticket(ticket, Waiter::Repair(id));
                    }
                    Ok(None) => return self.replan(id),
                    Err(_) => {}
                }
            }
            if let Some(a) = self.assemblies.get_mut(&id) {
                a.failed = Some(Refusal::of(Status::Io));
            }
        }
        let Some(a) = self.assemblies.remove(&id) else { return };
        let outcome = match a.failed {
            Some(refusal) => Err(refusal),
            None => {
                let Assembly { buf, copies, crcs, missed, .. } = a;
                Ok(Assembled { buf, copies, crcs, missed })
            }
        };
        match a.then {
            For::Read(read) => self.read_assembled(read, outcome),
            For::Upload(upload, part) => self.part_assembled(upload, part, outcome),
            For::Peer(id) => self.peer_assembled(id, outcome),
        }
    }

    /// Reads it all again.
    pub(crate) fn replan(&mut self, id: AsmId) {
        if !self.start_assembly(id) {
            self.starve(Starved::Assembly(id));
        }
    }

    fn fail_assembly(&mut self, id: AsmId, refusal: Refusal) {
        if let Some(a) = self.assemblies.get_mut(&id) {
            a.failed = Some(refusal);
            self.assembly_ended(id);
        }
    }

    /// Waited too long for its target. Uploads wait on: the leader's patience is longer than ours.
    pub(crate) fn give_up_assembly(&mut self, id: AsmId) -> bool {
        match self.assemblies.get(&id).map(|a| a.then) {
            Some(For::Upload(..)) => false,
            Some(For::Read(_) | For::Peer(_)) => {
                self.fail_assembly(id, Refusal::after(Status::Busy, RETRY_BUSY_MS));
                true
            }
            None => true,
        }
    }
}

/// Whether each block is what the index says.
fn is_sound(piece: &DevicePiece, bytes: &[u8]) -> bool {
    bytes.chunks(BLOCK).zip(&piece.crcs).all(|(block, crc)| crc32c(block) == *crc)
}

/// Zeroes what does not count, and says the checksums of what is there then.
fn finish_piece(piece: &DevicePiece, bytes: &mut [u8], crcs: &mut [u32]) {
    crcs.copy_from_slice(&piece.crcs);
    let valid = piece.tail_valid as usize;
    if valid < BLOCK
        && let Some(last) = bytes.len().checked_sub(BLOCK)
    {
        bytes[last + valid..].fill(0);
        if let Some(crc) = crcs.last_mut() {
            *crc = crc32c(&bytes[last..]);
        }
    }
}

/// Takes a piece that was read from the device. `dram`: what may be read again.
fn take_piece<B: Buffer>(
    piece: &DevicePiece,
    bytes: &mut [u8],
    crcs: &mut [u32],
    dram: Option<&mut Dram<B>>,
    buffers: &mut dyn Buffers<B>,
) -> bool {
    if !is_sound(piece, bytes) {
        return false;
    }
    if let Some(dram) = dram {
        let offsets = (piece.offset..).step_by(BLOCK);
        for ((block, crc), offset) in bytes.chunks(BLOCK).zip(&piece.crcs).zip(offsets) {
            dram.read(offset, *crc, block, buffers);
        }
    }
    finish_piece(piece, bytes, crcs);
    true
}

/// Copies a piece from memory, if all of it is there.
fn copy_all<B: Buffer>(dram: &mut Dram<B>, piece: &DevicePiece, to: &mut [u8]) -> bool {
    if !dram.has_all(piece.offset, &piece.crcs) {
        return false;
    }
    let blocks = to.chunks_mut(BLOCK).zip(&piece.crcs).enumerate();
    blocks.into_iter().all(|(n, (to, crc))| {
        let copy = dram.get(piece.offset + (n * BLOCK) as u64, *crc);
        copy.is_some_and(|copy| {
            to.copy_from_slice(&copy.bytes()[..BLOCK]);
            true
        })
    })
}
