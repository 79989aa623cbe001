//! The buffer arena of a core, and the owned handles to its slots.
//!
//! A [`Buf`] is exclusive: one handle per slot, moved into an operation and back out in its
//! completion event. So memory is reachable from safe code only while the kernel does not use it.
//! A `Buf` may be sent to another thread (a tokio thread fills it on a miss) and dropped there; its
//! slot goes back to its own (class, pool) free list, a bounded lock-free queue.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use nix::errno::Errno;

use crate::layout::{BLOCK, CLASSES, Class, ENTRY_MAX, POOLS, Plan, Pool, Slot};
use crate::sys::Mapping;

struct Shared {
    map: Mapping,
    slots: Box<[Slot]>,
    free: [[ArrayQueue<u32>; POOLS]; CLASSES],
}

/// The buffers of one core. Cheap to clone; all clones are the same arena.
#[derive(Clone)]
pub struct Arena {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Arena {
    pub(crate) fn new(plan: Plan) -> Result<Arena, Errno> {
        let map = Mapping::new(plan.bytes)?;
        let of = |class: Class, pool: Pool| {
            plan.slots.iter().filter(|s| s.class == class && s.pool == pool).count()
        };
        let free =
            Class::ALL.map(|class| Pool::ALL.map(|pool| ArrayQueue::new(of(class, pool).max(1))));
        for (index, slot) in plan.slots.iter().enumerate() {
            assert!(slot.offset + slot.class.bytes() <= map.len());
            let queue = &free[slot.class.index()][slot.pool.index()];
            // The queue was sized by counting these very slots.
            let pushed = queue.push(index as u32);
            debug_assert!(pushed.is_ok());
        }
        Ok(Arena { shared: Arc::new(Shared { map, slots: plan.slots.into(), free }) })
    }

    /// `bytes` of 4 KiB buffers, all of them of [`Pool::Clients`], on huge pages where there are any. Not registered
    /// with a ring; memory that was never used is not resident.
    pub fn of_blocks(bytes: usize) -> Result<Arena, Errno> {
        let slots = (0..bytes / BLOCK).map(|n| {
            let (class, pool) = (Class::Block4K, Pool::Clients);
            Slot { offset: n * BLOCK, class, pool }
        });
        Arena::new(Plan { slots: slots.collect(), bytes: bytes.next_multiple_of(BLOCK) })
    }

    /// A free buffer of `class` reserved for `pool`, or `None`: then the caller waits for one of
    /// its own to come back. The content is whatever the last user left (zeros at first).
    pub fn alloc(&self, class: Class, pool: Pool) -> Option<Buf> {
        let index = self.shared.free[class.index()][pool.index()].pop()?;
        let slot = self.shared.slots[index as usize];
        debug_assert_eq!((slot.class, slot.pool), (class, pool));
        // SAFETY: `new` asserted that the slot lies inside the mapping.
        let ptr = unsafe { self.shared.map.base().add(slot.offset) };
        Some(Buf {
            ptr,
            len: class.bytes(),
            home: Home::Arena { shared: self.shared.clone(), index },
        })
    }

    /// A free buffer of the smallest class that holds `len` bytes.
    pub fn alloc_len(&self, len: usize, pool: Pool) -> Option<Buf> {
        self.alloc(Class::for_len(len)?, pool)
    }

    /// Buffers of `class` that `pool` can still take.
    pub fn available(&self, class: Class, pool: Pool) -> usize {
        self.shared.free[class.index()][pool.index()].len()
    }

    /// Buffers of `class` that `pool` owns in all.
    pub fn capacity(&self, class: Class, pool: Pool) -> usize {
        self.shared.slots.iter().filter(|s| s.class == class && s.pool == pool).count()
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> usize {
        self.shared.map.len()
    }

    pub(crate) fn is_huge(&self) -> bool {
        self.shared.map.is_huge()
    }

    /// The registered-buffer entries that cover the arena, in order.
    pub(crate) fn entries(&self) -> Vec<libc::iovec> {
        let base = self.shared.map.base();
        let len = self.shared.map.len();
        (0..len)
            .step_by(ENTRY_MAX)
            .map(|at| libc::iovec {
                iov_base: base.as_ptr().wrapping_add(at).cast(),
                iov_len: (len - at).min(ENTRY_MAX),
            })
            .collect()
    }
}

enum Home {
    Arena { shared: Arc<Shared>, index: u32 },
    Heap,
}

/// An exclusive, block-aligned buffer. Dereferences to all of its bytes.
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    home: Home,
}

// SAFETY: a `Buf` is the only handle to its bytes, like a `Vec<u8>`; its home is shared through
// an `Arc` of thread-safe parts.
unsafe impl Send for Buf {}
// SAFETY: `&Buf` only reads.
unsafe impl Sync for Buf {}

impl Buf {
    /// A zeroed, block-aligned buffer outside any arena, of `len` bytes rounded up to whole
    /// blocks: for start-up work, tests, and small per-connection receive buffers. Not counted
    /// against any pool, so the caller bounds how many there are.
    pub fn unpooled(len: usize) -> Buf {
        let len = len.clamp(1, isize::MAX as usize / 2).next_multiple_of(BLOCK);
        let layout = heap_layout(len);
        // SAFETY: the layout has a size of at least one block.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Buf { ptr, len, home: Home::Heap }
    }

