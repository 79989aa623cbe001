//! The per-core proactor: one `io_uring` per core, one registered buffer arena, no async runtime.
//!
//! A sans-IO core drives it. One turn submits everything that was asked for since the last one,
//! waits for completions in the same system call, and hands back [`Event`]s:
//!
//! ```no_run
//! # use ebb_ring::{Config, Event, Reactor};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut reactor = Reactor::new(Config::default())?;
//! let (_listener, addr) = reactor.listen("127.0.0.1:0".parse()?)?;
//! println!("serving on {addr}");
//! let mut events = Vec::new();
//! loop {
//!     reactor.turn(None, &mut events)?; // sleeps without using CPU
//!     for event in events.drain(..) {
//!         match event {
//!             Event::Accepted { conn, .. } => { /* reactor.recv_some(conn, ...) */ let _ = conn; }
//!             _ => {}
//!         }
//!     }
//! }
//! # }
//! ```
//!
//! # Rules that hold for every operation
//!
//! * **Ownership.** An operation takes its buffers by value and its completion event gives them
//!   back. Nothing outside this crate can reach memory that the kernel may still read or write.
//! * **The last completion.** Memory, a connection's slot in the fixed-file table and its id are
//!   released only at the final completion of the last operation that uses them. A slot is never
//!   reused while something is in flight on it.
//! * **Whole transfers.** Short reads, writes, sends and exact receives are continued here, and
//!   EAGAIN/EINTR are retried here; nobody above sees them.
//! * **Bounded** (I9). Operations, connections, send queues, mailboxes and buffers all have fixed
//!   limits; past one the call is [`Rejected`] and gives its buffers back.
//! * **Shutdown drains.** [`Reactor::shutdown`] (and drop) cancels everything and waits for the
//!   last completion; if the kernel does not give one within five seconds the process aborts,
//!   because freeing memory in flight would corrupt it.
//!
//! # What it does not do
//!
//! It knows nothing of frames, chunks or peers' identity (I12 is the server's), retries no failed
//! device operation, and keeps no timers: the caller passes its next deadline to
//! [`Reactor::turn`].
//!
//! This is the only crate of the workspace that contains `unsafe`; everything public is safe.
#![allow(unsafe_code)]
#![warn(missing_docs)]

mod accept;
mod arena;
mod config;
mod conn;
mod connect;
mod disk;
mod error;
mod event;
mod file;
mod layout;
mod op;
mod reactor;
mod ring;
mod segment;
mod send;
mod setup;
#[cfg(test)]
mod short_tests;
mod slab;
mod sys;
mod wake;

pub use accept::ListenerId;
pub use arena::{Arena, Buf};
pub use config::{Config, SPIN_US_MAX, SQPOLL_IDLE_MS_MAX};
pub use conn::ConnId;
pub use disk::{Durability, FileId};
pub use error::{
    DiskError, DiskOp, FileError, MemlockLimit, NetError, Refusal, Rejected, SetupError,
    SetupWarning, TurnError,
};
pub use event::{CloseReason, Event, Token};
pub use file::{DeviceFile, DioAlign, OpenMode};
pub use layout::{BLOCK, Class, Pool, SLACK};
pub use nix::errno::Errno;
pub use op::OpId;
pub use reactor::{Reactor, Stats};
pub use segment::{Segment, Segments};
pub use wake::{MailSender, Mailbox, SendRefused, Waker, mailbox};
