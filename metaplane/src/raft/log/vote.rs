//! The vote file: who this node voted for, replaced atomically (write, sync, rename, sync the
//! directory) before the vote is told to anybody.

use super::super::Vote;
use super::super::disk::{self, Disk};
use ebb_dataplane_protocol::crc32c;
use std::io;
use std::path::Path;

const NAME: &str = "vote";
const TEMPORARY: &str = "vote.tmp";

/// Writes the vote.
pub(super) fn save(disk: &dyn Disk, dir: &Path, vote: &Vote) -> io::Result<()> {
    let json = serde_json::to_vec(vote).map_err(io::Error::other)?;
    let text = [format!("{:08x} ", crc32c(&json)).as_bytes(), &json].concat();
    disk::replace(disk, dir, (TEMPORARY, NAME), &text)
}

/// Reads the vote; `None` on a node that never voted.
pub(super) fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Vote>> {
    let text = match disk::read(disk, &dir.join(NAME)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the vote file is damaged");
    let (crc, json) = text.split_at_checked(9).ok_or_else(damaged)?;
    let crc = std::str::from_utf8(&crc[..8]).ok().and_then(|t| u32::from_str_radix(t, 16).ok());
    if crc != Some(crc32c(json)) {
        return Err(damaged());
    }
    serde_json::from_slice(json).map(Some).map_err(|_| damaged())
}
