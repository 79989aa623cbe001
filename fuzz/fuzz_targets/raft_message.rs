//! Messages between voters.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane::raft::log::hostile::message(data));
