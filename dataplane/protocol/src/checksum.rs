//! CRC-32C (Castagnoli, RFC 3720 §12.1), the checksum of every block, body and header (I10).

use crate::ids::BLOCK_BYTES;

/// CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    // CRC-32C fits 32 bits; the library's common type is wider.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Splits `[offset, offset + len)` at block boundaries: the pieces whose checksums travel with a
/// write. The first and last piece may be shorter than a block. Yields ranges relative to the start.
pub fn block_pieces(offset: u64, len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut at = 0usize;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let in_block = ((offset + at as u64) % u64::from(BLOCK_BYTES)) as usize;
        let end = len.min(at + BLOCK_BYTES as usize - in_block);
        let piece = at..end;
        at = end;
        Some(piece)
    })
}

/// The checksums of the pieces of a payload that starts at byte `offset` of its chunk.
pub fn piece_checksums(offset: u64, payload: &[u8]) -> Vec<u32> {
    block_pieces(offset, payload.len()).map(|r| crc32c(&payload[r])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn pieces_cover_the_range_and_never_cross_a_block() {
        for (offset, len) in
            [(0u64, 0usize), (0, 1), (0, 4096), (1, 4096), (4095, 2), (100, 20_000)]
        {
            let mut at = 0;
            for piece in block_pieces(offset, len) {
                assert_eq!(piece.start, at);
                assert!(piece.end > piece.start);
                let first = (offset + piece.start as u64) / 4096;
                let last = (offset + piece.end as u64 - 1) / 4096;
                assert_eq!(first, last);
                at = piece.end;
            }
            assert_eq!(at, len);
        }
    }
}
