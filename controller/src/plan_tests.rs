//! The planner against a toy cluster that does what it is told, some of it late.

use super::*;
use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::{ClusterMap, MapVersion, PgEntry, PgEpoch};
use ebb_metaplane_protocol::admin::{GroupStates, NodeStatus};

const GROUPS: usize = 64;

struct Toy {
    status: ClusterStatus,
    processes: Vec<NodeProcess>,
    started: u32,
}

impl Toy {
    fn new(desired: u32) -> Self {
        let map = ClusterMap {
            version: MapVersion(1),
            pgs: vec![PgEntry::default(); GROUPS],
            ..ClusterMap::default()
        };
        let status = ClusterStatus {
            map,
            replicas: 1,
            min_in_sync: 1,
            groups: GroupStates::default(),
            desired_nodes: desired,
            wake_nodes: desired,
            wake_wanted: false,
            moves: vec![],
            nodes: vec![],
            dirty_inodes: 0,
            dirty_oldest_ms: 0,
            pending_keys: 0,
            inodes: 0,
            sessions: vec![],
            bucket: String::new(),
            warnings: vec![],
            s3_error: None,
            shutting_down: false,
            counters: vec![],
            cut_off: vec![],
            lost_files: 0,
        };
        Self { status, processes: vec![], started: 0 }
    }

    fn dirt(&self, node: NodeId) -> u64 {
        let n = self.status.nodes.iter().find(|n| n.node == node).expect("known node");
        n.cores.iter().map(|c| c.dirty_bytes + c.pins).sum()
    }

    fn turn(&mut self) {
        for action in plan(&self.status, &self.processes) {
            match action {
                Action::StartNode => {
                    self.started += 1;
                    let id = NodeId(self.started);
                    self.status.map.nodes.push(NodeInfo {
                        id,
                        store: u128::from(id.0),
                        state: NodeState::Joining,
                        host: "h".into(),
                        ports: vec![1],
                        capacity_bytes: 1 << 30,
                    });
                    self.status.nodes.push(NodeStatus {
                        node: id,
                        heartbeat_age_ms: Some(0),
                        acked_map: 0,
                        cores: vec![CoreStats::default()],
                    });
                    self.processes.push(NodeProcess {
                        name: format!("node-{}", id.0),
                        node: Some(id),
                        former: vec![],
                    });
                }
                Action::StopNode(name) => {
                    let node = self.processes.iter().find(|p| p.name == name).and_then(|p| p.node);
                    if let Some(node) = node {
                        assert!(
                            self.status.map.groups_of(node).next().is_none(),
                            "I8: held groups"
                        );
                        assert_eq!(self.dirt(node), 0, "I8: stopped over dirt");
                    }
                    self.processes.retain(|p| p.name != name);
                }
                Action::Admin(AdminCall::SetNodeState { node, state }) => {
                    if state == NodeState::Gone {
                        assert_eq!(self.dirt(node), 0, "I8: gone over dirt");
                        self.status.map.nodes.retain(|n| n.id != node);
                    }
                    for n in &mut self.status.map.nodes {
                        if n.id == node {
                            n.state = state;
                        }
                    }
                    self.status.map.version.0 += 1;
                }
                Action::Admin(AdminCall::MovePg { pg, to }) => {
                    let entry = &mut self.status.map.pgs[usize::from(pg.0)];
                    assert_ne!(entry.members, to);
                    *entry =
                        PgEntry { epoch: PgEpoch(entry.epoch.0 + 1), members: to, ..entry.clone() };
                    self.status.map.version.0 += 1;
                }
                Action::Admin(AdminCall::SetDesired { nodes }) => {
                    self.status.desired_nodes = nodes;
                    self.status.wake_wanted = false;
                }
                Action::Admin(AdminCall::Forget { node }) => {
                    assert!(self.status.map.groups_of(node).next().is_none(), "held groups");
                    self.status.map.nodes.retain(|n| n.id != node);
                    self.status.cut_off.retain(|c| c.node != node);
                }
                Action::Admin(other) => panic!("unexpected {other:?}"),
            }
        }
        for n in &mut self.status.nodes {
            n.acked_map = self.status.map.version.0;
        }
    }

    fn settle(&mut self) {
        for _ in 0..100 {
            if plan(&self.status, &self.processes).is_empty() {
                return;
            }
            self.turn();
        }
        panic!("the plan never settles: {:?}", plan(&self.status, &self.processes));
    }

    fn held_by(&self, node: u32) -> usize {
        self.status.map.groups_of(NodeId(node)).count()
    }
}

#[test]
fn out_in_zero_and_back() {
    let mut toy = Toy::new(2);
    toy.settle();
    assert_eq!(toy.held_by(1) + toy.held_by(2), GROUPS);
    toy.status.desired_nodes = 3;
    toy.settle();
    assert!(toy.held_by(3) > 0);
    toy.status.desired_nodes = 1;
    toy.settle();
    assert_eq!((toy.processes.len(), toy.held_by(1)), (1, GROUPS));
    toy.status.desired_nodes = 0;
    toy.settle();
    assert!(toy.processes.is_empty());
    assert!(toy.status.map.pgs.iter().all(|pg| pg.members.is_empty()));
    toy.status.wake_nodes = 2;
    toy.status.wake_wanted = true;
    toy.settle();
    assert_eq!(toy.processes.len(), 2);
    assert!(toy.status.map.pgs.iter().all(|pg| pg.members.len() == 1));
}

