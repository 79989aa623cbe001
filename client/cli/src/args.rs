//! The command line.

use clap::{Args, Parser, Subcommand};
use ebb_bench::chunk::Operation;
use ebb_bench::engines::{Engine, Job};
use ebb_bench::recovery::Shape;
use std::path::PathBuf;

/// Ebbtide: an elastic file system over S3.
#[derive(Parser, Debug)]
#[command(name = "ebb", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Directory of the local cluster
    #[arg(long, global = true, env = "EBB_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Metadata servers of the cluster, HOST:PORT[,…]; default: the local cluster in --dir
    #[arg(long, global = true, env = "EBB_CLUSTER", value_name = "HOST:PORT")]
    pub cluster: Option<String>,
    /// File with the cluster key; default: DIR/key
    #[arg(long, global = true, env = "EBB_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Machine-readable output
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Start a cluster on this machine (or take a running one over)
    Up(Up),
    /// Flush everything to S3, then stop; refuses to drop dirty data
    Down(Down),
    /// Nodes, placement groups, dirty bytes and their age, usage
    Status,
    /// Data nodes: list them, or give one up that never comes back
    Node(Node),
    /// Voters of the metadata plane: list, add, remove, or replace one whose disk is gone
    Meta(Meta),
    /// Resize to N data nodes; 0 is allowed; dirty data goes to S3 first
    Scale(Scale),
    /// Mount the file system
    Mount(Mount),
    /// Unmount it
    Umount(Umount),
    /// Copy files: local paths and ebb:/path, either way
    Cp(Cp),
    /// List a directory
    Ls(Ls),
    /// Print files
    Cat(Paths),
    /// Show attributes
    Stat(Paths),
    /// Make directories
    Mkdir(Mkdir),
    /// Rename
    Mv(Mv),
    /// Remove
    Rm(Rm),
    /// Put a subtree into S3 now
    Flush(FlushArgs),
    /// Drop a subtree's clean data from the cache
    Evict(OnePath),
    /// Bring a subtree's data into the cache
    Warm(OnePath),
    /// Check the namespace of a running cluster, or, with --device, shard files offline
    #[command(
        long_about = "Checks the namespace while the cluster serves: every inode, name, key, handle and count \
against the others, and what the data nodes have that is not in S3 against what the namespace knows of. With \
--repair, mends what follows from something else; nothing that has a name, and no byte, is given up for it. With \
--device, checks shard files of stopped nodes instead: every structure, every block's checksum; changes nothing."
    )]
    Fsck(Fsck),
    /// Print the environment for other S3 tools (`eval "$(ebb env)"`)
    Env,
    /// Measure
    Bench(Bench),
    /// Run one server (used by `ebb up`, and in production)
    Serve(Serve),
}

