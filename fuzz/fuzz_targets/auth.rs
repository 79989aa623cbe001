//! The handshake and the cluster key.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_dataplane_protocol::hostile::auth(data));
