//! Entries of a checkpoint.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_store::hostile::checkpoint(data));
