//! The provisioner that runs a whole cluster on this machine, as processes of the one binary.

use crate::error::ControllerError as Error;
use crate::layout::{ClusterConfig, Layout};
use crate::plan::NodeProcess;
use crate::process::{CommandSpec, Process};
use ebb_dataplane_protocol::{ClusterMap, NodeId};
use std::collections::BTreeMap;
use std::time::Duration;

/// A server's role in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The embedded S3 server.
    S3,
    /// The metadata plane.
    Meta,
    /// A data node, by the provisioner's name.
    Data(String),
}

impl Role {
    /// The process's name.
    pub fn name(&self) -> &str {
        match self {
            Self::S3 => "s3",
            Self::Meta => "meta",
            Self::Data(name) => name,
        }
    }
}

/// Knows how to run a role: writes its configuration and says the command. The binary implements
/// it, so that this crate needs no server's code.
pub trait Launch: Send + Sync {
    /// The command of a role. Called before every start, with what is known by then (ports).
    fn command(
        &self,
        role: &Role,
        layout: &Layout,
        config: &ClusterConfig,
    ) -> Result<CommandSpec, Error>;
}

/// Time a server gets to stop by itself.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// All processes of a local cluster.
pub struct LocalCluster<L> {
    /// Its directory.
    pub layout: Layout,
    /// Its configuration, ports filled in as they become known.
    pub config: ClusterConfig,
    launch: L,
    s3: Option<Process>,
    meta: Process,
    nodes: BTreeMap<String, Process>,
}

impl<L: Launch> LocalCluster<L> {
    /// Takes over whatever runs already; starts nothing.
    pub fn adopt(layout: Layout, config: ClusterConfig, launch: L) -> Result<Self, Error> {
        let s3 = config.embedded_s3.then(|| Process::adopt(&layout, Role::S3.name()));
        let meta = Process::adopt(&layout, Role::Meta.name());
        let mut nodes = BTreeMap::new();
        let dir = layout.nodes();
        for entry in std::fs::read_dir(&dir).map_err(Error::file("read", &dir))? {
            let name = entry.map_err(Error::file("read", &dir))?.file_name();
            if let Some(name) = name.to_str().filter(|n| n.starts_with("node-")) {
                nodes.insert(name.to_owned(), Process::adopt(&layout, name));
            }
        }
        Ok(Self { layout, config, launch, s3, meta, nodes })
    }

    /// Restarts what died. Ports that a server chose are kept for its next start, so that clients
    /// find it where it was.
    pub fn tend(&mut self) -> Result<(), Error> {
        let known = self.config.clone();
        if let Some(s3) = &mut self.s3 {
            s3.ensure(&self.layout, &self.launch.command(&Role::S3, &self.layout, &self.config)?)?;
            if let Some(port) = port_of(s3, &self.layout) {
                self.config.s3_port = port;
            }
            if self.config.s3_port == 0 {
                return Ok(());
            }
        }
        let spec = self.launch.command(&Role::Meta, &self.layout, &self.config)?;
        self.meta.ensure(&self.layout, &spec)?;
        if let Some(port) = port_of(&self.meta, &self.layout) {
            self.config.meta_port = port;
        }
        if self.config != known {
            self.layout.save(&self.config)?;
        }
        if self.config.meta_port != 0 {
            for process in self.nodes.values_mut() {
                if process.check() {
                    continue;
                }
                let role = Role::Data(process.name().to_owned());
                process.ensure(
                    &self.layout,
                    &self.launch.command(&role, &self.layout, &self.config)?,
                )?;
            }
        }
        Ok(())
    }

    /// The first process that died and is not ready, with its last words: for `ebb up`'s error.
    pub fn ailing(&self) -> Option<(String, String)> {
        self.s3
            .iter()
            .chain([&self.meta])
            .chain(self.nodes.values())
            .find(|p| p.pid().is_none() && p.restarts() > 0 || p.restarts() > 3)
            .map(|p| (p.name().to_owned(), p.last_words(&self.layout)))
    }

