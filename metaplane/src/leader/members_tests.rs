//! The plan against a toy cluster that carries it out, one step at a time.

use super::*;
use ebb_dataplane_protocol::{CoreId, MapVersion, PgEpoch};

const GROUPS: u16 = 64;

struct Toy {
    map: ClusterMap,
    replicas: u8,
    alive: BTreeSet<NodeId>,
    cut_off: BTreeSet<NodeId>,
    wishes: Vec<(NodeId, Wishes)>,
    busy: BTreeSet<PgId>,
    whole: BTreeMap<ShardRef, MapVersion>,
    copies_seen: usize,
    least: usize,
}

fn on(node: u32) -> ShardRef {
    ShardRef { node: NodeId(node), core: CoreId(0) }
}

impl Toy {
    /// `nodes` of them; the first holds every group alone.
    fn new(nodes: u32, replicas: u8) -> Self {
        let mut toy = Self {
            map: ClusterMap { version: MapVersion(1), ..ClusterMap::default() },
            replicas,
            alive: BTreeSet::new(),
            cut_off: BTreeSet::new(),
            wishes: Vec::new(),
            busy: BTreeSet::new(),
            whole: BTreeMap::new(),
            copies_seen: 0,
            least: usize::MAX,
        };
        (1..=nodes).for_each(|n| toy.join(n));
        let held = PgEntry { epoch: PgEpoch(1), members: vec![on(1)], ..PgEntry::default() };
        toy.map.pgs = vec![held; usize::from(GROUPS)];
        toy
    }

    fn join(&mut self, n: u32) {
        self.map.nodes.push(NodeInfo {
            id: NodeId(n),
            store: u128::from(n),
            state: NodeState::Active,
            host: "h".into(),
            ports: vec![1],
            capacity_bytes: 1 << 30,
        });
        self.alive.insert(NodeId(n));
        self.whole.insert(on(n), MapVersion(u64::MAX));
    }

    fn lose(&mut self, n: u32) {
        self.alive.remove(&NodeId(n));
        self.cut_off.insert(NodeId(n));
    }

    fn plan(&self) -> Vec<(PgId, Step)> {
        plan(&Known {
            map: &self.map,
            replicas: self.replicas,
            alive: &self.alive,
            cut_off: &self.cut_off,
            wishes: &self.wishes,
            busy: &self.busy,
            whole: &self.whole,
            handing: 0,
            still: false,
        })
    }

    /// Carries the plan out; primaries ask for whoever is syncing to be in-sync.
    fn turn(&mut self) -> usize {
        let steps = self.plan();
        for (pg, step) in &steps {
            let e = &mut self.map.pgs[usize::from(pg.0)];
            e.epoch = PgEpoch(e.epoch.0 + 1);
            match *step {
                Step::TakeOver(to) => {
                    assert!(e.members[1..].contains(&to), "R44");
                    e.members.remove(0);
                    e.members.retain(|m| *m != to);
                    e.members.insert(0, to);
                }
                Step::HandOver(to) => {
                    assert!(e.members[1..].contains(&to), "R44");
                    e.members.retain(|m| *m != to);
                    e.members.insert(0, to);
                }
                Step::Add(who) => {
                    assert!(e.holders().all(|m| m.node != who.node), "one copy on a node");
                    e.syncing.push(who);
                }
                Step::InSync(who) => {
                    e.syncing.retain(|m| *m != who);
                    e.members.push(who);
                }
                Step::Lost(who) | Step::Surplus(who) => {
                    assert_ne!(e.primary(), Some(who), "R43");
                    e.members.retain(|m| *m != who);
                    e.syncing.retain(|m| *m != who);
                }
            }
        }
        let copies: usize = self.map.pgs.iter().map(|e| e.syncing.len()).sum();
        self.copies_seen = self.copies_seen.max(copies);
        self.least =
            self.least.min(self.map.pgs.iter().map(|e| e.members.len()).min().expect("groups"));
        self.wishes.clear();
        for n in &self.alive {
            let mut w = Wishes::default();
            for (i, e) in self.map.pgs.iter().enumerate() {
                if e.primary().is_some_and(|p| p.node == *n) {
                    let wish =
                        |m: &ShardRef| Wish { pg: PgId(i as u16), epoch: e.epoch, member: *m };
                    w.in_sync.extend(e.syncing.iter().map(wish));
                }
            }
            self.wishes.push((*n, w));
        }
        steps.len()
    }

