//! The data node: chunk servers over io_uring, one per core.
//!
//! Layers, top down: [`node`] starts and stops a process; `heartbeat` keeps its lease; `reactor_glue`
//! drives one ring per core and speaks frames; [`core`] decides, sans-IO; `ebb-store` keeps; `mover`
//! talks to S3 and `resolve` to the system's resolver on threads of their own.

mod blank;
mod clock;
pub mod config;
pub mod core;
mod heartbeat;
mod mover;
pub mod node;
mod reactor_glue;
mod resolve;
mod shards;
mod spill_file;

pub use config::{ConfigError, NodeConfig};
pub use heartbeat::HeartbeatError;
pub use node::{NodeError, Ready, run, shutdown_signal};
pub use reactor_glue::CoreError;
pub use shards::{BlockingDevice, ShardError, check};
pub use spill_file::SpillError;
