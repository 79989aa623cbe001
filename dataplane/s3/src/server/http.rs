//! The listening side: connections, requests, and carrying out faults around the S3 service.
//!
//! Bounded: at most `CONNECTIONS_MAX` connections, further ones wait to be accepted. Without a
//! switch set, a request goes straight through.

use std::{io, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use hyper::{Method, StatusCode, body::Incoming, header::HeaderMap, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::{Body, HttpError, HttpResponse, service::S3Service};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use crate::{
    fault::{FaultKind, Faults},
    operation::Operation,
};

const CONNECTIONS_MAX: usize = 512;
/// Read at once from a connection, and so the largest piece of a body on its way in.
const READ_BYTES_MAX: usize = 128 * 1024;
/// An idle connection is closed after this. Longer than clients keep theirs (the AWS SDK: 90 s),
/// so that a request seldom meets a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(300);
/// How long a shutdown waits for requests under way.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a failed accept (no file descriptors left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop` turns true, then lets the requests under way finish.
pub(super) async fn serve(
    listener: TcpListener,
    service: S3Service,
    faults: Faults,
    mut stop: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?.0, permit))
        };
        tokio::select! {
            () = super::stopped(&mut stop) => break,
            accepted = next => match accepted {
                Ok((stream, permit)) => {
                    let (service, faults) = (service.clone(), faults.clone());
                    connections.spawn(connection(stream, permit, service, faults, stop.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(SHUTDOWN_PATIENCE, ended).await.is_err() {
        tracing::warn!("connections still busy at shutdown are dropped");
    }
    connections.shutdown().await;
}

async fn connection(
    stream: TcpStream,
    _permit: OwnedSemaphorePermit,
    service: S3Service,
    faults: Faults,
    mut stop: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let handler = service_fn(move |request| {
        let (service, faults) = (service.clone(), faults.clone());
        async move { answer(request, &service, &faults).await }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(READ_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), handler);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = super::stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// An error here makes hyper drop the connection without a reply.
fn hang_up() -> HttpError {
    HttpError::new("dropped by a fault switch".into())
}

async fn answer(
    request: hyper::Request<Incoming>,
    service: &S3Service,
    faults: &Faults,
) -> Result<HttpResponse, HttpError> {
    let op = operation_of(
        request.method(),
        request.uri().path(),
        request.uri().query().unwrap_or_default(),
        request.headers(),
    );
    let fault = op.and_then(|op| faults.take(op, request.uri().path()));
    let Some(fault) = fault else { return service.call(request.map(Body::from)).await };
    tracing::info!(?op, ?fault, path = request.uri().path(), "fault switch strikes");
    match fault {
        FaultKind::LostRequest => Err(hang_up()),
        FaultKind::InternalError => refuse(request, StatusCode::INTERNAL_SERVER_ERROR).await,
        FaultKind::SlowDown => refuse(request, StatusCode::SERVICE_UNAVAILABLE).await,
        FaultKind::Delay { ms } => {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            service.call(request.map(Body::from)).await
        }
        FaultKind::Late { ms } => {
            let (head, body) = request.into_parts();
            let body = body.collect().await.map_err(|e| HttpError::new(Box::new(e)))?.to_bytes();
            let service = service.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                let done = service.call(hyper::Request::from_parts(head, Body::from(body))).await;
                tracing::info!(status = ?done.map(|r| r.status()), "a late request was carried out");
            });
            Err(hang_up())
        }
        FaultKind::LostReply => {
            drop(service.call(request.map(Body::from)).await);
            Err(hang_up())
        }
        FaultKind::InternalErrorAfter => {
            drop(service.call(request.map(Body::from)).await);
            Ok(error_reply(StatusCode::INTERNAL_SERVER_ERROR))
        }
        FaultKind::DelayReply { ms } => {
            let reply = service.call(request.map(Body::from)).await;
            tokio::time::sleep(Duration::from_millis(ms)).await;
            reply
        }
        FaultKind::Truncate { bytes } => {
            let reply = service.call(request.map(Body::from)).await?;
            Ok(reply.map(|body| truncated(body, bytes)))
        }
    }
}

/// Refuses without acting. The body is read first: a client that is still sending would see a
/// reset and not this answer.
async fn refuse(
    request: hyper::Request<Incoming>,
    status: StatusCode,
) -> Result<HttpResponse, HttpError> {
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        frame.map_err(|e| HttpError::new(Box::new(e)))?;
    }
    Ok(error_reply(status))
}

fn error_reply(status: StatusCode) -> HttpResponse {
    let code = match status {
        StatusCode::SERVICE_UNAVAILABLE => "SlowDown",
        _ => "InternalError",
    };
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <Error><Code>{code}</Code><Message>a fault switch is set</Message></Error>"
    );
    let mut reply = HttpResponse::new(Body::from(text));
    *reply.status_mut() = status;
    reply.headers_mut().insert(
        hyper::header::CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/xml"),
    );
    reply
}

/// The first bytes of a body, then a broken connection.
fn truncated(body: Body, bytes: u64) -> Body {
    use futures::{StreamExt, stream};
    let pieces = stream::unfold((body, bytes, false), |(mut body, left, cut)| async move {
        if cut {
            // hyper sends what it has gathered when the body is not ready, and drops it when the
            // body fails: without this turn the head of the reply might go missing too.
            tokio::task::yield_now().await;
            return Some((Err("cut short by a fault switch".into()), (body, 0, true)));
        }
        match body.next().await? {
            Ok(mut piece) => {
                let cut = piece.len() as u64 > left;
                if cut {
                    piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                }
                let left = left - piece.len() as u64;
                Some((Ok(piece), (body, left, cut)))
            }
            Err(e) => Some((Err(e), (body, left, false))),
        }
    });
    Body::http_body_unsync(http_body_util::StreamBody::new(
        pieces.map(|piece: Result<_, s3s::StdError>| {
            piece.map(hyper::body::Frame::data).map_err(Cut)
        }),
    ))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Cut(s3s::StdError);

/// Which operation a request is, as far as fault switches tell operations apart.
fn operation_of(
    method: &Method,
    path: &str,
    query: &str,
    headers: &HeaderMap,
) -> Option<Operation> {
    use Operation::*;
    let path = path.trim_start_matches('/');
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    let has = |name: &str| query.split('&').any(|part| part.split('=').next() == Some(name));
    let copies = headers.contains_key("x-amz-copy-source");
    let op = match (method.as_str(), bucket.is_empty(), key.is_empty()) {
        ("GET", true, _) => ListBuckets,
        ("GET", false, true) if has("uploads") => ListMultipartUploads,
        ("GET", false, true) if has("location") => HeadBucket,
        ("GET", false, true) => List,
        ("HEAD", false, true) => HeadBucket,
        ("PUT", false, true) => CreateBucket,
        ("POST", false, true) if has("delete") => DeleteMany,
        ("GET", false, false) if has("uploadId") => ListParts,
        ("GET", false, false) => Get,
        ("HEAD", false, false) => Head,
        ("PUT", false, false) if has("partNumber") && copies => UploadPartCopy,
        ("PUT", false, false) if has("partNumber") => UploadPart,
        ("PUT", false, false) if copies => Copy,
        ("PUT", false, false) => Put,
        ("POST", false, false) if has("uploads") => CreateMultipart,
        ("POST", false, false) if has("uploadId") => CompleteMultipart,
        ("DELETE", false, false) if has("uploadId") => AbortMultipart,
        ("DELETE", false, false) => Delete,
        _ => return None,
    };
    Some(op)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let plain = HeaderMap::new();
        let mut copy = HeaderMap::new();
        copy.insert("x-amz-copy-source", hyper::header::HeaderValue::from_static("b/k"));
        let of = |m: &str, path: &str, query: &str, headers: &HeaderMap| {
            operation_of(&Method::from_bytes(m.as_bytes()).expect("a method"), path, query, headers)
        };
        assert_eq!(of("PUT", "/b/k", "x-id=PutObject", &plain), Some(Operation::Put));
        assert_eq!(of("PUT", "/b/k", "", &copy), Some(Operation::Copy));
        let part = "partNumber=1&uploadId=u";
        assert_eq!(of("PUT", "/b/k", part, &plain), Some(Operation::UploadPart));
        assert_eq!(of("PUT", "/b/k", part, &copy), Some(Operation::UploadPartCopy));
        assert_eq!(of("POST", "/b/k", "uploads", &plain), Some(Operation::CreateMultipart));
        assert_eq!(of("POST", "/b/k", "uploadId=u", &plain), Some(Operation::CompleteMultipart));
        assert_eq!(of("GET", "/b", "list-type=2", &plain), Some(Operation::List));
        assert_eq!(of("GET", "/b/", "uploads=", &plain), Some(Operation::ListMultipartUploads));
        assert_eq!(of("DELETE", "/b/k/", "", &plain), Some(Operation::Delete));
        assert_eq!(of("PATCH", "/b/k", "", &plain), None);
    }
}
