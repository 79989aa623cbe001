//! `ebb bench engines` of a program with and without the engines to compare with.

use std::process::Command;

#[test]
fn a_program_without_the_engines_says_what_to_build() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = Command::new(env!("CARGO_BIN_EXE_ebb"))
        .args(["bench", "engines", "--dir"])
        .arg(dir.path())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "there is no cluster to measure");
    let advice = "cargo build --release -p ebb --features engines";
    assert_eq!(said.contains(advice), !cfg!(feature = "engines"), "{said}");
    assert_eq!(said.contains("needs a cluster"), cfg!(feature = "engines"), "{said}");
}
