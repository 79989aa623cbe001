//! Who is a member of a placement group, and who may become one (PROTOCOL R43–R45, R47, R48).

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::NodeCall;
use ebb_metaplane_protocol::command::{Command, CommandReply};

const PG: PgId = PgId(3);

fn register(w: &mut World, store: u128, boot: u128) -> ShardRef {
    let call = NodeCall::Register {
        store,
        host: "h".into(),
        ports: vec![10],
        capacity_bytes: 1 << 30,
        boot,
    };
    match w.apply(Command::RegisterNode(call)) {
        CommandReply::Node(Ok(node)) => ShardRef { node, core: CoreId(0) },
        other => panic!("{other:?}"),
    }
}

fn entry(w: &World) -> PgEntry {
    w.read().map().expect("readable").pgs[usize::from(PG.0)].clone()
}

fn version(w: &World) -> MapVersion {
    w.read().map().expect("readable").version
}

/// Refused, and nothing changed.
fn refused(w: &mut World, c: Command) {
    let before = w.read().map().expect("readable");
    assert!(matches!(w.apply(c.clone()), CommandReply::Refused(_)), "{c:?}");
    assert_eq!(w.read().map().expect("readable"), before);
}

fn add(from: u64, member: ShardRef) -> Command {
    Command::AddMember { pg: PG, from: PgEpoch(from), member }
}
fn in_sync(from: u64, member: ShardRef) -> Command {
    Command::MemberInSync { pg: PG, from: PgEpoch(from), member }
}
fn drop_it(from: u64, member: ShardRef, planned: bool) -> Command {
    Command::DropMember { pg: PG, from: PgEpoch(from), member, planned }
}
fn take_over(from: u64, to: ShardRef, keep_old: bool) -> Command {
    Command::TakeOver { pg: PG, from: PgEpoch(from), to, keep_old }
}

/// Three nodes; the first holds the group, in epoch 1.
fn world() -> (World, [ShardRef; 3]) {
    let mut w = World::new();
    let nodes = [1, 2, 3].map(|store| register(&mut w, store, 1));
    w.done(Command::SetPg { pg: PG, from: PgEpoch(0), members: vec![nodes[0]] });
    (w, nodes)
}

/// `world` with the second in-sync, in epoch 3.
fn pair() -> (World, [ShardRef; 3]) {
    let (mut w, n) = world();
    w.done(add(1, n[1]));
    w.done(in_sync(2, n[1]));
    (w, n)
}

#[test]
fn members_change_by_commands_that_name_the_epoch_they_were_made_for() {
    let (mut w, [a, b, c]) = world();
    let since = entry(&w).since_map_version;
    w.done(add(1, b));
    let e = entry(&w);
    assert_eq!((e.epoch, &e.members[..], &e.syncing[..]), (PgEpoch(2), &[a][..], &[b][..]));
    // It was decided about other members.
    refused(&mut w, in_sync(1, b));
    refused(&mut w, drop_it(1, b, false));
    refused(&mut w, take_over(1, b, false));
    refused(&mut w, add(1, c));
    w.done(in_sync(2, b));
    let e = entry(&w);
    assert_eq!((e.epoch, &e.members[..], &e.syncing[..]), (PgEpoch(3), &[a, b][..], &[][..]));
    assert_eq!((e.since_map_version, e.windows_since), (since, PgEpoch(0)), "the lead goes on");
    // Who was dropped and came back is syncing: what was asked for it before is void.
    w.done(drop_it(3, b, false));
    w.done(add(4, b));
    refused(&mut w, in_sync(3, b));
    assert_eq!(entry(&w).syncing, [b]);
    // An epoch is a map.
    let before = version(&w);
    w.done(in_sync(5, b));
    assert!(version(&w) > before);
}

#[test]
fn a_node_has_at_most_one_member_of_a_group() {
    let (mut w, [a, b, _]) = pair();
    for bad in
        [a, b, ShardRef { node: NodeId(99), core: CoreId(0) }, ShardRef { core: CoreId(7), ..b }]
    {
        refused(&mut w, add(3, bad));
    }
    refused(&mut w, Command::AddMember { pg: PgId(4), from: PgEpoch(0), member: a });
}

#[test]
fn an_in_sync_member_takes_over_and_a_syncing_one_never() {
    let (mut w, [a, b, c]) = pair();
    w.done(add(3, c));
    refused(&mut w, take_over(4, c, false));
    refused(&mut w, take_over(4, a, false));
    w.done(take_over(4, b, false));
    let e = entry(&w);
    assert_eq!((e.epoch, &e.members[..], &e.syncing[..]), (PgEpoch(5), &[b][..], &[c][..]));
    // A new lead: grants from before it are refused there (R26). Its windows it has (R27).
    assert_eq!((e.since_map_version, e.windows_since), (version(&w), PgEpoch(0)));
    // Asked for in the old lead.
    refused(&mut w, in_sync(4, c));
    // After a journaled freeze the old primary stays.
    w.done(in_sync(5, c));
    w.done(Command::PgMoving(PG, true));
    w.done(take_over(6, c, true));
    let e = entry(&w);
    assert_eq!((&e.members[..], e.moving), (&[c, b][..], false));
    assert_eq!(e.since_map_version, version(&w));
}

