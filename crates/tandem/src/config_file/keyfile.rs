//! Key files: one secret each, in a file that only its owner can read.
//!
//! `tandem genkey` writes 64 hexadecimal digits, 256 random bits. As a pair secret they are decoded to 32
//! bytes; as a pre-shared key they are taken as the text they are, so that the same line can be typed into
//! any other gateway.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crypto::Secret;
use zeroize::Zeroizing;

/// Bytes of a pair secret.
pub const PAIR_SECRET_LEN: usize = 32;
/// Longest key file, bytes.
const MAX_KEY_FILE: u64 = 4096;

/// Why a key file is not taken. Never quotes its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// The system refuses.
    #[error("{path}: {reason}")]
    System {
        /// The file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// Its mode lets others in.
    #[error("{path} can be read or written by others (mode {mode:04o})")]
    Exposed {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to neither root nor the reader.
    #[error("{path} belongs to user {uid}, who could read or replace it")]
    Foreign {
        /// The file.
        path: String,
        /// Its owner.
        uid: u32,
    },
    /// It is not a key.
    #[error("{path} {what}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl KeyFileError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::System { path, reason } if reason.contains("No such file") => {
                Some(format!("`tandem genkey {path}` makes one"))
            }
            Self::System { .. } | Self::Content { .. } => None,
            Self::Exposed { path, .. } => Some(format!("chmod 600 {path}")),
            Self::Foreign { path, .. } => Some(format!("chown root {path}")),
        }
    }
}

/// Reads a key file's text without its final line end.
///
/// # Errors
/// See [`KeyFileError`]; checks are made on the open file, so that it cannot be swapped in between.
pub fn read_key_file(path: &Path) -> Result<Secret, KeyFileError> {
    let shown = path.display().to_string();
    let system = |error: std::io::Error| KeyFileError::System {
        path: shown.clone(),
        reason: error.to_string(),
    };
    // O_NONBLOCK: opening a FIFO that somebody left there must not hang the daemon.
    const O_NONBLOCK: i32 = 0o4000;
    let file = OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path).map_err(system)?;
    let meta = file.metadata().map_err(system)?;
    let own_uid = std::fs::metadata("/proc/self").map_err(system)?.uid();
    check_access(&shown, meta.mode(), meta.uid(), own_uid)?;
    if !meta.is_file() {
        return Err(KeyFileError::Content { path: shown, what: "is not a regular file" });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE as usize + 1));
    file.take(MAX_KEY_FILE + 1).read_to_end(&mut bytes).map_err(system)?;
    if bytes.len() as u64 > MAX_KEY_FILE {
        return Err(KeyFileError::Content { path: shown, what: "is too long for a key" });
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
    }
    if bytes.is_empty() {
        return Err(KeyFileError::Content { path: shown, what: "is empty" });
    }
    if bytes.contains(&b'\n') {
        return Err(KeyFileError::Content { path: shown, what: "has several lines" });
    }
    Ok(Secret::from(bytes))
}

/// Refuses what anybody but root and the reader could read or write (security.md, "Privilege").
fn check_access(path: &str, mode: u32, uid: u32, own_uid: u32) -> Result<(), KeyFileError> {
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode: mode & 0o7777 });
    }
    if uid != 0 && uid != own_uid {
        return Err(KeyFileError::Foreign { path: path.to_owned(), uid });
    }
    Ok(())
}

/// The 32 bytes of a pair secret from its file's text.
pub(super) fn decode_pair_secret(text: &Secret) -> Option<Secret> {
    let digits = text.expose();
    if digits.len() != 2 * PAIR_SECRET_LEN {
        return None;
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(PAIR_SECRET_LEN));
    for pair in digits.chunks_exact(2) {
        let mut byte = 0;
        for digit in pair {
            byte = byte << 4 | u8::try_from(char::from(*digit).to_digit(16)?).ok()?;
        }
        bytes.push(byte);
    }
    Some(Secret::from(bytes))
}

/// Draws a key: 64 hexadecimal digits.
pub fn generate(rng: &mut dyn crypto::Rng) -> Zeroizing<String> {
    let secret = Secret::random(PAIR_SECRET_LEN, rng);
    let mut text = Zeroizing::new(String::with_capacity(2 * PAIR_SECRET_LEN));
    for byte in secret.expose() {
        for digit in [byte >> 4, byte & 15] {
            // A half byte is always a hexadecimal digit.
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    text
}

/// Writes a new key file with mode 0600; an existing file is never touched.
///
/// # Errors
/// [`KeyFileError::System`], also when the file exists.
pub fn write_key_file(path: &Path, key: &str) -> Result<(), KeyFileError> {
    let system = |error: std::io::Error| KeyFileError::System {
        path: path.display().to_string(),
        reason: error.to_string(),
    };
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(system)?;
    let mut line = Zeroizing::new(String::with_capacity(key.len() + 1));
    line.push_str(key);
    line.push('\n');
    file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).map_err(system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_is_for_the_owner_alone() {
        assert!(check_access("k", 0o100_600, 0, 0).is_ok());
        assert!(check_access("k", 0o100_400, 990, 990).is_ok());
        assert!(check_access("k", 0o100_600, 0, 990).is_ok());
        for mode in [0o640, 0o604, 0o620, 0o602, 0o644, 0o601] {
            let refused = check_access("k", 0o100_000 | mode, 0, 0);
            assert_eq!(refused, Err(KeyFileError::Exposed { path: "k".into(), mode }));
        }
        let refused = check_access("k", 0o100_600, 1000, 0);
        assert_eq!(refused, Err(KeyFileError::Foreign { path: "k".into(), uid: 1000 }));
    }

    #[test]
    fn a_generated_key_is_a_pair_secret() {
        let key = generate(&mut crypto::rand_core::OsRng);
        let text = Secret::from_slice(key.as_bytes());
        assert_eq!(decode_pair_secret(&text).unwrap().len(), PAIR_SECRET_LEN);
        let other = generate(&mut crypto::rand_core::OsRng);
        assert_ne!(*key, *other);
        for wrong in ["", "ab", &key[..63], &format!("{}g", &key[..63])] {
            assert!(decode_pair_secret(&Secret::from_slice(wrong.as_bytes())).is_none(), "{wrong}");
        }
        let known = format!("{}0aF", "0".repeat(61));
        let decoded = decode_pair_secret(&Secret::from_slice(known.as_bytes())).unwrap();
        assert_eq!(decoded.expose()[31], 0xaf);
    }
}
