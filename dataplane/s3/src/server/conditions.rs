//! Conditions of requests against the object there is. Pure; callers hold the key's lock.
//!
//! AWS's answers: a mutation under If-Match on a missing key is 404, on another etag 412; under
//! `If-None-Match: *` on an existing key 412. A read whose If-None-Match holds no news is 304.

use s3s::{
    S3ErrorCode, S3Result,
    dto::{ETagCondition, Timestamp},
    s3_error,
};
use time::OffsetDateTime;

fn matches(condition: &ETagCondition, etag: &str) -> bool {
    match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(wanted) => wanted.value() == etag,
    }
}

/// For PUT, Complete, Copy (its destination) and DELETE. `current` is the etag there is.
pub(super) fn check_write(
    current: Option<&str>,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<()> {
    if let Some(wanted) = if_match {
        match current {
            None => return Err(s3_error!(NoSuchKey, "If-Match on a key that does not exist")),
            Some(etag) if !matches(wanted, etag) => return Err(precondition_failed("If-Match")),
            Some(_) => {}
        }
    }
    if let (Some(unwanted), Some(etag)) = (if_none_match, current)
        && matches(unwanted, etag)
    {
        return Err(precondition_failed("If-None-Match"));
    }
    Ok(())
}

/// The four conditions of a read, or of a copy's source.
#[derive(Default)]
pub(super) struct ReadConditions<'a> {
    pub(super) if_match: Option<&'a ETagCondition>,
    pub(super) if_none_match: Option<&'a ETagCondition>,
    pub(super) if_modified_since: Option<&'a Timestamp>,
    pub(super) if_unmodified_since: Option<&'a Timestamp>,
}

impl ReadConditions<'_> {
    /// `stale` is what a failed If-None-Match or If-Modified-Since says: 304 for a read, 412 for
    /// a copy. The order of precedence is RFC 9110's.
    pub(super) fn check(&self, etag: &str, modified_ns: i64, stale: S3ErrorCode) -> S3Result<()> {
        // HTTP dates have whole seconds.
        let modified = modified_ns.div_euclid(1_000_000_000);
        let seconds = |t: &Timestamp| OffsetDateTime::from(t.clone()).unix_timestamp();
        if let Some(wanted) = self.if_match {
            if !matches(wanted, etag) {
                return Err(precondition_failed("If-Match"));
            }
        } else if self.if_unmodified_since.is_some_and(|t| modified > seconds(t)) {
            return Err(precondition_failed("If-Unmodified-Since"));
        }
        let no_news = match self.if_none_match {
            Some(unwanted) => matches(unwanted, etag),
            None => self.if_modified_since.is_some_and(|t| modified <= seconds(t)),
        };
        if no_news {
            return Err(s3s::S3Error::with_message(stale, "nothing newer"));
        }
        Ok(())
    }
}

fn precondition_failed(which: &'static str) -> s3s::S3Error {
    s3s::S3Error::with_message(
        S3ErrorCode::PreconditionFailed,
        format!("At least one of the pre-conditions you specified did not hold: {which}"),
    )
}

#[cfg(test)]
mod tests {
    use s3s::dto::ETag;

    use super::*;

    fn tag(text: &str) -> ETagCondition {
        ETagCondition::ETag(ETag::Strong(text.into()))
    }

    fn code(result: S3Result<()>) -> Option<S3ErrorCode> {
        result.err().map(|e| e.code().clone())
    }

    #[test]
    fn writes_answer_as_aws_does() {
        let (a, any) = (tag("a"), ETagCondition::Any);
        let failed = Some(S3ErrorCode::PreconditionFailed);
        assert_eq!(code(check_write(None, None, None)), None);
        assert_eq!(code(check_write(Some("a"), Some(&a), None)), None);
        assert_eq!(code(check_write(Some("b"), Some(&a), None)), failed);
        assert_eq!(code(check_write(None, Some(&a), None)), Some(S3ErrorCode::NoSuchKey));
        assert_eq!(code(check_write(None, None, Some(&any))), None);
        assert_eq!(code(check_write(Some("a"), None, Some(&any))), failed);
    }
}
