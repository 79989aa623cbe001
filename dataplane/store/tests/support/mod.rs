//! A device in memory, sparse, and a driver that completes everything at once.

#![allow(unreachable_pub, dead_code, reason = "a test's own module, used in part by each")]

use ebb_dataplane_protocol::*;
use ebb_store::*;
use std::collections::BTreeMap;
use std::io;

pub const CLUSTER: ClusterId = ClusterId(7);

/// 4 KiB pages that were written; the others are zeros.
#[derive(Default, Clone)]
pub struct Memory {
    pub bytes: u64,
    pub pages: BTreeMap<u64, Vec<u8>>,
}

impl OpenDevice for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (i, page) in buf.chunks_mut(4096).enumerate() {
            match self.pages.get(&(offset / 4096 + i as u64)) {
                Some(p) => page.copy_from_slice(p),
                None => page.fill(0),
            }
        }
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        for (i, page) in buf.chunks(4096).enumerate() {
            self.pages.insert(offset / 4096 + i as u64, page.to_vec());
        }
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn identity() -> Identity {
    Identity { cluster: CLUSTER, store: 99, node: NodeId(0), core: CoreId(0), pg_count: 8 }
}

pub struct Rig {
    pub disk: Memory,
    pub store: Store,
    pub sequence: u64,
}

pub const INODE: InodeId = InodeId(42);
pub const CHUNK: ChunkIndex = ChunkIndex(0);
pub const SCOPE: Scope = Scope::of(INODE, CHUNK, 8);

