//! The cluster map as last seen, fetched again when a node or a grant says it is old.

use crate::Result;
use crate::cluster::{left, turn, unexpected};
use crate::error::ClientError;
use ebb_dataplane_protocol::{ClusterMap, MapVersion};
use ebb_metaplane_protocol::{Query, QueryReply, Request, Response};
use ebb_rpc::MetaClient;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::time::Instant;

/// The newest map seen.
#[derive(Default)]
pub(crate) struct MapCache {
    map: RwLock<Arc<ClusterMap>>,
    fetching: tokio::sync::Mutex<()>,
}

impl MapCache {
    pub(crate) fn get(&self) -> Arc<ClusterMap> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks for a map newer than `have`; one asker at a time, the others use its answer. `wake`
    /// says that a group without a holder is needed now (scale zero).
    pub(crate) async fn refresh(
        &self,
        meta: &MetaClient,
        have: MapVersion,
        wake: bool,
        deadline: Instant,
    ) -> Result<Arc<ClusterMap>> {
        let _one = turn(&self.fetching, deadline).await?;
        let current = self.get();
        if current.version > have {
            return Ok(current);
        }
        let query = Query::Map { have: current.version, wake };
        match meta
            .call(
                &Request::Query { session: ebb_dataplane_protocol::SessionId(0), query },
                left(deadline),
            )
            .await?
        {
            Response::Query(reply) => match reply? {
                QueryReply::Map(None) => Ok(current),
                QueryReply::Map(Some(new)) => {
                    let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
                    if new.version >= map.version {
                        *map = Arc::new(new);
                    }
                    Ok(Arc::clone(&map))
                }
                _ => Err(ClientError::Metadata("no map in the answer".into())),
            },
            other => Err(unexpected(&other)),
        }
    }
}
