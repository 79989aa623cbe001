//! `ebb mount` and `ebb umount`.

use crate::args::{Cli, Mount, Umount};
use crate::exit::CliError;
use crate::{find, output};
use nix::mount::{MntFlags, umount2};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Time a detached mount gets to appear.
const MOUNT_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Refuses a mount point that will not do, in words.
pub(crate) fn check_mount_point(dir: &Path) -> Result<(), CliError> {
    match std::fs::metadata(dir) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => return Err(CliError::usage(format!("{} is not a directory", dir.display()))),
        Err(e) if e.raw_os_error() == Some(nix::libc::ENOTCONN) => {
            return Err(CliError::new(format!(
                "{0} is a mount whose process died: `ebb umount {0}` first",
                dir.display()
            )));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(CliError::usage(format!(
                "the mount point {0} does not exist: mkdir -p {0}",
                dir.display()
            )));
        }
        Err(e) => return Err(CliError::new(format!("{}: {e}", dir.display()))),
    }
    if mounted(dir) {
        return Err(CliError::new(format!("something is mounted on {} already", dir.display())));
    }
    if !Path::new("/dev/fuse").exists() {
        return Err(CliError::new(
            "/dev/fuse is missing: `modprobe fuse`, or give the container the device (--device /dev/fuse --cap-add SYS_ADMIN)",
        ));
    }
    Ok(())
}

/// Whether something is mounted exactly there.
fn mounted(dir: &Path) -> bool {
    let Ok(dir) = std::path::absolute(dir) else { return false };
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    table.lines().any(|line| {
        line.split(' ').nth(1).is_some_and(|p| Path::new(&p.replace("\\040", " ")) == dir)
    })
}

/// `ebb mount`
pub(crate) async fn mount(cli: &Cli, args: &Mount) -> Result<(), CliError> {
    let (source, dir) = match args.target.as_slice() {
        [dir] => (None, PathBuf::from(dir)),
        [source, dir] => (Some(source.clone()), PathBuf::from(dir)),
        _ => return Err(CliError::usage("ebb mount [SOURCE] DIR")),
    };
    check_mount_point(&dir)?;
    if args.foreground {
        return foreground(cli, source, &dir, &args.options).await;
    }
    // Wrong addresses and keys are told here and now, not in a log.
    find::meta(cli)?;
    detached(cli, source.as_deref(), &dir, &args.options).await?;
    if !cli.json {
        output::line(&format!("mounted on {}", dir.display()))?;
    }
    Ok(())
}

async fn foreground(
    cli: &Cli,
    source: Option<String>,
    dir: &Path,
    options: &[String],
) -> Result<(), CliError> {
    let (addresses, key) = find::cluster(cli)?;
    let addresses = source.map_or(addresses, |s| s.split(',').map(str::to_owned).collect());
    crate::launch::run_mount(addresses, key, dir, options).await
}

/// Mounts in a process of its own, for `ebb up --mount`.
pub(crate) async fn mount_detached(cli: &Cli, dir: &Path) -> Result<(), CliError> {
    detached(cli, None, dir, &[]).await
}

async fn detached(
    cli: &Cli,
    source: Option<&str>,
    dir: &Path,
    options: &[String],
) -> Result<(), CliError> {
    let dir =
        std::path::absolute(dir).map_err(|e| CliError::usage(format!("{}: {e}", dir.display())))?;
    let program =
        std::env::current_exe().map_err(|e| CliError::new(format!("cannot find myself: {e}")))?;
    let layout = find::layout(cli)?;
    let log_path = if layout.exists() {
        layout.log("mount")
    } else {
        std::env::temp_dir().join(format!("ebb-mount-{}.log", std::process::id()))
    };
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(&log_path);
    let (out, err) = open()
        .and_then(|f| Ok((f.try_clone()?, f)))
        .map_err(|e| CliError::new(format!("{}: {e}", log_path.display())))?;
    let mut command = Command::new(program);
    command.arg("mount").arg("--foreground").arg("--dir").arg(layout.dir());
    if let Some(cluster) = &cli.cluster {
        command.arg("--cluster").arg(cluster);
    }
    if let Some(key) = &cli.key_file {
        command.arg("--key-file").arg(key);
    }
    if !options.is_empty() {
        command.arg("-o").arg(options.join(","));
    }
    command.args(source).arg(&dir);
    if std::env::var_os("EBB_LOG").is_none() {
        command.env("EBB_LOG", "warn");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0)
        .spawn()
        .map_err(|e| CliError::new(format!("cannot start the mount: {e}")))?;
    let deadline = Instant::now() + MOUNT_PATIENCE;
    while !mounted(&dir) {
        if let Ok(Some(status)) = child.try_wait() {
            let text = std::fs::read_to_string(&log_path).unwrap_or_default();
            let words = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
            return Err(CliError::new(format!(
                "cannot mount ({status}): {}",
                words.trim_start_matches("ebb: ")
            )));
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            return Err(CliError::new(format!(
                "the mount does not appear; see {}",
                log_path.display()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// `ebb umount`
pub(crate) async fn umount(args: &Umount) -> Result<(), CliError> {
    if !mounted(&args.target) {
        return Err(CliError::usage(format!("nothing is mounted on {}", args.target.display())));
    }
    unmount(&args.target, args.lazy)
}

/// Unmounts, as root directly, else by fusermount3.
pub(crate) fn unmount(dir: &Path, lazy: bool) -> Result<(), CliError> {
    let dir =
        std::path::absolute(dir).map_err(|e| CliError::usage(format!("{}: {e}", dir.display())))?;
    let busy = || {
        CliError::new(format!(
            "{0} is busy: close what uses it (`fuser -vm {0}`), or `ebb umount --lazy {0}`",
            dir.display()
        ))
    };
    if nix::unistd::geteuid().is_root() {
        let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        return umount2(&dir, flags).map_err(|e| match e {
            nix::errno::Errno::EBUSY => busy(),
            e => CliError::new(format!("cannot unmount {}: {e}", dir.display())),
        });
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg(&dir);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(busy()),
        Err(e) => Err(CliError::new(format!("cannot run fusermount3: {e}"))),
    }
}
