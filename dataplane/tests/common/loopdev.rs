//! Block devices for tests: loop devices over files, where this machine lets us have them (root).

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; detached when dropped.
pub struct LoopDevice {
    pub path: PathBuf,
}

/// Runs a program; its output, or why not.
fn run(program: &str, args: &[&std::ffi::OsStr]) -> Result<String, String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if !out.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// A device of that many bytes over a new sparse file; `None`, and the reason on stdout, where there is
/// no such thing.
pub fn loop_device(file: &Path, bytes: u64, sector: u32) -> Option<LoopDevice> {
    std::fs::File::create(file).and_then(|f| f.set_len(bytes)).expect("a sparse file");
    let sector = sector.to_string();
    let args = ["--find", "--show", "--sector-size", &sector].map(std::ffi::OsStr::new);
    match run("losetup", &[&args[..], &[file.as_os_str()]].concat()) {
        Ok(path) => Some(LoopDevice { path: path.into() }),
        Err(why) => {
            println!("skipped: no loop device here ({why})");
            None
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach".as_ref(), self.path.as_os_str()]);
    }
}

/// A small file system in memory; unmounted when dropped.
pub struct Tmpfs {
    pub dir: PathBuf,
}

/// Mounts one of that many bytes; `None`, and the reason on stdout, where that is not allowed.
pub fn tmpfs(dir: &Path, bytes: u64) -> Option<Tmpfs> {
    std::fs::create_dir_all(dir).expect("directory");
    let size = format!("size={bytes}");
    let args = ["-t", "tmpfs", "-o", &size, "tmpfs"].map(std::ffi::OsStr::new);
    match run("mount", &[&args[..], &[dir.as_os_str()]].concat()) {
        Ok(_) => Some(Tmpfs { dir: dir.to_owned() }),
        Err(why) => {
            println!("skipped: no tmpfs here ({why})");
            None
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = run("umount", &["--lazy".as_ref(), self.dir.as_os_str()]);
    }
}
