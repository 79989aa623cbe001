//! A client of one core: presents grants it signs itself, writes, reads, checks every checksum.

use super::*;
use ebb_dataplane_protocol::checksum::{crc32c, piece_checksums};
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::data::{DataContext, decode_checksums, encode_checksums};

pub const TIMEOUT: Duration = Duration::from_secs(20);

/// One file as its writer sees it.
#[derive(Clone, Debug)]
pub struct File {
    pub inode: InodeId,
    pub generation: Generation,
    pub view: FileView,
    pub mode: GrantMode,
    pub least_map: MapVersion,
    pub alloc_limit: u64,
}

impl File {
    pub fn new(inode: u64) -> Self {
        Self {
            inode: InodeId(inode),
            generation: Generation(1),
            view: FileView {
                version: ViewVersion(1),
                content: ContentId(1),
                ..FileView::default()
            },
            mode: GrantMode::Write,
            least_map: MapVersion(1),
            alloc_limit: 1 << 40,
        }
    }
    /// Backed by an object of the bucket.
    pub fn backed(inode: u64, key: &str, etag: &str, length: u64) -> Self {
        let mut f = Self::new(inode);
        f.view.backing =
            Some(Backing { key: key.into(), etag: etag.into(), length, limit: length });
        f
    }
    pub fn grant(&self, session: SessionId) -> Grant {
        Grant {
            cluster: CLUSTER,
            inode: self.inode,
            mode: self.mode,
            generation: self.generation,
            session,
            view: self.view.clone(),
            least_map_version: self.least_map,
            alloc_limit: self.alloc_limit,
        }
    }
    pub fn signed(&self, session: SessionId) -> SignedGrant {
        SignedGrant::sign(&self.grant(session), &key())
    }
    /// As the metadata plane names it in its requests.
    pub fn meta_grant(&self) -> SignedGrant {
        let grant = Grant { mode: GrantMode::Read, ..self.grant(SessionId(0)) };
        SignedGrant::sign(&grant, &key())
    }
}

#[derive(Clone)]
pub struct Client {
    pub connection: Connection,
    pub session: SessionId,
    pub map_version: MapVersion,
    pub epoch: PgEpoch,
    pub sequence: Arc<std::sync::atomic::AtomicU64>,
    /// Sequences this far back are answered.
    pub unanswered_max: u64,
    /// Of the headers of reads.
    pub flags: u16,
}

impl Client {
    pub async fn new(world: &World, port: u16, session: u64) -> Self {
        Self {
            connection: world.connect(port, Role::Client, session).await,
            session: SessionId(session),
            map_version: MapVersion(1),
            epoch: PgEpoch(1),
            sequence: Arc::new(1.into()),
            unanswered_max: 1000,
            flags: 0,
        }
    }

    pub fn next_sequence(&self) -> Sequence {
        Sequence(self.sequence.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }

    pub async fn present(&self, file: &File) -> Status {
        self.present_signed(&file.signed(self.session)).await
    }

    pub async fn present_signed(&self, signed: &SignedGrant) -> Status {
        let header = Header::request(Opcode::Present, 0);
        let body = codec::encode(signed);
        let reply = self.connection.call(header, body.into(), bytes::Bytes::new(), TIMEOUT).await;
        reply.expect("answered").header.status
    }

    fn header(&self, opcode: Opcode, file: &File, chunk: u32, offset: u32, length: u32) -> Header {
        Header {
            inode: file.inode,
            chunk: ChunkIndex(chunk),
            offset,
            length,
            pg: PgId::of_chunk(file.inode, ChunkIndex(chunk), PGS),
            ..Header::request(opcode, 0)
        }
    }

    pub fn context(&self, file: &File, sequence: Sequence) -> DataContext {
        DataContext {
            generation: file.generation,
            view_version: file.view.version,
            map_version: self.map_version,
            pg_epoch: self.epoch,
            content: file.view.content,
            session: self.session,
            sequence,
            answered_below: Sequence(sequence.0.saturating_sub(self.unanswered_max)),
        }
    }

    pub async fn write_as(
        &self,
        file: &File,
        chunk: u32,
        offset: u32,
        data: &[u8],
        context: DataContext,
    ) -> Frame {
        let header = self.header(Opcode::Write, file, chunk, offset, data.len() as u32);
        let mut body = context.encode().to_vec();
        body.extend(encode_checksums(&piece_checksums(u64::from(offset), data)));
        let payload = bytes::Bytes::copy_from_slice(data);
        self.connection.call(header, body.into(), payload, TIMEOUT).await.expect("answered")
    }

    pub async fn write_status(&self, file: &File, chunk: u32, offset: u32, data: &[u8]) -> Status {
        let context = self.context(file, self.next_sequence());
        self.write_as(file, chunk, offset, data, context).await.header.status
    }

    /// As `write_status`; `None` if the connection ended instead.
    pub async fn try_write(
        &self,
        file: &File,
        chunk: u32,
        offset: u32,
        data: &[u8],
    ) -> Option<Status> {
        let context = self.context(file, self.next_sequence());
        let header = self.header(Opcode::Write, file, chunk, offset, data.len() as u32);
        let mut body = context.encode().to_vec();
        body.extend(encode_checksums(&piece_checksums(u64::from(offset), data)));
        let payload = bytes::Bytes::copy_from_slice(data);
        let reply = self.connection.call(header, body.into(), payload, TIMEOUT).await;
        reply.ok().map(|r| r.header.status)
    }

    /// Writes; `Busy` and the like are tried again as a client would.
    pub async fn write(&self, file: &File, chunk: u32, offset: u32, data: &[u8]) {
        let context = self.context(file, self.next_sequence());
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let reply = self.write_as(file, chunk, offset, data, context).await;
            match reply.header.status {
                Status::Ok => return,
                Status::Busy | Status::NoLease if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                status => panic!("write of {} at {chunk}:{offset}: {status:?}", data.len()),
            }
        }
    }

