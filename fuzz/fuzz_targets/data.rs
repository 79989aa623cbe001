//! The fixed bodies of reads and writes.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_dataplane_protocol::hostile::data(data));
