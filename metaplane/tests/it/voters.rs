//! Three voters: what one acknowledged the others know, when it is gone they go on, and one that was
//! away catches up, by log or by snapshot.

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane::MetaConfig;
use ebb_metaplane_protocol::*;
use std::collections::BTreeMap;
use std::net::TcpListener;

const ROOT: InodeId = InodeId::ROOT;

fn configs(world: &World) -> Vec<MetaConfig> {
    let listeners: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    let members: BTreeMap<String, String> = listeners
        .iter()
        .enumerate()
        .map(|(i, l)| ((i + 1).to_string(), l.local_addr().expect("an address").to_string()))
        .collect();
    (0..3)
        .map(|i| {
            let mut config = world.config(7, &format!("meta{i}"));
            config.node_id = i + 1;
            config.listen = members[&(i + 1).to_string()].clone();
            config.members = members.clone();
            config.snapshot_entries = 300;
            config
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_majority_goes_on_and_who_was_away_catches_up() {
    let world = World::new().await;
    let configs = configs(&world);
    let mut running: Vec<Option<Meta>> =
        futures::future::join_all(configs.iter().map(|c| world.start_with(c.clone())))
            .await
            .into_iter()
            .map(Some)
            .collect();
    let addresses: Vec<String> = configs.iter().map(|c| c.listen.clone()).collect();
    let c = Client::open(client_of(addresses), 5).await;
    let mut made = Vec::new();
    // Each in turn is away while the others make so much that its log is compacted away.
    for away in 0..3 {
        running[away].take().expect("running").stop().await;
        for i in 0..450 {
            let name = format!("{away}-{i:03}");
            c.mkdir(ROOT, &name).await.expect("made by the majority");
            made.push(name);
        }
        c.touch(ROOT, &format!("{away}-file")).await;
        made.push(format!("{away}-file"));
        running[away] = Some(world.start_with(configs[away].clone()).await);
    }
    made.sort_unstable();
    assert_eq!(c.names(ROOT, 1000).await, made);
    c.settle().await;
    assert_eq!(world.keys().await.len(), made.len());
    // Two of three gone: nothing is acknowledged any more.
    for voter in &mut running[..2] {
        voter.take().expect("running").stop().await;
    }
    let op = Op::Mkdir { parent: ROOT, name: b"lonely".to_vec(), mode: 0, uid: 0, gid: 0 };
    let request = c.request(op);
    let answer = c.meta.call(&request, std::time::Duration::from_secs(3)).await;
    assert!(answer.is_err(), "{answer:?}");
    running[0] = Some(world.start_with(configs[0].clone()).await);
    // The same request, with a majority again.
    let answer = c.meta.call(&request, PATIENCE).await;
    assert!(matches!(answer, Ok(Response::Op(Ok(OpReply::Made(_))))), "{answer:?}");
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}