#[test]
fn the_last_in_sync_member_is_never_dropped() {
    let (mut w, [a, b, _]) = pair();
    refused(&mut w, drop_it(3, a, false));
    w.done(drop_it(3, b, false));
    refused(&mut w, drop_it(4, a, false));
    w.done(add(4, b));
    refused(&mut w, drop_it(5, a, false));
    // Neither by its node's end: it holds a group (I8).
    refused(&mut w, Command::SetNodeState(b.node, NodeState::Gone));
    w.done(drop_it(5, b, true));
    w.done(Command::SetNodeState(b.node, NodeState::Gone));
    refused(&mut w, Command::SetNodeState(a.node, NodeState::Gone));
}

#[test]
fn a_member_leaves_by_plan_only_if_enough_in_sync_ones_remain() {
    let (mut w, [a, b, c]) = pair();
    assert_eq!(w.read().replication().expect("readable"), (1, 1));
    refused(&mut w, Command::SetReplication { replicas: 2, min_in_sync: 3 });
    let before = version(&w);
    w.done(Command::SetReplication { replicas: 2, min_in_sync: 2 });
    assert_eq!(w.read().replication().expect("readable"), (2, 2));
    assert!(version(&w) > before && entry(&w).min_in_sync == 2, "nodes hear of it");
    refused(&mut w, drop_it(3, b, true));
    w.done(add(3, c));
    refused(&mut w, drop_it(4, b, true));
    w.done(in_sync(4, c));
    w.done(drop_it(5, b, true));
    // What can't be reached is another matter: the group takes no writes until it has a second one again.
    w.done(drop_it(6, c, false));
    assert_eq!(entry(&w).members, [a]);
    let before = version(&w);
    w.done(Command::SetReplication { replicas: 3, min_in_sync: 2 });
    assert_eq!(version(&w), before, "nodes have nothing to hear");
}

#[test]
fn the_restart_of_a_primary_that_is_not_alone_is_a_new_epoch_and_a_new_lead() {
    let (mut w, [a, b, c]) = world();
    assert_eq!(register(&mut w, 1, 2), a);
    assert_eq!(entry(&w).epoch, PgEpoch(1), "alone: nothing to forget");
    w.done(add(1, b));
    let lead = entry(&w).since_map_version;
    assert_eq!(register(&mut w, 1, 2), a);
    assert_eq!(entry(&w).epoch, PgEpoch(2), "the same process says it again");
    for (store, member) in [(2, b), (3, c)] {
        assert_eq!(register(&mut w, store, 2), member);
        assert_eq!(entry(&w).epoch, PgEpoch(2), "not the primary");
    }
    assert_eq!(register(&mut w, 1, 3), a);
    let e = entry(&w);
    assert_eq!((e.epoch, e.since_map_version), (PgEpoch(3), version(&w)));
    assert!(e.since_map_version > lead);
    assert_eq!((&e.members[..], &e.syncing[..]), (&[a][..], &[b][..]));
    // What its old process asked for would make somebody in-sync whose acks it doesn't wait for.
    refused(&mut w, in_sync(2, b));
}

#[test]
fn a_holder_from_elsewhere_starts_without_other_members() {
    let (mut w, [_, b, c]) = pair();
    w.done(add(3, c));
    w.done(Command::SetPg { pg: PG, from: PgEpoch(4), members: vec![] });
    assert!(entry(&w).members.is_empty() && entry(&w).syncing.is_empty());
    w.done(Command::SetPg { pg: PG, from: PgEpoch(5), members: vec![b] });
    assert_eq!((entry(&w).members, entry(&w).syncing), (vec![b], vec![]));
}

#[test]
fn an_abandoned_node_takes_nothing_along_that_others_have() {
    let (mut w, [a, b, c]) = pair();
    w.done(Command::SetPg { pg: PgId(4), from: PgEpoch(0), members: vec![a] });
    w.done(Command::SetPg { pg: PgId(5), from: PgEpoch(0), members: vec![c] });
    w.done(Command::AddMember { pg: PgId(5), from: PgEpoch(1), member: a });
    let s = w.session();
    let group = |inode| PgId::of(inode, RunIndex(0), 64);
    let files: Vec<InodeId> =
        (0..256).map(|i| w.put_file(s, InodeId::ROOT, &format!("f{i}"), b"dirty")).collect();
    let of = |pg| files.iter().copied().filter(|f| group(*f) == pg).collect::<Vec<_>>();
    let (shared, alone, others) = (of(PG), of(PgId(4)), of(PgId(5)));
    assert!(!shared.is_empty() && !alone.is_empty() && !others.is_empty());
    let cut_off = w.read().sequence().expect("readable");
    let inodes = [shared.clone(), alone.clone(), others.clone()].concat();
    refused(&mut w, Command::RemoveNode { node: a.node, cut_off });
    w.done(Command::AbandonInodes { node: a.node, cut_off, inodes });
    for f in shared.iter().chain(&others) {
        assert!(w.read().attr(*f).is_ok(), "{f} was given up and another member has it");
    }
    assert!(alone.iter().all(|f| w.read().attr(*f).is_err()));
    w.done(Command::RemoveNode { node: a.node, cut_off });
    let map = w.read().map().expect("readable");
    let e = &map.pgs[usize::from(PG.0)];
    assert_eq!((&e.members[..], e.epoch), (&[b][..], PgEpoch(4)));
    assert_eq!((e.since_map_version, e.windows_since), (map.version, PgEpoch(0)), "a take-over");
    assert!(map.pgs[4].members.is_empty());
    assert_eq!((&map.pgs[5].members[..], &map.pgs[5].syncing[..]), (&[c][..], &[][..]));
}
