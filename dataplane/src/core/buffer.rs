//! What the core needs of a buffer. The reactor's are registered arena slots, the tests' plain memory.

/// Block-aligned memory, owned by whoever holds the value.
pub trait Buffer: std::fmt::Debug + Send + Sync + 'static {
    /// All bytes.
    fn bytes(&self) -> &[u8];
    /// All bytes, to change.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Buffer for ebb_ring::Buf {
    fn bytes(&self) -> &[u8] {
        self
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Buffer for ebb_store::AlignedBuf {
    fn bytes(&self) -> &[u8] {
        self
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}
