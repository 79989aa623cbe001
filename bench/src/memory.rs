//! `ebb bench memory`: resident memory of each server and mount of this machine, from /proc.
//!
//! Judged is the peak (`VmHWM`), with reserved huge pages, which `VmHWM` leaves out. The caller
//! knows which processes there are and what arena they were given.

use crate::report::{Bar, Limit, columns};
use serde::Serialize;

/// A process to look at.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its id.
    pub pid: i32,
    /// What it is.
    pub kind: Kind,
}

/// What a process is, and so what it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A data node with this arena, over all cores: arena + 256 MiB.
    Data {
        /// Bytes.
        arena_bytes: u64,
    },
    /// A mount: 512 MiB.
    Mount,
    /// Anything else: no promise.
    Other,
}

/// One process.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Its id.
    pub pid: i32,
    /// Resident now.
    pub resident_bytes: u64,
    /// Resident at most, ever.
    pub peak_bytes: u64,
    /// Reserved huge pages, not in the two above.
    pub huge_bytes: u64,
    /// The configured arena of a data node.
    pub arena_bytes: Option<u64>,
    /// The peak against what it may take, in bytes.
    pub bar: Option<Bar>,
}

const MIB: u64 = 1 << 20;
const DATA_BESIDE_ARENA: u64 = 256 * MIB;
const MOUNT: u64 = 512 * MIB;

/// Reads the processes; one that ended meanwhile is left out.
pub fn run(subjects: &[Subject]) -> Vec<Row> {
    subjects.iter().filter_map(row).collect()
}

fn row(subject: &Subject) -> Option<Row> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", subject.pid)).ok()?;
    let resident_bytes = field(&status, "VmRSS")?;
    let peak_bytes = field(&status, "VmHWM")?.max(resident_bytes);
    let huge_bytes = field(&status, "HugetlbPages").unwrap_or(0);
    let (limit, arena_bytes) = match subject.kind {
        Kind::Data { arena_bytes } => (Some(arena_bytes + DATA_BESIDE_ARENA), Some(arena_bytes)),
        Kind::Mount => (Some(MOUNT), None),
        Kind::Other => (None, None),
    };
    let bar = limit.map(|l| Limit::at_most(l as f64).judge((peak_bytes + huge_bytes) as f64));
    let (name, pid) = (subject.name.clone(), subject.pid);
    Some(Row { name, pid, resident_bytes, peak_bytes, huge_bytes, arena_bytes, bar })
}

/// A field of /proc/PID/status in bytes.
pub(crate) fn field(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = rest.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// This process's resident memory.
pub(crate) fn own_resident_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status").ok().and_then(|s| field(&s, "VmRSS")).unwrap_or(0)
}

/// What a node with a full cache would take: the most that a running node took beside its arena, and
/// the index of a full cache on top. A sum of two measurements: the node's own index is in the first.
#[derive(Clone, Debug, Serialize)]
pub struct WithIndex {
    /// How the cached data lies.
    pub shape: crate::index::Shape,
    /// Peak of a data node beside its arena.
    pub node_bytes: u64,
    /// Index of the full cache.
    pub index_bytes: u64,
    /// The sum against 256 MiB.
    pub bar: Bar,
}

impl std::fmt::Display for WithIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        write!(
            f,
            "a node with its cache full of {}: arena + {:.0} MiB ({:.0} as it runs here, {:.0} of index); ≤ 256 MiB: {}",
            self.shape,
            mib(self.node_bytes + self.index_bytes),
            mib(self.node_bytes),
            mib(self.index_bytes),
            if self.bar.met { "met" } else { "MISSED" }
        )
    }
}

/// Adds each index to the node that took the most.
pub fn with_index(processes: &[Row], index: &[crate::index::Row]) -> Vec<WithIndex> {
    let beside = |r: &Row| Some((r.peak_bytes + r.huge_bytes).saturating_sub(r.arena_bytes?));
    let Some(node_bytes) = processes.iter().filter_map(beside).max() else { return Vec::new() };
    index
        .iter()
        .map(|r| {
            let sum = node_bytes + r.resident_bytes;
            let bar = Limit::at_most(DATA_BESIDE_ARENA as f64).judge(sum as f64);
            WithIndex { shape: r.shape, node_bytes, index_bytes: r.resident_bytes, bar }
        })
        .collect()
}

/// The rows for people.
pub fn table(rows: &[Row]) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / MIB as f64);
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                format!("{} (pid {})", r.name, r.pid),
                mib(r.resident_bytes),
                mib(r.peak_bytes),
                mib(r.huge_bytes),
                r.arena_bytes.map_or("-".into(), mib),
                r.bar.as_ref().map_or(String::new(), |b| {
                    let verdict = if b.met { "met" } else { "MISSED" };
                    format!("peak ≤ {:.0} MiB: {verdict}", b.limit / MIB as f64)
                }),
            ]
        })
        .collect();
    columns(&["process", "RSS MiB", "peak MiB", "huge MiB", "arena MiB", "bar"], &cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_living_process_is_read_and_a_dead_one_left_out() {
        let me = Subject {
            name: "me".into(),
            pid: std::process::id() as i32,
            kind: Kind::Data { arena_bytes: 1 << 30 },
        };
        let nobody = Subject { name: "nobody".into(), pid: i32::MAX, kind: Kind::Mount };
        let rows = run(&[me, nobody]);
        assert_eq!(rows.len(), 1);
        assert!(rows[0].resident_bytes > 0 && rows[0].peak_bytes >= rows[0].resident_bytes);
        assert!(rows[0].bar.as_ref().is_some_and(|b| b.met));
    }
}