    /// The metadata plane's address, once it serves.
    pub fn meta_address(&self) -> Option<String> {
        self.meta.ready(&self.layout)?;
        (self.config.meta_port != 0)
            .then(|| format!("{}:{}", self.config.host, self.config.meta_port))
    }

    /// The embedded S3 server's URL, once it serves.
    pub fn s3_url(&self) -> Option<String> {
        self.s3.as_ref()?;
        (self.config.s3_port != 0)
            .then(|| format!("http://{}:{}", self.config.host, self.config.s3_port))
    }

    /// The data nodes' processes, matched with the map by what they said when they got ready.
    pub fn node_processes(&self, map: &ClusterMap) -> Vec<NodeProcess> {
        self.nodes
            .values()
            .map(|p| {
                let id = recorded_node_id(&self.layout, p.name());
                let node = id.or_else(|| {
                    let ports = ports_of(p, &self.layout)?;
                    map.nodes.iter().find(|n| n.ports == ports).map(|n| n.id)
                });
                NodeProcess { name: p.name().to_owned(), node }
            })
            .collect()
    }

    /// Starts one more data node.
    pub fn start_node(&mut self) -> Result<(), Error> {
        let last =
            self.nodes.keys().filter_map(|n| n.strip_prefix("node-")?.parse::<u32>().ok()).max();
        let name = format!("node-{}", last.unwrap_or(0) + 1);
        let dir = self.layout.node(&name);
        std::fs::create_dir_all(&dir).map_err(Error::file("create", &dir))?;
        self.nodes.insert(name.clone(), Process::adopt(&self.layout, &name));
        Ok(())
    }

    /// Stops a data node for good and removes its store. Only for nodes that are `Gone` (I8).
    pub async fn retire_node(&mut self, name: &str) -> Result<(), Error> {
        if let Some(mut process) = self.nodes.remove(name) {
            process.stop(&self.layout, STOP_GRACE).await;
        }
        let dir = self.layout.node(name);
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::file("remove", dir)(e))
            }
            _ => Ok(()),
        }
    }

    /// Stops every process: nodes, then the metadata plane, then S3.
    pub async fn stop_all(&mut self) {
        for process in self.nodes.values_mut() {
            process.stop(&self.layout, STOP_GRACE).await;
        }
        self.meta.stop(&self.layout, STOP_GRACE).await;
        if let Some(s3) = &mut self.s3 {
            s3.stop(&self.layout, STOP_GRACE).await;
        }
    }

    /// Removes what the bucket makes superfluous, after a clean `ebb down`.
    pub fn wipe(&self) -> Result<(), Error> {
        for dir in [self.layout.nodes(), self.layout.meta()] {
            std::fs::remove_dir_all(&dir).map_err(Error::file("remove", &dir))?;
            std::fs::create_dir(&dir).map_err(Error::file("create", &dir))?;
        }
        Ok(())
    }
}

/// `{"port": N}` of a ready file.
fn port_of(process: &Process, layout: &Layout) -> Option<u16> {
    u16::try_from(process.ready(layout)?.get("port")?.as_u64()?).ok()
}

/// `{"ports": [N…]}` of a ready file.
pub fn ports_of(process: &Process, layout: &Layout) -> Option<Vec<u16>> {
    let ready = process.ready(layout)?;
    ready.get("ports")?.as_array()?.iter().map(|p| u16::try_from(p.as_u64()?).ok()).collect()
}

/// `{"node": N}` of a node's ready file; kept over its restarts beside its store.
fn recorded_node_id(layout: &Layout, name: &str) -> Option<NodeId> {
    let text = std::fs::read_to_string(layout.run(&format!("{name}.ready"))).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(NodeId(u32::try_from(json.get("node")?.as_u64()?).ok()?))
}
