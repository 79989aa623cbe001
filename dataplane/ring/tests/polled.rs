//! All tests of the ring once more, on a ring whose submissions a kernel thread takes (SQPOLL).
#![allow(clippy::duplicate_mod)] // each of them has its own `common`

#[path = "connect.rs"]
mod connect;
#[path = "disk.rs"]
mod disk;
#[path = "lifecycle.rs"]
mod lifecycle;
#[path = "net.rs"]
mod net;

#[path = "common/mod.rs"]
mod common;

#[test]
fn this_binary_polls_and_the_kernel_lets_it() {
    assert!(common::is_polled());
    let reactor = common::reactor();
    let said = format!("{:?}", reactor.warnings());
    assert!(!said.contains("SQPOLL"), "{said}");
}
