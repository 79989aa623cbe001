//! Frames, handshake and calls over tokio sockets: the client side of every port, and the server
//! side of the metadata plane's.
//!
//! A [`Connection`] carries many calls at once; a call is answered, or fails with a narrow
//! [`RpcError`] that says whether it may have taken effect. Nothing is retried here except by
//! [`MetaClient`], whose requests are exactly-once by (session, sequence) or idempotent (I7).
//!
//! Not here: what the calls mean, grants, maps, sessions (ebb-client).

mod connection;
mod error;
mod frame;
mod handshake;
mod meta;
mod near;
pub mod server;
mod writer;

pub use connection::Connection;
pub use error::RpcError;
pub use frame::Frame;
pub use handshake::Identity;
pub use meta::MetaClient;
