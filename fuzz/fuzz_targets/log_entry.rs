//! Entries of the Raft log, decoded.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_metaplane_protocol::hostile::log_entry(data));