    fn settle(&mut self) {
        (self.copies_seen, self.least) = (0, usize::MAX);
        for _ in 0..1000 {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("it never settles: {:?}", self.plan());
    }

    fn whole(&self) -> bool {
        let nodes: Vec<&NodeInfo> =
            self.map.nodes.iter().filter(|n| self.alive.contains(&n.id)).collect();
        self.map.pgs.iter().enumerate().all(|(i, e)| {
            let mut want = members_of(PgId(i as u16), &nodes, usize::from(self.replicas));
            let right = e.primary() == want.first().copied() && e.syncing.is_empty();
            let mut have = e.members.clone();
            have.sort_unstable();
            want.sort_unstable();
            right && have == want
        })
    }
}

#[test]
fn groups_get_their_members_a_few_at_a_time_and_their_best_primary() {
    let mut toy = Toy::new(3, 2);
    toy.settle();
    assert!(toy.whole());
    assert_eq!((toy.copies_seen, toy.least), (COPIES_MAX, 1));
    let of = |n: u32| toy.map.pgs.iter().filter(|e| e.primary() == Some(on(n))).count();
    assert!((1..=3).all(|n| of(n) >= 10), "primaries are spread: {:?}", [of(1), of(2), of(3)]);
    // A fourth node takes its share, and there are never fewer than two copies meanwhile.
    toy.join(4);
    toy.settle();
    assert!(toy.whole());
    assert_eq!(toy.least, 2);
    // Drained it gives all of it back.
    toy.map.nodes[3].state = NodeState::Draining;
    toy.settle();
    assert_eq!(toy.map.groups_of(NodeId(4)).count(), 0);
    assert_eq!(toy.least, 2);
}

#[test]
fn a_lost_node_is_replaced_everywhere() {
    let mut toy = Toy::new(3, 2);
    toy.settle();
    let led: Vec<usize> = (0..64).filter(|i| toy.map.pgs[*i].primary() == Some(on(2))).collect();
    let heirs: Vec<ShardRef> = led.iter().map(|i| toy.map.pgs[*i].members[1]).collect();
    toy.lose(2);
    // What failed is seen to at once, for all groups.
    toy.turn();
    for (i, heir) in led.iter().zip(heirs) {
        assert_eq!(toy.map.pgs[*i].primary(), Some(heir));
    }
    assert_eq!(toy.map.groups_of(NodeId(2)).count(), 0);
    toy.settle();
    assert!(toy.whole());
}

#[test]
fn nobody_takes_over_from_a_primary_that_may_have_a_lease_nor_who_is_out_of_reach() {
    let mut toy = Toy::new(3, 2);
    toy.settle();
    toy.alive.remove(&NodeId(2));
    let before = toy.map.clone();
    // Silent, but not cut off.
    assert!(toy.plan().iter().all(|(_, s)| !matches!(s, Step::TakeOver(_) | Step::Lost(_))));
    // With its heir: those groups wait, and nobody who may be the last is dropped.
    toy.lose(2);
    toy.lose(3);
    for (pg, step) in toy.plan() {
        let e = &before.pgs[usize::from(pg.0)];
        assert!(e.members.contains(&on(1)), "{pg} {step:?}");
    }
    toy.settle();
    for (was, e) in before.pgs.iter().zip(&toy.map.pgs) {
        if !was.members.contains(&on(1)) {
            assert_eq!(was.members, e.members);
        }
    }
}

#[test]
fn nobody_is_dropped_while_the_primary_is_silent() {
    let mut toy = Toy::new(3, 2);
    toy.settle();
    // The member that is gone may be the last one.
    toy.alive.remove(&NodeId(1));
    toy.lose(2);
    let steps = toy.plan();
    assert!(steps.iter().any(|(_, s)| *s == Step::Lost(on(2))), "where the primary is there");
    for (pg, step) in steps {
        let primary = toy.map.pgs[usize::from(pg.0)].primary();
        assert_ne!(primary, Some(on(1)), "{pg} {step:?}");
    }
}

#[test]
fn a_syncing_member_never_takes_over_and_goes_when_it_is_lost() {
    let mut toy = Toy::new(2, 2);
    toy.turn();
    let pg = toy.map.pgs.iter().position(|e| !e.syncing.is_empty()).expect("added");
    toy.wishes.clear();
    toy.lose(1);
    assert!(toy.plan().is_empty(), "R44");
    toy.cut_off.clear();
    toy.alive.insert(NodeId(1));
    toy.lose(2);
    assert!(toy.plan().contains(&(PgId(pg as u16), Step::Lost(on(2)))));
}

#[test]
fn only_the_primarys_wishes_of_this_epoch_count() {
    let mut toy = Toy::new(3, 3);
    toy.settle();
    let e = toy.map.pgs[5].clone();
    let (primary, member) = (e.members[0], e.members[1]);
    let wish = |epoch, member| Wishes {
        unreachable: vec![Wish { pg: PgId(5), epoch, member }],
        in_sync: vec![Wish { pg: PgId(5), epoch, member }],
    };
    let last = PgEpoch(e.epoch.0 - 1);
    for (node, wishes) in [
        (member.node, wish(e.epoch, primary)),
        (member.node, wish(e.epoch, e.members[2])),
        (primary.node, wish(last, member)),
        (primary.node, wish(e.epoch, primary)),
    ] {
        toy.wishes = vec![(node, wishes)];
        assert!(toy.plan().is_empty(), "{node} {:?}", toy.wishes);
    }
    toy.wishes = vec![(primary.node, wish(e.epoch, member))];
    assert_eq!(toy.plan(), [(PgId(5), Step::Lost(member))]);
}

#[test]
fn with_one_member_wanted_nothing_happens_but_that_others_leave() {
    let mut toy = Toy::new(3, 1);
    assert!(toy.plan().is_empty());
    toy.lose(1);
    assert!(toy.plan().is_empty(), "a stand-in's work");
    let mut toy = Toy::new(3, 2);
    toy.settle();
    toy.replicas = 1;
    toy.settle();
    assert!(toy.map.pgs.iter().all(|e| e.members.len() == 1 && e.syncing.is_empty()));
}

#[test]
fn what_was_promised_stays_and_groups_that_move_are_left_alone() {
    let mut toy = Toy::new(3, 2);
    toy.settle();
    toy.map.pgs.iter_mut().for_each(|e| e.min_in_sync = 2);
    toy.map.nodes[2].state = NodeState::Draining;
    toy.map.nodes[1].state = NodeState::Draining;
    toy.settle();
    assert!(toy.map.pgs.iter().all(|e| e.members.len() == 2), "R48");
    let mut toy = Toy::new(3, 2);
    toy.busy = (0..GROUPS).map(PgId).collect();
    assert!(toy.plan().is_empty());
}

#[test]
fn nobody_hands_over_before_its_members_have_everything() {
    let mut toy = Toy::new(3, 2);
    toy.whole.clear();
    toy.settle();
    let others = |toy: &Toy| toy.map.pgs.iter().filter(|e| e.primary() != Some(on(1))).count();
    assert_eq!(others(&toy), 0, "copied to, and nobody gave its place away");
    toy.whole.insert(on(1), MapVersion(6));
    toy.map.pgs.iter_mut().for_each(|e| e.since_map_version = MapVersion(7));
    assert!(toy.plan().is_empty(), "said before the group changed its primary");
    toy.whole.insert(on(1), MapVersion(7));
    toy.settle();
    assert!(others(&toy) > 0);
}
