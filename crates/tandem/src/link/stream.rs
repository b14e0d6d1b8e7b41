//! TCP: listening, connecting, the handshakes over it, and the two tasks of a standing stream.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use netio::descriptor::close_first;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::datagram::Keys;
use super::frame::{Assembler, Kind, RECORD_MAX, chunks};
use super::manager::Internal;
use super::noise::{self, Initiator, MESSAGE_LEN, Session};
use super::{Shared, lock};

/// A handshake takes two round trips; a silent other is given up after this.
const HANDSHAKE_TIME: Duration = Duration::from_secs(1);

/// Handshakes under way on one listener; more are hung up on.
pub(super) const HANDSHAKES_MAX: usize = 8;

/// Sealed bytes that wait for the other to take them. Beyond it the other does not read, and the
/// stream is over.
const PENDING_MAX: usize = 128 << 20;

pub(super) fn listen(local: SocketAddr) -> io::Result<TcpListener> {
    let socket = tcp_socket(local)?;
    // Connections of a process killed a moment ago linger in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(local)?;
    socket.listen(32)
}

/// A stream that ends at once when this process is killed, as `ha`'s proof of a death wants it: for one that was accepted.
pub(super) fn sudden(stream: TcpStream) -> io::Result<TcpStream> {
    TcpStream::from_std(close_first(stream.into_std()?.into()).into())
}

