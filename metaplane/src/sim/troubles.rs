//! What befalls a group: crashes between and in the middle of disk operations, orderly stops, lost directories, slow
//! disks, bad networks, partitions, nodes that stand still, elections out of turn, changes of the voters.

use super::net::Weather;
use super::world::{World, address};
use ebb_metaplane_protocol::FsError;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Clients' ends, of which a node can be cut off too.
const CLIENT_ENDS: std::ops::Range<u64> = 1000..1008;

impl World {
    fn some_voter(&self) -> Option<u64> {
        if self.dice.chance(0.5)
            && let Some(leader) = self.leader()
        {
            return Some(leader.id);
        }
        let lives = self.lives();
        self.dice.pick(&lives).map(|l| l.id)
    }

    /// One after another, until it is calm.
    pub(super) async fn troubles(self: Arc<Self>) {
        while !self.calm.load(Ordering::SeqCst) {
            self.trouble();
            let pause = if self.dice.chance(0.4) { 60 } else { 500 };
            tokio::time::sleep(Duration::from_millis(self.dice.below(pause))).await;
        }
    }

    fn trouble(self: &Arc<Self>) {
        let Some(id) = self.some_voter() else { return };
        let d = &self.dice;
        match d.below(20) {
            0..3 => self.crash(id),
            3..8 => {
                if let Some(life) = self.life(id) {
                    // Small numbers meet an append or a vote, larger ones a snapshot or the state.
                    let operations = d.between(1, if d.chance(0.6) { 12 } else { 200 });
                    life.power.cut_after(operations);
                }
            }
            8 => {
                let world = Arc::clone(self);
                self.dice.spawn(async move { world.stop(id).await });
            }
            9..13 => self.part(id),
            13 => {
                self.count("pauses");
                let until = Instant::now() + Duration::from_millis(d.between(100, 2500));
                self.net.weather().still.insert(id, until);
                if let Some(life) = self.life(id) {
                    life.slow_ms.store(600, Ordering::SeqCst);
                    let ms = d.between(100, 1500);
                    self.dice.spawn(async move {
                        tokio::time::sleep(Duration::from_millis(ms)).await;
                        life.slow_ms.store(4, Ordering::SeqCst);
                    });
                }
            }
            14 => {
                if let Some(life) = self.life(id) {
                    self.count("slow disks");
                    life.slow_ms.store(d.between(1, 80), Ordering::SeqCst);
                }
            }
            15 => {
                let loss = [0.0, 0.02, 0.2][d.below(3) as usize];
                let delay_ms = [2, 20, 120][d.below(3) as usize];
                let duplicates = [0.0, 0.1][d.below(2) as usize];
                let mut w = self.net.weather();
                (w.loss, w.delay_ms, w.duplicates) = (loss, delay_ms, duplicates);
            }
            16 => {
                if let Some(life) = self.life(id) {
                    self.count("elections out of turn");
                    self.dice
                        .spawn(async move { drop(life.voter.raft().trigger().elect(true).await) });
                }
            }
            17 => {
                if let Some(life) = self.leader() {
                    self.count("leads handed over");
                    self.dice.spawn(async move { life.voter.hand_over().await });
                }
            }
            18 => self.lose_some(id),
            _ => self.clear(),
        }
    }

    /// Nothing is in the way any more.
    pub(super) fn clear(&self) {
        *self.net.weather() = Weather::default();
    }

    /// Cuts links of a voter.
    fn part(&self, id: u64) {
        self.count("partitions");
        let d = &self.dice;
        let others: Vec<u64> = self.nodes().keys().copied().filter(|n| *n != id).collect();
        let (some, clients) = (d.chance(0.3), d.chance(0.3));
        let one_way = d.chance(0.3).then(|| d.chance(0.5));
        self.trace(|| format!("voter {id} is cut off: some {some}, one way {one_way:?}"));
        let ends = others.into_iter().filter(|_| !some || d.chance(0.5));
        let ends: Vec<u64> = ends.chain(CLIENT_ENDS.filter(|_| clients)).collect();
        let mut w = self.net.weather();
        for end in ends {
            if one_way != Some(true) {
                w.cut.insert((id, end));
            }
            if one_way != Some(false) {
                w.cut.insert((end, id));
            }
        }
    }

