//! Carrying out the core's commands. What the ring or the mover has no room for waits, in order.

use super::Glue;
use crate::core::{Command, Event, Piece, Reply, Token};
use ebb_dataplane_protocol::Status;
use ebb_dataplane_protocol::header::HEADER_BYTES;
use ebb_ring::{Buf, Durability, Pool, Refusal, Segment, Token as RingToken};
use ebb_store::AlignedBuf;
use std::sync::Arc;

impl Glue {
    pub(super) fn carry_out(&mut self) {
        // Deferred commands first: order among device commands does not matter to the core, but
        // nothing may wait for ever.
        for _ in 0..self.deferred.len() {
            let Some(command) = self.deferred.pop_front() else { break };
            self.command(command);
        }
        let commands: Vec<Command<Buf>> = self.core.drain().collect();
        for command in commands {
            self.command(command);
        }
    }

    fn command(&mut self, command: Command<Buf>) {
        match command {
            Command::Read { token, offset, buf, range } => {
                let done =
                    self.reactor.read(self.file, RingToken(token.0), buf, range.clone(), offset);
                if let Err(r) = done {
                    let buf = r.back;
                    self.refused(r.why, token, Command::Read { token, offset, buf, range });
                }
            }
            Command::Write { token, offset, buf, range } => {
                let segment = Segment::Shared(buf, range);
                let done = self.reactor.write(
                    self.file,
                    RingToken(token.0),
                    segment,
                    offset,
                    Durability::Buffered,
                );
                if let Err(r) = done {
                    let back = r.back.into_vec().pop();
                    let Some(Segment::Shared(buf, range)) = back else { return };
                    self.refused(r.why, token, Command::Write { token, offset, buf, range });
                }
            }
            Command::WriteMeta { token, offset, bytes, durable } => {
                self.write_meta(token, offset, bytes, durable);
            }
            Command::Sync { token } => {
                if let Err(why) = self.reactor.sync(self.file, RingToken(token.0)) {
                    self.refused(why, token, Command::Sync { token });
                }
            }
            Command::SpillRead { .. } | Command::SpillWrite { .. } => self.spill_command(command),
            Command::Reply(reply) => self.reply(reply),
            Command::Job(job) => {
                if let Some(job) = self.jobs.try_send(job) {
                    self.deferred.push_back(Command::Job(job));
                }
            }
            Command::Call(call) => self.peers.call(&mut self.reactor, call, self.now_ms),
            Command::RefreshMap => self.refresh.notify_one(),
            Command::Failed(why) => self.failure = Some(why),
        }
    }

    /// A command for the spill device; one that is refused for good failed as if the device had.
    fn spill_command(&mut self, command: Command<Buf>) {
        let file = self.spill;
        match command {
            Command::SpillRead { token, offset, buf, range } => {
                let refused = match file {
                    Some(file) => {
                        let t = RingToken(token.0);
                        match self.reactor.read(file, t, buf, range.clone(), offset) {
                            Ok(_) => return,
                            Err(r) => (r.why, r.back),
                        }
                    }
                    None => (Refusal::NoFile, buf),
                };
                match refused {
                    (Refusal::TooManyOps, buf) => {
                        self.deferred.push_back(Command::SpillRead { token, offset, buf, range });
                    }
                    (why, buf) => {
                        tracing::warn!(core = self.index, %why, "spill device read refused");
                        self.core.handle(self.now_ms, Event::Read { token, buf, ok: false });
                    }
                }
            }
            Command::SpillWrite { token, offset, buf, range } => {
                let why = match file {
                    Some(file) => {
                        let segment = Segment::Shared(Arc::clone(&buf), range.clone());
                        let t = RingToken(token.0);
                        match self.reactor.write(file, t, segment, offset, Durability::Buffered) {
                            Ok(_) => return,
                            Err(r) => r.why,
                        }
                    }
                    None => Refusal::NoFile,
                };
                if why == Refusal::TooManyOps {
                    self.deferred.push_back(Command::SpillWrite { token, offset, buf, range });
                } else {
                    tracing::warn!(core = self.index, %why, "spill device write refused");
                    self.core.handle(self.now_ms, Event::Written { token, ok: false });
                }
            }
            other => debug_assert!(false, "not for the spill device: {other:?}"),
        }
    }

    /// The store's own bytes are few; they are copied into a slot so that the write is a fixed one.
    fn write_meta(&mut self, token: Token, offset: u64, bytes: Arc<AlignedBuf>, durable: bool) {
        let len = bytes.len();
        let mut buf = super::slots::take(self.reactor.arena(), len, Pool::Background)
            .unwrap_or_else(|| Buf::unpooled(len));
        buf[..len].copy_from_slice(&bytes);
        let durability = if durable { Durability::Dsync } else { Durability::Buffered };
        let segment = Segment::Buf(buf, 0..len);
        let done = self.reactor.write(self.file, RingToken(token.0), segment, offset, durability);
        if let Err(r) = done {
            self.refused(r.why, token, Command::WriteMeta { token, offset, bytes, durable });
        }
    }

    /// The ring took a device command back: later, or never.
    fn refused(&mut self, why: Refusal, token: Token, command: Command<Buf>) {
        match why {
            Refusal::TooManyOps => self.deferred.push_back(command),
            why => {
                // A bug or a shutdown: either way this shard's device is of no more use.
                tracing::error!(core = self.index, ?token, %why, "device operation refused");
                self.failure = Some("the ring refused a device operation");
            }
        }
    }

    /// Sends a reply as one message; counts a bad request's connection out.
    pub(super) fn reply(&mut self, reply: Reply<Buf>) {
        let close = reply.header.status == Status::BadRequest;
        let Some(conn) = self.conns.get_mut(&reply.conn) else { return };
        let id = conn.id;
        // Nothing more is read from a peer that sends nonsense.
        conn.closing |= close;
        let mut head = Vec::with_capacity(HEADER_BYTES + reply.body.len());
        head.extend_from_slice(&reply.header.encode());
        head.extend_from_slice(&reply.body);
        let mut segments = Vec::with_capacity(1 + reply.payload.len());
        segments.push(Segment::Bytes(head));
        for piece in reply.payload {
            match piece {
                Piece::Buf(buf, range) => segments.push(Segment::Buf(buf, range)),
                Piece::Shared(buf, range) => segments.push(Segment::Shared(buf, range)),
                Piece::Zeros(mut n) => {
                    while n > 0 {
                        let take = n.min(self.zero_slab.len());
                        segments.push(Segment::Static(&self.zero_slab[..take]));
                        n -= take;
                    }
                }
            }
        }
        if self.reactor.send(id, RingToken(0), segments).is_err() {
            // Broken or closing: nobody to tell.
            self.sent(id);
            self.reactor.close(id);
        } else if close {
            self.reactor.close_when_sent(id);
        }
    }
}