/// A socket that ends at once, from the first: no thread that starts while it connects has a copy.
fn tcp_socket(local: SocketAddr) -> io::Result<TcpSocket> {
    let socket = Socket::new(Domain::for_address(local), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    let socket = close_first(socket.into());
    Ok(TcpSocket::from_std_stream(socket.into()))
}

/// Connects from the link's own address, whatever route the host would choose.
pub(super) async fn connect_from(local: SocketAddr, remote: SocketAddr) -> io::Result<TcpStream> {
    let socket = tcp_socket(local)?;
    socket.bind(SocketAddr::new(local.ip(), 0))?;
    let stream = socket.connect(remote).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects on one link and shakes hands. `None` is not worth a word: nobody is there.
pub(super) async fn initiate(shared: &Shared, link: u8) -> Option<(TcpStream, Session)> {
    let port = shared.port(link)?;
    let from = port.remote.ip();
    let handshake = async {
        let mut stream = connect_from(port.local, port.remote).await.ok()?;
        let (initiator, message) = match Initiator::start(&shared.psk, shared.index) {
            Ok(started) => started,
            Err(error) => {
                shared.counters.refuse_handshake(from, error);
                return None;
            }
        };
        stream.write_all(&message).await.ok()?;
        let mut answer = [0; MESSAGE_LEN];
        if stream.read_exact(&mut answer).await.is_err() {
            return Some(Err(None));
        }
        Some(initiator.finish(&answer).map(|session| (stream, session)).map_err(Some))
    };
    match timeout(HANDSHAKE_TIME, handshake).await {
        Ok(Some(Ok(done))) => Some(done),
        Ok(Some(Err(Some(error)))) => {
            shared.counters.refuse_handshake(from, error);
            None
        }
        Ok(Some(Err(None))) => {
            // One may be a restart in a bad moment; a series is a refusal.
            super::Counters::add(&shared.counters.hang_ups);
            if shared.counters.snapshot().hang_ups.is_multiple_of(5) {
                shared.counters.refused_by_other(from);
            }
            None
        }
        Ok(None) => None,
        Err(_) => {
            super::Counters::add(&shared.counters.broken_handshakes);
            None
        }
    }
}

/// The accepting side, up to the initiator's first record. Only who holds the secret and chose
/// this connection gets so far.
pub(super) async fn accept(
    shared: &Shared,
    mut stream: TcpStream,
    from: IpAddr,
) -> Option<(TcpStream, Session, Keys)> {
    let handshake = async {
        let _ = stream.set_nodelay(true);
        let mut message = [0; MESSAGE_LEN];
        stream.read_exact(&mut message).await.ok()?;
        let (answer, session) = match noise::respond(&shared.psk, shared.index, &message) {
            Ok(done) => done,
            Err(error) => return Some(Err(error)),
        };
        stream.write_all(&answer).await.ok()?;
        let mut length = [0; 2];
        stream.read_exact(&mut length).await.ok()?;
        let mut body = vec![0; usize::from(u16::from_be_bytes(length)).min(RECORD_MAX)];
        stream.read_exact(&mut body).await.ok()?;
        let mut plain = Zeroizing::new(Vec::new());
        session.open(0, &body, &mut plain).ok()?;
        let (kind, keys) = plain.split_first()?;
        let keys =
            (Kind::from_byte(*kind) == Some(Kind::Keys)).then(|| Keys::decode(keys)).flatten()?;
        Some(Ok((session, keys)))
    };
    match timeout(HANDSHAKE_TIME, handshake).await {
        Ok(Some(Ok((session, keys)))) => Some((stream, session, keys)),
        Ok(Some(Err(error))) => {
            shared.counters.refuse_handshake(from, error);
            None
        }
        // Probes and abandoned attempts end here too.
        Ok(None) | Err(_) => {
            super::Counters::add(&shared.counters.broken_handshakes);
            None
        }
    }
}

/// Sealed records on their way to the writer task.
pub(super) struct Outbox {
    session: Arc<Session>,
    inner: Mutex<Pending>,
    wake: Notify,
}

#[derive(Default)]
struct Pending {
    next: u64,
    bytes: Vec<u8>,
    /// Write what is there, then end the stream and tell.
    closing: Option<oneshot::Sender<()>>,
    /// Take nothing more.
    over: bool,
}

impl Outbox {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session, inner: Mutex::new(Pending::default()), wake: Notify::new() }
    }

    /// Seals a whole frame into the queue. False when the stream takes nothing more.
    pub(super) fn push_frame(&self, frame: &[u8]) -> bool {
        chunks(frame).all(|(kind, chunk)| self.push(kind, chunk))
    }

    /// Seals one record into the queue.
    pub(super) fn push(&self, kind: Kind, chunk: &[u8]) -> bool {
        let mut inner = lock(&self.inner);
        if inner.over {
            return false;
        }
        if inner.bytes.len() + chunk.len() > PENDING_MAX {
            inner.over = true;
            self.wake.notify_one();
            return false;
        }
        let mut plain = Zeroizing::new(Vec::with_capacity(1 + chunk.len()));
        plain.push(kind.byte());
        plain.extend_from_slice(chunk);
        let number = inner.next;
        inner.next += 1;
        let sealed = self.session.seal(number, &plain, &mut inner.bytes).is_ok();
        inner.over |= !sealed;
        drop(inner);
        self.wake.notify_one();
        sealed
    }

    /// Says goodbye, lets what is queued go out, ends the stream, then resolves `done`.
    pub(super) fn goodbye(&self, done: oneshot::Sender<()>) {
        self.push(Kind::Goodbye, &[]);
        let mut inner = lock(&self.inner);
        inner.closing = Some(done);
        inner.over = true;
        drop(inner);
        self.wake.notify_one();
    }
}

/// Starts the two tasks of a stream; dropping the set ends them and closes the stream.
pub(super) fn run(
    tasks: &mut tokio::task::JoinSet<()>,
    stream: TcpStream,
    outbox: Arc<Outbox>,
    first_number: u64,
    generation: u64,
    to_manager: mpsc::Sender<Internal>,
) {
    let (read, write) = stream.into_split();
    let session = Arc::clone(&outbox.session);
    tasks.spawn(write_loop(write, outbox, generation, to_manager.clone()));
    tasks.spawn(async move {
        let end = read_loop(read, &session, first_number, generation, &to_manager).await;
        let _ = to_manager.send(Internal::Ended { generation, end }).await;
    });
}

