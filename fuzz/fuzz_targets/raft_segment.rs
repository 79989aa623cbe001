//! The header of a Raft log's segment.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane::raft::log::hostile::segment(data));
