//! Journal records and what they do to the index.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_store::hostile::record(data));
