//! The vote file: who this node voted for, replaced atomically (write, sync, rename, sync the
//! directory) before the vote is told to anybody.

use super::super::Vote;
use super::segment::sync_dir;
use ebb_dataplane_protocol::crc32c;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

const NAME: &str = "vote";
const TEMPORARY: &str = "vote.tmp";

/// Writes the vote.
pub(super) fn save(dir: &Path, vote: &Vote) -> io::Result<()> {
    let json = serde_json::to_vec(vote).map_err(io::Error::other)?;
    let mut file = File::create(dir.join(TEMPORARY))?;
    file.write_all(format!("{:08x} ", crc32c(&json)).as_bytes())?;
    file.write_all(&json)?;
    file.sync_all()?;
    std::fs::rename(dir.join(TEMPORARY), dir.join(NAME))?;
    sync_dir(dir)
}

/// Reads the vote; `None` on a node that never voted.
pub(super) fn load(dir: &Path) -> io::Result<Option<Vote>> {
    let text = match std::fs::read(dir.join(NAME)) {
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
