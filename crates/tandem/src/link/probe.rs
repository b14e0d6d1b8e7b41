//! The probe of proven death: does anybody still listen on the other's pair port?
//!
//! A process that is being killed closes its sockets one by one, so a probe may be accepted by a
//! kernel whose process is dying. When the listener goes, such a connection is reset, and the
//! probe tries again at once: it ends with the kernel's last word, not its first.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::{Instant, sleep, timeout_at};

use super::{PROBE_TIME, ProbeResult};

/// Between two tries, so that a host that accepts and hangs up is not flooded.
const PAUSE: Duration = Duration::from_millis(1);

/// Probes `remote` from `local`'s address; takes at most [`PROBE_TIME`].
pub(super) async fn probe(local: SocketAddr, remote: SocketAddr) -> ProbeResult {
    let deadline = Instant::now() + PROBE_TIME;
    let mut result = ProbeResult::Unknown;
    loop {
        match timeout_at(deadline, super::stream::connect_from(local, remote)).await {
            Ok(Ok(mut stream)) => {
                result = ProbeResult::Accepted;
                // A living process waits for our first message; a dying one's kernel hangs up.
                let mut nothing = [0; 1];
                if timeout_at(deadline, stream.read(&mut nothing)).await.is_err() {
                    return result;
                }
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return ProbeResult::Refused;
            }
            // Reset between SYN and ACK, or no route: what was known before stands.
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Ok(Err(_)) | Err(_) => return result,
        }
        if Instant::now() + PAUSE >= deadline {
            return result;
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn three_answers() {
        let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = tokio::net::TcpListener::bind(local).await.unwrap();
        let remote = listener.local_addr().unwrap();
        // Nobody accepts, as when the other is stopped: its kernel does.
        let start = Instant::now();
        assert_eq!(probe(local, remote).await, ProbeResult::Accepted);
        assert!(start.elapsed() >= PROBE_TIME);
        drop(listener);
        let start = Instant::now();
        assert_eq!(probe(local, remote).await, ProbeResult::Refused);
        assert!(start.elapsed() < PROBE_TIME / 2);
        // A documentation address behind no route, or one that drops: nothing is known.
        let nowhere = "240.0.0.1:4600".parse().unwrap();
        assert_eq!(probe(local, nowhere).await, ProbeResult::Unknown);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_listener_that_goes_while_we_wait_is_noticed_at_once() {
        let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let listener = tokio::net::TcpListener::bind(local).await.unwrap();
        let remote = listener.local_addr().unwrap();
        let start = Instant::now();
        let probing = tokio::spawn(probe(local, remote));
        sleep(Duration::from_millis(10)).await;
        drop(listener);
        assert_eq!(probing.await.unwrap(), ProbeResult::Refused);
        assert!(start.elapsed() < PROBE_TIME);
    }
}
