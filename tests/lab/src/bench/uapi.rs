//! WireGuard's configuration protocol: text over a UNIX socket, the same for every userspace implementation.

use crate::error::{Error, IoContext, Result};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use x25519_dalek::{PublicKey, StaticSecret};

/// One gateway's side.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Any 32 bytes, the gateway's own.
    pub secret: [u8; 32],
    /// The other gateway's.
    pub other_secret: [u8; 32],
    /// Where the other gateway is.
    pub endpoint: &'a str,
    /// What is behind it.
    pub allowed: &'a str,
}

/// The port that both use.
pub const PORT: u16 = 51_820;

impl Side<'_> {
    fn request(&self) -> String {
        let other = PublicKey::from(&StaticSecret::from(self.other_secret));
        format!(
            "set=1\nprivate_key={}\nlisten_port={PORT}\nreplace_peers=true\npublic_key={}\n\
             endpoint={}:{PORT}\nreplace_allowed_ips=true\nallowed_ip={}\n\n",
            hex(&self.secret),
            hex(other.as_bytes()),
            self.endpoint,
            self.allowed
        )
    }

    /// Tells it to whoever listens at `socket`.
    pub fn tell(&self, socket: &Path) -> Result<()> {
        let what = || format!("talk to {}", socket.display());
        let mut stream = UnixStream::connect(socket).doing(what())?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).doing(what())?;
        stream.write_all(self.request().as_bytes()).doing(what())?;
        let mut answer = String::new();
        let mut buffer = [0; 256];
        // The answer ends with an empty line; the other end may leave the connection open.
        while !answer.ends_with("\n\n") {
            match stream.read(&mut buffer).doing(what())? {
                0 => break,
                count => answer.push_str(&String::from_utf8_lossy(&buffer[..count])),
            }
        }
        judge(&answer)
    }
}

fn judge(answer: &str) -> Result<()> {
    match answer.lines().find_map(|line| line.strip_prefix("errno=")) {
        Some("0") => Ok(()),
        _ => Err(Error::check(format!("a WireGuard refused its configuration: {answer:?}"))),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_names_the_other_by_its_public_key() {
        let side = Side {
            secret: [1; 32],
            other_secret: [2; 32],
            endpoint: "192.0.2.1",
            allowed: "10.0.0.0/8",
        };
        let text = side.request();
        let public = hex(PublicKey::from(&StaticSecret::from([2; 32])).as_bytes());
        assert!(text.starts_with("set=1\n") && text.ends_with("\n\n"));
        assert!(text.contains(&format!("\npublic_key={public}\n")), "{text}");
        assert!(text.contains(&format!("\nprivate_key={}\n", "01".repeat(32))), "{text}");
    }

    #[test]
    fn only_errno_0_is_a_yes() {
        assert!(judge("errno=0\n\n").is_ok());
        assert!(judge("errno=1\n\n").is_err());
        assert!(judge("").is_err());
    }
}