/// `ebb up`
#[derive(Args, Debug)]
pub(crate) struct Up {
    /// Data nodes to start with
    #[arg(long, value_name = "N")]
    pub nodes: Option<u32>,
    /// Metadata servers (voters): of 3 one may be lost, of 5 two; default: 1, or as it was
    #[arg(long, value_name = "1|3|5", value_parser = parse_voters)]
    pub meta: Option<u8>,
    /// Start no data node here: they run on other machines (`ebb serve data`), and --nodes says how many are wanted
    #[arg(long)]
    pub nodes_elsewhere: bool,
    /// Bucket and prefix, s3://BUCKET[/PREFIX]; default: the embedded S3 server's s3://ebb
    #[arg(long, value_name = "S3-URL")]
    pub bucket: Option<String>,
    /// Endpoint of the S3 server; default: AWS_ENDPOINT_URL, else AWS
    #[arg(long, value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// Mount it there, too
    #[arg(long, value_name = "DIR")]
    pub mount: Option<PathBuf>,
    /// Return once it serves, and leave it running
    #[arg(long)]
    pub detach: bool,
    /// Device space of each data node
    #[arg(long, value_name = "BYTES", default_value = "2GiB", value_parser = parse_bytes)]
    pub node_capacity: u64,
    /// Cores of each data node
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub cores: u16,
    /// Buffer arena of each core
    #[arg(long, value_name = "BYTES", default_value = "128MiB", value_parser = parse_bytes)]
    pub arena: u64,
    /// RAM for the index of each data node, at least 16MiB: about 400 bytes for a small file, 1.1 KiB per MiB of large ones
    #[arg(long, value_name = "BYTES", default_value = "144MiB", value_parser = parse_bytes)]
    pub index: u64,
    /// RAM of each data node for copies of what is read again and again (the dram tier); it fills as it is used, 0: none
    #[arg(long, value_name = "BYTES", default_value = "32MiB", value_parser = parse_bytes)]
    pub dram: u64,
    /// Space of each data node for clean data that its device has no room for any more (the spill tier), in files under --spill-dir
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, requires = "spill_dir")]
    pub spill: Option<u64>,
    /// Directory on a slower and larger disk for the spill tier; several for several disks, at most one per core
    #[arg(long, value_name = "DIR", requires = "spill")]
    pub spill_dir: Vec<PathBuf>,
    /// Data nodes send large answers without copying them (SENDMSG_ZC): slower on loopback, worth a measurement on a fast network
    #[arg(long)]
    pub send_zc: bool,
    /// A kernel thread takes each core's submissions (SQPOLL) and sleeps after MS without one; it needs a processor of its own. 0: none
    #[arg(long, value_name = "MS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=60_000))]
    pub sqpoll: u32,
    /// A core under load looks for what comes next for US microseconds before it sleeps; it uses all of its processor then. 0: it sleeps
    #[arg(long, value_name = "US", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub spin: u32,
    /// Dirty data goes to S3 after this many ms, or earlier when a node fills up
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    pub flush_after: u64,
    /// Copies of what is not in S3 yet, each on a node of its own; default: 1, or as it was
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub replicas: Option<u8>,
    /// Refuse writes while fewer copies than this are complete; default: 1, or as it was
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub min_in_sync: Option<u8>,
    /// Take over a bucket whose cluster is gone for good without `ebb down`; what it had not flushed is lost
    #[arg(long)]
    pub steal_bucket: bool,
    /// Address to listen on
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,
    /// Port of the (first) metadata server; default: any free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub meta_port: u16,
    /// Port of the embedded S3 server; default: any free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub s3_port: u16,
}

/// `ebb fsck`
#[derive(Args, Debug)]
pub(crate) struct Fsck {
    /// Shard files or block devices (DIR/nodes/node-*/shard-*.ebb); their node must not run
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "repair")]
    pub device: Vec<PathBuf>,
    /// Mend what is found
    #[arg(long)]
    pub repair: bool,
}

/// `ebb down`
#[derive(Args, Debug)]
pub(crate) struct Down {
    /// Stop at once and keep dirty data in DIR for the next `ebb up`
    #[arg(long, conflicts_with = "abandon")]
    pub keep: bool,
    /// Stop and DROP data that is not in S3
    #[arg(long)]
    pub abandon: bool,
    /// Give up (and change nothing) when no progress was made for this many seconds
    #[arg(long, value_name = "S", default_value_t = 60)]
    pub patience: u64,
}

/// `ebb node`
#[derive(Args, Debug)]
pub(crate) struct Node {
    /// What to do
    #[command(subcommand)]
    pub what: NodeWhat,
}

/// What to do with nodes.
#[derive(Subcommand, Debug)]
pub(crate) enum NodeWhat {
    /// Every node: state, groups, dirty data, and since when it is cut off
    List,
    /// What would be lost with a node that never comes back; with --yes, give it up
    Abandon(NodeAbandon),
}

