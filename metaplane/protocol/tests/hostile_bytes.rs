//! No bytes break a decoder of the metadata plane's payloads (I12). `EBB_SEEDS` runs more of them, `EBB_SEED` one.

use ebb_dataplane_protocol::hostile::attack;
use ebb_metaplane_protocol::hostile::DECODERS;

#[test]
fn mutated_requests_answers_and_log_entries_never_break_their_decoders() {
    attack(&DECODERS, 20_000);
}