    /// Takes the directory of a voter, if the group can bear it.
    fn lose_some(self: &Arc<Self>, id: u64) {
        let Some(leader) = self.leader() else { return };
        let bad = self.nodes().values().any(|n| n.lost);
        // Where voters are about to change, more of them may be needed than remain.
        let settled = leader.settled_voters().is_some_and(|v| v.len() >= 3 && v.contains(&id));
        // One that founded alone has nobody to ask, and founds again: then it is refused the bucket
        // (`bucket::owner`), which isn't here.
        let alone = self.nodes().get(&id).is_some_and(|n| n.config.members.len() <= 1);
        if !bad && settled && !alone && !self.changing.load(Ordering::SeqCst) {
            self.lose(id);
        }
    }

    /// What is down comes back, soon or late.
    pub(super) async fn revive(self: Arc<Self>) {
        loop {
            let down: Vec<u64> = {
                let nodes = self.nodes();
                nodes.values().filter(|n| n.is_down()).map(|n| n.id).collect()
            };
            let calm = self.calm.load(Ordering::SeqCst);
            for id in down {
                if calm || self.dice.chance(0.12) {
                    self.start(id);
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Voters come and go. One that lost its directory is replaced.
    pub(super) async fn members(self: Arc<Self>) {
        let mut next = 10;
        loop {
            tokio::time::sleep(Duration::from_millis(self.dice.between(50, 1500))).await;
            let lost = self.nodes().values().find(|n| n.lost && !n.removed).map(|n| n.id);
            if let Some(id) = lost {
                self.remove(id).await;
                continue;
            }
            if self.calm.load(Ordering::SeqCst) {
                continue;
            }
            self.changing.store(true, Ordering::SeqCst);
            let Some(leader) = self.leader() else {
                self.changing.store(false, Ordering::SeqCst);
                continue;
            };
            let voters: Vec<u64> = leader.voter.voters().iter().map(|v| v.id).collect();
            if voters.len() >= 5 || voters.len() >= 2 && self.dice.chance(0.4) {
                if let Some(id) = self.dice.pick(&voters) {
                    self.remove(id).await;
                }
            } else {
                next += 1;
                self.add(next).await;
            }
            self.changing.store(false, Ordering::SeqCst);
        }
    }

    async fn add(self: &Arc<Self>, id: u64) {
        // It looks for others, who may know it by another directory.
        let others: BTreeMap<String, String> =
            self.lives().iter().map(|l| (l.id.to_string(), address(l.id))).collect();
        self.make(id, others, true);
        self.start(id);
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(self.dice.between(20, 200))).await;
            let Some(leader) = self.leader() else { continue };
            match leader.voter.add_voter(id, address(id)).await {
                Ok(()) => {
                    self.trace(|| format!("voter {id} is added"));
                    return self.count("voters added");
                }
                Err(e) => self.trace(|| format!("voter {id} is not added: {e:?}")),
            }
        }
    }

    async fn remove(self: &Arc<Self>, id: u64) {
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(self.dice.between(20, 200))).await;
            let Some(leader) = self.leader() else { continue };
            match leader.voter.remove_voter(id).await {
                Ok(()) => {
                    self.trace(|| format!("voter {id} is removed"));
                    self.count("voters removed");
                    if let Some(node) = self.nodes().get_mut(&id) {
                        (node.out, node.removed) = (true, true);
                    }
                    if self.life(id).is_some() {
                        self.crash(id);
                    }
                    return;
                }
                // Refused, with a reason that stays for now.
                Err(FsError::Invalid(why)) => {
                    return self.trace(|| format!("voter {id} stays: {why}"));
                }
                Err(e) => self.trace(|| format!("voter {id} is not removed: {e:?}")),
            }
        }
    }
}