/// `ebb node abandon`
#[derive(Args, Debug)]
pub(crate) struct NodeAbandon {
    /// The node's number in `ebb node list`; it must be cut off
    pub node: u32,
    /// GIVE UP what only this node has: files go back to what is in S3; those that never were there are lost
    #[arg(long)]
    pub yes: bool,
}

/// `ebb meta`
#[derive(Args, Debug)]
pub(crate) struct Meta {
    /// What to do
    #[command(subcommand)]
    pub what: MetaWhat,
}

/// What to do with the metadata plane.
#[derive(Subcommand, Debug)]
pub(crate) enum MetaWhat {
    /// Every voter: number, address, role, and how far it is behind
    List,
    /// Start one more metadata server and make it a voter, or take one in that runs elsewhere
    Add(MetaAdd),
    /// Take a voter out of the group; one that `ebb up` started is stopped and its directory removed
    Remove(MetaId),
    /// Add a voter in the place of one that never comes back, e.g. because its disk is gone
    Replace(MetaId),
    /// Write all names, attributes and where in the bucket the bytes are to a file, while the cluster serves
    Dump(MetaDump),
    /// Make the namespace of a dump in a new cluster over the same bucket, before anybody mounts it
    #[command(
        long_about = "Makes the namespace of a dump in a new cluster over the same bucket, before anybody mounts it: \
for when all metadata servers are lost, or to start without listing a large bucket. Nothing in the bucket is \
deleted or overwritten by it; what changed there since the dump is noticed when it is looked at. Bytes that \
only data nodes had are not in a dump: files with such go back to their last object, or are lost, and with any of \
them the load has to be told to --give-up-unstored. A load that was interrupted goes on when it is repeated."
    )]
    Load(MetaLoad),
}

/// `ebb meta dump`
#[derive(Args, Debug)]
pub(crate) struct MetaDump {
    /// Where to: a new file, or `-` for standard output
    pub file: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
}

/// `ebb meta load`
#[derive(Args, Debug)]
pub(crate) struct MetaLoad {
    /// What `ebb meta dump` wrote
    pub file: PathBuf,
    /// Files of which only data nodes had something go back to their last object; those without one are lost
    #[arg(long)]
    pub give_up_unstored: bool,
}

/// `ebb meta add`
#[derive(Args, Debug)]
pub(crate) struct MetaAdd {
    /// Where the server answers that was started elsewhere (`ebb serve meta` with `join = true`)
    #[arg(long, value_name = "HOST:PORT", requires = "id")]
    pub address: Option<String>,
    /// Its `node_id`; no number may be used twice
    #[arg(long, value_name = "N", requires = "address")]
    pub id: Option<u64>,
}

/// A voter.
#[derive(Args, Debug)]
pub(crate) struct MetaId {
    /// The voter's number in `ebb meta list`
    pub voter: u64,
}

/// `ebb scale`
#[derive(Args, Debug)]
pub(crate) struct Scale {
    /// Data nodes
    pub nodes: u32,
    /// Return when it is done
    #[arg(long)]
    pub wait: bool,
    /// Fail after this many seconds and leave the cluster as it was (with --wait)
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub deadline: u64,
}

/// `ebb mount`
#[derive(Args, Debug)]
pub(crate) struct Mount {
    /// [SOURCE] DIR; SOURCE is HOST:PORT of a metadata server
    #[arg(num_args = 1..=2, required = true, value_name = "[SOURCE] DIR")]
    pub target: Vec<String>,
    /// Stay in the foreground
    #[arg(long, short)]
    pub foreground: bool,
    /// Mount options of mount(8) and fstab, separated by commas (ro, allow_other, …)
    #[arg(short = 'o', value_name = "OPTIONS", value_delimiter = ',')]
    pub options: Vec<String>,
}

/// `ebb umount`
#[derive(Args, Debug)]
pub(crate) struct Umount {
    /// Mount point
    pub target: PathBuf,
    /// Detach even if it is busy
    #[arg(long, short)]
    pub lazy: bool,
}

