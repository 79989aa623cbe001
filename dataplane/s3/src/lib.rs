//! Conditional S3 operations, the attribute convention, the condition probe, and an embedded
//! on-disk S3 server.
//!
//! Two halves that meet only on the wire:
//! * [`Bucket`]: a thin client over the AWS SDK. It holds I3 (a lost reply is `Ambiguous`, 5xx is
//!   never success) and I10 at the edge (lengths and etags of every read are checked).
//! * [`server`]: our own S3 server, one file per object, durable before it answers, every
//!   condition atomic; with the [`fault`] switches that tests use to lose replies on purpose.
//!
//! Decides nothing about files: which key, which generation and what to do after a 412 is the
//! metadata plane's business (docs/PROTOCOL.md, section 8).

pub mod attributes;
pub mod client;
pub mod config;
pub mod error;
pub mod fault;
pub mod hostile;
pub mod operation;
pub mod probe;
pub mod server;
pub mod types;

pub use attributes::{Attributes, EbbTag, FileKind, LinkMark, Timestamp};
pub use client::{Bucket, GetBody, UploadBody};
pub use config::{BucketConfig, StaticCredentials, Timeouts};
pub use error::{ErrorKind, S3Error};
pub use operation::Operation;
pub use probe::Conditions;
pub use types::*;
