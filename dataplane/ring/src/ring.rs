//! The `io_uring` itself: pushing entries, entering the kernel, taking completions.
//!
//! The one place that decides the flags of `io_uring_enter`.

use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, squeue};
use nix::errno::Errno;

/// What the kernel's answer was worth to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    /// Submitted, waited, or timed out.
    Done,
    /// The kernel wants completions taken before it accepts more.
    Busy,
}

/// One completion, copied out of the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) res: i32,
    pub(crate) flags: u32,
}

pub(crate) struct Ring {
    pub(crate) uring: IoUring,
    /// Index of the ring in this thread's table, if it could be registered.
    pub(crate) registered_fd: Option<i32>,
    /// Linux 6.15: waiting is not charged as iowait.
    pub(crate) no_iowait: bool,
    /// SENDMSG_ZC is supported.
    pub(crate) has_send_zc: bool,
    /// WRITEV_FIXED is supported (Linux 6.15).
    pub(crate) has_writev_fixed: bool,
    /// The arena is registered.
    pub(crate) fixed_buffers: bool,
    /// A kernel thread takes what is queued; an enter only waits, or wakes that thread.
    pub(crate) sqpoll: bool,
}

impl Ring {
    /// Queues entries that belong together, all or none; `false` when the submission queue has no room for them.
    ///
    /// They become visible at once. A polling kernel thread may look between any two: a link of which it has seen
    /// only the first entry is over for it, and that operation runs alone, on a worker.
    ///
    /// # Safety
    /// Every address in `entries` must stay valid, and unaliased as far as the kernel writes there,
    /// until the final completion of the operation its `user_data` names.
    pub(crate) unsafe fn push(&mut self, entries: &[squeue::Entry]) -> bool {
        // SAFETY: handed on to the caller.
        unsafe { self.uring.submission().push_multiple(entries).is_ok() }
    }

    /// Whether entering is needed even with nothing to submit: the kernel has deferred work or
    /// completions that did not fit.
    fn kernel_has_work(&mut self) -> bool {
        let sq = self.uring.submission();
        sq.taskrun() || sq.cq_overflow()
    }

    /// Entries that can be queued before the next enter.
    fn room(&mut self) -> usize {
        let sq = self.uring.submission();
        sq.capacity() - sq.len()
    }

    pub(crate) fn queued(&mut self) -> usize {
        self.uring.submission().len()
    }

    /// One `io_uring_enter`: submits what is queued and waits for `want` completions at most for
    /// `timeout` (`None`: for ever). Skips the system call when it would do nothing.
    pub(crate) fn enter(&mut self, want: u32, timeout: Option<Duration>) -> Result<Entered, Errno> {
        let queued = self.queued();
        // GETEVENTS also with want == 0: deferred completions are only run by an enter that
        // carries it.
        let mut flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        let mut submit = queued > 0;
        if self.sqpoll {
            submit = false;
            // `need_wakeup` orders its look at the flag behind the entries pushed before it.
            if queued > 0 && self.uring.submission().need_wakeup() {
                flags |= EnterFlags::SQ_WAKEUP;
                submit = true;
            }
            if want == 0 && self.room() == 0 {
                // The caller has more; without this it would spin until the thread has taken some.
                flags |= EnterFlags::SQ_WAIT;
                submit = true;
            }
        }
        if want == 0 && !submit && !self.kernel_has_work() {
            return Ok(Entered::Done);
        }
        if self.no_iowait {
            flags |= EnterFlags::NO_IOWAIT;
        }
        let fd = match self.registered_fd {
            Some(index) => {
                flags |= EnterFlags::REGISTERED_RING;
                index
            }
            None => self.uring.as_raw_fd(),
        };
        let limit;
        let mut args = SubmitArgs::new();
        if let Some(timeout) = timeout {
            limit = Timespec::from(timeout);
            args = args.timespec(&limit);
        }
        match crate::sys::enter(fd, queued as u32, want, flags.bits(), &args) {
            // ETIME: the deadline passed. EINTR: a signal; the caller's loop comes back.
            Ok(_) | Err(Errno::ETIME | Errno::EINTR) => Ok(Entered::Done),
            Err(Errno::EAGAIN | Errno::EBUSY) => Ok(Entered::Busy),
            Err(errno) => Err(errno),
        }
    }

    /// Whether an enter that does not wait would bring a completion.
    pub(crate) fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty() || self.kernel_has_work()
    }

    /// Moves all completions into `out`.
    pub(crate) fn reap(&mut self, out: &mut Vec<Cqe>) {
        for cqe in self.uring.completion() {
            out.push(Cqe { user_data: cqe.user_data(), res: cqe.result(), flags: cqe.flags() });
        }
    }

    /// Puts `fd` (or nothing, -1) into entry `index` of the fixed-file table.
    pub(crate) fn set_file(&mut self, index: u32, fd: i32) -> Result<(), Errno> {
        match self.uring.submitter().register_files_update(index, &[fd]) {
            Ok(_) => Ok(()),
            Err(e) => Err(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))),
        }
    }
}
