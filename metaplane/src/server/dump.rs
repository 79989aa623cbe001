//! `ebb meta dump`: the namespace of one moment, a page a call, while everybody else goes on.
//!
//! The caller carries where it is; the leader keeps the moment, one at a time, until it is not asked for it any
//! more.

use crate::raft::kv::Moment;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{InodeId, codec};
use ebb_metaplane_protocol::dump::{DumpPage, RECORDS_MAX};
use ebb_metaplane_protocol::{FsError, FsResult};
use ebb_namespace::{Reader, Walk};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A moment that nobody asked for so long is let go.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);

/// The moment that is dumped.
#[derive(Default)]
pub(crate) struct Dumps(Arc<Mutex<Desk>>);

#[derive(Default)]
struct Desk {
    number: u64,
    held: Option<(Arc<Moment>, Instant)>,
}

fn open(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Service {
    /// A page: the first of a new moment, or the next of a held one.
    pub(super) async fn dump(&self, from: Option<(u64, Vec<u8>)>) -> FsResult<DumpPage> {
        let (number, walk) = match from {
            None => (self.begin_dump().await?, None),
            Some((number, at)) => {
                let walk: Walk = codec::decode(&at)
                    .map_err(|_| FsError::Invalid("not a place in a dump".into()))?;
                (number, Some(walk))
            }
        };
        let moment = {
            let mut desk = open(&self.dumps.0);
            let current = desk.number == number;
            let held = desk.held.as_mut().filter(|_| current).map(|(moment, asked)| {
                *asked = Instant::now();
                Arc::clone(moment)
            });
            held.ok_or_else(|| {
                FsError::Invalid("that dump ended, with its leader or unasked: dump again".into())
            })?
        };
        let cluster = self.cluster.to_string();
        let page = tokio::task::spawn_blocking(move || page(&moment, number, walk, cluster)).await;
        let page = page.map_err(|e| FsError::Io(e.to_string()))??;
        if page.next.is_none() {
            let mut desk = open(&self.dumps.0);
            if desk.number == number {
                desk.held = None;
            }
        }
        Ok(page)
    }

    async fn begin_dump(&self) -> FsResult<u64> {
        // What was answered before this call is in it.
        self.voter.read(|_, _| ()).await.map_err(fs_error)?;
        let moment = self.voter.moment().await.map_err(fs_error)?;
        let number = {
            let mut desk = open(&self.dumps.0);
            if desk.held.as_ref().is_some_and(|(_, asked)| asked.elapsed() < FORGOTTEN_AFTER) {
                let why = "another dump is under way".into();
                return Err(FsError::Again { retry_after_ms: 1_000, why });
            }
            desk.number += 1;
            desk.held = Some((Arc::new(moment), Instant::now()));
            desk.number
        };
        tokio::spawn(forget(Arc::downgrade(&self.dumps.0), number));
        Ok(number)
    }
}

/// Lets a moment go that nobody asks for: as long as it is held the state's file only grows.
async fn forget(desk: std::sync::Weak<Mutex<Desk>>, number: u64) {
    loop {
        tokio::time::sleep(FORGOTTEN_AFTER / 3).await;
        let Some(desk) = desk.upgrade() else { return };
        let mut desk = open(&desk);
        let asked = desk.held.as_ref().map(|(_, asked)| asked.elapsed());
        match asked {
            Some(age) if desk.number == number && age < FORGOTTEN_AFTER => {}
            Some(_) if desk.number == number => desk.held = None,
            _ => return,
        }
    }
}

/// Blocks on disk.
fn page(moment: &Moment, dump: u64, walk: Option<Walk>, cluster: String) -> FsResult<DumpPage> {
    let view = moment.view();
    let r = Reader(&view);
    let first = walk.is_none();
    let mut walk = walk.unwrap_or_else(|| Walk::below(InodeId::ROOT));
    let mut records = Vec::new();
    if first {
        records.push(r.dump_root()?);
    }
    records.extend(r.dump_page(&mut walk, RECORDS_MAX - records.len())?);
    let (taken, inodes) = (r.clock()?, r.counts()?.inodes);
    view.check().map_err(|e| FsError::Io(e.to_string()))?;
    let next = (!walk.is_done()).then(|| codec::encode(&walk).to_vec());
    Ok(DumpPage { dump, cluster, taken, inodes, records, next })
}
