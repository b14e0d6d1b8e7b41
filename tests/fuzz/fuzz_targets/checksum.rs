//! The Internet checksum, in one piece, in two, and with a copy.
#![no_main]

#[path = "../../../crates/wire/tests/common/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checks::checksum(bytes);
});
