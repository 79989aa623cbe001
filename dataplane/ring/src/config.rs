//! What a reactor is built with. Validated once, in [`crate::Reactor::new`].

/// The most of [`Config::sqpoll_idle_ms`]: longer than this an idle kernel thread need not spin.
pub const SQPOLL_IDLE_MS_MAX: u32 = 60_000;

/// The most of [`Config::spin_us`]: what takes longer is worth a sleep on any machine.
pub const SPIN_US_MAX: u32 = 10_000;

/// Limits and sizes of one core's reactor.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries; the completion queue has four times as many. At most 4096, so
    /// that a default 8 MiB memlock limit still boots.
    pub entries: u32,
    /// Bytes of buffer memory. All of it is resident once registered.
    pub arena_bytes: usize,
    /// Share of `arena_bytes` of each [`crate::Class`], smallest first, in percent; 0 leaves a
    /// class out. The sum must not exceed 100.
    pub class_percent: [u8; 4],
    /// Share of each class for each [`crate::Pool`], in percent. The sum must not exceed 100.
    pub pool_percent: [u8; 3],
    /// Register the arena with the ring, for ReadFixed and WriteFixed. Without it, or when the
    /// memlock limit forbids it, plain reads and writes are used.
    pub register_arena: bool,
    /// Device files that can be open at once.
    pub files_max: u32,
    /// Listening sockets.
    pub listeners_max: u32,
    /// Connections; one more is closed as it is accepted.
    pub conns_max: u32,
    /// Device operations that can be in flight or waiting to be submitted.
    pub disk_ops_max: u32,
    /// Messages that can wait in one connection's send queue.
    pub send_queue_max: usize,
    /// Use SENDMSG_ZC for sends of 64 KiB and more. Off by default (ADR 0009).
    pub send_zc: bool,
    /// A kernel thread takes submissions (SQPOLL): it spins, and sleeps after so many milliseconds
    /// without one; 0: there is none. Off by default (ADR 0009).
    pub sqpoll_idle_ms: u32,
    /// Microseconds to look for what is expected soon before the thread sleeps for it; 0: it sleeps at once.
    /// At most [`SPIN_US_MAX`]. Off by default (ADR 0009).
    pub spin_us: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            entries: 1024,
            arena_bytes: 256 << 20,
            class_percent: [2, 14, 24, 60],
            pool_percent: [50, 25, 25],
            register_arena: true,
            files_max: 16,
            listeners_max: 4,
            conns_max: 1024,
            disk_ops_max: 2048,
            send_queue_max: 256,
            send_zc: false,
            sqpoll_idle_ms: 0,
            spin_us: 0,
        }
    }
}

impl Config {
    /// Entries of the fixed-file table: device files, then listeners, then connections.
    pub(crate) fn fixed_files(&self) -> u32 {
        self.files_max + self.listeners_max + self.conns_max
    }

    /// The most operations alive at once, which sizes the operation slab: every device operation,
    /// and per connection one receive, one send (or an attempt to connect and its limit), its
    /// zero-copy remainders and one cancel.
    pub(crate) fn ops_max(&self) -> u32 {
        let per_conn = 3 + crate::send::ZC_HELD_MAX;
        self.disk_ops_max + self.conns_max * per_conn + self.listeners_max * 2 + 8
    }

    /// The first rule broken, in words.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let sum = |p: &[u8]| p.iter().map(|&x| u32::from(x)).sum::<u32>();
        if !(8..=4096).contains(&self.entries) {
            return Err("entries must be between 8 and 4096");
        }
        if sum(&self.class_percent) > 100 || sum(&self.pool_percent) > 100 {
            return Err("class_percent and pool_percent must each sum to at most 100");
        }
        if sum(&self.class_percent) == 0 || sum(&self.pool_percent) == 0 {
            return Err("class_percent and pool_percent must not be all zero");
        }
        if self.conns_max > 60_000 || self.files_max > 1024 || self.listeners_max > 64 {
            return Err("conns_max <= 60000, files_max <= 1024, listeners_max <= 64");
        }
        if self.disk_ops_max == 0 || self.disk_ops_max > 65_536 {
            return Err("disk_ops_max must be between 1 and 65536");
        }
        if self.send_queue_max == 0 || self.send_queue_max > 65_536 {
            return Err("send_queue_max must be between 1 and 65536");
        }
        if self.sqpoll_idle_ms > SQPOLL_IDLE_MS_MAX {
            return Err("sqpoll_idle_ms must be at most 60000");
        }
        if self.spin_us > SPIN_US_MAX {
            return Err("spin_us must be at most 10000");
        }
        if self.arena_bytes > 1 << 40 {
            return Err("arena_bytes must be at most 1 TiB");
        }
        Ok(())
    }
}