impl Rig {
    pub fn new(bytes: u64) -> Self {
        Self::with(Geometry::for_device(bytes).expect("large enough"))
    }
    pub fn with(geometry: Geometry) -> Self {
        let mut disk = Memory { bytes: geometry.device_bytes, ..Memory::default() };
        format_device(&mut disk, geometry, identity()).expect("formats");
        let store = Store::open(&mut disk, CLUSTER).expect("opens");
        Self { disk, store, sequence: 1 }
    }
    pub fn op(&mut self, offset: u32, len: u32, g: u64, base: BaseView) -> WriteOp {
        self.sequence += 1;
        WriteOp {
            inode: INODE,
            chunk: CHUNK,
            offset,
            len,
            generation: Generation(g),
            session: SessionId(1),
            sequence: Sequence(self.sequence),
            answered_below: Sequence(self.sequence),
            base,
        }
    }
    /// Plans, merges and commits; not durable yet.
    pub fn write_op(&mut self, op: &WriteOp, byte: u8) -> Result<Ticket, WriteError> {
        let plan = self.store.begin_write(op)?;
        let mut buffer = vec![0u8; plan.blocks as usize * 4096];
        buffer[plan.head..plan.head + op.len as usize].fill(byte);
        for e in &plan.edges {
            let mut old = vec![0u8; 4096];
            match e.source {
                EdgeSource::Zero => {}
                EdgeSource::Device { offset, crc, valid } => {
                    self.disk.read_at(offset, &mut old).expect("memory");
                    assert_eq!(crc32c(&old), crc);
                    old[valid as usize..].fill(0);
                }
                EdgeSource::Miss { valid } => old[..valid as usize].fill(b'S'),
            }
            for r in &e.fill {
                buffer[e.at + r.start..e.at + r.end].copy_from_slice(&old[r.clone()]);
            }
        }
        let crcs: Vec<u32> = buffer.chunks(4096).map(crc32c).collect();
        for w in &plan.writes {
            self.disk.write_at(w.offset, &buffer[w.range.clone()]).expect("memory");
        }
        self.store.commit_write(plan.id, &crcs, if plan.inline { &buffer } else { &[] })
    }
    pub fn write(&mut self, offset: u32, len: u32, g: u64, byte: u8, base: BaseView) {
        let op = self.op(offset, len, g, base);
        self.write_op(&op, byte).expect("accepted");
        self.settle();
    }
    pub fn fill(&mut self, first_block: u32, blocks: u32, content: u64, byte: u8, tail: u32) {
        let op = FillOp {
            inode: INODE,
            chunk: CHUNK,
            first_block,
            blocks,
            content: ContentId(content),
            tail_valid: tail,
        };
        let plan = self.store.begin_fill(&op).expect("space");
        let bytes = vec![byte; blocks as usize * 4096];
        for w in &plan.writes {
            self.disk.write_at(w.offset, &bytes[w.range.clone()]).expect("memory");
        }
        let crcs: Vec<u32> = bytes.chunks(4096).map(crc32c).collect();
        self.store.commit_fill(plan.id, &crcs).expect("commits");
        self.settle();
    }
    /// Makes everything durable and drives the checkpoint as far as it goes.
    pub fn settle(&mut self) {
        loop {
            let mut moved = false;
            while let Some(b) = self.store.take_batch() {
                self.disk.write_at(b.offset, &b.bytes).expect("memory");
                self.store.batch_durable(b.id).expect("in flight");
                moved = true;
            }
            if self.store.checkpoint_due() {
                self.store.begin_checkpoint();
            }
            match self.store.checkpoint_step() {
                CheckpointStep::Idle | CheckpointStep::Wait => {}
                CheckpointStep::Relocate { token, moves } => {
                    for m in moves {
                        let mut bytes = vec![0u8; m.bytes as usize];
                        self.disk.read_at(m.from, &mut bytes).expect("memory");
                        self.disk.write_at(m.to, &bytes).expect("memory");
                    }
                    self.store.checkpoint_done(token).expect("in flight");
                    moved = true;
                }
                CheckpointStep::Write { token, offset, bytes }
                | CheckpointStep::WriteDurable { token, offset, bytes } => {
                    self.disk.write_at(offset, &bytes).expect("memory");
                    self.store.checkpoint_done(token).expect("in flight");
                    moved = true;
                }
                CheckpointStep::Sync { token } => {
                    self.store.checkpoint_done(token).expect("in flight");
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }
    pub fn checkpoint(&mut self) {
        self.store.begin_checkpoint();
        self.settle();
    }
    pub fn reopen(&mut self) {
        self.store = Store::open(&mut self.disk, CLUSTER).expect("opens");
    }
    pub fn done(&mut self, r: Result<Option<Ticket>, ControlError>) {
        r.expect("accepted");
        self.settle();
    }
    /// The bytes of a range of blocks; a miss reads as 'S'.
    pub fn read(&mut self, blocks: std::ops::Range<u32>, base: BaseView) -> Vec<u8> {
        let plan = self.store.plan_read(INODE, CHUNK, blocks, base);
        self.bytes(plan)
    }
    pub fn read_pinned(&mut self, g: u64, blocks: std::ops::Range<u32>, base: BaseView) -> Vec<u8> {
        let plan = self.store.plan_read_pinned(INODE, Generation(g), CHUNK, blocks, base);
        self.bytes(plan.expect("sealed"))
    }
    pub fn bytes(&mut self, plan: ReadPlan) -> Vec<u8> {
        let mut out = Vec::new();
        for p in &plan.pieces {
            let mut bytes = vec![0u8; p.blocks.len() * 4096];
            match &p.source {
                PieceSource::Zero => {}
                PieceSource::Miss => bytes.fill(b'S'),
                PieceSource::Device { offset, crcs, tail_valid, .. } => {
                    self.disk.read_at(*offset, &mut bytes).expect("memory");
                    assert!(bytes.chunks(4096).map(crc32c).eq(crcs.iter().copied()));
                    let at = bytes.len() - 4096 + *tail_valid as usize;
                    bytes[at..].fill(0);
                }
            }
            out.extend(bytes);
        }
        if let Some(g) = plan.guard {
            self.store.release(g);
        }
        out
    }
}
