//! Control requests to a core, their answers, the map.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_dataplane_protocol::hostile::control(data));
