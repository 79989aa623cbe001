//! The planner: how things are → what to do next. Pure, so that every decision can be tested.
//!
//! * **Out**: start nodes; a node that heartbeats becomes active and takes its groups.
//! * **In** (I8): the surplus drains: its groups move (the metadata plane flushes their dirt to S3
//!   first); a node without groups, dirt and pins is declared gone, and only then its process stops.
//! * **Zero and back**: with no active node the groups are held by nobody; a client that needs data
//!   raises `wake_wanted`, and the last non-zero wish returns.
//!
//! * **Copies**: with several members wanted, the metadata plane's leader moves groups that somebody holds (ARCHITECTURE, replication): to copy
//!   is cheaper than to flush, and a take-over must not wait for a controller.
//!
//! * **Lost**: groups of a node that is cut off go to others at once if S3 has all of theirs (R24); the others wait
//!   for it, or for `ebb node abandon`. One of which nothing is left leaves the map if its process has another store by now.
//!
//! Every action is idempotent and is repeated on the next turn until the status shows its effect.

use ebb_dataplane_protocol::{NodeId, NodeInfo, NodeState, PgId, ShardRef};
use ebb_metaplane_protocol::admin::CutOff;
use ebb_metaplane_protocol::placement::primary_of;
use ebb_metaplane_protocol::{AdminCall, ClusterStatus};

/// Moves under way at most: each freezes a group for a moment.
pub const MOVES_MAX: usize = 8;
/// A node that was silent for longer takes no groups.
pub const SILENT_MS_MAX: u64 = 5_000;

/// A data node's process, as the provisioner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeProcess {
    /// The provisioner's name for it (`node-3`).
    pub name: String,
    /// The node it registered as, once it did.
    pub node: Option<NodeId>,
    /// Nodes it was before, with stores that are no more.
    pub former: Vec<NodeId>,
}

/// The nodes of a cluster whose processes run elsewhere: each that registered is one of them.
pub fn registered(status: &ClusterStatus) -> Vec<NodeProcess> {
    let process = |n: &NodeInfo| NodeProcess {
        name: format!("{}:{}", n.host, n.id),
        node: Some(n.id),
        former: Vec::new(),
    };
    status.map.nodes.iter().map(process).collect()
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the metadata plane for something.
    Admin(AdminCall),
    /// Start one more data node.
    StartNode,
    /// Stop a data node's process for good and remove its store.
    StopNode(String),
}

/// What to do next.
pub fn plan(status: &ClusterStatus, processes: &[NodeProcess]) -> Vec<Action> {
    let mut actions = Vec::new();
    if status.shutting_down {
        // `ebb down` flushes in place: nothing moves, nothing starts.
        return actions;
    }
    if status.wake_wanted && status.desired_nodes == 0 && status.wake_nodes > 0 {
        actions.push(Action::Admin(AdminCall::SetDesired { nodes: status.wake_nodes }));
        return actions;
    }
    node_set(status, processes, &mut actions);
    groups(status, &mut actions);
    actions
}

fn age_ms(status: &ClusterStatus, node: NodeId) -> Option<u64> {
    status.nodes.iter().find(|n| n.node == node).and_then(|n| n.heartbeat_age_ms)
}

fn cut_off(status: &ClusterStatus, node: NodeId) -> Option<&CutOff> {
    status.cut_off.iter().find(|c| c.node == node)
}

fn alive(status: &ClusterStatus, node: NodeId) -> bool {
    age_ms(status, node).is_some_and(|age| age <= SILENT_MS_MAX) && cut_off(status, node).is_none()
}

/// Starts, activates, drains and retires nodes.
fn node_set(status: &ClusterStatus, processes: &[NodeProcess], actions: &mut Vec<Action>) {
    let wish = status.desired_nodes as usize;
    let state = |n: NodeId| status.map.node(n).map(|n| n.state);
    let set = |node, state| Action::Admin(AdminCall::SetNodeState { node, state });

    // Processes that count towards the wish: running or starting, not on their way out.
    let mut staying = 0usize;
    let mut registered = 0usize;
    for p in processes {
        match p.node.map(state) {
            // Not registered yet.
            None => staying += 1,
            Some(Some(NodeState::Active | NodeState::Joining)) => {
                staying += 1;
                registered += 1;
            }
            Some(Some(NodeState::Draining)) => {}
            // The map does not know it any more: it is gone, its process may go.
            Some(Some(NodeState::Gone) | None) => actions.push(Action::StopNode(p.name.clone())),
        }
    }
    // A shrink that was taken back keeps the nodes it had begun to drain, before new ones start.
    let mut draining: Vec<NodeId> = nodes_in(status, NodeState::Draining);
    while staying < wish
        && let Some(node) = draining.pop()
    {
        actions.push(set(node, NodeState::Active));
        staying += 1;
        registered += 1;
    }
    for _ in staying..wish {
        actions.push(Action::StartNode);
    }
    for node in nodes_in(status, NodeState::Joining) {
        if alive(status, node) {
            actions.push(set(node, NodeState::Active));
        }
    }
    // The youngest go first: they hold the least.
    let mut active = nodes_in(status, NodeState::Active);
    let mut surplus = registered.saturating_sub(wish);
    while surplus > 0
        && let Some(node) = active.pop()
    {
        actions.push(set(node, NodeState::Draining));
        surplus -= 1;
    }
    for node in draining {
        if retired(status, node) {
            actions.push(set(node, NodeState::Gone));
        }
    }
    for c in &status.cut_off {
        if forgotten(status, processes, c.node) {
            actions.push(Action::Admin(AdminCall::Forget { node: c.node }));
        }
    }
}

