//! Who votes with this directory: the voter's id and a random name of the directory, in `voter.json`.
//!
//! A voter whose directory is emptied forgets what it voted for and which entries it acknowledged. If
//! it came back under its id, two leaders of one term could each have its vote, and an entry that a
//! majority had could be held by a minority (I1). So the name of the directory is part of the
//! membership, peers compare it whenever they connect (`network`), and such a voter is refused until
//! somebody replaces it by one with another id. The file is written before the first word to others.

use super::disk::{self, Disk};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterIdentity {
    /// The voter's id.
    pub id: u64,
    /// The directory's name, 32 hexadecimal digits.
    pub store: String,
    /// It has taken part in the group: from then on a log belongs to it.
    pub joined: bool,
}

const NAME: &str = "voter.json";
const TEMPORARY: &str = "voter.tmp";

impl VoterIdentity {
    /// Reads the identity of a directory, or makes one. `random`: the name of a new one. Blocks on disk.
    pub fn open(disk: &dyn Disk, dir: &Path, id: u64, random: u128) -> io::Result<Self> {
        match disk::read(disk, &dir.join(NAME)) {
            Ok(json) => serde_json::from_slice(&json).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let new = Self { id, store: format!("{random:032x}"), joined: false };
                new.save(disk, dir)?;
                Ok(new)
            }
            Err(e) => Err(e),
        }
    }

    /// Makes it durable. Blocks on disk.
    pub fn save(&self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let json = serde_json::to_vec(self).map_err(io::Error::other)?;
        disk::replace(disk, dir, (TEMPORARY, NAME), &json)
    }
}
