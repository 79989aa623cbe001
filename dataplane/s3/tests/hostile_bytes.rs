//! No metadata of an object breaks what reads it (anybody may write to a bucket). `EBB_SEEDS` runs more, `EBB_SEED`
//! one.

use ebb_dataplane_protocol::hostile::{Decoder, attack};
use ebb_s3::hostile::{attributes, seeds};

#[test]
fn mutated_attributes_and_tags_never_break_their_readers() {
    attack(&[Decoder { name: "attributes", seeds, run: attributes }], 20_000);
}
