//! The control socket: how `tandem` talks to a running `tandemd`.
//!
//! A Unix stream socket (default `/run/tandem/control.sock`). The client writes one JSON object on
//! one line; the daemon answers with one JSON object on one line; then either side may go on or close.
//!
//! ```text
//!   → {"command":"failover","endpoint":"main"}
//!   ← {"result":"failover","moves":[{"endpoint":"main","from":"left","to":"right","term":8,"took_ms":4}]}
//! ```
//!
//! What it never does: read more than [`MAX_REQUEST`] bytes before a line end, parse a byte of a caller
//! whose uid is neither root nor the daemon's (SO_PEERCRED), serve more than [`MAX_CLIENTS`] callers at
//! once, or carry a secret in either direction (security.md, statement 16).

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gateway::status::{FlowStatus, Status, TunnelState};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Where the socket stands unless `[daemon] socket` or `--socket` says otherwise.
pub const DEFAULT_PATH: &str = "/run/tandem/control.sock";
/// Longest request line, bytes, line end included.
pub const MAX_REQUEST: usize = 4096;
/// Longest response line, bytes: the status of some ten thousand tunnels.
pub const MAX_RESPONSE: usize = 64 << 20;
/// Callers served at once; more wait for their turn.
pub const MAX_CLIENTS: usize = 16;
/// A caller that stays silent for this long is disconnected.
const IDLE: Duration = Duration::from_secs(5);
/// How long a caller may take to read its answer.
const WRITE: Duration = Duration::from_secs(10);

/// What a caller may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of everything.
    Status {},
    /// The same without the tunnels, which are only counted.
    Summary {},
    /// Planned switchover, of one endpoint or of all that this instance owns.
    Failover {
        /// Name of the endpoint; none: every endpoint this instance owns.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
    },
    /// All endpoints leave this instance, and none comes back unasked.
    Drain {},
    /// The end of a drain: endpoints come home.
    Undrain {},
    /// The flows that this instance saw lately.
    Flows {},
    /// Brings a connection's tunnels up.
    Up {
        /// Name of the connection.
        connection: String,
    },
    /// Closes a connection's tunnels (the peer is told).
    Down {
        /// Name of the connection.
        connection: String,
        /// Also remove the rules that keep this connection's traffic from leaving in clear.
        #[serde(default)]
        purge: bool,
    },
    /// Renews keys now.
    Rekey {
        /// Name of the connection.
        connection: String,
        /// Which SAs.
        #[serde(default)]
        what: RekeyWhat,
    },
}

/// Which SAs `rekey` renews.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RekeyWhat {
    /// The IKE SA and all its Child SAs.
    #[default]
    Both,
    /// The IKE SA alone.
    Ike,
    /// The Child SAs alone.
    Child,
}

/// What the daemon answers. One of these is also what `tandem … --json` prints (for `status`: the inner
/// object alone).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Response {
    /// To `status` and `summary`.
    Status {
        /// The document of [`gateway::status`].
        status: Box<Status>,
    },
    /// To `failover`: every move is complete.
    Failover {
        /// One row per endpoint that moved.
        moves: Vec<Move>,
    },
    /// To `drain`: this instance serves nothing any more.
    Drain {
        /// Name of the instance.
        instance: String,
        /// One row per endpoint that moved.
        moves: Vec<Move>,
        /// Endpoints that cannot move: their tunnels were ended, and their peers told.
        #[serde(default)]
        withdrawn: Vec<String>,
    },
    /// To `undrain`: endpoints whose home it is come back when their hold-down is over.
    Undrain {
        /// Name of the instance.
        instance: String,
    },
    /// To `flows`.
    Flows {
        /// Sorted by source, destination, protocol and ports.
        flows: Vec<FlowStatus>,
    },
    /// To `up`.
    Up {
        /// Name of the connection.
        connection: String,
        /// One row per endpoint of the connection.
        tunnels: Vec<TunnelUp>,
    },
    /// To `down`.
    Down {
        /// Name of the connection.
        connection: String,
        /// Tunnels that were open and are closed now.
        closed: u32,
        /// The rules against clear text were removed.
        purged: bool,
    },
    /// To `rekey`: the exchanges were started (they are complete when `status` shows new SPIs).
    Rekey {
        /// Name of the connection.
        connection: String,
        /// IKE SAs being rekeyed.
        ike: u32,
        /// Child SAs being rekeyed.
        children: u32,
    },
    /// To anything that could not be done.
    Error(Failure),
}

/// One endpoint's planned move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Name of the endpoint.
    pub endpoint: String,
    /// Instance that served it before.
    pub from: String,
    /// Instance that serves it now.
    pub to: String,
    /// The new term.
    pub term: u64,
    /// Milliseconds from the request to the new owner's word.
    pub took_ms: u64,
}

