//! A device with a volatile cache: unsynced blocks may or may not survive a crash.

use ebb_store::OpenDevice;
use rand::Rng;
use std::collections::BTreeMap;
use std::io;

const BLOCK: usize = 4096;

pub struct Device {
    durable: Vec<u8>,
    volatile: BTreeMap<u64, Vec<u8>>,
}

impl Device {
    pub fn new(bytes: u64) -> Self {
        Self { durable: vec![0; bytes as usize], volatile: BTreeMap::new() }
    }
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        assert_eq!((offset % 4096, out.len() % BLOCK), (0, 0), "aligned");
        for (i, block) in out.chunks_mut(BLOCK).enumerate() {
            let at = offset + (i * BLOCK) as u64;
            match self.volatile.get(&at) {
                Some(b) => block.copy_from_slice(b),
                None => block.copy_from_slice(&self.durable[at as usize..at as usize + BLOCK]),
            }
        }
    }
    pub fn write(&mut self, offset: u64, data: &[u8], durable: bool) {
        assert_eq!((offset % 4096, data.len() % BLOCK), (0, 0), "aligned");
        for (i, block) in data.chunks(BLOCK).enumerate() {
            let at = offset + (i * BLOCK) as u64;
            if durable {
                self.volatile.remove(&at);
                self.durable[at as usize..at as usize + BLOCK].copy_from_slice(block);
            } else {
                self.volatile.insert(at, block.to_vec());
            }
        }
    }
    pub fn sync_all(&mut self) {
        for (at, block) in std::mem::take(&mut self.volatile) {
            self.durable[at as usize..at as usize + BLOCK].copy_from_slice(&block);
        }
    }
    /// Each unsynced block is kept or lost.
    pub fn crash(&mut self, rng: &mut impl Rng) {
        for (at, block) in std::mem::take(&mut self.volatile) {
            if rng.random_bool(0.5) {
                self.durable[at as usize..at as usize + BLOCK].copy_from_slice(&block);
            }
        }
    }
    /// A write in flight at a crash: any of its blocks may have happened.
    pub fn tear(&mut self, offset: u64, data: &[u8], rng: &mut impl Rng) {
        for (i, block) in data.chunks(BLOCK).enumerate() {
            if rng.random_bool(0.5) {
                self.write(offset + (i * BLOCK) as u64, block, true);
            }
        }
    }
}

impl OpenDevice for Device {
    fn len(&self) -> io::Result<u64> {
        Ok(self.durable.len() as u64)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read(offset, buf);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write(offset, buf, false);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all();
        Ok(())
    }
}