/// `ebb cp`
#[derive(Args, Debug)]
pub(crate) struct Cp {
    /// Copy directories
    #[arg(short, long)]
    pub recursive: bool,
    /// Files in flight
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: u16,
    /// Sources, then the target
    #[arg(num_args = 2.., required = true, value_name = "SOURCE… TARGET")]
    pub paths: Vec<String>,
}

/// `ebb ls`
#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// Modes, owners, sizes and times
    #[arg(short, long)]
    pub long: bool,
    /// Directory or file
    #[arg(default_value = "/")]
    pub path: String,
}

/// Commands on several paths.
#[derive(Args, Debug)]
pub(crate) struct Paths {
    /// Paths in the file system (ebb:/path or /path)
    #[arg(required = true)]
    pub paths: Vec<String>,
}

/// Commands on one path.
#[derive(Args, Debug)]
pub(crate) struct OnePath {
    /// Path in the file system
    pub path: String,
}

/// `ebb mkdir`
#[derive(Args, Debug)]
pub(crate) struct Mkdir {
    /// Parents too; no error if it exists
    #[arg(short, long)]
    pub parents: bool,
    /// Directories
    #[arg(required = true)]
    pub paths: Vec<String>,
}

/// `ebb mv`
#[derive(Args, Debug)]
pub(crate) struct Mv {
    /// Old path
    pub source: String,
    /// New path, or a directory to move into
    pub target: String,
}

/// `ebb rm`
#[derive(Args, Debug)]
pub(crate) struct Rm {
    /// Directories and what is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// No error if it does not exist
    #[arg(short, long)]
    pub force: bool,
    /// Paths
    #[arg(required = true)]
    pub paths: Vec<String>,
}

/// `ebb flush`
#[derive(Args, Debug)]
pub(crate) struct FlushArgs {
    /// Subtree
    #[arg(default_value = "/")]
    pub path: String,
    /// Return when everything that is dirty now is in S3
    #[arg(long)]
    pub wait: bool,
}

/// `ebb bench`
#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// What to measure
    #[command(subcommand)]
    pub what: BenchWhat,
}

/// What to measure.
#[derive(Subcommand, Debug)]
pub(crate) enum BenchWhat {
    /// Reads and writes of chunks against the running cluster
    Chunk(BenchChunk),
    /// Whole jobs through a mount point, and on a plain directory
    Mount(BenchMount),
    /// Creates, stats, listings, renames and unlinks by many clients of the metadata servers
    Meta(BenchMeta),
    /// Resident memory of servers and mounts, and of an index of a large cache
    Memory(BenchMemory),
    /// How long opening a full shard takes; needs no cluster
    Recovery(BenchRecovery),
    /// Chunk reads by one core, and the same by minimal servers on other I/O engines
    Engines(BenchEngines),
    /// A minimal server of `engines`
    #[command(hide = true)]
    EngineServer(BenchEngineServer),
    /// What concurrent clients saw, and whether there is an order that explains it: no figures, a test
    History(BenchHistory),
    /// Everything that is promised, in one run: chunk --baseline, mount, memory, recovery
    All(BenchMount),
}

/// `ebb bench chunk`
#[derive(Args, Debug)]
pub(crate) struct BenchChunk {
    /// Bytes of each request
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_values = ["4KiB", "64KiB", "1MiB"], value_parser = parse_bytes)]
    pub size: Vec<u64>,
    /// Requests in flight
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1u32, 16])]
    pub depth: Vec<u32>,
    /// Seconds of each measurement
    #[arg(long, value_name = "S", default_value_t = 5)]
    pub seconds: u64,
    /// Bytes of the file it makes (/.ebb-bench, removed afterwards)
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    pub file: u64,
    /// Only some of read, write (durable on its node) and write+fsync (committed as well); or read-dram: of what the
    /// nodes have in memory
    #[arg(long, value_name = "OPERATION", value_delimiter = ',')]
    pub only: Vec<Operation>,
    /// Runs; figures are their medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Also run fio (in --dir), iperf3 (loopback) and, for read-dram, redis-server, turn by turn, and print the ratios
    #[arg(long)]
    pub baseline: bool,
    /// Ask all server cores, not one
    #[arg(long)]
    pub all_cores: bool,
    /// Measure another cluster of this machine in turn, and print the ratios: of another version, or with other settings
    #[arg(long, value_name = "DIR", conflicts_with = "baseline")]
    pub beside: Option<PathBuf>,
}

