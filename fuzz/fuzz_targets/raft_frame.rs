//! Frames and operations of the Raft log.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane::raft::log::hostile::frame(data));
