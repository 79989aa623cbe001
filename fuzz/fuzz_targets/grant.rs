//! Grants, forged and signed.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_dataplane_protocol::hostile::grant(data));