/// `ebb bench mount`
#[derive(Args, Debug)]
pub(crate) struct BenchMount {
    /// The mount point, or a directory under it
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// Directory of another file system, to compare with
    #[arg(long, value_name = "DIR")]
    pub plain: Option<PathBuf>,
    /// Runs; figures are their medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Bytes of the large file
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_bytes)]
    pub file: u64,
    /// Small files
    #[arg(long, value_name = "N", default_value_t = 5000)]
    pub files: u32,
    /// Seconds of random reads
    #[arg(long, value_name = "S", default_value_t = 3)]
    pub seconds: u64,
}

/// `ebb bench meta`
#[derive(Args, Debug)]
pub(crate) struct BenchMeta {
    /// Clients at once, each with a session, a connection and a directory of its own
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub clients: u32,
    /// Files of each client
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub files: u32,
    /// Runs; figures are their medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Also fill one directory with so many entries, and list it
    #[arg(long, value_name = "ENTRIES", default_value_t = 0)]
    pub entries: u32,
    /// Also measure what metadata servers answer that do not lead; the library's clients, which have leases, are left out
    #[arg(long)]
    pub followers: bool,
    /// Do the same with system calls in the cluster's directory, and run Redis there, turn by turn
    #[arg(long)]
    pub baseline: bool,
}

/// `ebb bench engines`
#[derive(Args, Debug)]
pub(crate) struct BenchEngines {
    /// Bytes of each request (up to 1 MiB) and requests in flight
    #[arg(long, value_name = "BYTES:N", value_delimiter = ',', default_values = ["1MiB:16", "4KiB:32"], value_parser = parse_job)]
    pub job: Vec<Job>,
    /// Connections that carry them
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub connections: u32,
    /// Seconds of each measurement
    #[arg(long, value_name = "S", default_value_t = 5)]
    pub seconds: u64,
    /// Bytes of the two files it makes (/.ebb-bench-engines, and one in --dir; removed afterwards)
    #[arg(long, value_name = "BYTES", default_value = "256MiB", value_parser = parse_bytes)]
    pub file: u64,
    /// Runs; figures are their medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Leave out the minimal servers without checksums
    #[arg(long)]
    pub checksums_only: bool,
}

/// `ebb bench history`
#[derive(Args, Debug)]
pub(crate) struct BenchHistory {
    /// Seconds that the clients work
    #[arg(long, value_name = "S", default_value_t = 10)]
    pub seconds: u64,
    /// Clients of the library, each with a session of its own
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub clients: u32,
    /// Clients that send an unanswered request to the next metadata server after a moment
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub hasty: u32,
    /// Readers at each metadata server, whoever leads
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub readers: u32,
    /// Metadata servers that do not lead answer, too: clients of the library have no leases, and ask them; so do half of the reads of readers
    #[arg(long)]
    pub followers: bool,
    /// Where hasty clients and readers find the metadata servers, if not where everybody does
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub voters: Vec<String>,
    /// Trees that are checked each for itself
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub trees: u32,
    /// Names in a directory
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub names: u16,
    /// What the clients' choices come from; they still meet as they happen to; default: random
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Where to write the history, a JSON document per line; it is there, and empty, when the clients begin
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Only check this one, which was recorded before; needs no cluster
    #[arg(long, value_name = "FILE")]
    pub check: Option<PathBuf>,
    /// Configurations of a tree that the search enters at most
    #[arg(long, value_name = "N", default_value_t = 4_000_000)]
    pub limit: usize,
}

