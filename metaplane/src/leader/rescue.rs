//! The dirty ranges of a file whose base is lost, stored as objects of their own (PROTOCOL R36).
//!
//! The nodes upload the runs that hold them from their pins, into one object under the reserved prefix;
//! what isn't dirty in those is zero there. S3 then copies each dirty range, and nothing else (I4), to
//! `name.conflict-<id>/<offset>-<length>`. These keys belong to this inode alone, and every object is
//! completed from an upload that is aborted when in doubt, so that nothing of it lands late.

use super::seal::Sealed;
use super::store::length_of;
use crate::bucket::attributes;
use crate::service::Service;
use ebb_dataplane_protocol::control::StoreOutcome;
use ebb_dataplane_protocol::{ByteRange, ClusterMap, RUN_BYTES, RunIndex};
use ebb_metaplane_protocol::flush::{RescuedRange, StorePlan};
use ebb_s3::{Condition, Etag, Metadata, Part, S3Error, UploadId};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};

/// Dirty ranges of one file at most; past that it stays dirty, and says so.
const RANGES_MAX: usize = 10_000;
/// Calls in flight at most.
const CONCURRENCY: usize = 8;
/// S3 copies so much in one call; parts but the last are never small.
const COPY_PART_BYTES: u64 = 1 << 30;

/// Ranges in order, joined where they touch, up to the file's end.
fn joined(extents: &[ByteRange], size: u64) -> Vec<ByteRange> {
    let mut all: Vec<ByteRange> = extents
        .iter()
        .map(|e| ByteRange { start: e.start, end: e.end.min(size) })
        .filter(|e| e.start < e.end)
        .collect();
    all.sort_unstable_by_key(|e| e.start);
    let mut joined: Vec<ByteRange> = Vec::new();
    for e in all {
        match joined.last_mut() {
            Some(last) if e.start <= last.end => last.end = last.end.max(e.end),
            _ => joined.push(e),
        }
    }
    joined
}

/// The runs that hold these ranges, in order.
fn runs_of(ranges: &[ByteRange]) -> Vec<RunIndex> {
    let mut runs: Vec<u32> = ranges
        .iter()
        .flat_map(|r| (r.start / RUN_BYTES) as u32..=((r.end - 1) / RUN_BYTES) as u32)
        .collect();
    runs.dedup();
    runs.into_iter().map(RunIndex).collect()
}

/// Where a byte of the file is in the object of these runs. A range of touching bytes is in one piece.
fn place(runs: &[RunIndex], at: u64) -> u64 {
    let run = (at / RUN_BYTES) as u32;
    let before = runs.partition_point(|r| r.0 < run) as u64;
    before * RUN_BYTES + at % RUN_BYTES
}

impl Service {
    /// Stores the dirty ranges. `Err` says why they are not stored yet.
    pub(crate) async fn rescue(
        &self,
        plan: &StorePlan,
        sealed: &Sealed,
        map: &ClusterMap,
    ) -> Result<Vec<RescuedRange>, String> {
        let ranges = joined(&sealed.extents, plan.attr.size);
        if ranges.len() > RANGES_MAX {
            return Err(format!(
                "its object was changed from outside, and its {} dirty ranges are too many to be \
                 stored one by one; write it over in whole or remove it",
                ranges.len()
            ));
        }
        if ranges.is_empty() {
            return Ok(Vec::new());
        }
        let runs = runs_of(&ranges);
        let source = format!(".ebb/rescue/{:016x}", plan.inode.0);
        let etag = self.gather(plan, &runs, &source, map).await?;
        let mut copies: Vec<BoxFuture<'_, Result<RescuedRange, String>>> = Vec::new();
        for range in ranges {
            copies.push(Box::pin(self.copy_range(plan, &source, &etag, &runs, range)));
        }
        let stored = futures::stream::iter(copies)
            .buffer_unordered(CONCURRENCY)
            .try_collect::<Vec<_>>()
            .await;
        // A late delete of it hits, if anything, another gathering: that is begun anew.
        if let Err(e) = self.bucket.delete(&source, None).await {
            tracing::warn!(key = source, error = %e, "a temporary object stays");
        }
        let mut stored = stored?;
        stored.sort_unstable_by_key(|r| r.offset);
        tracing::warn!(
            key = plan.key,
            ranges = stored.len(),
            "its object was changed from outside; what was dirty of it is stored below this key"
        );
        Ok(stored)
    }

