//! `ebb`: the one binary.
fn main() {}
