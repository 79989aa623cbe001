//! Building the ring: the ladder of flags, the registrations, and what to tell a person when the
//! kernel refuses.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, Probe, opcode};
use nix::errno::Errno;

use crate::arena::Arena;
use crate::config::Config;
use crate::error::{SetupError, SetupWarning};
use crate::layout;
use crate::ring::Ring;
use crate::sys;

/// One rung: what it gives up against the best set, and what it still asks for.
struct Rung {
    lost: &'static str,
    no_sqarray: bool,
    defer: bool,
}

const LADDER: [Rung; 3] = [
    Rung { lost: "", no_sqarray: true, defer: true },
    // NO_SQARRAY came with Linux 6.6.
    Rung { lost: "NO_SQARRAY (Linux 6.6)", no_sqarray: false, defer: true },
    // SINGLE_ISSUER and DEFER_TASKRUN came with 6.0 and 6.1.
    Rung { lost: "DEFER_TASKRUN (Linux 6.1)", no_sqarray: false, defer: false },
];

pub(crate) struct Built {
    pub(crate) ring: Ring,
    pub(crate) arena: Arena,
    pub(crate) warnings: Vec<SetupWarning>,
}

/// Builds everything, starting at rung `first` of the ladder (0: the best; others are for tests).
pub(crate) fn build(cfg: &Config, first: usize) -> Result<Built, SetupError> {
    cfg.check().map_err(SetupError::Config)?;
    let plan = layout::plan(cfg)
        .map_err(|need| SetupError::ArenaTooSmall { have: cfg.arena_bytes, need })?;
    let mut warnings = Vec::new();

    let polled = match cfg.sqpoll_idle_ms {
        0 => None,
        // Before 5.11 it took a capability.
        idle_ms => open_polled(cfg, idle_ms)
            .map_err(|errno| {
                let what = "polling submissions by a kernel thread (SQPOLL)";
                warnings.push(SetupWarning::Optional { what, errno });
            })
            .ok(),
    };
    let sqpoll = polled.is_some();
    let (uring, lost) = match polled {
        Some(uring) => (uring, ""),
        None => open_ring(cfg, &LADDER[first..])?,
    };
    if !lost.is_empty() {
        warnings.push(SetupWarning::FewerFlags { lost });
    }
    register_files(&uring, cfg)?;

    let arena = Arena::new(plan).map_err(|errno| SetupError::Os {
        what: "mapping the buffer arena",
        source: errno.into(),
    })?;
    if !arena.is_huge() {
        warnings.push(SetupWarning::NoHugePages);
    }
    let fixed_buffers = cfg.register_arena && register_arena(&uring, &arena, &mut warnings);

    // Two kinds of kernel workers, bounded: regular files (fdatasync) and unbounded (sockets).
    optional(
        "bounding the io-wq workers",
        uring.submitter().register_iowq_max_workers(&mut [4, 1]),
        &mut warnings,
    );
    let probe = probe(&uring);
    let supports = |code: u8| probe.as_ref().is_some_and(|p| p.is_supported(code));
    // SAFETY: the descriptor belongs to `uring`, which outlives this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) };
    let registered_fd = match sys::register_ring_fd(fd) {
        Ok(index) => Some(index),
        Err(errno) => {
            warnings.push(SetupWarning::Optional { what: "registering the ring's file", errno });
            None
        }
    };
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let ring = Ring {
        registered_fd,
        no_iowait: uring.params().is_feature_no_iowait(),
        has_send_zc: supports(opcode::SendMsgZc::CODE),
        has_writev_fixed: supports(opcode::WritevFixed::CODE),
        fixed_buffers,
        sqpoll,
        uring,
    };
    Ok(Built { ring, arena, warnings })
}

fn open_ring(cfg: &Config, ladder: &[Rung]) -> Result<(IoUring, &'static str), SetupError> {
    let mut last = Errno::EINVAL;
    for rung in ladder {
        let mut builder = builder(cfg);
        builder.setup_taskrun_flag();
        if rung.defer {
            builder.setup_single_issuer().setup_defer_taskrun();
        } else {
            builder.setup_coop_taskrun();
        }
        if rung.no_sqarray {
            builder.setup_no_sqarray();
        }
        match finish(&builder, cfg) {
            Ok(ring) => return Ok((ring, rung.lost)),
            Err(Errno::EINVAL) => last = Errno::EINVAL,
            Err(errno) => return Err(explain("setting up the ring", errno, cfg)),
        }
    }
    Err(explain("setting up the ring", last, cfg))
}

/// What every ring has.
fn builder(cfg: &Config) -> io_uring::Builder {
    let mut builder = IoUring::builder();
    builder.dontfork().setup_clamp().setup_submit_all().setup_cqsize(cfg.entries * 4);
    builder
}

