//! Decoders under attack: what fuzz targets and the mutation tests of every crate share (I10, I12).
//!
//! A decoder of bytes that a peer, a device or a bucket controls is listed once, with valid bytes to begin
//! from and the property that it keeps on any bytes: it ends, it does not panic, and what it takes it
//! also writes back. [`attack`] runs mutations of the seeds from numbered seeds, in the normal test suite;
//! `fuzz/` runs the same functions under libFuzzer. Nothing here is used by a server.

use crate::auth::{Challenge, ClusterKey, Hello, Proof, Role, encode_hello};
use crate::codec;
use crate::control::{Control, ControlReply, CoreStats, FlushDone, SealItem, WindowEntry};
use crate::data::{DataContext, WriteReply, decode_checksums, encode_checksums};
use crate::grant::{Backing, ByteRange, Cut, FileView, Grant, GrantMode, SignedGrant};
use crate::header::{HEADER_BYTES, Header, Opcode};
use crate::ids::*;
use crate::map::{ClusterMap, NodeInfo, NodeState, PgEntry, ShardRef};
use crate::replica::{Ship, Shipped};
use crate::{Status, crc32c};
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error as Rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

/// Longest input that a mutation makes.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// One decoder.
#[derive(Clone, Copy)]
pub struct Decoder {
    /// What a fuzz target is called.
    pub name: &'static str,
    /// Valid inputs to begin from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Decodes anything; panics if the property does not hold.
    pub run: fn(&[u8]),
}

/// A small generator (xorshift); not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        let mut r = Self((seed ^ 0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..8 {
            r.next();
        }
        r
    }
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// Below `n`; 0 for 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next() % n as u64) as usize }
    }
}

/// Changes bytes as a rotten disk, a torn transfer or an attacker would.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], r: &mut Random) {
    const INTERESTING: [u64; 12] = [
        0,
        1,
        2,
        7,
        0x7f,
        0xff,
        0xffff,
        0x7fff_ffff,
        0xffff_ffff,
        1 << 32,
        u64::MAX >> 1,
        u64::MAX,
    ];
    for _ in 0..=r.below(6) {
        let at = r.below(bytes.len());
        match r.below(9) {
            0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << r.below(8),
            2 if !bytes.is_empty() => bytes[at] = r.next() as u8,
            3 | 4 => {
                let width = [1, 2, 4, 8][r.below(4)];
                let at = if r.below(2) == 0 { at / width * width } else { at };
                let v = INTERESTING[r.below(INTERESTING.len())].to_le_bytes();
                if let Some(slot) = bytes.get_mut(at..at + width) {
                    slot.copy_from_slice(&v[..width]);
                }
            }
            5 => bytes.truncate(at),
            6 => {
                let more = r.below(64);
                let fill = r.next() as u8;
                bytes.extend(std::iter::repeat_n(fill, more));
            }
            7 => {
                let end = at + r.below(bytes.len() - at + 1).min(256);
                let piece = bytes[at..end].to_vec();
                let to = r.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            _ => {
                let from = r.below(other.len());
                let len = r.below(other.len() - from + 1).min(256);
                let end = (at + r.below(len + 1)).min(bytes.len());
                bytes.splice(at..end, other[from..from + len].iter().copied());
            }
        }
        bytes.truncate(INPUT_BYTES_MAX);
    }
}

/// Runs `rounds` mutations of each decoder's seeds; `EBB_SEEDS` runs another number, `EBB_SEED` only that one.
/// A failure names the decoder, the seed, and the bytes. `EBB_CORPUS` names a directory for the valid inputs.
pub fn attack(decoders: &[Decoder], rounds: u64) {
    let number = |name| std::env::var(name).ok().and_then(|v: String| v.parse::<u64>().ok());
    let seeds = match number("EBB_SEED") {
        Some(one) => one..one + 1,
        None => 0..number("EBB_SEEDS").unwrap_or(rounds),
    };
    for d in decoders {
        let valid = (d.seeds)();
        assert!(!valid.is_empty(), "{}: nothing to begin from", d.name);
        valid.iter().for_each(|bytes| (d.run)(bytes));
        if let Some(dir) = std::env::var_os("EBB_CORPUS") {
            let dir = std::path::Path::new(&dir).join(d.name);
            std::fs::create_dir_all(&dir).expect("a directory for the seeds");
            for (i, bytes) in valid.iter().enumerate() {
                std::fs::write(dir.join(format!("{i}")), bytes).expect("written");
            }
        }
        for seed in seeds.clone() {
            let mut r = Random::new(seed);
            let mut bytes = valid[r.below(valid.len())].clone();
            let other = &valid[r.below(valid.len())];
            mutate(&mut bytes, other, &mut r);
            if std::panic::catch_unwind(|| (d.run)(&bytes)).is_err() {
                panic!("{}: EBB_SEED={seed} breaks it: {}", d.name, hex::encode(&bytes));
            }
        }
        println!("{}: {} mutations of {} inputs", d.name, seeds.end - seeds.start, valid.len());
    }
}

