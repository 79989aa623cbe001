//! A disk with a volatile cache: what is written is readable at once and durable only after a sync or a
//! durable write of its own. A power cut keeps, loses or tears each unsynced write independently.

use ebb_store::{AlignedBuf, OpenDevice};
use rand::Rng;
use rand::rngs::StdRng;
use std::io;

/// Faults injected so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub power_cuts: u64,
    pub kills: u64,
    pub kept: u64,
    pub lost: u64,
    pub torn: u64,
    pub flips: u64,
    pub misdirected: u64,
}

impl std::ops::AddAssign for Faults {
    fn add_assign(&mut self, o: Self) {
        self.power_cuts += o.power_cuts;
        self.kills += o.kills;
        self.kept += o.kept;
        self.lost += o.lost;
        self.torn += o.torn;
        self.flips += o.flips;
        self.misdirected += o.misdirected;
    }
}

pub struct Disk {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Completed or issued writes since the last sync, in issue order.
    cache: Vec<(u64, Vec<u8>)>,
    pub faults: Faults,
}

impl Disk {
    /// A disk full of garbage.
    pub fn new(bytes: u64, rng: &mut StdRng) -> Self {
        let mut durable = vec![0u8; bytes as usize];
        let fill: u8 = rng.random();
        durable.iter_mut().enumerate().for_each(|(i, b)| *b = (i as u8).wrapping_mul(31) ^ fill);
        Self { current: durable.clone(), durable, cache: Vec::new(), faults: Faults::default() }
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(
            offset.is_multiple_of(4096) && bytes.len().is_multiple_of(4096),
            "O_DIRECT alignment"
        );
        self.current[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        self.cache.push((offset, bytes.to_vec()));
    }
    /// `RWF_DSYNC`: this write alone is durable.
    pub fn write_durable(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        assert!(
            self.cache.iter().all(|(o, b)| o + b.len() as u64 <= offset || *o >= end),
            "a durable write over an unsynced one: the model would need an order"
        );
        self.current[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        self.durable[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    pub fn sync_all(&mut self) {
        for (offset, bytes) in self.cache.drain(..) {
            self.durable[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
    }
    pub fn read(&self, offset: u64, len: usize) -> AlignedBuf {
        let mut out = AlignedBuf::zeroed(len);
        out.copy_from_slice(&self.current[offset as usize..][..len]);
        out
    }

    /// Power cut. `in_flight`: a write that was issued and not answered.
    pub fn power_cut(&mut self, in_flight: Option<(u64, Vec<u8>)>, rng: &mut StdRng) {
        self.faults.power_cuts += 1;
        let mut cache = std::mem::take(&mut self.cache);
        cache.extend(in_flight);
        for (offset, bytes) in cache {
            match rng.random_range(0..3) {
                0 => {
                    self.faults.lost += 1;
                }
                1 => {
                    self.faults.kept += 1;
                    self.durable[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                _ => {
                    self.faults.torn += 1;
                    self.tear(offset, &bytes, rng);
                }
            }
            // What was in the cache is gone.
            let range = offset as usize..offset as usize + bytes.len();
            self.current[range.clone()].copy_from_slice(&self.durable[range]);
        }
    }

    fn tear(&mut self, offset: u64, bytes: &[u8], rng: &mut StdRng) {
        let sector = if rng.random_bool(0.5) { 512 } else { 4096 };
        let sectors = bytes.len() / sector;
        let prefix = rng.random_bool(0.4).then(|| rng.random_range(0..=sectors));
        for (i, s) in bytes.chunks(sector).enumerate() {
            if prefix.map_or_else(|| rng.random_bool(0.5), |p| i < p) {
                self.durable[offset as usize + i * sector..][..sector].copy_from_slice(s);
            }
        }
    }

    /// kill -9: the cache survives; a write in flight may or may not have been carried out.
    pub fn kill(&mut self, in_flight: Option<(u64, Vec<u8>)>, rng: &mut StdRng) {
        self.faults.kills += 1;
        if let Some((offset, bytes)) = in_flight
            && rng.random_bool(0.5)
        {
            self.write(offset, &bytes);
        }
    }

    pub fn flip(&mut self, offset: u64, mask: u8) {
        self.faults.flips += 1;
        self.current[offset as usize] ^= mask;
        self.durable[offset as usize] ^= mask;
    }
    /// The block at `from` is (also) written to `to`, and what should have gone there is not.
    pub fn misdirect(&mut self, from: u64, to: u64) {
        self.faults.misdirected += 1;
        let block = self.read(from, 4096);
        self.current[to as usize..][..4096].copy_from_slice(&block);
        self.durable[to as usize..][..4096].copy_from_slice(&block);
    }
    pub fn durable_image(&self) -> Vec<u8> {
        self.durable.clone()
    }
    pub fn restore(&mut self, image: &[u8]) {
        self.cache.clear();
        self.durable.copy_from_slice(image);
        self.current.copy_from_slice(image);
    }
}

impl OpenDevice for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.durable.len() as u64)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.current[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write(offset, buf);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all();
        Ok(())
    }
}
