//! A shard as an earlier build left it is opened by this one, with all that was in it (docs/FORMAT.md §8).
//!
//! `images/vN.txt` is a device of 16 MiB: the pages that are not zero, each a line `PAGE BYTES`, where
//! `BYTES` is hexadecimal and `*N` repeats the byte before it N more times. It stays as it is as long as
//! the format has this version; a new version gets an image of its own, made with
//! `EBB_MAKE_IMAGE=1 cargo test -p ebb-store --test stored_image`, and those before are refused by their number.

mod support;

use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::*;
use ebb_store::geometry::FORMAT_VERSION;
use ebb_store::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use support::*;

const DEVICE: u64 = 16 << 20;
/// The object under the writes: 310 blocks, 77 bytes of the last.
const BASE: BaseView = BaseView { content: ContentId(5), valid_bytes: 309 * 4096 + 77 };
const NONE: BaseView = BaseView { content: ContentId(0), valid_bytes: 0 };
const OTHER: InodeId = InodeId(43);
const GONE: InodeId = InodeId(44);

fn path(version: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/images/v{version}.txt"))
}

fn to_text(disk: &Memory) -> String {
    let mut out = String::new();
    for (page, bytes) in disk.pages.iter().filter(|(_, b)| b.iter().any(|b| *b != 0)) {
        out += &format!("{page} ");
        for same in bytes.chunk_by(|a, b| a == b) {
            out += &format!("{:02x}", same[0]);
            match same.len() - 1 {
                0 => {}
                1 => out += &format!("{:02x}", same[0]),
                more => out += &format!("*{more} "),
            }
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

fn from_text(text: &str) -> Memory {
    let mut pages = BTreeMap::new();
    for line in text.lines() {
        let (page, rest) = line.split_once(' ').expect("a page and its bytes");
        let mut bytes: Vec<u8> = Vec::with_capacity(4096);
        for token in rest.split(' ') {
            let (hex, more) = token.split_once('*').unwrap_or((token, "0"));
            for pair in hex.as_bytes().chunks(2) {
                let pair = std::str::from_utf8(pair).expect("hexadecimal");
                bytes.push(u8::from_str_radix(pair, 16).expect("hexadecimal"));
            }
            let last = *bytes.last().expect("a byte before its repetitions");
            let more: usize = more.parse().expect("a number");
            bytes.resize(bytes.len() + more, last);
        }
        assert_eq!(bytes.len(), 4096, "page {page}");
        pages.insert(page.parse().expect("a number"), bytes);
    }
    Memory { bytes: DEVICE, pages }
}

/// What the image was made by: half of it in the checkpoint, half in the journal after it.
fn make() -> Rig {
    let mut r = Rig::new(DEVICE);
    let t = r.store.set_node(NodeId(5));
    r.done(t);
    let t = r.store.forget_bare_inodes(MapVersion(2));
    r.done(t);
    r.write(0, 100_000, 1, b'a', BASE); // To data blocks.
    r.write(200_001, 10, 1, b'b', BASE); // Inside the journal, with two edges from S3 ('S').
    r.fill(300, 10, 5, b'f', 77); // Clean, with a short last block.
    let t = r.store.set_floor(scope(OTHER), Generation(9));
    r.done(t);
    let t = r.store.seal(SCOPE, Generation(1));
    r.done(t);
    let entries: Vec<_> = [3u64, 4]
        .map(|n| WindowEntry {
            session: SessionId(8),
            below: Sequence(2),
            sequence: Sequence(n),
            generation: Generation(n + 10),
            inode: OTHER,
            chunk: CHUNK,
        })
        .into();
    let t = r.store.take_windows(PgId(2), PgEpoch(6), &entries);
    r.done(t);
    r.checkpoint();
    r.write(4096, 4096, 2, b'c', BASE); // Over a sealed block.
    let op = WriteOp { answered_below: Sequence(3), ..r.op(400 * 4096, 40_000, 2, BASE) };
    r.write_op(&op, b'd').expect("accepted");
    r.settle();
    let view = ViewUpdate {
        scope: scope(OTHER),
        version: ViewVersion(4),
        base: BaseView { content: ContentId(11), valid_bytes: 100 },
        cuts: vec![Cut { generation: Generation(9), at: 50 }],
    };
    let t = r.store.apply_view(&view);
    r.done(t);
    let t = r.store.set_floor(scope(GONE), Generation(3));
    r.done(t);
    let t = r.store.drop_inode(scope(GONE));
    r.done(t);
    let t = r.store.freeze(PgId(5), PgEpoch(4));
    r.done(t);
    r
}

fn scope(inode: InodeId) -> Scope {
    Scope::of(inode, CHUNK, 8)
}

fn blocks(of: &[(u8, usize)]) -> Vec<u8> {
    of.iter().flat_map(|(byte, count)| std::iter::repeat_n(*byte, *count)).collect()
}

/// Every byte, floor, window and mark that [`make`] left.
fn check(r: &mut Rig) {
    const PAGE: usize = 4096;
    assert_eq!(r.store.identity(), Identity { node: NodeId(5), ..identity() });
    // What readers see now: generation 2 over 1 over the object, then a known hole.
    let small = 200_001 - 48 * PAGE;
    let wanted = [
        (b'a', PAGE),
        (b'c', PAGE),
        (b'a', 100_000 - 2 * PAGE),
        (b'S', 48 * PAGE - 100_000),
        (b'S', small),
        (b'b', 10),
        (b'S', PAGE - small - 10),
        (b'S', 251 * PAGE),
        (b'f', 9 * PAGE + 77),
        (0, PAGE - 77 + 90 * PAGE),
        (b'd', 40_000),
        (0, 10 * PAGE - 40_000),
    ];
    assert!(r.read(0..410, BASE) == blocks(&wanted), "what readers see");
    // What the flush of generation 1 reads.
    let pinned = [(b'a', 100_000), (b'S', 48 * PAGE - 100_000)];
    assert!(r.read_pinned(1, 0..48, BASE) == blocks(&pinned), "what the flush reads");
    assert!(r.store.sealed(SCOPE, Generation(1)).is_some(), "the seal");
    // Floors: sealed; set to 9 and raised by a cut of that generation; dropped with its inode.
    let floors = [INODE, OTHER, GONE].map(|i| r.store.floor(scope(i)).0);
    assert_eq!(floors, [2, 10, 0], "floors");
    let stale = r.op(0, 1, 1, BASE);
    let refused = r.store.begin_write(&stale);
    assert!(matches!(refused, Err(WriteError::StaleGeneration { .. })), "{refused:?}");
    assert_eq!(r.store.view_version(scope(OTHER)).0, ViewVersion(4));
    assert_eq!(r.store.content(OTHER), ContentId(11));
    // Windows: what was applied, what was answered, what came with a group.
    let seen = |session, n| r.store.seen(SessionId(session), Sequence(n));
    assert_eq!(
        [seen(1, 2), seen(1, 3), seen(1, 4), seen(1, 5), seen(1, 6)],
        [
            Seen::Answered,
            Seen::Answered,
            Seen::Applied(Generation(2)),
            Seen::Applied(Generation(2)),
            Seen::New
        ]
    );
    assert_eq!(
        [seen(8, 1), seen(8, 3), seen(8, 4), seen(8, 5)],
        [Seen::Answered, Seen::Applied(Generation(13)), Seen::Applied(Generation(14)), Seen::New]
    );
    // Groups and the horizon of grants.
    assert_eq!((0..8).map(|g| r.store.frozen(PgId(g)).map(|e| e.0)).collect::<Vec<_>>(), {
        let mut frozen = vec![None; 8];
        frozen[5] = Some(4);
        frozen
    });
    assert_eq!(r.store.grant_horizon(), MapVersion(2));
}

fn stored(version: u32) -> Memory {
    from_text(&std::fs::read_to_string(path(version)).expect("the stored image"))
}

#[test]
fn an_image_of_this_version_opens_with_every_byte_floor_and_window() {
    let mut made = make();
    check(&mut made);
    if std::env::var_os("EBB_MAKE_IMAGE").is_some() {
        std::fs::write(path(FORMAT_VERSION), to_text(&made.disk)).expect("written");
    }
    let mut disk = stored(FORMAT_VERSION);
    let report = verify(&mut disk).expect("opens");
    assert_eq!((report.superblocks, report.bad.len()), (4, 0));
    assert!(report.checkpoint >= 2 && report.batches >= 5, "both halves: {report:?}");
    let store = Store::open(&mut disk, CLUSTER).expect("opens");
    let mut r = Rig { disk, store, sequence: 100 };
    check(&mut r);
    // And it goes on from there.
    let next = ContentId(6);
    let done = control::FlushDone {
        inode: INODE,
        generation: Generation(1),
        content: next,
        old_content: BASE.content,
        valid_bytes: BASE.valid_bytes,
        old_valid_bytes: BASE.valid_bytes,
    };
    let t = r.store.flush_done(SCOPE.pg, &done);
    r.done(t);
    r.write(0, 4096, 3, b'z', BaseView { content: next, ..BASE });
    r.checkpoint();
    r.reopen();
    assert_eq!(r.read(0..1, BaseView { content: next, ..BASE }), vec![b'z'; 4096]);
    assert_eq!(r.read(5..6, BaseView { content: next, ..BASE }), vec![b'a'; 4096]);
    assert_eq!(r.read(500..501, NONE), vec![0; 4096]);
}

#[test]
fn images_of_other_versions_are_refused_by_their_number() {
    let forged = |version: u32| {
        let mut disk = stored(FORMAT_VERSION);
        for offset in Geometry::for_device(DEVICE).expect("large enough").superblock_offsets() {
            let page = disk.pages.get_mut(&(offset / 4096)).expect("a superblock");
            page[8..12].copy_from_slice(&version.to_le_bytes());
            let crc = crc32c(&page[..4092]);
            page[4092..].copy_from_slice(&crc.to_le_bytes());
        }
        disk
    };
    // One that was in use once, and later ones.
    for (version, mut disk) in [
        (2, stored(2)),
        (3, stored(3)),
        (FORMAT_VERSION + 1, forged(FORMAT_VERSION + 1)),
        (4_000_000, forged(4_000_000)),
    ] {
        let before = disk.pages.clone();
        let e = Store::open(&mut disk, CLUSTER).expect_err("refused");
        assert!(
            matches!(e, OpenError::OtherVersion { found, expected: FORMAT_VERSION } if found == version)
        );
        let says = format!("format version {version}, this program reads version {FORMAT_VERSION}");
        assert!(e.to_string().contains(&says), "{e}");
        assert!(disk.pages == before, "left as it is");
    }
}
