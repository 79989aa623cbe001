//! No bytes on a device break what reads them, even under checksums that hold (I10). `EBB_SEEDS` runs more of
//! them, `EBB_SEED` one.

use ebb_dataplane_protocol::hostile::attack;
use ebb_store::hostile::DECODERS;

#[test]
fn mutated_superblocks_batches_and_checkpoints_never_break_their_decoders() {
    attack(&DECODERS[..4], 20_000);
}

#[test]
fn a_device_with_forged_contents_opens_or_says_why_not() {
    attack(&DECODERS[4..], 500);
}