fn finish(builder: &io_uring::Builder, cfg: &Config) -> Result<IoUring, Errno> {
    match builder.build(cfg.entries) {
        // Without NODROP (5.5) completions could be lost; without EXT_ARG (5.11) a turn
        // could not time out.
        Ok(ring) if ring.params().is_feature_nodrop() && ring.params().is_feature_ext_arg() => {
            Ok(ring)
        }
        Ok(_) => Err(Errno::EINVAL),
        Err(e) => Err(errno_of(&e)),
    }
}

/// With a kernel thread that submits. It runs the completions as well, so the kernel refuses the
/// flags that say when this thread does.
fn open_polled(cfg: &Config, idle_ms: u32) -> Result<IoUring, Errno> {
    let mut best = builder(cfg);
    best.setup_sqpoll(idle_ms);
    let plain = best.clone();
    best.setup_no_sqarray();
    finish(&best, cfg).or_else(|_| finish(&plain, cfg))
}

fn register_files(uring: &IoUring, cfg: &Config) -> Result<(), SetupError> {
    let wanted = cfg.fixed_files();
    // The table is bounded by the open-files limit, and each entry also has a descriptor here.
    let limit = sys::raise_open_files(u64::from(wanted) + 128);
    match uring.submitter().register_files_sparse(wanted) {
        Ok(()) => Ok(()),
        Err(e) => Err(match errno_of(&e) {
            Errno::EMFILE => SetupError::OpenFiles { wanted, limit },
            errno => explain("registering the file table", errno, cfg),
        }),
    }
}

/// `false`, with a warning, when the memlock limit or the kernel forbids it.
fn register_arena(uring: &IoUring, arena: &Arena, warnings: &mut Vec<SetupWarning>) -> bool {
    // SAFETY: the entries cover exactly the arena's mapping. The reactor owns ring and arena, drops
    // the ring first, and the kernel pins the pages of a registered buffer until then.
    let result = unsafe { uring.submitter().register_buffers(&arena.entries()) };
    match result {
        Ok(()) => true,
        Err(e) => {
            warnings.push(SetupWarning::ArenaUnregistered {
                bytes: arena.bytes(),
                limit: sys::memlock_limit(),
                errno: errno_of(&e),
            });
            false
        }
    }
}

fn optional(what: &'static str, result: io::Result<()>, warnings: &mut Vec<SetupWarning>) {
    if let Err(e) = result {
        warnings.push(SetupWarning::Optional { what, errno: errno_of(&e) });
    }
}

fn probe(uring: &IoUring) -> Option<Probe> {
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe).ok()?;
    Some(probe)
}

fn errno_of(e: &io::Error) -> Errno {
    Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))
}

/// Turns the kernel's answer into what a person can do about it.
pub(crate) fn explain(what: &'static str, errno: Errno, cfg: &Config) -> SetupError {
    match errno {
        Errno::ENOMEM => {
            // 64 bytes a submission entry, 16 a completion of which there are four times as many,
            // and the arena.
            let ring = u64::from(cfg.entries) * (64 + 4 * 16) + 8192;
            let arena = if cfg.register_arena { cfg.arena_bytes as u64 } else { 0 };
            let need = (ring + arena).div_ceil(1024);
            SetupError::Memlock { what, limit: sys::memlock_limit(), need }
        }
        Errno::EPERM | Errno::EACCES => {
            SetupError::Forbidden { what, sysctl: sys::io_uring_sysctl() }
        }
        Errno::ENOSYS | Errno::EINVAL | Errno::EOPNOTSUPP => {
            SetupError::KernelTooOld { what, kernel: sys::kernel_release(), errno }
        }
        errno => SetupError::Os { what, source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_says_what_to_do() {
        let cfg = Config::default();
        let text = |errno| explain("setting up the ring", errno, &cfg).to_string();
        for word in ["memlock limit is", "KiB are needed", "ulimit -l", "LimitMEMLOCK=infinity"] {
            assert!(text(Errno::ENOMEM).contains(word), "{}", text(Errno::ENOMEM));
        }
        for word in ["seccomp", "kernel.io_uring_disabled", "io_uring_setup"] {
            assert!(text(Errno::EPERM).contains(word), "{}", text(Errno::EPERM));
        }
        for errno in [Errno::ENOSYS, Errno::EINVAL] {
            assert!(text(errno).contains("too old") && text(errno).contains("5.19"));
            assert!(text(errno).contains(&sys::kernel_release()));
        }
        assert!(text(Errno::ENFILE).contains("setting up the ring"));
    }
}
