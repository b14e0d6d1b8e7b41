//! The `tandem` binary as a person or a script runs it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use gateway::status::{FlowStatus, Status, TunnelState};
use serde_json::Value;
use tandem::control_socket::{Call, Failure, Fault, Move, Request, Response, Server, TunnelUp};
use tokio::sync::mpsc;

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tandem-cli-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// The sample configuration with key files beside it.
    fn sample(&self) -> String {
        let sample = include_str!("../../../config/tandem.toml");
        let text = sample.replace("/etc/tandem/", "").replace(
            "[daemon]\n",
            &format!("[daemon]\nsocket = {:?}\n", self.path("control.sock")),
        );
        std::fs::write(self.0.join("tandem.toml"), text).unwrap();
        for key in ["pair.key", "branch.psk"] {
            assert!(tandem(&["genkey", &self.path(key)]).status.success());
        }
        self.path("tandem.toml")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tandem(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tandem")).args(args).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Exactly one line, and that is JSON.
fn json(output: &Output) -> Value {
    let text = out(output);
    assert_eq!(text.lines().count(), 1, "{text}{}", err(output));
    serde_json::from_str(&text).unwrap()
}

/// A daemon on a thread of its own that knows one connection and one endpoint.
fn daemon(socket: &Path) {
    let (ready, wait) = std::sync::mpsc::channel();
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let server = Server::bind(&socket).await.unwrap();
            let (calls, mut inbox) = mpsc::channel::<Call>(4);
            tokio::spawn(server.run(calls));
            ready.send(()).unwrap();
            while let Some(Call { request, reply }) = inbox.recv().await {
                let _ = reply.send(respond(request));
            }
        });
    });
    wait.recv().unwrap();
}

fn respond(request: Request) -> Response {
    let unknown = |what: &str, name: &str| {
        let failure = Failure::new(Fault::UnknownName, format!("there is no {what} `{name}`"));
        Response::Error(failure.hint("one of: branch"))
    };
    match request {
        Request::Status {} | Request::Summary {} => Response::Status {
            status: Box::new(Status { instance: "left".into(), ..Status::default() }),
        },
        Request::Failover { endpoint } => Response::Failover {
            moves: vec![Move {
                endpoint: endpoint.unwrap_or("main".into()),
                from: "left".into(),
                to: "right".into(),
                term: 13,
                took_ms: 4,
            }],
        },
        Request::Drain {} => Response::Drain {
            instance: "left".into(),
            withdrawn: Vec::new(),
            moves: vec![Move {
                endpoint: "a".into(),
                from: "left".into(),
                to: "right".into(),
                term: 13,
                took_ms: 4,
            }],
        },
        Request::Undrain {} => Response::Undrain { instance: "left".into() },
        Request::Flows {} => Response::Flows {
            flows: vec![
                FlowStatus {
                    source: "10.1.0.9".into(),
                    destination: "10.2.0.5".into(),
                    protocol: 6,
                    source_port: Some(40_000),
                    destination_port: Some(443),
                    connection: Some("branch".into()),
                    endpoint: "a".into(),
                    steered: true,
                    ..FlowStatus::default()
                },
                FlowStatus {
                    source: "fd01::9".into(),
                    destination: "fd02::5".into(),
                    protocol: 58,
                    endpoint: "b".into(),
                    ..FlowStatus::default()
                },
            ],
        },
        Request::Up { connection } if connection == "branch" => Response::Up {
            connection,
            tunnels: vec![TunnelUp {
                connection: "branch".into(),
                endpoint: "main".into(),
                state: TunnelState::Established,
            }],
        },
        Request::Up { connection } if connection == "depot" => Response::Up {
            connection,
            tunnels: vec![TunnelUp {
                connection: "depot".into(),
                endpoint: "main".into(),
                state: TunnelState::Connecting,
            }],
        },
        Request::Down { connection, purge } => {
            Response::Down { connection, closed: 1, purged: purge }
        }
        Request::Rekey { connection, what } => {
            let (ike, children) = match what {
                tandem::control_socket::RekeyWhat::Both => (1, 2),
                tandem::control_socket::RekeyWhat::Ike => (1, 0),
                tandem::control_socket::RekeyWhat::Child => (0, 2),
            };
            Response::Rekey { connection, ike, children }
        }
        Request::Up { connection } => unknown("connection", &connection),
    }
}