async fn write_loop(
    mut write: OwnedWriteHalf,
    outbox: Arc<Outbox>,
    generation: u64,
    to_manager: mpsc::Sender<Internal>,
) {
    let mut bytes = Vec::new();
    loop {
        let (closing, over) = {
            let mut inner = lock(&outbox.inner);
            bytes.clear();
            std::mem::swap(&mut bytes, &mut inner.bytes);
            (inner.closing.take(), inner.over)
        };
        // An error shows on the reading side too, which reports it.
        let written = write.write_all(&bytes).await;
        // A snapshot's burst must not stay resident: a killed process frees memory first.
        if bytes.capacity() > 1 << 20 {
            bytes = Vec::new();
        }
        if let Some(done) = closing {
            let _ = write.shutdown().await;
            let _ = done.send(());
            return;
        }
        if written.is_err() {
            return;
        }
        if over && lock(&outbox.inner).bytes.is_empty() {
            let _ = to_manager.send(Internal::Ended { generation, end: End::Overflow }).await;
            return;
        }
        outbox.wake.notified().await;
    }
}

/// Why a reading or writing task stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Goodbye,
    Closed,
    /// What came does not verify or makes no sense.
    Broken,
    /// The other takes nothing off the stream.
    Overflow,
}

async fn read_loop(
    mut read: OwnedReadHalf,
    session: &Session,
    first_number: u64,
    generation: u64,
    to_manager: &mpsc::Sender<Internal>,
) -> End {
    let mut number = first_number;
    let mut buffer = Vec::with_capacity(2 * RECORD_MAX);
    let mut plain = Zeroizing::new(Vec::with_capacity(RECORD_MAX));
    let mut assembler = Assembler::default();
    loop {
        let mut rest: &[u8] = &buffer;
        while let Some((length, tail)) = rest.split_first_chunk::<2>() {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > RECORD_MAX {
                return End::Broken;
            }
            let Some((body, tail)) = tail.split_at_checked(length) else { break };
            rest = tail;
            if session.open(number, body, &mut plain).is_err() {
                return End::Broken;
            }
            let Some((kind, chunk)) = plain.split_first() else { return End::Broken };
            let internal = match (Kind::from_byte(*kind), number) {
                (Some(Kind::Keys), 0) => match Keys::decode(chunk) {
                    Some(keys) => Some(Internal::PeerKeys { generation, keys }),
                    None => return End::Broken,
                },
                (Some(kind @ (Kind::Part | Kind::End)), 1..) => {
                    match assembler.push(kind == Kind::End, chunk) {
                        Ok(frame) => frame.map(|bytes| Internal::Frame { generation, bytes }),
                        Err(_) => return End::Broken,
                    }
                }
                (Some(Kind::Goodbye), 1..) => return End::Goodbye,
                _ => return End::Broken,
            };
            number += 1;
            if let Some(internal) = internal
                && to_manager.send(internal).await.is_err()
            {
                return End::Closed;
            }
        }
        let consumed = buffer.len() - rest.len();
        buffer.drain(..consumed);
        match read.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return End::Closed,
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    // ha.md, proven death: whatever else a killed process has open is closed after these.
    #[tokio::test(flavor = "current_thread")]
    async fn sockets_of_the_pair_are_closed_first() {
        let local = "127.0.0.1:0".parse().unwrap();
        let listener = listen(local).unwrap();
        let lowest = std::fs::File::open("/dev/null").unwrap();
        let at = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(connect_from(local, at), listener.accept());
        let theirs = sudden(theirs.unwrap().0).unwrap();
        for fd in [listener.as_raw_fd(), ours.unwrap().as_raw_fd(), theirs.as_raw_fd()] {
            assert!(fd > lowest.as_raw_fd() + 100, "{fd}");
        }
    }
}
