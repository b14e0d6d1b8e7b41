//! Any vnet header before any bytes: what is taken for segments gives as many packets as it says, and ends.
#![no_main]

use esp::segment::Segments;
use wire::vnet::{Offload, VNET_HEADER_LEN};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((header, packet)) = bytes.split_first_chunk::<VNET_HEADER_LEN>() else { return };
    let Some(mut segments) = Segments::new(packet, Offload::decode(header)) else { return };
    let (mut room, packets, mut count) = ([0; 2048], segments.packets(), 0);
    while !segments.is_done() {
        let Some(length) = segments.next_into(packet, &mut room) else { return };
        assert!(length <= room.len() && count < packets);
        count += 1;
    }
    assert_eq!(count, packets);
});