/// Cut off, holds no group, and is not waited for: its process registered as another node (its store was wiped), or it was
/// on its way out.
fn forgotten(status: &ClusterStatus, processes: &[NodeProcess], node: NodeId) -> bool {
    let draining = status.map.node(node).is_some_and(|n| n.state == NodeState::Draining);
    let replaced = processes.iter().any(|p| p.former.contains(&node))
        && processes.iter().all(|p| p.node != Some(node));
    status.map.groups_of(node).next().is_none() && (draining || replaced)
}

/// Holds no group, acked a map that says so, and then reported neither dirt nor pins (I8). The
/// metadata plane checks the same again before it agrees.
fn retired(status: &ClusterStatus, node: NodeId) -> bool {
    let empty = status.map.groups_of(node).next().is_none();
    let report = status.nodes.iter().find(|n| n.node == node);
    empty
        && report.is_some_and(|r| {
            r.acked_map >= status.map.version.0
                && r.heartbeat_age_ms.is_some_and(|age| age <= SILENT_MS_MAX)
                && r.cores.iter().all(|c| c.dirty_bytes == 0 && c.pins == 0)
        })
}

/// Moves groups to where they belong.
fn groups(status: &ClusterStatus, actions: &mut Vec<Action>) {
    let takers: Vec<&NodeInfo> = status
        .map
        .nodes
        .iter()
        .filter(|n| n.state == NodeState::Active && alive(status, n.id))
        .collect();
    // Nodes that are only silent keep what they hold: they may hold dirty data, and are restarted.
    let holders: Vec<&NodeInfo> =
        status.map.nodes.iter().filter(|n| n.state == NodeState::Active).collect();
    let mut room = MOVES_MAX.saturating_sub(status.moves.len());
    for (i, entry) in status.map.pgs.iter().enumerate() {
        let pg = PgId(i as u16);
        if status.moves.contains(&pg) {
            continue;
        }
        if entry.primary().is_some() && (status.replicas > 1 || entry.has_others()) {
            // The leader sees to groups with members; but not to those that nobody is to hold, nor when none of
            // those in-sync is in contact.
            let lost = entry.members.iter().all(|m| cut_off(status, m.node).is_some());
            if !lost && !holders.is_empty() {
                continue;
            }
        }
        if let Some(lost) = entry.primary().and_then(|p| cut_off(status, p.node)) {
            // Nothing is frozen for it, so it is not rationed.
            if !lost.waiting.contains(&pg)
                && let Some(to) = primary_of(pg, &takers)
            {
                actions.push(Action::Admin(AdminCall::MovePg { pg, to: vec![to] }));
            }
            continue;
        }
        if room == 0 {
            continue;
        }
        let Some(to) = target(pg, entry.primary(), &takers, &holders) else { continue };
        // A group held by nobody is assigned at once; only real moves are rationed.
        if !entry.members.is_empty() {
            room -= 1;
        }
        actions.push(Action::Admin(AdminCall::MovePg { pg, to }));
    }
}

/// Where a group should go; `None`: it stays.
fn target(
    pg: PgId,
    now: Option<ShardRef>,
    takers: &[&NodeInfo],
    holders: &[&NodeInfo],
) -> Option<Vec<ShardRef>> {
    let want = primary_of(pg, holders);
    if want == now {
        return None;
    }
    match want {
        None => Some(Vec::new()),
        Some(w) if takers.iter().any(|t| t.id == w.node) => Some(vec![w]),
        // The best holder is silent: the group waits where it is, unless nobody holds it.
        Some(_) if now.is_some() => None,
        Some(_) => primary_of(pg, takers).map(|t| vec![t]),
    }
}

fn nodes_in(status: &ClusterStatus, state: NodeState) -> Vec<NodeId> {
    let mut ids: Vec<_> =
        status.map.nodes.iter().filter(|n| n.state == state).map(|n| n.id).collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
