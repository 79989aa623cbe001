//! The provisioner that runs a whole cluster on this machine, as processes of the one binary.

use crate::error::ControllerError as Error;
use crate::layout::{ClusterConfig, Layout, write_atomically};
use crate::plan::NodeProcess;
use crate::process::{CommandSpec, Process};
use crate::voters::{Voters, process_name};
use ebb_dataplane_protocol::NodeId;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A server's role in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The embedded S3 server.
    S3,
    /// A voter of the metadata plane, by its number.
    Meta(u64),
    /// A data node, by the provisioner's name.
    Data(String),
}

impl Role {
    /// The process's name.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::S3 => "s3".into(),
            Self::Meta(id) => process_name(*id).into(),
            Self::Data(name) => name.into(),
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

/// Nodes remembered that a process was.
const IDS_MAX: usize = 16;
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
    voters: BTreeMap<u64, Process>,
    nodes: BTreeMap<String, Process>,
}

impl<L: Launch> LocalCluster<L> {
    /// Takes over whatever runs already; starts nothing.
    pub fn adopt(layout: Layout, config: ClusterConfig, launch: L) -> Result<Self, Error> {
        let s3 = config.embedded_s3.then(|| Process::adopt(&layout, &Role::S3.name()));
        let mut nodes = BTreeMap::new();
        let dir = layout.nodes();
        for entry in std::fs::read_dir(&dir).map_err(Error::file("read", &dir))? {
            let name = entry.map_err(Error::file("read", &dir))?.file_name();
            if let Some(name) = name.to_str().filter(|n| n.starts_with("node-")) {
                nodes.insert(name.to_owned(), Process::adopt(&layout, name));
            }
        }
        let mut cluster = Self { layout, config, launch, s3, voters: BTreeMap::new(), nodes };
        cluster.find_voters();
        cluster.find_former_voters()?;
        Ok(cluster)
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
        if let Some(voters) = Voters::load(&self.layout)? {
            self.config.voters = voters.voters;
        }
        self.find_voters();
        for voter in self.config.voters() {
            let role = Role::Meta(voter.id);
            let Some(process) = self.voters.get_mut(&voter.id) else { continue };
            // Not written anew while it runs, so that a person finds what it was told.
            if !process.check() {
                let spec = self.launch.command(&role, &self.layout, &self.config)?;
                process.ensure(&self.layout, &spec)?;
            }
        }
        if self.config.voters.is_empty()
            && let Some(port) = self.voters.get(&1).and_then(|p| port_of(p, &self.layout))
        {
            self.config.meta_port = port;
        }
        if self.voters.values().all(|p| p.ready(&self.layout).is_some()) {
            // They serve, so the bucket is ours: later starts have nothing to steal.
            self.config.steal_bucket = false;
        }
        if self.config != known {
            self.layout.save(&self.config)?;
        }
        if !self.config.meta_addresses().is_empty() {
            for process in self.nodes.values_mut() {
                if process.check() {
                    Record::keep(&self.layout, process)?;
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

    /// A process for each voter that there is to be.
    fn find_voters(&mut self) {
        for voter in self.config.voters() {
            let adopt = || Process::adopt(&self.layout, &process_name(voter.id));
            self.voters.entry(voter.id).or_insert_with(adopt);
        }
    }

    /// What an earlier controller did not come to retire. Without a file of voters nobody was taken out.
    fn find_former_voters(&mut self) -> Result<(), Error> {
        let Some(Voters { next, .. }) = Voters::load(&self.layout)? else { return Ok(()) };
        for id in (1..next).filter(|id| self.layout.meta(*id).is_dir()) {
            let adopt = || Process::adopt(&self.layout, &process_name(id));
            self.voters.entry(id).or_insert_with(adopt);
        }
        Ok(())
    }

    /// Stops voters that were taken out of the group, and removes their directories.
    pub async fn retire_voters(&mut self) -> Result<(), Error> {
        if let Some(voters) = Voters::load(&self.layout)? {
            self.config.voters = voters.voters;
        }
        let wanted: Vec<u64> = self.config.voters().iter().map(|v| v.id).collect();
        let gone: Vec<u64> =
            self.voters.keys().copied().filter(|id| !wanted.contains(id)).collect();
        for id in gone {
            if let Some(mut process) = self.voters.remove(&id) {
                process.stop(&self.layout, STOP_GRACE).await;
                tracing::info!(voter = id, "retired");
            }
            remove(&self.layout.meta(id))?;
        }
        Ok(())
    }

    /// The addresses of all voters, once one of them serves.
    pub fn meta_addresses(&self) -> Option<Vec<String>> {
        let serves = self.voters.values().any(|p| p.ready(&self.layout).is_some());
        let addresses = self.config.meta_addresses();
        (serves && !addresses.is_empty()).then_some(addresses)
    }

    /// The embedded S3 server's URL, once it serves.
    pub fn s3_url(&self) -> Option<String> {
        self.s3.as_ref()?;
        (self.config.s3_port != 0)
            .then(|| format!("http://{}:{}", self.config.host, self.config.s3_port))
    }

    /// The data nodes' processes, with the ids they registered under (kept over restarts).
    pub fn node_processes(&self) -> Vec<NodeProcess> {
        self.nodes
            .values()
            .map(|p| {
                let node = Record::load(&self.layout, p.name()).map(|r| NodeId(r.node));
                let mut former = Record::ids(&self.layout, p.name());
                former.retain(|id| Some(*id) != node);
                NodeProcess { name: p.name().to_owned(), node, former }
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
        let _ = std::fs::remove_file(Record::ids_path(&self.layout, name));
        self.remove_spill(name);
        remove(&self.layout.node(name))
    }

    /// Removes a node's spill files, and nothing else that may be beside them. What stays costs only its space.
    fn remove_spill(&self, name: &str) {
        for dir in self.config.spill_of(name) {
            for core in 0..self.config.cores_per_node {
                let _ = std::fs::remove_file(dir.join(format!("spill-{core}.ebb")));
            }
            let _ = std::fs::remove_dir(dir);
        }
    }

    /// Stops every process: nodes, then the metadata plane, then S3.
    pub async fn stop_all(&mut self) {
        for process in self.nodes.values_mut() {
            process.stop(&self.layout, STOP_GRACE).await;
        }
        let layout = &self.layout;
        let voters = self.voters.values_mut().map(|p| p.stop(layout, STOP_GRACE));
        futures::future::join_all(voters).await;
        if let Some(s3) = &mut self.s3 {
            s3.stop(&self.layout, STOP_GRACE).await;
        }
    }

    /// Removes what the bucket makes superfluous, after a clean `ebb down`.
    pub fn wipe(&self) -> Result<(), Error> {
        let nodes = std::fs::read_dir(self.layout.nodes()).into_iter().flatten().flatten();
        for node in nodes {
            self.remove_spill(&node.file_name().to_string_lossy());
        }
        let voters = self.config.voters();
        let dirs = voters.iter().map(|v| self.layout.meta(v.id)).chain([self.layout.nodes()]);
        for dir in dirs {
            remove(&dir)?;
            std::fs::create_dir(&dir).map_err(Error::file("create", &dir))?;
        }
        if let Some(mut voters) = Voters::load(&self.layout)? {
            voters.refound();
            voters.save(&self.layout)?;
        }
        Ok(())
    }
}

fn remove(dir: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// The port of `{"address": "host:port"}` in a ready file.
fn port_of(process: &Process, layout: &Layout) -> Option<u16> {
    let ready = process.ready(layout)?;
    ready.get("address")?.as_str()?.rsplit_once(':')?.1.parse().ok()
}

/// What a data node said when it got ready, kept beside its store: its id, and the ports its
/// clients know.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// Its node id.
    pub node: u32,
    /// One port per core.
    pub ports: Vec<u16>,
}

impl Record {
    fn path(layout: &Layout, name: &str) -> PathBuf {
        layout.node(name).join("registered.json")
    }

    /// Beside the node's directory, which may be lost.
    fn ids_path(layout: &Layout, name: &str) -> PathBuf {
        layout.nodes().join(format!("ids-{name}"))
    }

    /// Nodes that a process was, oldest first: a store that was wiped registers as a new one.
    fn ids(layout: &Layout, name: &str) -> Vec<NodeId> {
        let text = std::fs::read_to_string(Self::ids_path(layout, name)).unwrap_or_default();
        let ids: Vec<u32> = serde_json::from_str(&text).unwrap_or_default();
        ids.into_iter().map(NodeId).collect()
    }

    /// What is known of a node.
    pub fn load(layout: &Layout, name: &str) -> Option<Self> {
        serde_json::from_str(&std::fs::read_to_string(Self::path(layout, name)).ok()?).ok()
    }

    /// Keeps what a ready node says, if it is news.
    fn keep(layout: &Layout, process: &Process) -> Result<(), Error> {
        let Some(ready) = process.ready(layout) else { return Ok(()) };
        let Ok(said) = serde_json::from_value::<Self>(ready) else { return Ok(()) };
        // A directory that is gone under a running process is made anew by the next one.
        let is_news = Self::load(layout, process.name()).as_ref() != Some(&said);
        if !is_news || !layout.node(process.name()).is_dir() {
            return Ok(());
        }
        let mut ids = Self::ids(layout, process.name());
        if !ids.contains(&NodeId(said.node)) {
            ids.push(NodeId(said.node));
            // What it was long ago is forgotten by now.
            ids.drain(..ids.len().saturating_sub(IDS_MAX));
            let text = serde_json::to_vec(&ids.iter().map(|id| id.0).collect::<Vec<_>>());
            let path = Self::ids_path(layout, process.name());
            write_atomically(&path, &text.unwrap_or_default(), 0o644)?;
        }
        let text = serde_json::to_vec(&said).unwrap_or_default();
        write_atomically(&Self::path(layout, process.name()), &text, 0o644)
    }
}
