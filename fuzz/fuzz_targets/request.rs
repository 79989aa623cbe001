//! Requests on a metadata port.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane_protocol::hostile::request(data));
