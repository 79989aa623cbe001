//! The crash simulator: a fake disk, a reference model and a seeded driver. Knows the store by its
//! public interface only.

#![allow(unreachable_pub, reason = "a test's own modules")]

pub mod disk;
pub mod driver;
pub mod model;
pub mod oracle;
pub mod workload;
