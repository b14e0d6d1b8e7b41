//! Plain hashes. SHA-1 serves NAT detection alone (RFC 7296 §2.23), where it
//! hides addresses but guards nothing.

use ring::digest;

/// SHA-1 over the parts joined.
#[must_use]
pub fn sha1(parts: &[&[u8]]) -> [u8; 20] {
    digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, parts)
}

/// SHA-256 over the parts joined.
#[must_use]
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    digest(&digest::SHA256, parts)
}

fn digest<const N: usize>(alg: &'static digest::Algorithm, parts: &[&[u8]]) -> [u8; N] {
    let mut context = digest::Context::new(alg);
    for part in parts {
        context.update(part);
    }
    let mut out = [0; N];
    // Equal lengths by the two callers above; `zip` cannot panic anyway.
    for (to, from) in out.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    // FIPS 180-4 examples ("abc"); `printf abc | sha1sum`, `sha256sum`.
    #[test]
    fn known_answers() {
        let want1 = "a9993e364706816aba3e25717850c26c9cd0d89d";
        let want256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&sha1(&[b"a", b"bc"])), want1);
        assert_eq!(hex(&sha256(&[b"ab", b"", b"c"])), want256);
    }
}
