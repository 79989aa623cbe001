//! Who votes with this directory: the voter's id and a random name of the directory, in `voter.json`.
//!
//! A voter whose directory is emptied forgets what it voted for and which entries it acknowledged. If
//! it came back under its id, two leaders of one term could each have its vote, and an entry that a
//! majority had could be held by a minority (I1). So the name of the directory is part of the
//! membership, peers compare it whenever they connect (`network`), and such a voter is refused until
//! somebody replaces it by one with another id. The file is written before the first word to others.

use super::log::sync_dir;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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

fn path(dir: &Path) -> PathBuf {
    dir.join("voter.json")
}

impl VoterIdentity {
    /// Reads the identity of a directory, or makes one. `random`: the name of a new one. Blocks on disk.
    pub fn open(dir: &Path, id: u64, random: u128) -> io::Result<Self> {
        match std::fs::read(path(dir)) {
            Ok(json) => serde_json::from_slice(&json).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let new = Self { id, store: format!("{random:032x}"), joined: false };
                new.save(dir)?;
                Ok(new)
            }
            Err(e) => Err(e),
        }
    }

    /// Makes it durable. Blocks on disk.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        let temporary = dir.join("voter.tmp");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self).map_err(io::Error::other)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path(dir))?;
        sync_dir(dir)
    }
}
