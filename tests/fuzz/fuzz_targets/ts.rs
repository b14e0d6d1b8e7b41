//! Bodies of TSi and TSr payloads.
#![no_main]

#[path = "../../../crates/wire/tests/common/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checks::selectors(bytes, &mut checks::Reached::default());
});
