//! The control socket over a real Unix socket: bounds, bad lines, silence, a daemon that stops.
//! security.md, statement 16: lengths and the caller's uid are checked.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use gateway::status::Status;
use tandem::control_socket::{
    Call, Fault, MAX_CLIENTS, MAX_REQUEST, Request, Response, Server, ask,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(5);

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        // The folder does not exist yet: the server makes it.
        self.0.join("run/control.sock")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A daemon that answers `status` with a name, and lets `up` fall.
async fn daemon(folder: &Folder) {
    let server = Server::bind(&folder.socket()).await.unwrap();
    let (calls, mut inbox) = mpsc::channel::<Call>(4);
    tokio::spawn(server.run(calls));
    tokio::spawn(async move {
        while let Some(call) = inbox.recv().await {
            if call.request == (Request::Status {}) {
                let status = Box::new(Status { instance: "left".into(), ..Status::default() });
                let _ = call.reply.send(Response::Status { status });
            }
        }
    });
}

async fn say(folder: &Folder, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(folder.socket()).await.unwrap();
    // The daemon may hang up while we still write.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_question_is_answered_and_the_socket_is_ours_alone() {
    let folder = Folder::new("answer");
    daemon(&folder).await;
    let response = ask(&folder.socket(), &Request::Status {}, PATIENCE).await.unwrap();
    assert!(matches!(response, Response::Status { status } if status.instance == "left"));
    let mode = std::fs::metadata(folder.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn several_questions_on_one_stream_are_answered_in_order() {
    let folder = Folder::new("several");
    daemon(&folder).await;
    let answer =
        say(&folder, b"{\"command\":\"status\"}\nnonsense\n{\"command\":\"status\"}\n").await;
    let kinds: Vec<bool> = answer.lines().map(|l| l.contains("\"result\":\"status\"")).collect();
    assert_eq!(kinds, [true, false, true]);
}

#[tokio::test]
async fn bad_lines_are_answered_and_change_nothing() {
    let folder = Folder::new("bad");
    daemon(&folder).await;
    let mut deep = b"[".repeat(MAX_REQUEST - 1);
    deep.push(b'\n');
    for line in
        [&b"\n"[..], b"{}\n", b"\0\xff\n", b"{\"command\":\"status\",\"command\":\"up\"}\n", &deep]
    {
        let answer = say(&folder, line).await;
        assert!(answer.contains("\"fault\":\"bad-request\""), "{answer}");
    }
    let long = vec![b'x'; MAX_REQUEST + 1];
    let answer = say(&folder, &long).await;
    assert!(answer.contains(&format!("longer than {MAX_REQUEST} bytes")), "{answer}");
    // A line that just fits is judged by its content; a cut one gets no answer.
    let mut fits = vec![b'x'; MAX_REQUEST - 1];
    fits.push(b'\n');
    assert!(say(&folder, &fits).await.contains("not a request"));
    assert_eq!(say(&folder, b"{\"command\":\"sta").await, "");
    assert!(ask(&folder.socket(), &Request::Status {}, PATIENCE).await.is_ok());
}

#[tokio::test]
async fn an_answer_never_given_means_the_daemon_is_stopping() {
    let folder = Folder::new("dropped");
    daemon(&folder).await;
    let up = Request::Up { connection: "branch".into() };
    let failure = ask(&folder.socket(), &up, PATIENCE).await.unwrap_err();
    assert_eq!((failure.fault, failure.text.as_str()), (Fault::Failed, "tandemd is stopping"));
}

#[tokio::test]
async fn nobody_listening_says_how_to_start_the_daemon() {
    let folder = Folder::new("nobody");
    let failure = ask(&folder.socket(), &Request::Status {}, PATIENCE).await.unwrap_err();
    assert_eq!(failure.fault, Fault::Unreachable);
    assert!(failure.hint.unwrap().contains("systemctl start tandem"));
}

#[tokio::test]
async fn a_left_over_socket_is_replaced_and_a_served_one_is_not() {
    let folder = Folder::new("stale");
    std::fs::create_dir_all(folder.socket().parent().unwrap()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.socket()).unwrap());
    daemon(&folder).await;
    let failure = Server::bind(&folder.socket()).await.unwrap_err();
    assert!(failure.text.contains("another tandemd"), "{failure}");
    assert!(ask(&folder.socket(), &Request::Status {}, PATIENCE).await.is_ok());
}

#[tokio::test]
async fn silent_callers_cannot_keep_others_out_for_long() {
    let folder = Folder::new("silent");
    daemon(&folder).await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CLIENTS {
        silent.push(UnixStream::connect(folder.socket()).await.unwrap());
    }
    // All places are taken; the idle limit frees them.
    let response = ask(&folder.socket(), &Request::Status {}, Duration::from_secs(15)).await;
    assert!(response.is_ok(), "{response:?}");
}