/// One tunnel of a connection that was asked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelUp {
    /// Name of its connection: another than was asked for where a remote gateway has several addresses.
    #[serde(default)]
    pub connection: String,
    /// Name of the endpoint.
    pub endpoint: String,
    /// How far it is when the answer is given.
    pub state: TunnelState,
}

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The line was not a request this release knows.
    BadRequest,
    /// The caller's uid is neither root nor the daemon's.
    Denied,
    /// No endpoint or connection of that name.
    UnknownName,
    /// This instance does not own what it would have to change.
    NotOwner,
    /// The other instance cannot take over now.
    NotReady,
    /// It was tried and the peer, or the other instance, said no or nothing.
    Failed,
    /// The daemon is not running, or its socket cannot be reached.
    Unreachable,
    /// A file: missing, readable by others, in the way …
    File,
    /// The configuration is wrong.
    Config,
}

/// A failure, for the operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    /// Whose doing.
    pub fault: Fault,
    /// One line, whole sentence.
    pub text: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(fault: Fault, text: impl Into<String>) -> Self {
        Self { fault, text: text.into(), hint: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A request on its way to the daemon's control loop.
///
/// Dropping `reply` unanswered tells the caller that the daemon is stopping.
#[derive(Debug)]
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes; a closed receiver means that the caller has left.
    pub reply: oneshot::Sender<Response>,
}

/// The listening side.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    own_uid: u32,
}

impl Server {
    /// Listens at `path`, with mode 0600; creates the folder (0755) if need be and removes a socket that
    /// nobody serves any more.
    ///
    /// # Errors
    /// [`Fault::File`] when another daemon serves this socket, or the file system refuses.
    pub async fn bind(path: &Path) -> Result<Self, Failure> {
        let file = |error: io::Error| {
            Failure::new(
                Fault::File,
                format!("cannot listen on control socket {}: {error}", path.display()),
            )
            .hint("the folder must be writable for tandemd; [daemon] socket chooses another")
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(file)?;
        }
        if path.exists() {
            if UnixStream::connect(path).await.is_ok() {
                return Err(Failure::new(
                    Fault::File,
                    format!("another tandemd serves control socket {}", path.display()),
                )
                .hint("stop it first, or give this one another [daemon] socket"));
            }
            std::fs::remove_file(path).map_err(file)?;
        }
        let listener = UnixListener::bind(path).map_err(file)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(file)?;
        // Our own uid without a system call of our own: /proc/self belongs to it.
        let own_uid = std::fs::metadata("/proc/self").map_err(file)?.uid();
        Ok(Self { listener, path: path.to_owned(), own_uid })
    }