/// `ebb bench engine-server`
#[derive(Args, Debug)]
pub(crate) struct BenchEngineServer {
    /// On what it runs
    #[arg(long)]
    pub engine: Engine,
    /// The file it serves
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    /// The CPU it runs on
    #[arg(long, value_name = "N")]
    pub cpu: usize,
    /// Zeros in the place of checksums
    #[arg(long)]
    pub no_checksums: bool,
}

/// `ebb bench memory`
#[derive(Args, Debug)]
pub(crate) struct BenchMemory {
    /// Also fill an index, in memory only, as for this many GiB of cache; 0: not
    #[arg(long, value_name = "GIB", default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=4096))]
    pub index: u64,
}

/// `ebb bench recovery`
#[derive(Args, Debug)]
pub(crate) struct BenchRecovery {
    /// Where the shard is made and removed again, on the device to measure
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// Bytes of the shard; without --data it takes far less of the disk
    #[arg(long, value_name = "BYTES", default_value = "20GiB", value_parser = parse_bytes)]
    pub capacity: u64,
    /// How its data lies, if not in every way: whole-chunks, fragmented, small-files, tiny-files
    #[arg(long, value_name = "SHAPE", value_delimiter = ',')]
    pub shape: Vec<Shape>,
    /// Openings; figures are their medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub runs: u32,
    /// Write the cached blocks too, which opening does not read, and check them all in the end
    #[arg(long)]
    pub data: bool,
}

/// `ebb serve`
#[derive(Args, Debug)]
pub(crate) struct Serve {
    /// Which server
    #[command(subcommand)]
    pub what: ServeWhat,
}

/// A server.
#[derive(Subcommand, Debug)]
pub(crate) enum ServeWhat {
    /// The embedded S3 server
    S3(ConfigFile),
    /// A metadata server
    Meta(ConfigFile),
    /// A data node
    Data(ConfigFile),
    /// The controller of a local cluster
    Controller {
        /// The cluster's directory
        directory: PathBuf,
    },
}

/// A server's configuration.
#[derive(Args, Debug)]
pub(crate) struct ConfigFile {
    /// TOML file
    #[arg(long)]
    pub config: PathBuf,
}

/// "1MiB:16": bytes of a request, requests in flight.
fn parse_job(text: &str) -> Result<Job, String> {
    let (size, depth) = text.split_once(':').ok_or("write BYTES:N, as in 1MiB:16")?;
    let size = u32::try_from(parse_bytes(size)?).map_err(|_| "out of range")?;
    let depth = depth.parse().map_err(|_| format!("{depth:?} is not a number"))?;
    Ok(Job { size, depth })
}

/// "4096", "64KiB", "1.5GiB", "10MB".
pub(crate) fn parse_voters(text: &str) -> Result<u8, String> {
    match text {
        "1" | "3" | "5" => text.parse().map_err(|_| text.to_owned()),
        _ => {
            Err("1, 3 or 5: an even number survives no more losses than the odd one below it"
                .into())
        }
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        other => return Err(format!("unknown unit {other:?}: use KiB, MiB, GiB, TiB")),
    };
    let value: f64 = number.parse().map_err(|_| format!("{number:?} is not a number"))?;
    let bytes = value * factor as f64;
    if !(0.0..=1e15).contains(&bytes) {
        return Err("out of range".into());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_parse_as_people_write_them() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("64KiB"), Ok(65536));
        assert_eq!(parse_bytes("1.5g"), Ok(3 << 29));
        assert_eq!(parse_bytes("10MB"), Ok(10_000_000));
        assert!(parse_bytes("ten").is_err());
        assert!(parse_bytes("5 parsecs").is_err());
    }
}