#[test]
fn a_node_with_dirt_is_never_retired() {
    let mut toy = Toy::new(2);
    toy.settle();
    toy.status.nodes[1].cores[0].dirty_bytes = 4096;
    toy.status.desired_nodes = 1;
    for _ in 0..20 {
        toy.turn();
    }
    assert_eq!(toy.processes.len(), 2, "its process stays");
    assert!(toy.status.map.node(NodeId(2)).is_some());
    toy.status.nodes[1].cores[0].dirty_bytes = 0;
    toy.settle();
    assert_eq!(toy.processes.len(), 1);
}

#[test]
fn a_shrink_taken_back_keeps_its_nodes() {
    let mut toy = Toy::new(2);
    toy.settle();
    toy.status.nodes[1].cores[0].pins = 1;
    toy.status.desired_nodes = 1;
    toy.turn();
    toy.status.desired_nodes = 2;
    toy.settle();
    assert_eq!(toy.started, 2, "no third node was started");
    assert_eq!(toy.held_by(1) + toy.held_by(2), GROUPS);
}

#[test]
fn a_silent_node_keeps_its_groups_and_gets_none() {
    let mut toy = Toy::new(2);
    toy.settle();
    let held = toy.held_by(2);
    toy.status.nodes[1].heartbeat_age_ms = Some(SILENT_MS_MAX + 1);
    assert!(plan(&toy.status, &toy.processes).is_empty());
    assert_eq!(toy.held_by(2), held);
}

#[test]
fn groups_of_a_node_that_is_cut_off_go_to_others_unless_they_wait() {
    let mut toy = Toy::new(3);
    toy.settle();
    let lost = NodeId(2);
    let groups: Vec<PgId> = toy.status.map.groups_of(lost).map(|(pg, _)| pg).collect();
    let waiting = groups[..3].to_vec();
    // Its heart beat a moment ago, and its lease is over all the same.
    toy.status.cut_off = vec![CutOff { node: lost, since_ms: 1, waiting: waiting.clone() }];
    toy.settle();
    let held =
        |toy: &Toy| -> Vec<PgId> { toy.status.map.groups_of(lost).map(|(pg, _)| pg).collect() };
    assert_eq!(held(&toy), waiting);
    assert!(toy.status.map.node(lost).is_some(), "it may come back");
    // What waited was given up or flushed elsewhere.
    toy.status.cut_off[0].waiting.clear();
    toy.settle();
    assert_eq!(held(&toy), []);
    assert_eq!(toy.status.map.nodes.len(), 3, "its process may have the store still");
    // Back again, it gets its share.
    toy.status.cut_off.clear();
    toy.settle();
    assert_eq!(held(&toy), groups);
}

#[test]
fn a_process_with_a_new_store_replaces_the_node_it_was() {
    let mut toy = Toy::new(2);
    toy.settle();
    let waiting: Vec<PgId> = toy.status.map.groups_of(NodeId(2)).map(|g| g.0).take(1).collect();
    toy.status.cut_off = vec![CutOff { node: NodeId(2), since_ms: 1, waiting }];
    toy.processes[1].node = Some(NodeId(3));
    toy.processes[1].former = vec![NodeId(2)];
    toy.started = 3;
    toy.status.map.nodes.push(NodeInfo {
        id: NodeId(3),
        store: 3,
        ..toy.status.map.nodes[0].clone()
    });
    toy.status.nodes.push(NodeStatus { node: NodeId(3), ..toy.status.nodes[0].clone() });
    toy.settle();
    assert_eq!(toy.held_by(2), 1, "with something that waits it is kept");
    toy.status.cut_off[0].waiting.clear();
    toy.settle();
    assert!(toy.status.map.node(NodeId(2)).is_none());
    assert_eq!((toy.processes.len(), toy.held_by(1) + toy.held_by(3)), (2, GROUPS));
}

#[test]
fn nodes_that_others_start_count_like_those_started_here() {
    let mut toy = Toy::new(2);
    toy.settle();
    assert_eq!(registered(&toy.status).len(), 2);
    let plan_of = |toy: &Toy| plan(&toy.status, &registered(&toy.status));
    assert!(plan_of(&toy).is_empty(), "as many as are wanted");
    toy.status.desired_nodes = 3;
    assert_eq!(plan_of(&toy), [Action::StartNode], "which is for others to do");
    toy.status.desired_nodes = 1;
    let drain = AdminCall::SetNodeState { node: NodeId(2), state: NodeState::Draining };
    assert!(plan_of(&toy).contains(&Action::Admin(drain)));
}

#[test]
fn nothing_happens_while_shutting_down() {
    let mut toy = Toy::new(2);
    toy.settle();
    toy.status.shutting_down = true;
    toy.status.desired_nodes = 0;
    assert!(plan(&toy.status, &toy.processes).is_empty());
}
