//! The real `tandemd` in a network namespace of its own: what it keeps of its privileges, what it leaves behind, and
//! what it says when it cannot start. These tests need root and fail without it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking, its helpers too"
)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A namespace with `eth0` and `eth1`, and a folder for the daemon's files.
struct Host {
    folder: PathBuf,
}

impl Host {
    fn ip(&self, arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "ip {arguments}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Writes a configuration of one connection with these selectors.
    fn configure(&self, local_ts: &str, remote_ts: &str) -> PathBuf {
        let folder = self.folder.display();
        let text = format!(
            r#"
            [endpoints.main]
            wan = {{ address = "203.0.113.10", gateway = "203.0.113.1", interface = "eth0" }}
            lan = {{ address = "10.1.0.1", interface = "eth1" }}
            [connections.branch]
            remote_address = "198.51.100.7"
            auth = {{ psk_file = "branch.psk" }}
            [connections.branch.children.net]
            local_ts = {local_ts}
            remote_ts = {remote_ts}
            [daemon]
            socket = "{folder}/control.sock"
            state_dir = "{folder}/state"
            tun = "tandem0"
            "#
        );
        let psk = self.folder.join("branch.psk");
        std::fs::write(&psk, "correct horse battery staple").unwrap();
        std::fs::set_permissions(psk, std::fs::Permissions::from_mode(0o600)).unwrap();
        let path = self.folder.join("tandem.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    fn start(&self, config: &Path) -> Daemon {
        let log = std::fs::File::create(self.folder.join("log")).unwrap();
        let mut child = Command::new("sh")
            // Not what the unit gives: the daemon must see to it itself.
            .args(["-c", "ulimit -c unlimited; exec \"$0\" --config \"$1\""])
            .arg(env!("CARGO_BIN_EXE_tandemd"))
            .arg(config)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.log().contains("tandemd 0") {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "{ended:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        while std::os::unix::net::UnixStream::connect(self.folder.join("control.sock")).is_err() {
            assert!(Instant::now() < deadline, "{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        Daemon(child)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap()
    }

    fn tandem(&self, config: &Path, arguments: &str) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(arguments.split_whitespace())
            .arg("--config")
            .arg(config)
            .output()
            .unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tandem {arguments}: {text}");
        text.into_owned()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Killed with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn on_a_host(name: &'static str, body: impl FnOnce(&Host) + Send + 'static) {
    let run = move || {
        netio::netns::isolate_thread().expect("these tests need root");
        let folder = std::env::temp_dir().join(format!("tandemd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let host = Host { folder };
        host.ip("link set lo up");
        for (interface, address) in [("eth0", "203.0.113.2/24"), ("eth1", "10.1.0.2/24")] {
            host.ip(&format!("link add {interface} type veth peer name {interface}-far"));
            host.ip(&format!("link set {interface} up"));
            host.ip(&format!("link set {interface}-far up"));
            host.ip(&format!("address add {address} dev {interface}"));
        }
        body(&host);
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn no_thread_keeps_privileges_and_a_crash_leaves_no_keys() {
    on_a_host("privileges", |host| {
        let mut daemon = host.start(&host.configure(r#"["10.1.0.0/24"]"#, r#"["10.2.0.0/24"]"#));
        let process = PathBuf::from(format!("/proc/{}", daemon.0.id()));
        let mut names = Vec::new();
        for task in std::fs::read_dir(process.join("task")).unwrap() {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().to_owned()
            };
            let name = line("Name:");
            for set in ["CapEff:", "CapPrm:"] {
                let set = u64::from_str_radix(&line(set), 16).unwrap();
                // CAP_NET_ADMIN and CAP_NET_RAW.
                assert_eq!(set & !0x3000, 0, "{name}");
            }
            for set in ["CapBnd:", "CapInh:", "CapAmb:"] {
                assert_eq!(line(set), "0000000000000000", "{name}: {set}");
            }
            assert_eq!(line("NoNewPrivs:"), "1", "{name}");
            if name.starts_with("tracing") {
                assert_eq!(line("CapPrm:"), "0000000000000000", "the log thread needs nothing");
            }
            names.push(name);
        }
        assert!(names.iter().any(|name| name.starts_with("tracing")), "{names:?}");
        assert!(names.len() >= 3, "control, worker, log: {names:?}");

        let limits = std::fs::read_to_string(process.join("limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let core: Vec<&str> = core.split_whitespace().skip(4).take(2).collect();
        assert_eq!(core, ["0", "0"]);
        let killed = Command::new("kill").args(["-ABRT", &daemon.0.id().to_string()]).status();
        assert!(killed.unwrap().success());
        let status = daemon.0.wait().unwrap();
        assert_eq!((status.signal(), status.core_dumped()), (Some(6), false));
    });
}

/// Where a packet would go: the interface, or `nowhere`.
fn way(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(["route", "get"])
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace().skip_while(|word| *word != "dev").skip(1);
    words.next().filter(|_| output.status.success()).unwrap_or("nowhere").to_owned()
}

/// Bytes that an interface was given to send.
fn sent_by(interface: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix(interface)).unwrap();
    line.trim_start_matches(':').split_whitespace().nth(8).unwrap().parse().unwrap()
}

#[test]
fn everywhere_means_everywhere_but_here() {
    on_a_host("everywhere", |host| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        host.ip("link add eth2 type veth peer name eth2-far");
        host.ip("link set eth2 up");
        host.ip("address add 192.168.7.1/24 dev eth2");
        host.ip("route add default via 203.0.113.1 metric 100");
        // The WAN's own network is among ours: the hardest case for the daemon's packets.
        let ours = r#"["10.1.0.0/24", "203.0.113.0/24"]"#;
        let daemon = host.start(&host.configure(ours, r#"["0.0.0.0/0"]"#));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !host.ip("address show dev tandem0").contains("203.0.113.10") {
            assert!(Instant::now() < deadline, "{}", host.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        let ways = |list: &[(&str, &str)]| {
            let found: Vec<_> = list.iter().map(|(packet, _)| (*packet, way(packet))).collect();
            let wanted: Vec<_> = list.iter().map(|(p, way)| (*p, (*way).to_owned())).collect();
            assert_eq!(found, wanted, "{}", host.ip("rule show"));
        };
        ways(&[
            // Clients of the LAN, and the gateway as one of them: into the tunnel …
            ("8.8.8.8 from 10.1.0.9 iif eth1", "tandem0"),
            ("8.8.8.8 from 10.1.0.2", "tandem0"),
            // … but not to their neighbours.
            ("10.1.0.9 from 10.1.0.2", "eth1"),
            ("203.0.113.7 from 10.1.0.9 iif eth1", "eth0"),
            // IKE and ESP never; anything else from that address is ours to protect.
            ("198.51.100.7 from 203.0.113.10 ipproto udp sport 4500 dport 4500", "eth0"),
            ("198.51.100.7 from 203.0.113.10 ipproto udp sport 500 dport 500", "eth0"),
            ("198.51.100.7 from 203.0.113.10 ipproto udp sport 53 dport 53", "tandem0"),
            // What is none of the connection's business.
            ("8.8.8.8 from 192.168.7.1", "eth0"),
            ("8.8.8.8", "eth0"),
            // Not in clear from the WAN.
            ("10.1.0.9 from 8.8.8.8 iif eth0", "nowhere"),
        ]);
        // ESP as protocol 50, which `ip route get` cannot ask about. What the TUN gets first is the other packet.
        let at = "203.0.113.10".parse().unwrap();
        let mut esp = netio::esp::EspSocket::bind(at, 1 << 16).unwrap();
        let before = sent_by("tandem0");
        let to = "198.51.100.7:0".parse().unwrap();
        let item = netio::udp::SendItem { to, bytes: &[9; 64], tos: 0 };
        assert_eq!(esp.send([item].into_iter()), 1, "{:?}", esp.counters());
        let other = std::net::UdpSocket::bind("203.0.113.10:53").unwrap();
        other.send_to(&[9; 100], "198.51.100.7:53").unwrap();
        let deadline = Instant::now() + Duration::from_secs(3);
        while sent_by("tandem0") == before {
            assert!(Instant::now() < deadline, "nothing came to the TUN");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(sent_by("tandem0") - before, 20 + 8 + 100);
        // A network that has lost its interface is not sought by the default route.
        host.ip("link set eth1 down");
        ways(&[("10.1.0.9 from 10.1.0.2", "tandem0")]);
        host.ip("link set eth1 up");
        drop(daemon);
        ways(&[
            ("8.8.8.8 from 10.1.0.2", "nowhere"),
            ("10.1.0.9 from 10.1.0.2", "eth1"),
            ("8.8.8.8 from 192.168.7.1", "eth0"),
            // Forged by a client, where the address is not (as on a standby): the way of IKE and ESP is for this host.
            (
                "198.51.100.7 from 203.0.113.10 iif eth1 ipproto udp sport 4500 dport 4500",
                "nowhere",
            ),
        ]);
    });
}

#[test]
fn rules_of_an_old_configuration_go_with_it() {
    on_a_host("stale", |host| {
        let (ours, wide) = (r#"["10.1.0.0/24"]"#, r#"["10.2.0.0/24", "0.0.0.0/0"]"#);
        host.tandem(&host.configure(ours, r#"["10.2.0.0/24"]"#), "protect");
        let config = host.configure(ours, wide);
        host.tandem(&config, "protect");
        // A /0 beside a narrower network that was there first: the kernel would take that one for it.
        let rules = host.ip("rule show");
        assert!(rules.contains("from 10.1.0.0/24 lookup 4116"), "{rules}");
        assert!(rules.contains("from 10.1.0.0/24 to 10.2.0.0/24 lookup 4116"), "{rules}");
        let daemon = host.start(&config);
        let config = host.configure(ours, r#"["10.2.0.0/24", "10.3.0.0/24"]"#);
        // While a daemon runs, what it serves stays protected.
        host.tandem(&config, "protect");
        assert_eq!(way("8.8.8.8 from 10.1.0.2"), "tandem0");
        drop(daemon);
        assert_eq!(way("8.8.8.8 from 10.1.0.2"), "nowhere");
        let daemon = host.start(&config);
        assert!(!host.ip("rule show").contains("from 10.1.0.0/24 lookup 4116"));
        assert_eq!(way("10.2.0.7 from 10.1.0.2"), "tandem0");
        drop(daemon);
        assert_eq!(way("10.3.0.7 from 10.1.0.2"), "nowhere");
        let config = host.configure(ours, r#"["10.2.0.0/24"]"#);
        host.tandem(&config, "protect");
        let rules = host.ip("rule show");
        assert!(!rules.contains("10.3.0.0/24"), "{rules}");
        assert_eq!(way("10.2.0.7 from 10.1.0.2"), "nowhere");
    });
}

#[test]
fn a_second_daemon_says_why_not_and_leaves_the_first_alone() {
    on_a_host("second", |host| {
        let config = host.configure(r#"["10.1.0.0/24"]"#, r#"["10.2.0.0/24"]"#);
        let refused = |config: &Path| {
            let output = Command::new(env!("CARGO_BIN_EXE_tandemd"))
                .arg("--config")
                .arg(config)
                .output()
                .unwrap();
            assert!(!output.status.success());
            let said = output.stdout.iter().chain(&output.stderr).copied().collect();
            String::from_utf8(said).unwrap()
        };
        let variant = |from: &str, to: &str| {
            let text = std::fs::read_to_string(&config).unwrap();
            let path = host.folder.join("variant.toml");
            std::fs::write(&path, text.replace(from, to)).unwrap();
            path
        };
        let said = refused(&variant(r#"tun = "tandem0""#, r#"tun = "eth1""#));
        assert!(said.contains("[daemon] tun chooses another name"), "{said}");
        let daemon = host.start(&config);
        let routes = || host.ip("route show table 4116") + &host.ip("route show table main");
        let before = routes();
        assert!(before.contains("tandem0"), "{before}");
        let said = refused(&variant("tandem0", "tandem9"));
        assert!(said.contains("another tandemd serves control socket"), "{said}");
        let said = refused(&variant("control.sock", "other.sock"));
        assert!(said.contains("another tandemd runs in this network namespace"), "{said}");
        assert_eq!(routes(), before);
        drop(daemon);
        let port = std::net::UdpSocket::bind("0.0.0.0:500").unwrap();
        let said = refused(&config);
        assert!(said.contains("another IKE daemon may have the port"), "{said}");
        drop(port);
    });
}
