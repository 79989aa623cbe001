//! Seals (PROTOCOL §3): every primary of a run below the allocation limit ends the generation,
//! whether it holds data of it or not.
//!
//! The map is read after `FlushBegin` was applied: no grant of the sealed generation is younger than
//! that, so whoever holds data of it is a primary in this map or an older one, and a group changes
//! hands only without dirt.

use super::cores::{self, CoreError};
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::control::{BATCH_MAX, Control, ControlReply, SealItem};
use ebb_dataplane_protocol::{ByteRange, Generation, InodeId, ShardRef};
use ebb_metaplane_protocol::FsResult;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// What the primaries of one inode said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sealed {
    /// Dirty ranges of the sealed generation and those before.
    pub(crate) extents: Vec<ByteRange>,
    /// Highest byte written.
    pub(crate) high_water: u64,
}

/// An inode to be sealed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ToSeal {
    pub(crate) inode: InodeId,
    pub(crate) generation: Generation,
    pub(crate) alloc_limit: u64,
}

impl Service {
    /// Seals inodes; those of which a primary did not answer in time are errors.
    pub(crate) async fn seal(
        &self,
        items: &[ToSeal],
    ) -> FsResult<HashMap<InodeId, Result<Sealed, String>>> {
        let map = self.voter.peek(|_, r| r.map()).map_err(fs_error)??;
        let mut by_core: BTreeMap<ShardRef, Vec<SealItem>> = BTreeMap::new();
        let mut found: HashMap<InodeId, Result<Sealed, String>> = HashMap::new();
        for item in items {
            found.insert(item.inode, Ok(Sealed::default()));
            for core in cores::primaries(&map, item.inode, item.alloc_limit) {
                let seal = SealItem {
                    inode: item.inode,
                    generation: item.generation,
                    alloc_limit: item.alloc_limit,
                };
                by_core.entry(core).or_default().push(seal);
            }
        }
        let timeout = Duration::from_millis(self.config.timings.seal_timeout_ms);
        let map = &map;
        let calls = by_core.into_iter().flat_map(|(core, items)| {
            items
                .chunks(BATCH_MAX)
                .map(<[SealItem]>::to_vec)
                .map(|batch| async move {
                    let request = Control::Seal(map.version, batch.clone());
                    let reply = self.cores.call(map, core, &request, timeout).await;
                    let sealed = reply.and_then(|reply| match reply {
                        ControlReply::Sealed(items) => Ok(items),
                        other => Err(cores::unexpected(core, &other)),
                    });
                    (batch, sealed)
                })
                .collect::<Vec<_>>()
        });
        for (asked, answer) in futures::future::join_all(calls).await {
            match answer {
                Ok(items) => {
                    let items: HashMap<InodeId, _> =
                        items.into_iter().map(|i| (i.inode, i)).collect();
                    for seal in asked {
                        let entry =
                            found.entry(seal.inode).or_insert_with(|| Ok(Sealed::default()));
                        match (items.get(&seal.inode), entry) {
                            (Some(i), Ok(sealed)) if i.generation == seal.generation => {
                                sealed.extents.extend_from_slice(&i.extents);
                                sealed.high_water = sealed.high_water.max(i.high_water);
                            }
                            (_, entry @ Ok(_)) => {
                                *entry = Err("a core left the inode out of its answer".into());
                            }
                            (_, Err(_)) => {}
                        }
                    }
                }
                Err(e) => fail(&mut found, &asked, &e),
            }
        }
        Ok(found)
    }
}

fn fail(found: &mut HashMap<InodeId, Result<Sealed, String>>, asked: &[SealItem], e: &CoreError) {
    for seal in asked {
        found.insert(seal.inode, Err(format!("sealing failed: {e}")));
    }
}