    /// One object of the runs, each as its node has it pinned; zeros where it isn't dirty.
    async fn gather(
        &self,
        plan: &StorePlan,
        runs: &[RunIndex],
        source: &str,
        map: &ClusterMap,
    ) -> Result<Etag, String> {
        let mut plan = plan.clone();
        plan.key = source.to_owned();
        plan.view.backing = None;
        let size = length_of(&plan);
        let metadata: Metadata = attributes::metadata_of(self.cluster, &plan);
        let upload = self.begin(source, &metadata).await?;
        let mut uploads: Vec<BoxFuture<'_, Result<Part, StoreOutcome>>> = Vec::new();
        for run in runs {
            uploads.push(Box::pin(self.run_part(&plan, map, &upload, *run)));
        }
        let parts: Result<Vec<Part>, StoreOutcome> =
            futures::stream::iter(uploads).buffer_unordered(CONCURRENCY).try_collect().await;
        match parts {
            Ok(parts) => self.end(source, &upload, parts, (&plan, size_of(runs, size))).await,
            Err(outcome) => {
                self.abort(source, &upload).await;
                Err(format!("uploading what is dirty of it: {outcome:?}"))
            }
        }
    }

    async fn run_part(
        &self,
        plan: &StorePlan,
        map: &ClusterMap,
        upload: &UploadId,
        run: RunIndex,
    ) -> Result<Part, StoreOutcome> {
        let length = (plan.attr.size - run.start()).min(RUN_BYTES) as u32;
        match self.node_part(plan, map, upload, run, length).await {
            StoreOutcome::Stored { etag } => Ok(Part { number: run.0 + 1, etag: Etag::new(etag) }),
            other => Err(other),
        }
    }

    /// One dirty range to its own object.
    async fn copy_range(
        &self,
        plan: &StorePlan,
        source: &str,
        etag: &Etag,
        runs: &[RunIndex],
        range: ByteRange,
    ) -> Result<RescuedRange, String> {
        let length = range.end - range.start;
        let key = format!("{}/{}-{length}", plan.key, range.start);
        let metadata: Metadata = attributes::metadata_of(self.cluster, plan);
        let upload = self.begin(&key, &metadata).await?;
        let from = place(runs, range.start);
        let mut parts = Vec::new();
        let mut at = 0;
        while at < length {
            let end = (at + COPY_PART_BYTES).min(length);
            let number = parts.len() as u32 + 1;
            let copied = self
                .bucket
                .upload_part_copy(&key, &upload, number, source, Some(etag), from + at..from + end)
                .await;
            match copied {
                Ok(part) => parts.push(part),
                Err(e) => {
                    self.abort(&key, &upload).await;
                    return Err(failed(&e));
                }
            }
            at = end;
        }
        let etag = self.end(&key, &upload, parts, (plan, length)).await?;
        Ok(RescuedRange { offset: range.start, length, etag: etag.as_str().to_owned() })
    }

    async fn begin(&self, key: &str, metadata: &Metadata) -> Result<UploadId, String> {
        self.health.note(self.bucket.create_multipart(key, metadata).await).map_err(|e| failed(&e))
    }

    /// Completes; in doubt it is aborted, and the key says whether it had been completed before.
    async fn end(
        &self,
        key: &str,
        upload: &UploadId,
        mut parts: Vec<Part>,
        (plan, length): (&StorePlan, u64),
    ) -> Result<Etag, String> {
        parts.sort_by_key(|p| p.number);
        let done = self.bucket.complete_multipart(key, upload, &parts, &Condition::None).await;
        match self.health.note(done) {
            Ok(etag) => Ok(etag),
            Err(e) => {
                self.abort(key, upload).await;
                match self.head(key).await {
                    Ok(Some(info))
                        if info.size == length
                            && attributes::is_ours(self.cluster, &info, &[plan.nonce]) =>
                    {
                        Ok(info.etag)
                    }
                    _ => Err(failed(&e)),
                }
            }
        }
    }
}

/// Bytes of the object of these runs of a file.
fn size_of(runs: &[RunIndex], size: u64) -> u64 {
    runs.iter().map(|r| (size - r.start()).min(RUN_BYTES)).sum()
}

fn failed(e: &S3Error) -> String {
    format!("storing what is dirty of it: {e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange { start, end }
    }

    #[test]
    fn every_dirty_byte_is_in_one_range_and_no_other_byte_is() {
        let found = joined(&[range(50, 60), range(0, 10), range(10, 20), range(55, 70)], 65);
        assert_eq!(found, [range(0, 20), range(50, 65)]);
        assert_eq!(joined(&[range(70, 80)], 65), []);
    }

    #[test]
    fn a_range_is_found_in_the_object_of_its_runs() {
        let ranges = [range(5, 6), range(3 * RUN_BYTES - 1, 4 * RUN_BYTES + 7)];
        let runs = runs_of(&ranges);
        assert_eq!(runs.iter().map(|r| r.0).collect::<Vec<_>>(), [0, 2, 3, 4]);
        assert_eq!(place(&runs, 5), 5);
        assert_eq!(place(&runs, 3 * RUN_BYTES - 1), 2 * RUN_BYTES - 1);
        assert_eq!(size_of(&runs, 4 * RUN_BYTES + 100), 3 * RUN_BYTES + 100);
    }
}
