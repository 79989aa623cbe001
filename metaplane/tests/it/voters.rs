//! Three voters: what one acknowledged the others know, when it is gone they go on, and one that was
//! away catches up, by log or by snapshot.

use crate::common::*;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{InodeId, Status};
use ebb_metaplane::{MetaConfig, MetaError};
use ebb_metaplane_protocol::admin::{VoterRole, VoterStatus};
use ebb_metaplane_protocol::*;
use ebb_rpc::{Connection, Identity, RpcError};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::{Duration, Instant};

const ROOT: InodeId = InodeId::ROOT;

fn free_addresses<const N: usize>() -> [String; N] {
    // All at once, so that they differ.
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    listeners.map(|l| l.local_addr().expect("an address").to_string())
}

pub(crate) fn configs(world: &World) -> Vec<MetaConfig> {
    let addresses: [String; 3] = free_addresses();
    let members: BTreeMap<String, String> =
        (1..).map(|id: u64| id.to_string()).zip(addresses.iter().cloned()).collect();
    (0..3)
        .map(|i| {
            let mut config = world.config(7, &format!("meta{i}"));
            config.node_id = i as u64 + 1;
            config.listen = addresses[i].clone();
            config.members = members.clone();
            config.snapshot_entries = 300;
            config
        })
        .collect()
}

pub(crate) async fn start_all(world: &World, configs: &[MetaConfig]) -> Vec<Option<Meta>> {
    let starting = configs.iter().map(|c| world.start_with(c.clone()));
    futures::future::join_all(starting).await.into_iter().map(Some).collect()
}

pub(crate) async fn client_of_all(configs: &[MetaConfig]) -> Client {
    Client::open(client_of(configs.iter().map(|c| c.listen.clone()).collect()), 5).await
}

async fn voters(c: &Client) -> Vec<VoterStatus> {
    match c.admin(AdminCall::Voters).await.expect("an answer") {
        AdminReply::Voters(voters) => voters,
        other => panic!("not the voters: {other:?}"),
    }
}

/// Index of the leader's configuration.
pub(crate) async fn leader(c: &Client) -> usize {
    let voters = voters(c).await;
    let leads = voters.iter().find(|v| v.role == VoterRole::Leader).expect("a leader");
    usize::try_from(leads.id).expect("small") - 1
}

/// Repeats what the metadata plane says `Again` to.
async fn admin(c: &Client, call: AdminCall) -> FsResult<AdminReply> {
    let end = Instant::now() + PATIENCE;
    loop {
        match c.admin(call.clone()).await {
            Err(FsError::Again { .. }) if Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            answer => return answer,
        }
    }
}

