//! Mounts an Ebbtide file system through FUSE.
//!
//! A thin shim: it turns the kernel's requests into calls of [`ebb_client::FileSystem`], and results
//! into replies. No file-system logic, no error mapping beyond a number, no state but what belongs
//! to the kernel's view: open directory streams and what the kernel was last told of an inode.
//!
//! A request is begun on the FUSE thread that read it; what is not ready at once goes on as a tokio
//! task that replies when it is, so that a read waiting for S3 blocks nobody else.

mod convert;
mod directory;
mod filesystem;
mod known;
mod locks;
mod mount;
mod mountinfo;
mod telling;
mod xattr;

pub use mount::{MountConfig, MountError, mount, stop_signal, unmount};
