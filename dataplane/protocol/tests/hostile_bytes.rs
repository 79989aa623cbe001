//! No bytes break a decoder of this crate (I10, I12). `EBB_SEEDS` runs more of them, `EBB_SEED` one.

use ebb_dataplane_protocol::hostile::{DECODERS, attack};

#[test]
fn mutated_frames_grants_and_handshakes_never_break_their_decoders() {
    attack(&DECODERS, 20_000);
}
