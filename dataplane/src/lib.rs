//! The data node: chunk servers over io_uring, one per core.
//!
//! Layers, top down: [`node`] starts and stops a process; `heartbeat` keeps its lease; `reactor_glue`
//! drives one ring per core and speaks frames; [`core`] decides, sans-IO; `ebb-store` keeps; `mover`
//! talks to S3 on threads of its own.

pub mod core;
