//! The 64-byte header of a frame.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_dataplane_protocol::hostile::header(data));
