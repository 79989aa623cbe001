//! One supervised server process: started in its own process group with its output in a log,
//! found again by its pid file after the controller died, restarted with back-off when it dies.

use crate::error::ControllerError as Error;
use crate::layout::{Layout, write_atomically};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Pause before a restart: doubles while the process keeps dying young.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A process that lived this long is not dying young.
const YOUNG: Duration = Duration::from_secs(5);
/// Log files are cut to nothing at a start when they passed this size (I9).
const LOG_BYTES_MAX: u64 = 64 << 20;

/// What to run.
#[derive(Clone, Debug)]
pub struct CommandSpec {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment beside the inherited one.
    pub env: Vec<(String, String)>,
}

/// A process under supervision.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Option<Pid>,
    started: Option<Instant>,
    backoff: Duration,
    not_before: Option<Instant>,
    restarts: u64,
}

/// Start time of a process in clock ticks since boot: tells a recycled pid from the old process.
fn start_ticks(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may hold spaces; a zombie is as good as dead.
    let rest = &stat[stat.rfind(')')? + 2..];
    let mut fields = rest.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The process a pid file names, if it still lives.
pub fn living(layout: &Layout, name: &str) -> Option<Pid> {
    let text = std::fs::read_to_string(layout.run(&format!("{name}.pid"))).ok()?;
    let (pid, ticks) = text.trim().split_once(' ')?;
    let pid = Pid::from_raw(pid.parse().ok()?);
    (start_ticks(pid)? == ticks.parse::<u64>().ok()?).then_some(pid)
}

/// Writes a pid file for a process.
pub fn write_pid(layout: &Layout, name: &str, pid: Pid) -> Result<(), Error> {
    let ticks = start_ticks(pid).unwrap_or(0);
    write_atomically(
        &layout.run(&format!("{name}.pid")),
        format!("{pid} {ticks}\n").as_bytes(),
        0o644,
    )
}

impl Process {
    /// A process by name; adopts the one that runs already.
    pub fn adopt(layout: &Layout, name: &str) -> Self {
        let pid = living(layout, name);
        if let Some(pid) = pid {
            tracing::info!(name, %pid, "taken over");
        }
        Self {
            name: name.to_owned(),
            pid,
            started: pid.map(|_| Instant::now()),
            backoff: BACKOFF_MIN,
            not_before: None,
            restarts: 0,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Its pid while it runs.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }
    /// How often it was restarted by this controller.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }
    /// Its ready file.
    pub fn ready_file(&self, layout: &Layout) -> PathBuf {
        layout.run(&format!("{}.ready", self.name))
    }
    /// What it said when it became ready, as JSON.
    pub fn ready(&self, layout: &Layout) -> Option<serde_json::Value> {
        self.pid?;
        serde_json::from_str(&std::fs::read_to_string(self.ready_file(layout)).ok()?).ok()
    }

    /// Notices a death. True if it runs.
    pub fn check(&mut self) -> bool {
        let Some(pid) = self.pid else { return false };
        // Our own child must be reaped; an adopted one is init's.
        let dead = match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => false,
            Ok(status) => {
                tracing::warn!(name = self.name, ?status, "server process ended");
                true
            }
            Err(_) => start_ticks(pid).is_none(),
        };
        if dead {
            let young = self.started.is_some_and(|s| s.elapsed() < YOUNG);
            let pause = if young { self.backoff } else { BACKOFF_MIN };
            self.backoff = (pause * 2).min(BACKOFF_MAX);
            self.not_before = Some(Instant::now() + pause);
            self.pid = None;
        }
        !dead
    }

    /// Starts it unless it runs or its back-off lasts. True if it was started now.
    pub fn ensure(&mut self, layout: &Layout, spec: &CommandSpec) -> Result<bool, Error> {
        if self.check() || self.not_before.is_some_and(|t| Instant::now() < t) {
            return Ok(false);
        }
        let ready = self.ready_file(layout);
        let _ = std::fs::remove_file(&ready);
        let log_path = layout.log(&self.name);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(Error::file("open", &log_path))?;
        if log.metadata().map(|m| m.len()).unwrap_or(0) > LOG_BYTES_MAX {
            log.set_len(0).map_err(Error::file("cut", &log_path))?;
        }
        let log2 = log.try_clone().map_err(Error::file("open", &log_path))?;
        let child = Command::new(&spec.program)
            .args(&spec.args)
            .envs(spec.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log2)
            .process_group(0)
            .spawn()
            .map_err(Error::file("run", &spec.program))?;
        let pid = Pid::from_raw(child.id() as i32);
        write_pid(layout, &self.name, pid)?;
        if self.started.is_some() {
            self.restarts += 1;
            tracing::warn!(name = self.name, %pid, restarts = self.restarts, "restarted");
        } else {
            tracing::info!(name = self.name, %pid, "started");
        }
        self.pid = Some(pid);
        self.started = Some(Instant::now());
        Ok(true)
    }

    /// Asks it to stop; kills it after `grace`.
    pub async fn stop(&mut self, layout: &Layout, grace: Duration) {
        if let Some(pid) = self.pid {
            let _ = kill(pid, Signal::SIGTERM);
            let deadline = Instant::now() + grace;
            let mut killed = false;
            while self.check() {
                if Instant::now() > deadline && !killed {
                    tracing::warn!(name = self.name, "does not stop: killed");
                    let _ = kill(pid, Signal::SIGKILL);
                    killed = true;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let _ = std::fs::remove_file(layout.run(&format!("{}.pid", self.name)));
        let _ = std::fs::remove_file(self.ready_file(layout));
    }

    /// The end of its log, for an error message.
    pub fn last_words(&self, layout: &Layout) -> String {
        let text = std::fs::read(layout.log(&self.name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
        let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join(" | ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout) {
        let dir = tempfile::tempdir().expect("tempdir");
        for sub in ["run", "log"] {
            std::fs::create_dir(dir.path().join(sub)).expect("mkdir");
        }
        let layout = Layout::new(dir.path());
        (dir, layout)
    }

    fn sleeper() -> CommandSpec {
        CommandSpec { program: "/bin/sleep".into(), args: vec!["1000".into()], env: vec![] }
    }

    #[tokio::test]
    async fn a_killed_process_is_noticed_and_restarted() {
        let (_dir, layout) = layout();
        let mut p = Process::adopt(&layout, "x");
        assert!(p.ensure(&layout, &sleeper()).expect("starts"));
        assert!(!p.ensure(&layout, &sleeper()).expect("runs already"));
        let first = p.pid().expect("runs");
        kill(first, Signal::SIGKILL).expect("killed");
        let deadline = Instant::now() + Duration::from_secs(10);
        while p.pid() == Some(first) || p.pid().is_none() {
            p.ensure(&layout, &sleeper()).expect("restarts");
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(p.restarts(), 1);
        p.stop(&layout, Duration::from_secs(5)).await;
        assert!(living(&layout, "x").is_none());
    }

    #[tokio::test]
    async fn a_new_controller_takes_the_running_process_over() {
        let (_dir, layout) = layout();
        let mut first = Process::adopt(&layout, "x");
        first.ensure(&layout, &sleeper()).expect("starts");
        let pid = first.pid();
        drop(first);
        let mut second = Process::adopt(&layout, "x");
        assert_eq!(second.pid(), pid);
        assert!(!second.ensure(&layout, &sleeper()).expect("nothing to start"));
        second.stop(&layout, Duration::from_secs(5)).await;
    }

    #[test]
    fn a_recycled_pid_is_not_taken_over() {
        let (_dir, layout) = layout();
        let me = std::process::id();
        std::fs::write(layout.run("x.pid"), format!("{me} 1\n")).expect("write");
        assert!(living(&layout, "x").is_none());
    }
}
