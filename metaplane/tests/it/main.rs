//! The metadata server on real sockets, over the embedded S3 server and real data nodes. One program,
//! because each one links everything.

mod bucket;
mod common;
mod data;
mod faults;
mod followers;
mod names;
mod owner;
mod truncates;
mod voters;
mod xattrs;

/// The server of the kill tests, when this program runs itself as one; otherwise nothing.
#[test]
fn server_process() {
    common::serve_if_asked();
}
