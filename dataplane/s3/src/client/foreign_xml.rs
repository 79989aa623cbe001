//! Replies whose root element has the wrong name, put right before the SDK reads them.
//!
//! The Rust SDK insists on the root's name, which no other SDK does, so servers get it wrong
//! unnoticed: moto says `CompleteMultipartUploadResponse`, rclone `InitiateMultipartUpload`. An
//! `<Error>` stays one, and nothing but the name of the root is touched.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use aws_sdk_s3::{
    config::{ConfigBag, Intercept, RuntimeComponents},
    error::BoxError,
    primitives::SdkBody,
};
use aws_smithy_runtime_api::client::interceptors::{
    context::BeforeDeserializationInterceptorContextMut, dyn_dispatch_hint,
};
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};

/// Longest reply that is gathered; the largest (a page of parts) has about 300 KiB.
const REPLY_BYTES_MAX: usize = 4 << 20;

/// Renames a reply's root to the one the SDK wants, if it is one of the aliases.
#[derive(Debug, Clone, Copy)]
pub(super) struct RootName {
    wanted: &'static str,
    aliases: &'static [&'static str],
}

pub(super) const CREATE: RootName = RootName {
    wanted: "InitiateMultipartUploadResult",
    aliases: &["InitiateMultipartUpload", "InitiateMultipartUploadResponse"],
};
pub(super) const COMPLETE: RootName = RootName {
    wanted: "CompleteMultipartUploadResult",
    aliases: &["CompleteMultipartUpload", "CompleteMultipartUploadResponse"],
};
pub(super) const LIST_PARTS: RootName =
    RootName { wanted: "ListPartsResult", aliases: &["ListParts", "ListPartsResponse"] };

#[dyn_dispatch_hint]
impl Intercept for RootName {
    fn name(&self) -> &'static str {
        "ebb-root-name"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let body = context.response_mut().body_mut();
        let inner = std::mem::replace(body, SdkBody::taken());
        let renamed = Renamed { inner, gathered: BytesMut::new(), root: *self, done: false };
        *body = SdkBody::from_body_1_x(renamed);
        Ok(())
    }
}

struct Renamed {
    inner: SdkBody,
    gathered: BytesMut,
    root: RootName,
    done: bool,
}

impl Body for Renamed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        while !self.done {
            match ready!(Body::poll_frame(Pin::new(&mut self.inner), cx)) {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.gathered.extend_from_slice(&data);
                    }
                    if self.gathered.len() > REPLY_BYTES_MAX {
                        return Poll::Ready(Some(Err("the reply is too long".into())));
                    }
                }
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => {
                    self.done = true;
                    let reply = self.gathered.split().freeze();
                    return Poll::Ready(Some(Ok(Frame::data(self.root.rename(reply)))));
                }
            }
        }
        Poll::Ready(None)
    }
}

impl RootName {
    fn rename(&self, reply: Bytes) -> Bytes {
        let Ok(text) = std::str::from_utf8(&reply) else { return reply };
        // The first `<` that starts a name is the root's; `<?` and `<!` come before it.
        let root = text.match_indices('<').map(|(at, _)| &text[at + 1..]);
        let mut root = root.filter(|rest| !rest.starts_with(['?', '!']));
        let Some(rest) = root.next() else { return reply };
        let end = rest.find(|c: char| c.is_whitespace() || c == '>' || c == '/');
        let name = &rest[..end.unwrap_or(rest.len())];
        if !self.aliases.contains(&name) {
            return reply;
        }
        let opened = text.replacen(&format!("<{name}"), &format!("<{}", self.wanted), 1);
        opened.replace(&format!("</{name}>"), &format!("</{}>", self.wanted)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_roots_name_changes() {
        let renamed = |text: &'static str| COMPLETE.rename(Bytes::from_static(text.as_bytes()));
        let reply = "<?xml version=\"1.0\"?>\n<CompleteMultipartUploadResponse xmlns=\"x\"><Key>\
                     a</Key></CompleteMultipartUploadResponse>";
        let wanted = "<?xml version=\"1.0\"?>\n<CompleteMultipartUploadResult xmlns=\"x\"><Key>\
                      a</Key></CompleteMultipartUploadResult>";
        assert_eq!(renamed(reply), wanted);
        for same in [wanted, "<Error><Code>InternalError</Code></Error>", "", "<", "plain <?", "<a"]
        {
            assert_eq!(renamed(same), same);
        }
    }
}
