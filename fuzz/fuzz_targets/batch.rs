//! A batch of the journal.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_store::hostile::batch(data));