/// The property of an `rkyv` payload: what is taken is written back, and that is taken as the same.
pub fn archive<T>(bytes: &[u8])
where
    T: Archive + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, Rancor>>,
    T::Archived:
        for<'a> CheckBytes<HighValidator<'a, Rancor>> + Deserialize<T, HighDeserializer<Rancor>>,
{
    let Ok(value) = codec::decode::<T>(bytes) else { return };
    let written = codec::encode(&value);
    match codec::decode::<T>(&written) {
        Ok(again) => assert_eq!(codec::encode(&again), written, "another value came back"),
        Err(e) => panic!("what was taken is refused when written back: {e}"),
    }
}

/// A frame's header, as it is and with its checksum made right.
pub fn header(bytes: &[u8]) {
    let mut b = [0u8; HEADER_BYTES];
    let len = bytes.len().min(HEADER_BYTES);
    b[..len].copy_from_slice(&bytes[..len]);
    for _ in 0..2 {
        if let Ok(h) = Header::decode(&b, 1 << 18) {
            assert_eq!(h.encode(), b, "a header has one form");
            assert!(h.tail_bytes() <= (1 << 18) + (4 << 20), "bounded");
            let _ = (h.reply(Status::Io), h.is_reply());
        }
        let crc = crc32c(&b[..60]);
        b[60..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The fixed bodies of hot requests.
pub fn data(bytes: &[u8]) {
    if let Some((context, rest)) = DataContext::decode(bytes) {
        assert_eq!([&context.encode()[..], rest].concat(), bytes);
    }
    if let Some(reply) = WriteReply::decode(bytes) {
        assert_eq!(reply.encode(), bytes);
    }
    if let Some(crcs) = decode_checksums(bytes) {
        assert_eq!(encode_checksums(&crcs), bytes);
    }
}

/// Requests of the metadata plane and of primaries to a core, their answers, and the map.
pub fn control(bytes: &[u8]) {
    archive::<Control>(bytes);
    archive::<ControlReply>(bytes);
    archive::<ClusterMap>(bytes);
    archive::<Shipped>(bytes);
    if let Ok(map) = codec::decode::<ClusterMap>(bytes) {
        let found = map.pg_of(InodeId(7), ChunkIndex(9));
        assert_eq!(found.is_some(), map.pg_count() > 0);
        let primary = found.and_then(|(_, entry)| entry.primary());
        let _ = primary.and_then(|shard| map.address(shard));
        assert!(map.groups_of(NodeId(1)).count() <= map.pgs.len());
    }
}

/// Grants, as presented (never believed) and as signed (believed).
pub fn grant(bytes: &[u8]) {
    let key = ClusterKey::new([7; 32]);
    archive::<Grant>(bytes);
    if let Ok(signed) = codec::decode::<SignedGrant>(bytes) {
        let mine = SignedGrant { mac: key.sign(&[b"ebb-grant", &signed.bytes]), ..signed.clone() };
        if mine.mac != signed.mac {
            assert!(signed.open(&key).is_err(), "a forged grant opened");
        }
        if let Ok(grant) = mine.open(&key) {
            let _ = grant.view.backing.as_ref().map(Backing::valid_bytes);
        }
        let _ = signed.peek();
    }
}

/// The handshake's messages.
pub fn auth(bytes: &[u8]) {
    archive::<Hello>(bytes);
    archive::<Challenge>(bytes);
    archive::<Proof>(bytes);
    let key = ClusterKey::new([7; 32]);
    if let Ok(c) = codec::decode::<Challenge>(bytes) {
        assert!(!crate::auth::check_server(&key, b"hello", &c), "nobody signed that");
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(key) = ClusterKey::from_hex(text)
    {
        assert_eq!(key.to_hex(), text.trim().to_lowercase());
    }
}

fn some_grant() -> Grant {
    let backing = Backing { key: "a/b".into(), etag: "\"e\"".into(), length: 9000, limit: 8000 };
    let cut = Cut { generation: Generation(2), at: 4096 };
    let view = FileView { backing: Some(backing), cuts: vec![cut], ..FileView::default() };
    Grant {
        cluster: ClusterId(5),
        inode: InodeId(9),
        mode: GrantMode::Write,
        generation: Generation(3),
        session: SessionId(4),
        view,
        least_map_version: MapVersion(1),
        alloc_limit: RUN_BYTES,
    }
}

fn headers() -> Vec<Vec<u8>> {
    let write = Header { offset: 4096, length: 4096, ..Header::request(Opcode::Write, 7) };
    let write = write.with_body(b"abc").with_payload(4096);
    vec![write.encode().to_vec(), write.reply(Status::Busy).encode().to_vec()]
}

fn datas() -> Vec<Vec<u8>> {
    let context = DataContext {
        generation: Generation(1),
        view_version: ViewVersion(2),
        map_version: MapVersion(3),
        pg_epoch: PgEpoch(4),
        content: ContentId(5),
        session: SessionId(6),
        sequence: Sequence(7),
        answered_below: Sequence(6),
    };
    let reply = WriteReply { generation: Generation(1) };
    vec![[&context.encode()[..], &encode_checksums(&[1, 2])].concat(), reply.encode()]
}

fn controls() -> Vec<Vec<u8>> {
    let (inode, generation) = (InodeId(1), Generation(2));
    let entry = WindowEntry {
        session: SessionId(1),
        below: Sequence(2),
        sequence: Sequence(3),
        generation,
        inode,
        chunk: ChunkIndex(4),
    };
    let done = FlushDone {
        inode,
        generation,
        content: ContentId(3),
        old_content: ContentId(2),
        valid_bytes: 10,
        old_valid_bytes: 20,
    };
    let signed = SignedGrant::sign(&some_grant(), &ClusterKey::new([7; 32]));
    let range = ByteRange { start: 0, end: 10 };
    let calls = [
        Control::Seal(MapVersion(1), vec![SealItem { inode, generation, alloc_limit: 9 }]),
        Control::FlushDone(MapVersion(1), vec![done]),
        Control::ApplyViews(vec![signed.clone()]),
        Control::TakeWindows(PgId(1), PgEpoch(2), vec![entry]),
        Control::Warm(signed, range),
    ];
    let stats = ControlReply::Stats(CoreStats::default());
    let shard = ShardRef { node: NodeId(1), core: CoreId(0) };
    let map = ClusterMap {
        version: MapVersion(3),
        cluster: ClusterId(4),
        incarnation: Incarnation(1),
        nodes: vec![NodeInfo {
            id: NodeId(1),
            store: 7,
            state: NodeState::Active,
            host: "h".into(),
            ports: vec![1, 2],
            capacity_bytes: 9,
        }],
        pgs: vec![PgEntry {
            epoch: PgEpoch(1),
            members: vec![shard],
            syncing: Vec::new(),
            since_map_version: MapVersion(1),
            windows_since: PgEpoch(0),
            min_in_sync: 0,
            moving: false,
        }],
    };
    let mut all: Vec<_> = calls.iter().map(codec::encode).collect();
    let ship = Ship::Stage { inode, chunk: ChunkIndex(1), crcs: vec![1, 2, 3] };
    let (pg, epoch, map_version) = (PgId(1), PgEpoch(2), MapVersion(3));
    let shipped = Shipped { pg, epoch, map_version, stream: 4, place: 5, ship };
    all.extend([codec::encode(&stats), codec::encode(&map), codec::encode(&shipped)]);
    all
}

fn grants() -> Vec<Vec<u8>> {
    let grant = some_grant();
    let signed = SignedGrant::sign(&grant, &ClusterKey::new([7; 32]));
    vec![codec::encode(&grant), codec::encode(&signed)]
}

fn handshakes() -> Vec<Vec<u8>> {
    let hello = Hello {
        nonce: [1; 16],
        cluster: ClusterId(5),
        role: Role::Client,
        session: SessionId(2),
        node: NodeId(3),
        lane: 1,
        peer: None,
    };
    vec![
        encode_hello(&hello),
        codec::encode(&Challenge { nonce: [2; 16], cluster: ClusterId(5), proof: [3; 32] }),
        codec::encode(&Proof { proof: [4; 32] }),
        ClusterKey::new([5; 32]).to_hex().into_bytes(),
    ]
}

/// This crate's decoders.
pub const DECODERS: [Decoder; 5] = [
    Decoder { name: "header", seeds: headers, run: header },
    Decoder { name: "data", seeds: datas, run: data },
    Decoder { name: "control", seeds: controls, run: control },
    Decoder { name: "grant", seeds: grants, run: grant },
    Decoder { name: "auth", seeds: handshakes, run: auth },
];
