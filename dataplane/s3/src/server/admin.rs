//! The admin port: flips fault switches from another process. For tests only; off unless asked
//! for, and bound to loopback or not at all.
//!
//! ```text
//! GET    /_ebb/faults    {"pending": [...], "struck": n}
//! PUT    /_ebb/faults    replaces all, body: a JSON array of faults
//! POST   /_ebb/faults    adds one, body: a JSON fault
//! DELETE /_ebb/faults    clears
//! ```

use std::convert::Infallible;

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode, body::Bytes, body::Incoming, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::watch};

use crate::fault::{Fault, Faults};

const PATH: &str = "/_ebb/faults";
const BODY_BYTES_MAX: usize = 64 * 1024;

pub(super) async fn serve(listener: TcpListener, faults: Faults, mut stop: watch::Receiver<bool>) {
    loop {
        let stream = tokio::select! {
            () = super::stopped(&mut stop) => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => return,
            },
        };
        let faults = faults.clone();
        let handler = service_fn(move |request| {
            let faults = faults.clone();
            async move { Ok::<_, Infallible>(answer(request, &faults).await) }
        });
        // One at a time and closed after each: nobody needs more of a test's switchboard.
        let served = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), handler);
        tokio::select! {
            () = super::stopped(&mut stop) => return,
            _ = served => {}
        }
    }
}

fn reply(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(text.into()));
    *reply.status_mut() = status;
    reply
}

async fn answer(request: Request<Incoming>, faults: &Faults) -> Response<Full<Bytes>> {
    if request.uri().path() != PATH {
        return reply(StatusCode::NOT_FOUND, format!("only {PATH} is here\n"));
    }
    let method = request.method().clone();
    let body = match Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(e) => return reply(StatusCode::BAD_REQUEST, format!("{e}\n")),
    };
    let refused = |e: serde_json::Error| reply(StatusCode::BAD_REQUEST, format!("{e}\n"));
    let added = match method {
        Method::GET => true,
        Method::DELETE => {
            faults.clear();
            true
        }
        Method::PUT => match serde_json::from_slice::<Vec<Fault>>(&body) {
            Err(e) => return refused(e),
            Ok(new) => {
                faults.clear();
                new.into_iter().all(|fault| faults.add(fault))
            }
        },
        Method::POST => match serde_json::from_slice::<Fault>(&body) {
            Err(e) => return refused(e),
            Ok(fault) => faults.add(fault),
        },
        _ => return reply(StatusCode::METHOD_NOT_ALLOWED, "GET, PUT, POST or DELETE\n"),
    };
    if !added {
        return reply(StatusCode::BAD_REQUEST, "too many faults at once\n");
    }
    let state = serde_json::json!({ "pending": faults.pending(), "struck": faults.struck() });
    reply(StatusCode::OK, format!("{state}\n"))
}
