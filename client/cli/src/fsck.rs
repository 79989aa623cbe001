//! `ebb fsck`: the namespace of a running cluster ([`crate::fsck_namespace`]), or what is on a device, without
//! a cluster.

use crate::args::{Cli, Fsck};
use crate::exit::CliError;
use crate::{fsck_namespace, output};
use ebb_store::{BLOCK, Report};
use serde_json::json;

/// Damaged blocks that are named one by one.
const NAMED_MAX: usize = 20;

/// `ebb fsck`
pub(crate) async fn fsck(cli: &Cli, args: &Fsck) -> Result<(), CliError> {
    match args.device.as_slice() {
        [] => fsck_namespace::fsck(cli, args.repair).await,
        devices => fsck_devices(cli, devices).await,
    }
}

/// Checks every device, and fails if any has something to report.
async fn fsck_devices(cli: &Cli, devices: &[std::path::PathBuf]) -> Result<(), CliError> {
    let mut reports = Vec::new();
    let mut broken = Vec::new();
    for path in devices {
        let spinner = output::spinner(&format!("reading {}", path.display()), cli.json);
        let of = path.clone();
        let checked = tokio::task::spawn_blocking(move || ebb_dataplane::check(&of)).await;
        spinner.finish_and_clear();
        let report = match checked.map_err(|e| CliError::new(e.to_string()))? {
            Ok(report) => report,
            Err(e) => {
                broken.push(path.display().to_string());
                if cli.json {
                    reports.push(json!({ "device": path, "error": e.to_string() }));
                } else {
                    output::line(&format!("{e}"))?;
                }
                continue;
            }
        };
        if !is_sound(&report) {
            broken.push(path.display().to_string());
        }
        if cli.json {
            reports.push(as_json(path, &report));
        } else {
            print(path, &report)?;
        }
    }
    if cli.json {
        output::json(&reports)?;
    }
    match broken.as_slice() {
        [] => Ok(()),
        some => Err(CliError::new(format!(
            "{} of {} devices are damaged or cannot be read: {}. A node that finds a bad block serves \
             it from S3 where it can, and never wrong bytes",
            some.len(),
            devices.len(),
            some.join(", ")
        ))),
    }
}

fn is_sound(r: &Report) -> bool {
    r.bad.is_empty() && r.used_blocks == r.reachable_blocks
}

fn as_json(path: &std::path::Path, r: &Report) -> serde_json::Value {
    let bad: Vec<_> = r
        .bad
        .iter()
        .map(|b| {
            json!({
                "inode": b.inode.0, "chunk": b.chunk.0, "block": b.block,
                "device_offset": b.offset, "dirty": b.dirty,
            })
        })
        .collect();
    json!({
        "device": path,
        "cluster": r.identity.cluster.to_string(),
        "node": r.identity.node.0,
        "core": r.identity.core.0,
        "device_bytes": r.geometry.device_bytes,
        "superblock_copies_valid": r.superblocks,
        "checkpoint": r.checkpoint,
        "journal_batches": r.batches,
        "inodes": r.inodes,
        "chunks": r.chunks,
        "extents": r.extents,
        "bytes_compared": r.blocks * BLOCK as u64,
        "used_bytes": r.used_blocks * BLOCK as u64,
        "reachable_bytes": r.reachable_blocks * BLOCK as u64,
        "bad_blocks": bad,
    })
}

fn print(path: &std::path::Path, r: &Report) -> Result<(), CliError> {
    let bytes = |blocks: u64| output::bytes(blocks * BLOCK as u64);
    output::line(&format!(
        "{}: node {} core {} of cluster {}; {}; superblock {} of 4 copies, checkpoint {}, {} journal batches \
         after it; {} inodes, {} chunks, {} extents; {} compared",
        path.display(),
        r.identity.node,
        r.identity.core,
        r.identity.cluster,
        output::bytes(r.geometry.device_bytes),
        r.superblocks,
        r.checkpoint,
        r.batches,
        r.inodes,
        r.chunks,
        r.extents,
        bytes(r.blocks)
    ))?;
    if r.used_blocks != r.reachable_blocks {
        let (used, reachable) = (bytes(r.used_blocks), bytes(r.reachable_blocks));
        output::line(&format!("  space leaked: {used} in use, {reachable} referred to"))?;
    }
    for b in r.bad.iter().take(NAMED_MAX) {
        output::line(&format!(
            "  bad block at {}: inode {} chunk {} block {}, {}",
            b.offset,
            b.inode,
            b.chunk.0,
            b.block,
            if b.dirty { "DIRTY: not in S3" } else { "clean: S3 has it" }
        ))?;
    }
    if r.bad.len() > NAMED_MAX {
        output::line(&format!("  and {} more", r.bad.len() - NAMED_MAX))?;
    }
    if is_sound(r) {
        output::line("  sound")?;
    }
    Ok(())
}
