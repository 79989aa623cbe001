//! The protocol between the planes, as small models that are checked exhaustively (docs/PROTOCOL.md).
//!
//! [`core`] holds grants, seals, flushes, cuts and session fences of one inode; [`handover`] a placement
//! group that changes hands; [`key`] one S3 key. [`rules`] names what can be taken out, [`suite`] says which
//! sizes are checked and what each removal must break. Covers I1, I2, I3, I5, I6, I7 and the dirty half of
//! I8; the others are no matter of interleavings. It checks the protocol, not the code that follows it.

pub mod core;
pub mod handover;
pub mod key;
pub mod replica;
pub mod rules;
pub mod run;
pub mod suite;
