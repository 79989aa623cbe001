//! How many writes shared one batch of a core's journal (group commit), as the core itself counts.
//!
//! A batch is everything a core's journal took since its last one: data that does not ride in the
//! journal is synced once, then one journal write with RWF_DSYNC makes all of the batch durable, then
//! its writes are answered (I1). One is in flight at a time, and meanwhile the next collects. So what
//! is divided here is the requests of a turn by the batches of the same turn: both counters are asked
//! for while nothing of the turn is in flight.

use crate::BenchError;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::{ClusterMap, ShardRef};
use ebb_rpc::{Connection, Identity};
use serde::Serialize;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// Counters of journals, summed over cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) batches: u64,
    pub(crate) mutations: u64,
    /// Reads answered from memory.
    pub(crate) dram_hits: u64,
}

impl Counted {
    /// What came since `before`; `None`: the counters began anew, with their process.
    pub(crate) fn since(self, before: Self) -> Option<Self> {
        Some(Self {
            batches: self.batches.checked_sub(before.batches)?,
            mutations: self.mutations.checked_sub(before.mutations)?,
            dram_hits: self.dram_hits.checked_sub(before.dram_hits)?,
        })
    }
}

/// What shared the journal's batches in one turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Group {
    /// Batches that became durable.
    pub batches: u64,
    /// Mutations in them: the writes, and what else the core journaled meanwhile.
    pub mutations: u64,
    /// Requests that were answered.
    pub requests: u64,
}

impl Group {
    /// Requests per batch; 0 without a batch.
    pub fn requests_per_batch(&self) -> f64 {
        per(self.requests, self.batches)
    }
    /// Mutations per batch; 0 without a batch.
    pub fn mutations_per_batch(&self) -> f64 {
        per(self.mutations, self.batches)
    }
    /// Requests per batch as `fio` can have it: the nearest whole number, at least 1.
    pub fn whole(&self) -> u32 {
        (self.requests_per_batch().round() as u32).max(1)
    }
}

fn per(what: u64, batches: u64) -> f64 {
    if batches == 0 { 0.0 } else { what as f64 / batches as f64 }
}

/// Connections to the cores whose counters are asked for.
pub(crate) struct Journals {
    cores: Vec<Connection>,
}

impl Journals {
    /// Of these cores. The counters are for operators: no session is needed.
    pub(crate) async fn of(
        map: &ClusterMap,
        cores: &[ShardRef],
        key: &ClusterKey,
    ) -> Result<Self, BenchError> {
        let identity = Identity::new(key.clone(), Role::Controller);
        let mut connections = Vec::new();
        for core in cores {
            let (host, port) = map.address(*core).ok_or_else(|| {
                BenchError::Journal(format!("node {} is not in the map", core.node))
            })?;
            let address = format!("{host}:{port}");
            let connection = Connection::connect(&address, &identity, PATIENCE).await;
            connections.push(connection.map_err(|e| BenchError::Journal(e.to_string()))?);
        }
        Ok(Self { cores: connections })
    }

    /// What they count so far.
    pub(crate) async fn count(&self) -> Result<Counted, BenchError> {
        let mut sum = Counted::default();
        for core in &self.cores {
            let reply = core.control(&Control::Stats, PATIENCE).await;
            match reply.map_err(|e| BenchError::Journal(e.to_string()))? {
                ControlReply::Stats(stats) => {
                    sum.batches += stats.journal_batches;
                    sum.mutations += stats.journal_records;
                    sum.dram_hits += stats.dram_hits;
                }
                other => return Err(BenchError::Journal(format!("it answered {other:?}"))),
            }
        }
        Ok(sum)
    }

    /// What came since `before`, beside the requests that caused it; and how many were answered from memory.
    pub(crate) async fn since(
        &self,
        before: Counted,
        requests: u64,
    ) -> Result<(Group, u64), BenchError> {
        let now = self.count().await?;
        let Counted { batches, mutations, dram_hits } = now.since(before).ok_or_else(|| {
            BenchError::Journal("a data node was restarted during the measurement".into())
        })?;
        Ok((Group { batches, mutations, requests }, dram_hits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_what_shared_a_batch_and_no_batch_is_no_group() {
        let before = Counted { batches: 100, mutations: 1_000, dram_hits: 1 };
        let after = Counted { batches: 300, mutations: 2_040, dram_hits: 3 };
        let Counted { batches, mutations, .. } = after.since(before).expect("the same process");
        let group = Group { batches, mutations, requests: 1_000 };
        assert_eq!((group.requests_per_batch(), group.mutations_per_batch()), (5.0, 5.2));
        assert_eq!(before.since(after), None, "a restarted node counts from zero");
        assert_eq!(Group::default().requests_per_batch(), 0.0);
    }

    #[test]
    fn fio_gets_the_nearest_whole_group_and_never_none() {
        let whole = |requests, batches| Group { batches, mutations: requests, requests }.whole();
        assert_eq!([whole(149, 100), whole(151, 100), whole(1, 100)], [1, 2, 1]);
        assert_eq!(whole(0, 0), 1);
    }
}
