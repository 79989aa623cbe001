//! The benchmark harness: what `ebb bench` runs against a real cluster.
//!
//! Figures are medians or totals of real requests over real sockets; nothing is simulated. Speed
//! lives here, never in timed tests.

pub mod chunk;