    pub async fn read_frame(&self, file: &File, chunk: u32, offset: u32, length: u32) -> Frame {
        let mut header = self.header(Opcode::Read, file, chunk, offset, length);
        header.flags = self.flags;
        let body = self.context(file, Sequence(0)).encode().to_vec();
        self.connection
            .call(header, body.into(), bytes::Bytes::new(), TIMEOUT)
            .await
            .expect("answered")
    }

    pub async fn read_status(&self, file: &File, chunk: u32, offset: u32, length: u32) -> Status {
        self.read_frame(file, chunk, offset, length).await.header.status
    }

    pub async fn read(&self, file: &File, chunk: u32, offset: u32, length: u32) -> Vec<u8> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let frame = self.read_frame(file, chunk, offset, length).await;
            match frame.header.status {
                Status::Ok => return checked(&frame, offset, length),
                Status::Busy | Status::NoLease if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                status => panic!("read of {length} at {chunk}:{offset}: {status:?}"),
            }
        }
    }
}

/// The asked bytes of a reply, after every block's checksum.
pub fn checked(frame: &Frame, offset: u32, length: u32) -> Vec<u8> {
    let crcs = decode_checksums(&frame.body).expect("checksums");
    let h = &frame.header;
    assert_eq!((h.offset % 4096, h.length % 4096), (0, 0), "a block-aligned superset");
    assert_eq!(h.length as usize, frame.payload.len());
    assert_eq!(crcs.len(), frame.payload.len() / 4096, "one checksum per block");
    for (block, crc) in frame.payload.chunks(4096).zip(&crcs) {
        assert_eq!(crc32c(block), *crc);
    }
    assert!(h.offset <= offset && h.offset + h.length >= offset + length);
    let at = (offset - h.offset) as usize;
    frame.payload[at..at + length as usize].to_vec()
}

/// Requests of the metadata plane.
#[derive(Clone)]
pub struct MetaPeer {
    pub connection: Connection,
}

impl MetaPeer {
    pub async fn new(world: &World, port: u16) -> Self {
        Self { connection: world.connect(port, Role::Meta, 0).await }
    }
    pub async fn control(&self, c: Control) -> ControlReply {
        self.connection.control(&c, TIMEOUT).await.expect("answered")
    }
    /// Waits until that much is cached durably.
    pub async fn eventually_clean(&self, bytes: u64) {
        let deadline = Instant::now() + TIMEOUT;
        while self.stats().await.clean_bytes < bytes {
            assert!(Instant::now() < deadline, "never cached");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    pub async fn stats(&self) -> ebb_dataplane_protocol::control::CoreStats {
        match self.control(Control::Stats).await {
            ControlReply::Stats(s) => s,
            other => panic!("{other:?}"),
        }
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng};
    let mut data = vec![0u8; len];
    rand::rngs::SmallRng::seed_from_u64(seed).fill_bytes(&mut data);
    data
}
