//! How voters begin and end: started, crashed, stopped in order, without their directories.

use super::disk::{Lie, Power, SimDisk};
use super::net::SimDial;
use super::world::{Break, Life, World};
use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::ground::Ground;
use crate::raft::disk::Disk;
use crate::raft::identity::VoterIdentity;
use crate::voter::Voter;
use ebb_metaplane_protocol::Time;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

impl World {
    /// Starts what is down and may run.
    pub(super) fn start(self: &Arc<Self>, id: u64) {
        let begun = {
            let mut nodes = self.nodes();
            let Some(node) = nodes.get_mut(&id) else { return };
            if node.out || node.starting || node.life.is_some() {
                return;
            }
            node.starting = true;
            let power = Power::new();
            // As likely to fail again while it reads what it has.
            if !self.calm.load(Ordering::SeqCst) && self.dice.chance(0.1) {
                power.cut_after(self.dice.between(1, 60));
            }
            let slow_ms = Arc::new(AtomicU64::new(4));
            let disk = SimDisk {
                device: node.device.clone(),
                power: Arc::clone(&power),
                dice: self.dice.clone(),
                lie: self.lie(),
                direct: node.direct,
                slow_ms: Arc::clone(&slow_ms),
            };
            let dial = SimDial { world: Arc::downgrade(self), id, power: Arc::clone(&power) };
            let (started, skew) = (self.started, node.skew_ns);
            // In 2026.
            let clock = move || {
                Time(1_790_000_000_000_000_000 + skew + started.elapsed().as_nanos() as i64)
            };
            let ground = Ground {
                disk: Arc::new(disk),
                dial: Arc::new(dial),
                clock: Arc::new(clock),
                pace: node.pace.clone(),
            };
            (node.config.clone(), ground, power, slow_ms)
        };
        let world = Arc::clone(self);
        self.dice.spawn(async move {
            let (config, ground, power, slow_ms) = begun;
            let started = Voter::start(&config, &config.listen, ground).await;
            world.started(id, config, started, power, slow_ms);
        });
    }

    fn started(
        self: &Arc<Self>,
        id: u64,
        config: MetaConfig,
        started: Result<Voter, MetaError>,
        power: Arc<Power>,
        slow_ms: Arc<AtomicU64>,
    ) {
        let voter = match started {
            Ok(voter) => voter,
            Err(e) => {
                let on = power.is_on();
                power.cut();
                if let Some(node) = self.nodes().get_mut(&id) {
                    node.starting = false;
                    self.trace(|| format!("voter {id} did not start: {e}"));
                    if on && node.lost {
                        node.out = true;
                    } else if on {
                        self.fail(format!("voter {id} does not start: {e}"));
                    }
                    node.device.lose_power(&self.dice, self.lie());
                }
                return;
            }
        };
        let life = Arc::new(Life { id, voter, power, slow_ms });
        {
            let mut nodes = self.nodes();
            let Some(node) = nodes.get_mut(&id) else { return };
            node.starting = false;
            node.life = Some(Arc::clone(&life));
        }
        self.count("starts");
        self.trace(|| format!("voter {id} runs"));
        let world = Arc::clone(self);
        self.dice.spawn(async move {
            if let Err(e) = life.voter.found(&config).await
                && world.life(id).is_some_and(|l| Arc::ptr_eq(&l, &life))
            {
                world.trace(|| format!("voter {id} ends: {e}"));
                let lost = world.nodes().get(&id).is_some_and(|n| n.lost);
                match e {
                    MetaError::LostDirectory { .. } if lost => {
                        world.count("lost directories noticed");
                        world.crash(id);
                        if let Some(node) = world.nodes().get_mut(&id) {
                            node.out = true;
                        }
                    }
                    e => world.fail(format!("voter {id} founds nothing: {e}")),
                }
            }
        });
    }

    fn lie(&self) -> Option<Lie> {
        match self.broken {
            Some(Break::Disk(lie)) => Some(lie),
            _ => None,
        }
    }

    /// Its power is gone, now.
    pub(super) fn crash(self: &Arc<Self>, id: u64) {
        let life = {
            let mut nodes = self.nodes();
            let Some(node) = nodes.get_mut(&id) else { return };
            let Some(life) = node.life.take() else { return };
            life.power.cut();
            let torn = node.device.lose_power(&self.dice, self.lie());
            if torn > 0 {
                self.count("torn writes");
            }
            life
        };
        self.count("crashes");
        self.trace(|| format!("voter {id} loses its power"));
        // What is left of it touches nothing any more.
        self.dice.spawn(async move { life.voter.stop().await });
    }

    /// Stops in order.
    pub(super) async fn stop(self: &Arc<Self>, id: u64) {
        let Some(life) = self.life(id) else { return };
        self.trace(|| format!("voter {id} stops"));
        life.voter.hand_over().await;
        {
            let mut nodes = self.nodes();
            let Some(node) = nodes.get_mut(&id) else { return };
            // It may have crashed meanwhile, and be back.
            if !node.life.as_ref().is_some_and(|l| Arc::ptr_eq(l, &life)) {
                return;
            }
            (node.life, node.starting) = (None, true);
        }
        life.voter.stop().await;
        if let Some(node) = self.nodes().get_mut(&id) {
            node.starting = false;
            if life.power.is_on() {
                self.count("orderly stops");
            } else {
                node.device.lose_power(&self.dice, self.lie());
            }
        }
        life.power.cut();
    }

    /// Its directory is lost, or the log in it.
    pub(super) fn lose(self: &Arc<Self>, id: u64) {
        self.crash(id);
        if self.life(id).is_some() {
            return;
        }
        let whole = self.dice.chance(0.6);
        let (device, identity, disk) = {
            let mut nodes = self.nodes();
            let Some(node) = nodes.get_mut(&id) else { return };
            node.lost = true;
            let disk = SimDisk {
                device: node.device.clone(),
                power: Power::new(),
                dice: self.dice.clone(),
                lie: None,
                direct: false,
                slow_ms: Arc::default(),
            };
            let identity = VoterIdentity::open(&disk, &node.config.dir, id, 0);
            (node.device.clone(), identity, disk)
        };
        self.count("directories lost");
        self.trace(|| format!("voter {id} loses its directory, whole: {whole}"));
        if whole || self.broken == Some(Break::Lost) {
            device.wipe();
        } else {
            device.wipe_dir(Path::new("/meta/log"));
        }
        if self.broken == Some(Break::Lost)
            && let Ok(own) = identity
        {
            let same = VoterIdentity { joined: false, ..own };
            let made = disk.create_dirs(Path::new("/meta"));
            made.and_then(|()| same.save(&disk, Path::new("/meta"))).expect("a working disk");
        }
    }
}
