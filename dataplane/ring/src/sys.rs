//! The system calls that neither std, nix nor io-uring wrap the way this crate needs them, each
//! behind a safe function, and the one memory mapping.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use io_uring::types::SubmitArgs;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::error::{MemlockLimit, SysctlSays};

/// Opcode of `io_uring_register` that puts the ring's own descriptor into the task's table.
const IORING_REGISTER_RING_FDS: libc::c_uint = 20;

/// Mirrors `struct io_uring_rsrc_update` of the kernel's ABI.
#[repr(C)]
struct RsrcUpdate {
    offset: u32,
    resv: u32,
    data: u64,
}

/// Registers the ring's descriptor with this thread and returns its index, so that each enter
/// saves a descriptor look-up. The index is valid on this thread only.
pub(crate) fn register_ring_fd(ring: BorrowedFd<'_>) -> Result<i32, Errno> {
    let fd = ring.as_raw_fd();
    let mut update = RsrcUpdate { offset: u32::MAX, resv: 0, data: fd as u64 };
    // SAFETY: `update` is a live io_uring_rsrc_update for the duration of the call, and 1 is the
    // number of them; the kernel writes only its `offset`.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            IORING_REGISTER_RING_FDS,
            &raw mut update,
            1 as libc::c_uint,
        )
    };
    Errno::result(rc)?;
    Ok(update.offset as i32)
}

/// `io_uring_enter` with extended arguments. `fd` is the ring's descriptor, or its registered index
/// when `flags` says so. The io-uring crate's wrapper would do, but it forgets the registered index
/// each time a submitter is borrowed.
pub(crate) fn enter(
    fd: i32,
    to_submit: u32,
    want: u32,
    flags: u32,
    args: &SubmitArgs<'_, '_>,
) -> Result<usize, Errno> {
    // SAFETY: `args` is a transparent io_uring_getevents_arg, alive with everything it points at
    // for the call, and its size is passed. Submitting the queued entries is sound because each
    // was pushed under the contract of `Ring::push`.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            fd,
            to_submit,
            want,
            flags,
            std::ptr::from_ref(args),
            size_of::<SubmitArgs<'_, '_>>(),
        )
    };
    Errno::result(rc).map(|n| n as usize)
}

/// The soft memlock limit of this process.
pub(crate) fn memlock_limit() -> MemlockLimit {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft != libc::RLIM_INFINITY => MemlockLimit::Bytes(soft),
        _ => MemlockLimit::Unlimited,
    }
}

/// Raises the soft open-files limit to at least `want` if the hard limit allows it, and answers
/// the soft limit then in force.
pub(crate) fn raise_open_files(want: u64) -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 0 };
    if soft >= want {
        return soft;
    }
    let target = want.min(hard);
    if target > soft && setrlimit(Resource::RLIMIT_NOFILE, target, hard).is_ok() {
        return target;
    }
    soft
}

pub(crate) fn kernel_release() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let text = text.trim();
    if text.is_empty() { "release unknown".to_owned() } else { text.to_owned() }
}

pub(crate) fn io_uring_sysctl() -> SysctlSays {
    match std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").as_deref().map(str::trim) {
        Ok("0") => SysctlSays::Allowed,
        Ok("1") => SysctlSays::GroupOnly,
        Ok("2") => SysctlSays::Disabled,
        _ => SysctlSays::Unknown,
    }
}

/// Memory and offset alignment of direct I/O on `fd`, from `statx`; `None` where the kernel (before
/// 6.1) or the file system does not say. (0, 0) means: no direct I/O.
pub(crate) fn dio_align(fd: BorrowedFd<'_>) -> Result<Option<(u32, u32)>, Errno> {
    // SAFETY: an all-zero statx is a valid value of that plain C struct.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: `stx` is writable for the call, the path is a NUL-terminated empty string, and with
    // AT_EMPTY_PATH the call is about `fd`, which is open.
    let rc = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stx,
        )
    };
    Errno::result(rc)?;
    let known = stx.stx_mask & libc::STATX_DIOALIGN != 0;
    Ok(known.then_some((stx.stx_dio_mem_align, stx.stx_dio_offset_align)))
}

