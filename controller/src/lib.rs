//! The controller: decides the node set and the placement, and drives a provisioner.
//!
//! It keeps no state of its own: the wish (`ebb scale N`), the map and the dirtiness are in the
//! metadata plane, the processes are found again by their pid files. So it can die at any moment
//! and the next one takes over ([`local`]).
//!
//! * [`plan`]: pure: status in, actions out (I8: a node goes only when nothing depends on it).
//! * [`layout`]: the directory of a local cluster.
//! * [`process`]: one supervised server process.
//! * [`local`]: the provisioner that runs a whole cluster on this machine.
//! * [`voters`]: which metadata servers there are on this machine.
//! * [`run`]: the loop that ties them together.

pub mod error;
pub mod layout;
pub mod local;
pub mod plan;
pub mod process;
pub mod run;
pub mod voters;

pub use error::ControllerError;
pub use layout::{ClusterConfig, Layout};
pub use local::{Launch, LocalCluster, Role};
pub use run::run;
