//! IP packets, with TCP and UDP inside.
#![no_main]

#[path = "../../../crates/wire/tests/common/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    checks::packet(bytes, &mut checks::Reached::default());
});