#[test]
fn commands_to_the_daemon() {
    let place = Place::new("daemon");
    let socket = place.path("control.sock");
    daemon(Path::new(&socket));
    let ask = |args: &[&str]| tandem(&[args, &["--socket", &socket]].concat());

    let status = ask(&["status"]);
    assert!(
        status.status.success() && out(&status).starts_with("left · tandemd"),
        "{}",
        err(&status)
    );
    assert_eq!(json(&ask(&["status", "--json"]))["instance"], "left");

    assert_eq!(out(&ask(&["failover", "main"])), "main: left → right, term 13, in 4 ms\n");
    assert_eq!(json(&ask(&["failover", "--json"]))["moves"][0]["to"], "right");
    assert_eq!(out(&ask(&["up", "branch"])), "branch at main: established\n");
    assert_eq!(out(&ask(&["down", "branch"])), "branch: 1 tunnel closed\n");
    assert_eq!(json(&ask(&["down", "branch", "--purge", "--json"]))["purged"], true);
    assert_eq!(out(&ask(&["rekey", "branch"])), "branch: rekeying 1 IKE SA and 2 Child SAs\n");
    assert_eq!(json(&ask(&["rekey", "branch", "--ike", "--json"]))["children"], 0);
    assert_eq!(json(&ask(&["rekey", "branch", "--child", "--json"]))["ike"], 0);

    // What did not come up is no success for a script.
    let slow = ask(&["up", "depot"]);
    assert_eq!((slow.status.code(), out(&slow).as_str()), (Some(1), "depot at main: connecting\n"));
    let unknown = ask(&["up", "nowhere"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert_eq!(err(&unknown), "tandem: there is no connection `nowhere`\n  hint: one of: branch\n");
    let unknown = ask(&["up", "nowhere", "--json"]);
    assert_eq!((unknown.status.code(), err(&unknown).as_str()), (Some(1), ""));
    assert_eq!(json(&unknown)["fault"], "unknown-name");
}

#[test]
fn the_configuration_names_the_socket() {
    let place = Place::new("socket");
    let config = place.sample();
    let nobody = tandem(&["status", "--config", &config]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(err(&nobody).contains(&place.path("control.sock")), "{}", err(&nobody));
    assert!(
        err(&nobody).contains("hint: start it with `systemctl start tandemd`"),
        "{}",
        err(&nobody)
    );
    daemon(Path::new(&place.path("control.sock")));
    assert!(tandem(&["status", "--config", &config]).status.success());
    // A broken configuration does not keep anybody from asking for the status.
    let text = std::fs::read_to_string(&config).unwrap().replace("index = 0", "index = 7\nx = = 1");
    std::fs::write(&config, text).unwrap();
    assert!(tandem(&["status", "--config", &config]).status.success());
}

#[test]
fn check_says_fine_or_where_not() {
    let place = Place::new("check");
    let config = place.sample();
    let fine = tandem(&["check", &config]);
    assert!(fine.status.success(), "{}{}", out(&fine), err(&fine));
    assert!(
        out(&fine).contains("fine for `left`, paired with `right`; endpoints 1, connections 1"),
        "{}",
        out(&fine)
    );
    assert!(out(&fine).contains("start tandemd with --instance"), "{}", out(&fine));
    let digest = |instance| {
        json(&tandem(&["check", &config, "--instance", instance, "--json"]))["config_digest"]
            .clone()
    };
    assert_eq!(digest("left"), digest("right"));
    assert_eq!(digest("left").as_str().unwrap().len(), 16);

    let text =
        std::fs::read_to_string(&config).unwrap().replace("home = \"left\"", "home = \"lft\"");
    std::fs::write(&config, text).unwrap();
    let bad = tandem(&["check", &config]);
    assert_eq!(bad.status.code(), Some(1));
    let shown = out(&bad);
    assert!(
        shown.contains("home `lft` is no instance")
            && shown.contains("1 error; tandemd would not start"),
        "{shown}"
    );
    let bad = tandem(&["check", &config, "--json"]);
    assert_eq!(bad.status.code(), Some(1));
    let answer = json(&bad);
    assert_eq!((&answer["result"], &answer["ok"]), (&"check".into(), &false.into()));
    let problem = &answer["problems"][0];
    assert_eq!((&problem["text"], &problem["severity"]), (&"\"lft\"".into(), &"error".into()));
    assert!(
        problem["line"].as_u64().unwrap() > 1
            && problem["expected"] == "expected one of left, right"
    );

    let missing = tandem(&["check", &place.path("none.toml"), "--json"]);
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(json(&missing)["fault"], "file");
}

#[test]
fn genkey_writes_once_with_a_closed_mode() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new("genkey");
    let file = place.path("a.key");
    assert!(tandem(&["genkey", &file]).status.success());
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read_to_string(&file).unwrap();
    assert!(key.len() == 65 && key.trim_end().bytes().all(|b| b.is_ascii_hexdigit()), "{key:?}");
    let again = tandem(&["genkey", &file]);
    assert_eq!(again.status.code(), Some(1));
    assert!(err(&again).contains("never overwritten") && !err(&again).contains(key.trim()));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), key);
    let printed = json(&tandem(&["genkey", "--json"]));
    assert_eq!(printed["key"].as_str().unwrap().len(), 64);
    let named = json(&tandem(&["genkey", &place.path("b.key"), "--json"]));
    assert_eq!((&named["file"], &named["key"]), (&place.path("b.key").into(), &Value::Null));
}