    /// The size class, for a buffer of an arena.
    pub fn class(&self) -> Option<Class> {
        match &self.home {
            Home::Arena { shared, index } => Some(shared.slots[*index as usize].class),
            Home::Heap => None,
        }
    }

    /// Whom it is reserved for, for a buffer of an arena.
    pub fn pool(&self) -> Option<Pool> {
        match &self.home {
            Home::Arena { shared, index } => Some(shared.slots[*index as usize].pool),
            Home::Heap => None,
        }
    }

    /// The registered entry it lies in, if it is one of `arena`'s.
    pub(crate) fn fixed_entry(&self, arena: &Arena) -> Option<u16> {
        match &self.home {
            Home::Arena { shared, index } if Arc::ptr_eq(shared, &arena.shared) => {
                Some(shared.slots[*index as usize].entry())
            }
            _ => None,
        }
    }
}

fn heap_layout(len: usize) -> Layout {
    // `len` is a multiple of BLOCK below isize::MAX, so this cannot fail; a fallback would only
    // hide a broken invariant.
    Layout::from_size_align(len, BLOCK).expect("block-aligned layout")
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr..ptr+len` is initialised (mapped or allocated zeroed), lives as long as
        // `home`, and this handle is the only one: no `&mut` exists while `&self` does, and the
        // kernel uses the bytes only while an operation owns the handle.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        match &self.home {
            Home::Arena { shared, index } => {
                let slot = shared.slots[*index as usize];
                let back = shared.free[slot.class.index()][slot.pool.index()].push(*index);
                // Each index exists once, so its queue has room.
                debug_assert!(back.is_ok());
            }
            // SAFETY: allocated in `unpooled` with this very layout, freed once.
            Home::Heap => unsafe { dealloc(self.ptr.as_ptr(), heap_layout(self.len)) },
        }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buf")
            .field("len", &self.len)
            .field("class", &self.class())
            .field("pool", &self.pool())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::layout::plan;

    fn arena() -> Arena {
        // Miri takes its time for each buffer.
        let arena_bytes = if cfg!(miri) { 24 << 20 } else { 64 << 20 };
        Arena::new(plan(&Config { arena_bytes, ..Config::default() }).unwrap()).unwrap()
    }

    #[test]
    fn pools_never_starve_each_other() {
        let arena = arena();
        let mut held = Vec::new();
        for class in Class::ALL {
            while let Some(buf) = arena.alloc(class, Pool::Clients) {
                held.push(buf);
            }
        }
        for class in Class::ALL {
            for pool in [Pool::Replication, Pool::Background] {
                assert_eq!(arena.available(class, pool), arena.capacity(class, pool));
                assert!(arena.alloc(class, pool).is_some());
            }
        }
        drop(held);
        for class in Class::ALL {
            assert_eq!(arena.available(class, Pool::Clients), arena.capacity(class, Pool::Clients));
        }
    }

    #[test]
    fn buffers_are_aligned_and_disjoint() {
        let arena = arena();
        let mut held = Vec::new();
        for class in Class::ALL {
            for pool in Pool::ALL {
                while let Some(mut buf) = arena.alloc(class, pool) {
                    assert_eq!(buf.as_ptr() as usize % BLOCK, 0);
                    assert_eq!(buf.len(), class.bytes());
                    let tag = held.len() as u64;
                    buf[..8].copy_from_slice(&tag.to_le_bytes());
                    let end = buf.len();
                    buf[end - 8..].copy_from_slice(&tag.to_le_bytes());
                    held.push(buf);
                }
            }
        }
        for (tag, buf) in held.iter().enumerate() {
            assert_eq!(buf[..8], (tag as u64).to_le_bytes());
            assert_eq!(buf[buf.len() - 8..], (tag as u64).to_le_bytes());
        }
    }

    #[test]
    fn a_buffer_dropped_on_another_thread_comes_back() {
        let arena = arena();
        let before = arena.available(Class::Large4M, Pool::Clients);
        let buf = arena.alloc_len(4 << 20, Pool::Clients).unwrap();
        assert_eq!(arena.available(Class::Large4M, Pool::Clients), before - 1);
        std::thread::spawn(move || drop(buf)).join().unwrap();
        assert_eq!(arena.available(Class::Large4M, Pool::Clients), before);
    }

    #[test]
    fn unpooled_buffers_are_whole_zeroed_blocks() {
        let buf = Buf::unpooled(5000);
        assert_eq!((buf.len(), buf.as_ptr() as usize % BLOCK), (8192, 0));
        assert!(buf.iter().all(|&b| b == 0) && buf.class().is_none());
    }
    #[test]
    fn a_slot_comes_back_as_its_last_user_left_it() {
        let arena = arena();
        for class in Class::ALL {
            let mut first = arena.alloc(class, Pool::Replication).unwrap();
            let (len, at) = (first.len(), first.as_ptr());
            (first[0], first[len - 1]) = (7, 8);
            // A class may have one slot for the pool: it is the next one only if all others are out.
            let mut held = Vec::new();
            while let Some(other) = arena.alloc(class, Pool::Replication) {
                held.push(other);
            }
            drop(first);
            let again = arena.alloc(class, Pool::Replication).unwrap();
            assert_eq!((again.as_ptr(), again[0], again[len - 1]), (at, 7, 8));
        }
    }

    #[test]
    fn neighbours_are_written_at_the_same_time() {
        let arena = Arena::of_blocks(4 * BLOCK).unwrap();
        let mut bufs: Vec<Buf> =
            (0..4).map(|_| arena.alloc(Class::Block4K, Pool::Clients).unwrap()).collect();
        // Four exclusive borrows of one mapping, alive at once and used in turns.
        let mut views: Vec<&mut [u8]> = bufs.iter_mut().map(|b| &mut b[..]).collect();
        for round in 0..3 {
            for (n, view) in views.iter_mut().enumerate() {
                view[round] = n as u8;
                view[BLOCK - 1] = n as u8;
            }
        }
        std::thread::scope(|s| {
            for view in views {
                s.spawn(move || view.rotate_left(BLOCK / 2));
            }
        });
        for (n, buf) in bufs.iter().enumerate() {
            assert!(buf[BLOCK / 2..BLOCK / 2 + 3].iter().all(|&b| usize::from(b) == n));
        }
    }

    #[test]
    fn a_buffer_outlives_its_arena() {
        let arena = arena();
        let mut bufs: Vec<Buf> =
            Class::ALL.map(|class| arena.alloc(class, Pool::Background).unwrap()).into();
        let twin = arena.clone();
        drop(arena);
        drop(twin);
        for buf in &mut bufs {
            let end = buf.len() - 1;
            (buf[0], buf[end]) = (1, 2);
        }
        // Dropped here one by one; the last one frees the memory.
        while let Some(buf) = bufs.pop() {
            assert_eq!((buf[0], buf[buf.len() - 1]), (1, 2));
        }
    }

    #[test]
    fn a_shared_buffer_is_free_when_its_last_reader_is_gone() {
        let arena = Arena::of_blocks(BLOCK).unwrap();
        let mut buf = arena.alloc(Class::Block4K, Pool::Clients).unwrap();
        buf.fill(3);
        let shared = Arc::new(buf);
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let shared = shared.clone();
                std::thread::spawn(move || shared.iter().map(|&b| usize::from(b)).sum::<usize>())
            })
            .collect();
        drop(shared);
        assert!(readers.into_iter().all(|r| r.join().unwrap() == 3 * BLOCK));
        assert!(arena.alloc(Class::Block4K, Pool::Clients).is_some());
    }

    #[test]
    fn threads_that_pass_slots_around_never_share_one() {
        let arena = Arena::of_blocks(2 * BLOCK).unwrap();
        let rounds = if cfg!(miri) { 20 } else { 10_000 };
        std::thread::scope(|s| {
            for id in 1..=3u8 {
                let arena = &arena;
                s.spawn(move || {
                    for _ in 0..rounds {
                        let Some(mut buf) = arena.alloc(Class::Block4K, Pool::Clients) else {
                            std::thread::yield_now();
                            continue;
                        };
                        (buf[0], buf[BLOCK - 1]) = (id, id);
                        std::thread::yield_now();
                        assert_eq!((buf[0], buf[BLOCK - 1]), (id, id));
                    }
                });
            }
        });
        assert_eq!(arena.available(Class::Block4K, Pool::Clients), 2);
    }

    /// What a device does to a buffer: its address is taken as for a submission entry, then the
    /// handle moves about with its operation, and the bytes arrive behind its back.
    #[test]
    fn bytes_arrive_at_the_address_of_a_buffer_that_moved_since() {
        let arena = Arena::of_blocks(BLOCK).unwrap();
        for mut buf in [arena.alloc(Class::Block4K, Pool::Clients).unwrap(), Buf::unpooled(BLOCK)] {
            let part = &mut buf[512..1024];
            let (at, len) = (part.as_mut_ptr(), part.len());
            let mut ops = crate::slab::Slab::new(2);
            let key = ops.insert(Some(buf)).unwrap_or_else(|_| panic!("there is room"));
            let _ = ops.insert(None);
            // SAFETY: the slab owns the buffer and nobody looks at it: so writes the kernel.
            unsafe { std::slice::from_raw_parts_mut(at, len).fill(9) };
            let buf = ops.remove(key).flatten().unwrap();
            assert!(buf[512..1024].iter().all(|&b| b == 9));
            assert!(buf[..512].iter().chain(&buf[1024..]).all(|&b| b == 0));
        }
    }
}