    /// Serves callers until `calls` is closed. Each request becomes one [`Call`].
    pub async fn run(self, calls: mpsc::Sender<Call>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = calls.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (calls, own_uid) = (calls.clone(), self.own_uid);
                    tokio::spawn(async move {
                        // A caller that vanishes mid-line is no event of ours.
                        if let Ok(caller) = stream.peer_cred() {
                            let _ = serve(stream, caller.uid(), own_uid, &calls).await;
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: wait rather than spin.
                    tracing::warn!(%error, "control socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Best effort: a leftover socket is removed at the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One caller, request after request.
async fn serve(
    stream: UnixStream,
    uid: u32,
    own_uid: u32,
    calls: &mpsc::Sender<Call>,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    if !may_ask(uid, own_uid) {
        tracing::warn!(uid, "control socket: caller refused");
        let failure = Failure::new(Fault::Denied, format!("uid {uid} may not control tandemd"))
            .hint("use sudo, or the user that tandemd runs as");
        return send(stream.get_mut(), &Response::Error(failure), WRITE).await;
    }
    loop {
        let line = match tokio::time::timeout(IDLE, read_line(&mut stream, MAX_REQUEST)).await {
            Err(_silent) => return Ok(()),
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(line))) => line,
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                // The rest of the line is unread, so the stream cannot go on.
                let text = format!("a request line longer than {MAX_REQUEST} bytes");
                let failure = Failure::new(Fault::BadRequest, text);
                return send(stream.get_mut(), &Response::Error(failure), WRITE).await;
            }
            Ok(Err(error)) => return Err(error),
        };
        let response = match serde_json::from_slice::<Request>(&line) {
            Err(error) => Response::Error(
                Failure::new(Fault::BadRequest, format!("not a request: {error}"))
                    .hint("are tandem and tandemd of one release?"),
            ),
            Ok(request) => answer(request, calls).await,
        };
        let line = written(response).await?;
        send_line(stream.get_mut(), &line, WRITE).await?;
    }
}

/// A response as a line. The state of ten thousand tunnels takes its time, in which the control loop has more urgent
/// things to do.
async fn written(response: Response) -> io::Result<Vec<u8>> {
    match response {
        Response::Status { .. } | Response::Flows { .. } => {
            tokio::task::spawn_blocking(move || line_of(&response)).await?
        }
        short => line_of(&short),
    }
}

/// Hands a request to the control loop and waits for its word.
async fn answer(request: Request, calls: &mpsc::Sender<Call>) -> Response {
    let stopping = || Response::Error(Failure::new(Fault::Failed, "tandemd is stopping"));
    let (reply, response) = oneshot::channel();
    if calls.send(Call { request, reply }).await.is_err() {
        return stopping();
    }
    response.await.unwrap_or_else(|_dropped| stopping())
}

/// Root, and the user the daemon runs as.
fn may_ask(uid: u32, own_uid: u32) -> bool {
    uid == 0 || uid == own_uid
}

/// A line without its end; `None` at the end of the stream; `InvalidData` when longer than `limit`.
async fn read_line<R: AsyncBufRead + Unpin>(
    reader: &mut R,
    limit: usize,
) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = reader.take(limit as u64).read_until(b'\n', &mut line).await?;
    if line.pop_if(|last| *last == b'\n').is_some() {
        Ok(Some(line))
    } else if read == 0 {
        Ok(None)
    } else if read == limit {
        Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"))
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Writes one value as one line.
async fn send<T: Serialize>(
    stream: &mut UnixStream,
    value: &T,
    patience: Duration,
) -> io::Result<()> {
    send_line(stream, &line_of(value)?, patience).await
}

fn line_of<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

async fn send_line(stream: &mut UnixStream, line: &[u8], patience: Duration) -> io::Result<()> {
    tokio::time::timeout(patience, stream.write_all(line))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Asks the daemon at `path` one thing and waits `patience` for the answer.
///
/// # Errors
/// The daemon's own failure, or [`Fault::Unreachable`] / [`Fault::Denied`] with a hint when there is
/// nobody, or nobody that listens to us, at the other end.
pub async fn ask(path: &Path, request: &Request, patience: Duration) -> Result<Response, Failure> {
    let mut stream = match UnixStream::connect(path).await {
        Ok(stream) => BufReader::new(stream),
        Err(error) => return Err(unreachable(path, &error)),
    };
    let broken = |error: &io::Error| {
        Failure::new(Fault::Unreachable, format!("tandemd at {} hung up: {error}", path.display()))
            .hint("journalctl -u tandemd -n 50")
    };
    // A refusing daemon may answer and close before it has read us: its word counts, not our EPIPE.
    let sent = send(stream.get_mut(), request, WRITE).await;
    let line = match tokio::time::timeout(patience, read_line(&mut stream, MAX_RESPONSE)).await {
        Ok(Ok(Some(line))) => line,
        Ok(Ok(None)) => {
            let eof = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(broken(&sent.err().unwrap_or(eof)));
        }
        Ok(Err(error)) => return Err(broken(&error)),
        Err(_late) => {
            let text = format!("no answer from tandemd within {} s", patience.as_secs());
            return Err(
                Failure::new(Fault::Unreachable, text).hint("tandem status; journalctl -u tandemd")
            );
        }
    };
    match serde_json::from_slice(&line) {
        Ok(Response::Error(failure)) => Err(failure),
        Ok(response) => Ok(response),
        Err(error) => Err(Failure::new(
            Fault::BadRequest,
            format!("tandemd's answer is not understood: {error}"),
        )
        .hint("are tandem and tandemd of one release?")),
    }
}

/// Says what a failed connect means.
fn unreachable(path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
            Fault::Unreachable,
            format!("tandemd is not running here (nobody listens on {path})"),
        )
        .hint("start it with `systemctl start tandemd`; --socket or --config names another socket"),
        io::ErrorKind::PermissionDenied => {
            Failure::new(Fault::Denied, format!("no permission to open {path}"))
                .hint("use sudo, or the user that tandemd runs as")
        }
        _ => Failure::new(Fault::Unreachable, format!("cannot open {path}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_daemons_own_user_may_ask() {
        assert!(may_ask(0, 990) && may_ask(990, 990) && may_ask(0, 0));
        assert!(!may_ask(1000, 990) && !may_ask(990, 0));
    }

    #[tokio::test]
    async fn a_line_is_bounded_on_both_sides_of_the_limit() {
        let mut fits = vec![b'x'; 9];
        fits.push(b'\n');
        assert_eq!(read_line(&mut &fits[..], 10).await.unwrap(), Some(vec![b'x'; 9]));
        let long = [b'x'; 11];
        let error = read_line(&mut &long[..], 10).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_line(&mut &b""[..], 10).await.unwrap(), None);
        let cut = read_line(&mut &b"{\"comm"[..], 10).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_foreign_uid_is_refused_before_its_line_is_read() {
        let (client, server) = UnixStream::pair().unwrap();
        let (calls, mut inbox) = mpsc::channel(1);
        let mut client = BufReader::new(client);
        send(client.get_mut(), &Request::Status {}, WRITE).await.unwrap();
        let served = serve(server, 1000, 990, &calls);
        tokio::time::timeout(WRITE, served).await.unwrap().unwrap();
        let line = read_line(&mut client, MAX_REQUEST).await.unwrap().unwrap();
        let response: Response = serde_json::from_slice(&line).unwrap();
        assert!(matches!(response, Response::Error(Failure { fault: Fault::Denied, .. })));
        assert!(inbox.try_recv().is_err());
    }
}
