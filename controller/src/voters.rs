//! The voters of a local cluster (`voters.json`): which servers the controller runs, and where. Who votes is
//! decided by the group itself; this is only about processes. `ebb up` writes the file, `ebb meta` changes it,
//! the controller reads it every turn. Without it there is one voter, number 1.

use crate::error::ControllerError as Error;
use crate::layout::{Layout, write_atomically};
use serde::{Deserialize, Serialize};

/// A voter's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voter {
    /// Its number in the group.
    pub id: u64,
    /// Its port, chosen before it is started: the others have to know it.
    pub port: u16,
    /// It is added to a group that there is; the others found it.
    #[serde(default)]
    pub join: bool,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voters {
    /// The next number: none is used twice, since what its directory had promised may be lost.
    pub next: u64,
    /// By number.
    pub voters: Vec<Voter>,
}

/// The process of a voter; also the name of its directory.
pub fn process_name(id: u64) -> String {
    if id == 1 { "meta".to_owned() } else { format!("meta-{id}") }
}

impl Voters {
    /// Founders with these ports.
    pub fn found(ports: &[u16]) -> Self {
        let voters: Vec<Voter> =
            (1..).zip(ports).map(|(id, port)| Voter { id, port: *port, join: false }).collect();
        Self { next: voters.len() as u64 + 1, voters }
    }

    /// What the file says; `None`: there is no file.
    pub fn load(layout: &Layout) -> Result<Option<Self>, Error> {
        let path = layout.voters();
        match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json)
                .map(Some)
                .map_err(|e| Error::BadConfig { path, reason: e.to_string() }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::file("read", path)(e)),
        }
    }

    /// Replaces the file.
    pub fn save(&self, layout: &Layout) -> Result<(), Error> {
        let json = serde_json::to_vec_pretty(self).unwrap_or_default();
        write_atomically(&layout.voters(), &json, 0o644)
    }

    /// Takes one more in, and says which. `used`: the highest number that the group knows.
    pub fn add(&mut self, port: u16, used: u64) -> Voter {
        let id = self.next.max(used + 1);
        self.next = id + 1;
        let voter = Voter { id, port, join: true };
        self.voters.push(voter.clone());
        voter
    }

    /// Their directories are empty again: the next start founds a group.
    pub fn refound(&mut self) {
        for voter in &mut self.voters {
            voter.join = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_never_used_twice() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layout = Layout::new(dir.path());
        assert_eq!(Voters::load(&layout).expect("no file"), None);
        let mut voters = Voters::found(&[7001, 7002, 7003]);
        let fourth = voters.add(7004, 3);
        assert_eq!((fourth.id, fourth.join), (4, true));
        voters.voters.retain(|v| v.id != 4);
        voters.save(&layout).expect("saved");
        let mut voters = Voters::load(&layout).expect("read").expect("there");
        assert_eq!(voters.add(7004, 3).id, 5);
        assert_eq!(voters.add(7005, 9).id, 10, "others may have added some");
    }
}
