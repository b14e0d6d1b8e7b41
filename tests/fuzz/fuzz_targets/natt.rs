//! Datagrams on port 4500, ESP packets and their trailers.
#![no_main]

#[path = "../../../crates/wire/tests/common/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checks::encapsulated(bytes);
});
