//! Answers of a metadata server.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane_protocol::hostile::response(data));
