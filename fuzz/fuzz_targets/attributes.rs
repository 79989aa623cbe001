//! An object's attributes and tag.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ebb_s3::hostile::attributes(data));
