//! The metadata server: a Raft voter, the RPC port, and the leader's work against S3 and the data
//! nodes.
//!
//! Three layers. [`raft`]: log, state, snapshots, network. `server`: requests in, answers out;
//! what the state machine decided is signed here. `leader`: loops that flush, deliver notices,
//! delete keys, expire sessions, move groups and hold the bucket, each resumable by any leader,
//! because all they know for good is in the state machine (`ebb-namespace`).
//!
//! Holds up I1 (metadata), I3 (only S3's word makes clean), I7 (by Raft and the state machine), I9
//! (every queue is bounded) and I12 on its port. Sees no bulk data.

pub mod config;
pub mod error;
pub mod raft;

mod bucket;
mod ground;
mod leader;
mod leases;
mod membership;
mod s3_health;
mod server;
mod service;
#[cfg(test)]
mod sim;
mod start;
mod voter;

pub use config::{MetaConfig, Timings};
pub use error::MetaError;
pub use start::{run, terminated};