#[test]
fn peer_config_is_the_other_side() {
    let place = Place::new("peer");
    let config = place.sample();
    let shown = tandem(&["peer-config", "branch", "--config", &config]);
    assert!(shown.status.success(), "{}", err(&shown));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/branch.swanctl.conf");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, out(&shown)).unwrap();
    }
    assert_eq!(out(&shown), std::fs::read_to_string(golden).unwrap());
    let key = std::fs::read_to_string(place.path("branch.psk")).unwrap();
    assert!(!out(&shown).contains(key.trim()));

    let secret =
        tandem(&["peer-config", "branch", "--config", &config, "--secrets", "--format", "swanctl"]);
    assert!(out(&secret).contains(&format!("secret = \"{}\"", key.trim())));
    let braces = |c| out(&secret).matches(c).count();
    assert_eq!(braces('{'), braces('}'));

    let answer = json(&tandem(&["peer-config", "branch", "--config", &config, "--json"]));
    assert_eq!(
        (&answer["format"], answer["text"].as_str().unwrap().trim()),
        (&"swanctl".into(), out(&shown).trim())
    );
    let never = std::fs::read_to_string(&config).unwrap().replace("\"auto\"", "\"never\"");
    std::fs::write(&config, never).unwrap();
    let never = out(&tandem(&["peer-config", "branch", "--config", &config]));
    assert!(never.contains("encap = no") && !never.contains("encap = yes"), "{never}");
    let unknown = tandem(&["peer-config", "nowhere", "--config", &config]);
    assert_eq!(err(&unknown), "tandem: there is no connection `nowhere`\n  hint: one of: branch\n");
}

/// The documents of the commands that need no daemon, whole. What differs from run to run is replaced; what the host
/// lacks depends on the host, so of that only the fields' names are compared.
#[test]
fn documents_of_the_local_commands() {
    // `protect` sets rules: in a network namespace of the test's own. Needs root.
    netio::netns::isolate_thread().unwrap();
    let place = Place::new("documents");
    let config = place.sample();
    let broken = place.path("broken.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&broken, text.replace("home = \"left\"", "home = \"lft\"")).unwrap();
    let runs: [&[&str]; 8] = [
        &["check", &config, "--instance", "left"],
        &["check", &broken, "--instance", "left"],
        &["genkey"],
        &["genkey", &place.path("new.key")],
        &["peer-config", "branch", "--config", &config],
        &["protect", "--config", &config, "--instance", "left"],
        &["protect", "--remove"],
        &["peer-config", "nowhere", "--config", &config],
    ];
    let mut shown = String::new();
    for words in runs {
        let mut document = json(&tandem(&[words, &["--json"]].concat()));
        for (key, length) in [("key", 64), ("config_digest", 16)] {
            if let Some(value) = document.get_mut(key).filter(|value| value.is_string()) {
                assert_eq!(value.as_str().unwrap().len(), length, "{key}");
                *value = key.to_uppercase().into();
            }
        }
        for row in
            document.get_mut("host").and_then(Value::as_array_mut).iter().flat_map(|v| v.iter())
        {
            let keys: Vec<_> = row.as_object().unwrap().keys().cloned().collect();
            assert_eq!(keys, ["help", "message", "place", "severity"]);
        }
        if let Some(host) = document.get_mut("host") {
            *host = "HOST".into();
        }
        let text = serde_json::to_string_pretty(&document).unwrap();
        shown += &format!("{}\n", text.replace(&place.path(""), "DIR/"));
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/local.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &shown).unwrap();
    }
    assert_eq!(shown, std::fs::read_to_string(golden).unwrap());
}

#[test]
fn usage_errors_have_a_code_of_their_own() {
    for args in
        [&["fly"][..], &["up"], &["rekey", "b", "--ike", "--child"], &["status", "--nonsense"]]
    {
        assert_eq!(tandem(args).status.code(), Some(2), "{args:?}");
    }
    assert!(out(&tandem(&["--version"])).starts_with("tandem "));
}

#[test]
fn the_daemon_holds_no_format_that_it_does_not_speak() {
    let tandemd =
        |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_tandemd")).args(args).output().unwrap();
    for newest in ["0", "3", "one"] {
        let refused = tandemd(&["--hold-format", newest]);
        assert_eq!(refused.status.code(), Some(2));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("--hold-format"), "{said}");
    }
    // One that it speaks leads on to the configuration.
    let config = "/nonexistent/tandem.toml";
    let begun = tandemd(&["--hold-format", "1", "--config", config]);
    assert!(String::from_utf8_lossy(&begun.stderr).contains(config));
    assert!(out(&tandemd(&["--help"])).contains("--hold-format <N>"));
}
