//! How a voter reaches others: over TCP, or over a simulated network (`crate::sim`).

use bytes::Bytes;
use ebb_dataplane_protocol::Header;
use ebb_rpc::{Connection, Frame, Identity, RpcError};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

/// Makes connections.
pub trait Dial: Send + Sync {
    /// Connects to host:port within a time.
    fn connect<'a>(
        &'a self,
        address: &'a str,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Arc<dyn Line>, RpcError>>;
}

/// A connection.
pub trait Line: Send + Sync {
    /// A call that must answer `Ok` within a time.
    fn call(
        &self,
        header: Header,
        body: Bytes,
        payload: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Frame, RpcError>>;
    /// Whether it is of no more use.
    fn is_closed(&self) -> bool;
}

impl Dial for Identity {
    fn connect<'a>(
        &'a self,
        address: &'a str,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Arc<dyn Line>, RpcError>> {
        async move {
            let connection = Connection::connect(address, self, timeout).await?;
            Ok(Arc::new(connection) as Arc<dyn Line>)
        }
        .boxed()
    }
}

impl Line for Connection {
    fn call(
        &self,
        header: Header,
        body: Bytes,
        payload: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Frame, RpcError>> {
        self.call_ok(header, body, payload, timeout).boxed()
    }
    fn is_closed(&self) -> bool {
        Connection::is_closed(self)
    }
}
