//! Histories of concurrent clients, and whether one order of their operations explains them.
//!
//! - [`search`]: the checker, for any specification: Wing & Gong's search (JPDC 1993) with Lowe's memory of
//!   configurations (CCPE 2017).
//! - [`tree`]: the specification of a small directory tree, as the metadata plane promises it.
//! - [`history`]: what was asked and answered when, as lines of JSON, one independent tree after the other
//!   (Lowe's and Porcupine's P-compositionality: a history is linearizable iff each tree's is).
//! - [`explain`]: what to show of a history that has no order.
//!
//! Sans-IO: no clock, no randomness, no files. A search that takes too long says so, which is no pass.

pub mod explain;
pub mod history;
pub mod search;
pub mod tree;
