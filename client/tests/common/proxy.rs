//! Between the clients and a data node: loses the answer of a session's next write with its connection, and keeps that
//! session's writes back until told. Everything else passes, byte by byte.

use ebb_dataplane_protocol::data::CONTEXT_BYTES;
use ebb_dataplane_protocol::header::HEADER_BYTES;
use ebb_dataplane_protocol::{Opcode, SessionId};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxies of a cluster do, together.
#[derive(Clone)]
pub struct Rules {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// The next write of this session is taken and not answered.
    lose: Option<SessionId>,
    /// Its writes wait.
    held: BTreeSet<SessionId>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { state: Arc::default(), changed: watch::Sender::new(0) }
    }
}

impl Rules {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn set(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.state());
        self.changed.send_modify(|n| *n += 1);
    }
    async fn until(&self, f: impl Fn(&State) -> bool) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            if f(&self.state()) {
                return;
            }
            changed.changed().await.expect("this side holds the sender");
        }
    }
    /// The answer of the session's next write is to be lost, and its writes held from then on.
    pub fn lose_next_write_of(&self, session: SessionId) {
        self.set(|s| s.lose = Some(session));
    }
    /// Waits until it is.
    pub async fn lost(&self, session: SessionId) {
        self.until(|s| s.held.contains(&session)).await;
    }
    /// Its writes pass again.
    pub fn release(&self, session: SessionId) {
        self.set(|s| {
            s.held.remove(&session);
        });
    }

    /// Passes everything that comes to `listener` on to `to`, until the test ends.
    pub fn serve(&self, listener: TcpListener, to: String) {
        let rules = self.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (rules, to) = (rules.clone(), to.clone());
                tokio::spawn(async move {
                    // A node that is away: the client sees its connection close.
                    if let Ok(node) = TcpStream::connect(&to).await {
                        rules.connection(client, node).await;
                    }
                });
            }
        });
    }

    async fn connection(&self, client: TcpStream, node: TcpStream) {
        let _ = (client.set_nodelay(true), node.set_nodelay(true));
        let (from_client, to_client) = client.into_split();
        let (from_node, to_node) = node.into_split();
        let doomed = Arc::new(Mutex::new(None));
        tokio::select! {
            _ = self.requests(from_client, to_node, &doomed) => {}
            _ = self.answers(from_node, to_client, &doomed) => {}
        }
    }

    async fn requests(
        &self,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        doomed: &Mutex<Option<(u64, SessionId)>>,
    ) -> std::io::Result<()> {
        loop {
            let frame = Frame::read(&mut from).await?;
            if let Some(session) = frame.writer() {
                self.until(|s| !s.held.contains(&session)).await;
                let mut state = self.state();
                if state.lose == Some(session) {
                    state.lose = None;
                    *doomed.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some((frame.id(), session));
                }
            }
            to.write_all(&frame.0).await?;
        }
    }

    async fn answers(
        &self,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        doomed: &Mutex<Option<(u64, SessionId)>>,
    ) -> std::io::Result<()> {
        loop {
            let frame = Frame::read(&mut from).await?;
            let lost = doomed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take_if(|d| d.0 == frame.id() && frame.0[5] == Opcode::Write as u8);
            if let Some((_, session)) = lost {
                if frame.0[24..26] == [0, 0] {
                    self.set(|s| {
                        s.held.insert(session);
                    });
                    return Ok(());
                }
                // Refused: the one after it, then.
                self.set(|s| s.lose = Some(session));
            }
            to.write_all(&frame.0).await?;
        }
    }
}

/// A frame's bytes.
struct Frame(Vec<u8>);

impl Frame {
    async fn read(from: &mut OwnedReadHalf) -> std::io::Result<Self> {
        let mut bytes = vec![0; HEADER_BYTES];
        from.read_exact(&mut bytes).await?;
        let len = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
        };
        let rest = len(16) + len(20);
        bytes.resize(HEADER_BYTES + rest, 0);
        from.read_exact(&mut bytes[HEADER_BYTES..]).await?;
        Ok(Self(bytes))
    }
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }
    fn id(&self) -> u64 {
        self.u64_at(8)
    }
    /// The session, if it is a write.
    fn writer(&self) -> Option<SessionId> {
        let write =
            self.0[5] == Opcode::Write as u8 && self.0.len() >= HEADER_BYTES + CONTEXT_BYTES;
        // The sixth field of the context.
        write.then(|| SessionId(self.u64_at(HEADER_BYTES + 40)))
    }
}
