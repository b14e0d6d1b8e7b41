//! IKE messages, and their sealed content as if decrypted.
#![no_main]

#[path = "../../../crates/wire/tests/common/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checks::ike(bytes, &mut checks::Reached::default());
});