/// What a server says itself, without going on to another.
async fn ask(address: &str, request: &Request) -> Result<Response, RpcError> {
    let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
    let connection = Connection::connect(address, &identity, PATIENCE).await?;
    connection.meta(request, PATIENCE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_serves_nobody_and_names_the_leader() {
    let world = World::new().await;
    let configs = configs(&world);
    let running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    c.mkdir(ROOT, "d").await.expect("made");
    let leads = leader(&c).await;
    let everything = voters(&c).await;
    assert_eq!(everything.len(), 3);
    assert_eq!(everything.iter().filter(|v| v.role == VoterRole::Follower).count(), 2);
    let path = vec![b"d".to_vec()];
    let query = Request::Query { session: c.session, query: Query::Resolve { path } };
    for (i, config) in configs.iter().enumerate() {
        for request in [query.clone(), Request::Admin(AdminCall::Status)] {
            match ask(&config.listen, &request).await {
                Ok(_) => assert_eq!(i, leads),
                Err(RpcError::Status { status, message, .. }) => {
                    assert_ne!(i, leads);
                    assert_eq!((status, &message), (Status::NotLeader, &configs[leads].listen));
                }
                Err(e) => panic!("{e}"),
            }
        }
    }
    // One address is enough to find the leader, and all others.
    let follower = (0..3).find(|i| *i != leads).expect("one of the others");
    let knows_one = Client::open(client_of(vec![configs[follower].listen.clone()]), 6).await;
    knows_one.resolve("/d").await.expect("found");
    let mut running = running;
    running[follower].take().expect("runs").stop().await;
    running[leads].take().expect("runs").stop().await;
    running[follower] = None;
    running[leads] = Some(world.start_with(configs[leads].clone()).await);
    knows_one.resolve("/d").await.expect("the third was named by the first");
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over_and_no_call_fails() {
    let world = World::new().await;
    let configs = configs(&world);
    let mut running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let mut stalls = Vec::new();
    for round in 0..6 {
        let mut longest = Duration::ZERO;
        let leads = leader(&c).await;
        let stopping = running[leads].take().expect("runs").stop();
        let making = async {
            for i in 0..60 {
                let begun = Instant::now();
                c.mkdir(ROOT, &format!("{round}-{i}")).await.expect("made once");
                longest = longest.max(begun.elapsed());
            }
        };
        tokio::join!(stopping, making);
        stalls.push(longest);
        assert_ne!(leader(&c).await, leads, "another one leads");
        running[leads] = Some(world.start_with(configs[leads].clone()).await);
        // The new leader has the bucket.
        c.symlink(ROOT, &format!("link {round}"), "0-0").await.expect("made");
        c.settle().await;
    }
    assert_eq!(c.names(ROOT, 1000).await.len(), 6 * 61);
    assert_eq!(world.keys().await.len(), 6 * 61);
    eprintln!("the longest calls around each of the hand-overs took {stalls:?}");
    // Without one there is an election, which nobody begins earlier.
    let least = *stalls.iter().min().expect("some");
    assert!(least < Duration::from_millis(400), "{stalls:?}");
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_comes_back_to_a_process_finds_it_fit() {
    let world = World::new().await;
    let configs = configs(&world);
    let starting = configs.iter().enumerate().map(|(i, config)| {
        let file = world.dir.path().join(format!("{i}.toml"));
        async move { Process::start(config, &file).await }
    });
    let mut running: Vec<Process> = futures::future::join_all(starting).await;
    let c = client_of_all(&configs).await;
    let mut leaders = Vec::new();
    let mut made = 0;
    // Until one that led, and was paused, leads again.
    while leaders.iter().collect::<std::collections::BTreeSet<_>>().len() == leaders.len() {
        let leads = leader(&c).await;
        leaders.push(leads);
        for i in 0..20 {
            c.symlink(ROOT, &format!("{}-{i}", leaders.len()), "x").await.expect("made");
            made += 1;
        }
        // It can write to the bucket, whoever led before.
        c.settle().await;
        assert_eq!(world.keys().await.len(), made, "{leaders:?}");
        // A flush that is under way when its leader is gone is asked of the next.
        c.symlink(ROOT, &format!("late {}", leaders.len()), "x").await.expect("made");
        made += 1;
        running[leads].pause();
        c.symlink(ROOT, &format!("later {}", leaders.len()), "x").await.expect("made");
        made += 1;
        assert_ne!(leader(&c).await, leads);
        let report = c.flush().await;
        assert!(report.failed.is_empty() && report.remaining == 0, "{report:?}");
        running[leads].go_on();
        // What it still believes about itself harms nobody.
        let asked = Request::Query { session: c.session, query: Query::GetAttr(ROOT) };
        let answer = ask(&configs[leads].listen, &asked).await;
        assert!(
            matches!(answer, Err(RpcError::Status { status: Status::NotLeader, .. })),
            "{answer:?}"
        );
    }
    assert_eq!(c.names(ROOT, 1000).await.len(), made);
    for process in &mut running {
        process.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_nobody_hears_says_so_and_goes_on_when_it_is_heard() {
    let world = World::new().await;
    let configs = configs(&world);
    let starting = configs.iter().enumerate().map(|(i, config)| {
        let file = world.dir.path().join(format!("{i}.toml"));
        async move { Process::start(config, &file).await }
    });
    let mut running: Vec<Process> = futures::future::join_all(starting).await;
    let c = client_of_all(&configs).await;
    c.mkdir(ROOT, "before").await.expect("made");
    let leads = leader(&c).await;
    let others: Vec<usize> = (0..3).filter(|i| *i != leads).collect();
    others.iter().for_each(|i| running[*i].pause());
    let make = |name: &str| Op::Mkdir {
        parent: ROOT,
        name: name.as_bytes().to_vec(),
        mode: 0,
        uid: 0,
        gid: 0,
    };
    let begun = Instant::now();
    // Under way when it is noticed, and after that: neither waits for what may never come.
    // The one may yet be carried out, the other one was not even proposed.
    for (name, said) in [("under way", Status::Superseded), ("later", Status::NotLeader)] {
        let asked = c.request(make(name));
        let answer = ask(&configs[leads].listen, &asked).await;
        assert!(
            matches!(answer, Err(RpcError::Status { status, .. }) if status == said),
            "{name}: {answer:?}"
        );
    }
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    others.iter().for_each(|i| running[*i].go_on());
    // What was under way may have come true meanwhile: it is nobody's answer to a new request.
    c.mkdir(ROOT, "after").await.expect("made");
    let names = c.names(ROOT, 10).await;
    assert!(["before", "after"].iter().all(|n| names.iter().any(|m| m == n)), "{names:?}");
    c.symlink(ROOT, "link", "x").await.expect("made");
    c.settle().await;
    for process in &mut running {
        process.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_the_leader_fails_no_call_and_repeats_none() {
    let world = World::new().await;
    let configs = configs(&world);
    let file = |i: usize| world.dir.path().join(format!("{i}.toml"));
    let starting = configs.iter().enumerate().map(|(i, config)| {
        let file = file(i);
        async move { Process::start(config, &file).await }
    });
    let mut running: Vec<Process> = futures::future::join_all(starting).await;
    let c = client_of_all(&configs).await;
    let mut longest = Duration::ZERO;
    for round in 0..4 {
        let leads = leader(&c).await;
        for i in 0..80 {
            if i == 20 {
                running[leads].kill();
            }
            let begun = Instant::now();
            // A second try of one that was carried out would say that it exists.
            c.mkdir(ROOT, &format!("{round}-{i}")).await.expect("made once");
            longest = longest.max(begun.elapsed());
        }
        running[leads] = Process::start(&configs[leads], &file(leads)).await;
    }
    assert_eq!(c.names(ROOT, 1000).await.len(), 320);
    eprintln!("the longest of 320 calls took {longest:?}");
    for process in &mut running {
        process.kill();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_without_its_directory_is_refused_and_another_takes_its_place() {
    let world = World::new().await;
    let configs = configs(&world);
    let mut running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    for i in 0..400 {
        c.mkdir(ROOT, &format!("{i}")).await.expect("made");
    }
    // Whoever lost its directory, the founder too, and whatever of it is left.
    for (lost, part) in [(0, ""), (1, ""), (2, "log")] {
        running[lost].take().expect("runs").stop().await;
        let kept = world.dir.path().join("kept");
        let dir = configs[lost].dir.join(part);
        std::fs::rename(&dir, &kept).expect("moved away");
        let refused = world.refusal(configs[lost].clone()).await;
        assert!(matches!(refused, MetaError::LostDirectory { .. }), "{refused}");
        assert!(
            refused.to_string().contains(&format!("ebb meta replace {}", lost + 1)),
            "{refused}"
        );
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::rename(&kept, &dir).expect("moved back");
        running[lost] = Some(world.start_with(configs[lost].clone()).await);
    }
    // Another voter's directory is as little its own.
    running[2].take().expect("runs").stop().await;
    let other = MetaConfig { dir: configs[2].dir.clone(), ..configs[1].clone() };
    let other = MetaConfig { listen: "127.0.0.1:0".into(), ..other };
    let refused = world.refusal(other).await;
    assert!(matches!(refused, MetaError::OtherVoter { found: 3, wanted: 2, .. }), "{refused}");

    // The third is gone for good. What is left goes on, and takes a fourth in.
    std::fs::remove_dir_all(&configs[2].dir).expect("removed");
    let [address] = free_addresses();
    let fourth = MetaConfig {
        node_id: 4,
        dir: world.dir.path().join("meta3"),
        listen: address.clone(),
        join: true,
        ready_file: Some(world.dir.path().join("meta3.ready")),
        ..configs[1].clone()
    };
    running.push(Some(world.start_with(fourth.clone()).await));
    let wrong = AdminCall::AddVoter { id: 5, address: address.clone() };
    let refused = admin(&c, wrong).await;
    assert!(matches!(refused, Err(FsError::Invalid(_))), "{refused:?}");
    admin(&c, AdminCall::AddVoter { id: 4, address: address.clone() }).await.expect("added");
    admin(&c, AdminCall::AddVoter { id: 4, address }).await.expect("added already");
    admin(&c, AdminCall::RemoveVoter { id: 3 }).await.expect("removed");
    admin(&c, AdminCall::RemoveVoter { id: 3 }).await.expect("removed already");
    let ids: Vec<u64> = voters(&c).await.iter().map(|v| v.id).collect();
    assert_eq!(ids, [1, 2, 4]);
    // One of the old ones goes: the new one is needed for a majority, and has everything.
    running[0].take().expect("runs").stop().await;
    c.mkdir(ROOT, "after").await.expect("made");
    assert_eq!(c.names(ROOT, 1000).await.len(), 401);
    // Nobody else may go now.
    let refused = admin(&c, AdminCall::RemoveVoter { id: 2 }).await;
    assert!(matches!(refused, Err(FsError::Invalid(_))), "{refused:?}");
    // The new one's directory is as precious as any.
    running[3].take().expect("runs").stop().await;
    std::fs::remove_dir_all(&fourth.dir).expect("removed");
    let refused = world.refusal(fourth).await;
    assert!(matches!(refused, MetaError::LostDirectory { .. }), "{refused}");
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sole_voter_becomes_three_and_one_again() {
    let world = World::new().await;
    let first = world.start(7, "meta").await;
    let c = first.session().await;
    for i in 0..50 {
        c.mkdir(ROOT, &format!("{i}")).await.expect("made");
    }
    let mut others = Vec::new();
    for id in [2, 3] {
        let [address] = free_addresses();
        let mut config = world.config(7, &format!("meta{id}"));
        (config.node_id, config.listen, config.join) = (id, address.clone(), true);
        config.members =
            [("1".into(), first.address.clone()), (id.to_string(), address.clone())].into();
        others.push(world.start_with(config).await);
        admin(&c, AdminCall::AddVoter { id, address }).await.expect("added");
    }
    c.mkdir(ROOT, "three").await.expect("made");
    assert_eq!(voters(&c).await.len(), 3);
    // The leader is the one to go: it hands over first.
    admin(&c, AdminCall::RemoveVoter { id: 1 }).await.expect("removed");
    first.stop().await;
    c.mkdir(ROOT, "two").await.expect("made");
    let leads = leader(&c).await as u64 + 1;
    let other = 5 - leads;
    admin(&c, AdminCall::RemoveVoter { id: other }).await.expect("removed");
    others.remove(other as usize - 2).stop().await;
    c.mkdir(ROOT, "one").await.expect("made");
    assert_eq!(c.names(ROOT, 1000).await.len(), 53);
    c.settle().await;
    others.remove(0).stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_majority_goes_on_and_who_was_away_catches_up() {
    let world = World::new().await;
    let configs = configs(&world);
    let mut running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
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
