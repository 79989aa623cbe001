//! From the SDK's error to [`S3Error`]: the one place that decides what a failure means.
//!
//! Holds I3. The order is: what the server said for certain (its error code, then its status),
//! then whether the request can have reached it at all. What remains of a mutation is `Ambiguous`.

use std::error::Error;

use aws_sdk_s3::error::{DisplayErrorContext, SdkError};
use aws_smithy_runtime_api::client::{orchestrator::HttpResponse, result::ConnectorError};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

use crate::{
    error::{ErrorKind, S3Error},
    operation::Operation,
};

/// Longest text taken over from an error.
const MESSAGE_BYTES_MAX: usize = 400;

pub(super) fn classify<E>(op: Operation, key: &str, error: SdkError<E, HttpResponse>) -> S3Error
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let (kind, message) = match &error {
        SdkError::ServiceError(reply) => {
            let status = reply.raw().status().as_u16();
            let code = reply.err().code().unwrap_or_default();
            let text = reply.err().message().unwrap_or_default();
            let message = if code.is_empty() && text.is_empty() {
                // No S3 error in it: a HEAD's reply, or one that did not parse.
                format!("HTTP {status}: {}", DisplayErrorContext(reply.err()))
            } else {
                format!("HTTP {status} {code} {text}")
            };
            (of_reply(op, status, code), message)
        }
        SdkError::ResponseError(reply) => {
            // A reply that did not parse, most often because it was cut off. A 4xx still says no.
            let status = reply.raw().status().as_u16();
            let kind = match status {
                400..=499 => of_reply(op, status, ""),
                _ => unknown(op, ErrorKind::Server),
            };
            (kind, format!("HTTP {status}: {}", DisplayErrorContext(&error)))
        }
        SdkError::TimeoutError(_) => {
            let kind = if never_connected(&error) {
                ErrorKind::Connect
            } else {
                unknown(op, ErrorKind::Timeout)
            };
            (kind, "no reply in time".to_owned())
        }
        SdkError::DispatchFailure(failure) => (
            of_connector(op, failure.as_connector_error(), &error),
            DisplayErrorContext(&error).to_string(),
        ),
        SdkError::ConstructionFailure(_) => {
            let text = DisplayErrorContext(&error).to_string();
            let kind =
                if is_about_credentials(&text) { ErrorKind::Denied } else { ErrorKind::Invalid };
            (kind, text)
        }
        _ => (unknown(op, ErrorKind::Server), DisplayErrorContext(&error).to_string()),
    };
    S3Error::new(kind, op, key, shorten(message))
}

/// The outcome is not known: `otherwise` for a read, `Ambiguous` for a mutation.
fn unknown(op: Operation, otherwise: ErrorKind) -> ErrorKind {
    if op.is_mutation() { ErrorKind::Ambiguous } else { otherwise }
}

fn of_reply(op: Operation, status: u16, code: &str) -> ErrorKind {
    // The code first: Complete and Copy may carry an error under status 200.
    match code {
        "PreconditionFailed" => return ErrorKind::PreconditionFailed,
        "ConditionalRequestConflict" | "OperationAborted" => return ErrorKind::Conflict,
        "NoSuchBucket" => return ErrorKind::NoSuchBucket,
        "NoSuchKey" | "NoSuchUpload" => return ErrorKind::NotFound,
        "SlowDown"
        | "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests" => return ErrorKind::Throttled,
        "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch" => {
            return ErrorKind::Integrity;
        }
        "NotImplemented" => return ErrorKind::Invalid,
        // The server gave up waiting for the request's body: it has not acted on it.
        "RequestTimeout" => return ErrorKind::Timeout,
        _ => {}
    }
    match status {
        401 | 403 => ErrorKind::Denied,
        404 => ErrorKind::NotFound,
        409 => ErrorKind::Conflict,
        412 => ErrorKind::PreconditionFailed,
        429 => ErrorKind::Throttled,
        501 => ErrorKind::Invalid,
        503 if !op.is_mutation() => ErrorKind::Throttled,
        300..=499 => ErrorKind::Invalid,
        _ => unknown(op, ErrorKind::Server),
    }
}

fn of_connector(
    op: Operation,
    connector: Option<&ConnectorError>,
    error: &(dyn Error + 'static),
) -> ErrorKind {
    if never_connected(error) {
        return ErrorKind::Connect;
    }
    // The SDK reports what fails before anything is sent (no credentials) as a dispatch failure
    // too; such an error has nothing of the HTTP stack in its chain.
    let sent = find::<hyper_util::client::legacy::Error>(error).is_some()
        || find::<hyper::Error>(error).is_some();
    if !sent && is_about_credentials(&DisplayErrorContext(error).to_string()) {
        return ErrorKind::Denied;
    }
    match connector {
        Some(c) if c.is_timeout() => unknown(op, ErrorKind::Timeout),
        Some(c) if c.is_user() && !sent => ErrorKind::Invalid,
        _ => unknown(op, ErrorKind::Connect),
    }
}

/// Whether the failure was in making the connection, so that no byte of the request went out.
fn never_connected(error: &(dyn Error + 'static)) -> bool {
    find::<hyper_util::client::legacy::Error>(error).is_some_and(|e| e.is_connect())
}

fn is_about_credentials(text: &str) -> bool {
    text.contains("redentials") || text.contains("identity")
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn shorten(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        let mut end = MESSAGE_BYTES_MAX;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push_str("...");
    }
    message.truncate(message.trim_end().len());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_errors_of_mutations_are_ambiguous_and_of_reads_are_not() {
        for status in [500, 502, 503, 504, 599] {
            assert_eq!(of_reply(Operation::Put, status, ""), ErrorKind::Ambiguous, "{status}");
            assert!(of_reply(Operation::Get, status, "") != ErrorKind::Ambiguous, "{status}");
        }
        assert_eq!(of_reply(Operation::Put, 503, "SlowDown"), ErrorKind::Throttled);
    }

    #[test]
    fn an_error_under_status_200_is_an_error() {
        let op = Operation::CompleteMultipart;
        assert_eq!(of_reply(op, 200, "InternalError"), ErrorKind::Ambiguous);
        assert_eq!(of_reply(op, 200, "PreconditionFailed"), ErrorKind::PreconditionFailed);
    }
}
