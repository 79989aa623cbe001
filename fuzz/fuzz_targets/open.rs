//! A whole device with forged contents under checksums that hold.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_store::hostile::open(data));
