//! Compares a store with the model, through reads that check every checksum.

use super::disk::Disk;
use super::model::{BlockKey, State, block_start};
use ebb_dataplane_protocol::*;
use ebb_store::*;
use std::collections::BTreeMap;

pub type Check = Result<(), String>;

/// Chunks the workload uses: two of one run, one of another.
pub const CHUNKS: [u32; 3] = [0, 1, 4];

/// The scopes of an inode that the workload uses.
pub fn scopes(inode: InodeId) -> Vec<Scope> {
    let of = |chunk: &u32| Scope::of(inode, ChunkIndex(*chunk), super::driver::PGS);
    let mut all: Vec<Scope> = CHUNKS.iter().map(of).collect();
    all.dedup();
    all
}

pub fn ensure(ok: bool, what: impl FnOnce() -> String) -> Check {
    if ok { Ok(()) } else { Err(what()) }
}

/// An object in S3, sparse.
#[derive(Clone, Debug, Default)]
pub struct Object {
    pub len: u64,
    pub blocks: BTreeMap<BlockKey, super::model::Block>,
}

impl Object {
    /// A block of it, of which bytes of the file below `valid` count.
    pub fn block(&self, key: BlockKey, valid: u64) -> Vec<u8> {
        let mut out = self.blocks.get(&key).map_or_else(|| vec![0u8; 4096], |b| b.to_vec());
        let keep = self.len.min(valid).saturating_sub(block_start(key)).min(4096) as usize;
        out[keep..].fill(0);
        out
    }
}

/// Reads the blocks of a device piece, checked and zeroed past the tail. `Err`: a checksum mismatch.
pub fn read_piece(disk: &Disk, source: &PieceSource) -> Result<Vec<Vec<u8>>, String> {
    let PieceSource::Device { offset, crcs, tail_valid, .. } = source else {
        return Err("not on the device".into());
    };
    let bytes = disk.read(*offset, crcs.len() * 4096);
    let mut out: Vec<Vec<u8>> = bytes.chunks(4096).map(<[u8]>::to_vec).collect();
    for (i, b) in out.iter().enumerate() {
        ensure(crc32c(b) == crcs[i], || {
            format!("checksum mismatch at {}", offset + i as u64 * 4096)
        })?;
    }
    if let Some(last) = out.last_mut() {
        last[*tail_valid as usize..].fill(0);
    }
    Ok(out)
}

fn chunks_of(scope: Scope) -> impl Iterator<Item = u32> {
    let inside = move |c: &u32| scope == Scope::of(scope.inode, ChunkIndex(*c), super::driver::PGS);
    CHUNKS.into_iter().filter(inside)
}

/// Whether the store holds exactly `state`.
pub fn compare(
    store: &mut Store,
    disk: &Disk,
    state: &State,
    inodes: &[InodeId],
    pgs: u16,
) -> Check {
    for scope in inodes.iter().flat_map(|id| scopes(*id)) {
        let id = &scope.inode;
        let empty = super::model::Inode::default();
        let m = state.inodes.get(&scope).unwrap_or(&empty);
        ensure(store.floor(scope) == m.least(), || {
            format!("{scope}: floor {} instead of {}", store.floor(scope), m.least())
        })?;
        // Without data and floor an inode's view may be forgotten with its last clean chunk.
        let view = store.view_version(scope).0;
        let forgotten = view == ViewVersion(0) && m.floor == Generation(0) && m.dirty.is_empty();
        ensure(view == m.view || forgotten, || format!("{scope}: view"))?;
        for chunk in chunks_of(scope) {
            let nothing = BaseView { content: ContentId(u64::MAX), valid_bytes: 0 };
            let plan = store.plan_read(*id, ChunkIndex(chunk), 0..CHUNK_BLOCKS, nothing);
            let result = compare_blocks(disk, &plan.pieces, |b| {
                m.dirty.get(&(chunk, b)).map(|d| d.1.to_vec())
            });
            if let Some(g) = plan.guard {
                store.release(g);
            }
            result.map_err(|e| format!("{scope} chunk {chunk}: {e}"))?;
        }
        for g in (0..=m.floor.0 + 1).map(Generation) {
            compare_seal(store, disk, scope, g, m)?;
        }
    }
    for (scope, m) in &state.inodes {
        ensure(store.floor(*scope) == m.least(), || format!("{scope}: floor"))?;
    }
    for (session, w) in &state.windows {
        for s in 0..w.1.keys().next_back().copied().unwrap_or(0).max(w.0) + 3 {
            let (got, want) = (store.seen(*session, Sequence(s)), state.seen(*session, s));
            ensure(got == want, || {
                format!("session {session} sequence {s}: {got:?} instead of {want:?}")
            })?;
        }
    }
    for pg in 0..pgs {
        ensure(store.frozen(PgId(pg)) == state.frozen.get(&pg).copied(), || {
            format!("freeze of {pg}")
        })?;
    }
    ensure(store.identity().node == state.node, || "node id".into())
}

fn compare_blocks(
    disk: &Disk,
    pieces: &[ReadPiece],
    expected: impl Fn(u32) -> Option<Vec<u8>>,
) -> Check {
    for p in pieces {
        let bytes = match &p.source {
            PieceSource::Device { dirty: true, .. } => Some(read_piece(disk, &p.source)?),
            PieceSource::Zero => None,
            other => return Err(format!("blocks {:?} are {other:?}", p.blocks)),
        };
        for (i, b) in p.blocks.clone().enumerate() {
            let got = bytes.as_ref().map(|v| &v[i]);
            let want = expected(b);
            ensure(got == want.as_ref(), || match (got, want) {
                (Some(_), Some(_)) => format!("block {b} has wrong bytes"),
                (None, _) => format!("block {b} is lost"),
                (_, None) => format!("block {b} should not be there"),
            })?;
        }
    }
    Ok(())
}

fn compare_seal(
    store: &mut Store,
    disk: &Disk,
    scope: Scope,
    g: Generation,
    m: &super::model::Inode,
) -> Check {
    let id = scope.inode;
    let got = store.sealed(scope, g);
    let Some((snapshot, high)) = m.seals.get(&g) else {
        return ensure(got.is_none(), || format!("inode {id}: a seal of {g} from nowhere"));
    };
    let Some(got) = got else { return Err(format!("inode {id}: the seal of {g} is lost")) };
    ensure(got.high_water == *high, || {
        format!("inode {id} seal {g}: high water {} instead of {high}", got.high_water)
    })?;
    for chunk in chunks_of(scope) {
        let nothing = BaseView { content: ContentId(u64::MAX), valid_bytes: 0 };
        let plan = store
            .plan_read_pinned(id, g, ChunkIndex(chunk), 0..CHUNK_BLOCKS, nothing)
            .ok_or("sealed and not readable")?;
        let result =
            compare_blocks(disk, &plan.pieces, |b| snapshot.get(&(chunk, b)).map(|b| b.to_vec()));
        if let Some(guard) = plan.guard {
            store.release(guard);
        }
        result.map_err(|e| format!("inode {id} seal {g} chunk {chunk}: {e}"))?;
    }
    // The extents name every pinned block and no other.
    let mut blocks = std::collections::BTreeSet::new();
    for r in &got.extents {
        let mut at = r.start;
        while at < r.end {
            let chunk = (at / u64::from(CHUNK_BYTES)) as u32;
            blocks.insert((chunk, (at % u64::from(CHUNK_BYTES) / 4096) as u32));
            at += 4096;
        }
    }
    ensure(blocks.iter().eq(snapshot.keys()), || format!("inode {id} seal {g}: extents"))
}
