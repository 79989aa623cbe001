//! The other side: the same phases by threads on the local file system.

use super::{Operation, Sample, Side, micros, us};
use crate::BenchError;
use hdrhistogram::Histogram;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Creates of a thread with an fsync each: they are slow.
const SYNCED_FILES_MAX: u32 = 500;

pub(super) struct Work {
    pub(super) under: PathBuf,
    pub(super) clients: u32,
    pub(super) files: u32,
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn run(work: &Work) -> Result<Vec<(Operation, Side, Sample)>, BenchError> {
    let top = work.under.join(format!(".ebb-bench-meta-{}", std::process::id()));
    std::fs::create_dir(&top).map_err(BenchError::file("create", &top))?;
    let top = Scratch(top);
    let dirs: Vec<PathBuf> = (0..work.clients).map(|n| top.0.join(n.to_string())).collect();
    for dir in &dirs {
        std::fs::create_dir(dir).map_err(BenchError::file("create", dir))?;
    }
    let mut done = Vec::new();
    for operation in Operation::ALL {
        let sample = phase(&dirs, |dir, took| files(operation, dir, work.files, took))?;
        done.push((operation, Side::Local, sample));
    }
    let count = work.files.min(SYNCED_FILES_MAX);
    let sample = phase(&dirs, |dir, took| synced(dir, count, took))?;
    done.push((Operation::Create, Side::LocalSynced, sample));
    Ok(done)
}

/// A thread for each directory; `each` says how many operations it did.
fn phase(
    dirs: &[PathBuf],
    each: impl Fn(&Path, &mut Histogram<u64>) -> std::io::Result<u64> + Sync,
) -> Result<Sample, BenchError> {
    let begun = Instant::now();
    let results: Vec<_> = std::thread::scope(|scope| {
        let each = &each;
        let threads: Vec<_> = dirs
            .iter()
            .map(|dir| {
                scope.spawn(move || {
                    let mut took = micros();
                    let count = each(dir, &mut took).map_err(BenchError::file("work in", dir))?;
                    Ok::<_, BenchError>((count, took))
                })
            })
            .collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let elapsed = begun.elapsed();
    let (mut count, mut took) = (0, micros());
    for result in results {
        let (done, of) = result.map_err(|_| BenchError::Worker("a thread panicked".into()))??;
        count += done;
        took.add(of).map_err(|e| BenchError::Worker(e.to_string()))?;
    }
    Ok(Sample::new(count, elapsed, &took))
}

fn files(
    operation: Operation,
    dir: &Path,
    count: u32,
    took: &mut Histogram<u64>,
) -> std::io::Result<u64> {
    if operation == Operation::Readdir {
        // As a page of ours has attributes.
        let mut entries = 0;
        for entry in std::fs::read_dir(dir)? {
            entry?.metadata()?;
            entries += 1;
        }
        return Ok(entries);
    }
    let (name, moved) =
        (|n| dir.join(format!("file.{n:08}")), |n| dir.join(format!("moved.{n:08}")));
    for n in 0..count {
        let begun = Instant::now();
        match operation {
            Operation::Create => drop(File::create_new(name(n))?),
            Operation::Stat => std::fs::metadata(name(n)).map(|_| ())?,
            Operation::Rename => std::fs::rename(name(n), moved(n))?,
            Operation::Unlink => std::fs::remove_file(moved(n))?,
            Operation::Readdir => {}
        }
        let _ = took.record(us(begun));
    }
    Ok(count.into())
}

/// Creates that are durable when they are done, as ours.
fn synced(dir: &Path, count: u32, took: &mut Histogram<u64>) -> std::io::Result<u64> {
    let parent = File::open(dir)?;
    for n in 0..count {
        let begun = Instant::now();
        File::create_new(dir.join(format!("synced.{n:08}")))?.sync_all()?;
        parent.sync_all()?;
        let _ = took.record(us(begun));
    }
    Ok(count.into())
}
