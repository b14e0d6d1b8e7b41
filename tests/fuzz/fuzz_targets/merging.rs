//! Batches of mixed flows, merged and split again.
#![no_main]

#[path = "../../../crates/esp/tests/common/made.rs"]
mod made;
#[path = "../../../crates/esp/tests/common/merging.rs"]
mod merging;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (packets, most) = merging::drawn(bytes);
    merging::check(&packets, most, &mut merging::Reached::default());
});