/// A blocking TCP socket of the address's family, closed on exec.
pub(crate) fn tcp_socket(addr: &std::net::SocketAddr) -> Result<OwnedFd, Errno> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// Resets a TCP connection at once (connect to AF_UNSPEC): drops its queues, tells the peer.
pub(crate) fn reset_connection(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: an all-zero sockaddr is a valid value of that plain C struct.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: `nowhere` is alive for the call and `len` is its size; the descriptor is open.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, len) };
    Errno::result(rc).map(drop)
}

/// Two MiB, the size and alignment of a huge page.
pub(crate) const HUGE: usize = 2 << 20;

/// Private anonymous zeroed memory, aligned to [`HUGE`], unmapped on drop.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    raw: *mut libc::c_void,
    raw_len: usize,
    huge: bool,
}

// SAFETY: a mapping is plain memory owned by this value; who may touch which part of it is
// decided by `Arena`, which hands each slot to one `Buf` at a time.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out only addresses.
unsafe impl Sync for Mapping {}

#[cfg(not(miri))]
impl Mapping {
    /// Maps `len` bytes rounded up to whole huge pages: reserved huge pages if there are enough,
    /// else transparent ones where the kernel grants them.
    pub(crate) fn new(len: usize) -> Result<Mapping, Errno> {
        let len = len.max(1).next_multiple_of(HUGE);
        let map = |bytes: usize, extra: libc::c_int| {
            // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases
            // nothing.
            let p = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | extra,
                    -1,
                    0,
                )
            };
            if p == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(p) }
        };
        let (raw, raw_len, reserved) = match map(len, libc::MAP_HUGETLB) {
            Ok(p) => (p, len, true),
            Err(_) => (map(len + HUGE, 0)?, len + HUGE, false),
        };
        let pad = (raw as usize).wrapping_neg() % HUGE;
        let Some(base) = NonNull::new(raw.cast::<u8>().wrapping_add(pad)) else {
            return Err(Errno::ENOMEM);
        };
        let advise = |advice| {
            // SAFETY: the range [base, base + len) lies inside the mapping made above, and
            // neither advice used here changes its content or validity in this process.
            unsafe { libc::madvise(base.as_ptr().cast(), len, advice) == 0 }
        };
        // A child must not share pages that a device may write to (copy-on-write after fork
        // would detach the parent's page from the in-flight transfer).
        advise(libc::MADV_DONTFORK);
        let huge = reserved || advise(libc::MADV_HUGEPAGE);
        Ok(Mapping { base, len, raw, raw_len, huge })
    }
}

#[cfg(not(miri))]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `raw`/`raw_len` are exactly what mmap gave, unmapped once. Every `Buf` keeps the
        // arena alive, and an operation in flight owns its `Buf`, so nobody uses the memory now.
        unsafe {
            libc::munmap(self.raw, self.raw_len);
        }
    }
}

/// Miri knows no huge pages: the same bytes, zeroed and aligned alike, from the heap, where it sees
/// every access and a leak.
#[cfg(miri)]
impl Mapping {
    pub(crate) fn new(len: usize) -> Result<Mapping, Errno> {
        let len = len.max(1).next_multiple_of(HUGE);
        // SAFETY: the layout has a size of at least one huge page.
        let raw = unsafe { std::alloc::alloc_zeroed(Mapping::layout(len)) };
        let base = NonNull::new(raw).ok_or(Errno::ENOMEM)?;
        Ok(Mapping { base, len, raw: raw.cast(), raw_len: len, huge: false })
    }

    fn layout(len: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(len, HUGE).expect("whole huge pages")
    }
}

#[cfg(miri)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, freed once.
        unsafe { std::alloc::dealloc(self.raw.cast(), Mapping::layout(self.raw_len)) }
    }
}

impl Mapping {
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }
}
