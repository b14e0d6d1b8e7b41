//! 16-bit fields of packets, in network order.

/// The field at `at`; `None` beyond the end.
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Sets the field at `at`; `None`, and nothing is changed, beyond the end.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}
