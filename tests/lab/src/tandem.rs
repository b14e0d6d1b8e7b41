//! Instances of the daemon under test: their configuration, their life and death, what they say of themselves.

use crate::error::{Error, IoContext, Result, write_file};
use crate::ns::Ns;
use crate::proc::{Cmd, Proc};
use crate::run::Run;
use crate::{net, wait};
use nix::sys::signal::Signal;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the binaries are.
#[derive(Clone, Debug)]
pub struct Bins {
    /// The daemon.
    pub tandemd: PathBuf,
    /// The command.
    pub tandem: PathBuf,
}

impl Bins {
    /// Looks in `dir`, or else in `TANDEM_BIN_DIR`, or else beside the running program.
    pub fn find(dir: Option<&Path>) -> Result<Bins> {
        let own = std::env::current_exe().doing("find the lab's own program")?;
        let dir = match (dir, std::env::var_os("TANDEM_BIN_DIR")) {
            (Some(dir), _) => dir.to_owned(),
            (None, Some(dir)) => dir.into(),
            (None, None) => own.parent().unwrap_or(Path::new(".")).to_owned(),
        };
        let bins = Bins { tandemd: dir.join("tandemd"), tandem: dir.join("tandem") };
        for path in [&bins.tandemd, &bins.tandem] {
            if !path.exists() {
                return Err(Error::Machine(format!(
                    "there is no {} (cargo build --release)",
                    path.display()
                )));
            }
        }
        Ok(bins)
    }
}

/// A connection of the configuration file.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its name.
    pub name: String,
    /// The remote gateway, or `any`.
    pub remote_address: String,
    /// Our identity.
    pub local_id: String,
    /// The peer's.
    pub remote_id: String,
    /// The pre-shared key.
    pub psk: String,
    /// IKE proposals.
    pub ike_proposals: Vec<String>,
    /// `auto`, `always`, `never`.
    pub encap: String,
    /// Further `key = value` lines, values in TOML.
    pub settings: Vec<(String, String)>,
    /// Its children.
    pub children: Vec<Child>,
}

/// A child of a connection.
#[derive(Clone, Debug)]
pub struct Child {
    /// Its name.
    pub name: String,
    /// Our selectors.
    pub local_ts: Vec<String>,
    /// The peer's selectors.
    pub remote_ts: Vec<String>,
    /// ESP proposals.
    pub esp_proposals: Vec<String>,
    /// `initiate`, `trap`, `respond`.
    pub start: String,
    /// Further `key = value` lines, values in TOML.
    pub settings: Vec<(String, String)>,
}

/// An endpoint of the configuration file; its interface on the LAN is eth1.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub name: String,
    /// Its home.
    pub home: String,
    /// Its virtual WAN address.
    pub wan: String,
    /// Next hop on the WAN; empty where all peers are on its segment.
    pub gateway: String,
    /// The interface there.
    pub uplink: String,
    /// Its virtual LAN addresses.
    pub lan: Vec<String>,
    /// Further `key = value` lines, values in TOML.
    pub settings: Vec<(String, String)>,
}

/// One configuration file: the same on both hosts.
#[derive(Clone, Debug)]
pub struct Config {
    /// The pair's secret, if there is a pair.
    pub secret: Option<String>,
    /// Further lines of `[pair]`, values in TOML.
    pub pair_settings: Vec<(String, String)>,
    /// Names, indices and links of the instances.
    pub instances: Vec<(String, u8, Vec<String>)>,
    /// The endpoints; every connection is served at each of them.
    pub endpoints: Vec<Endpoint>,
    /// The connections.
    pub connections: Vec<Connection>,
    /// Whether the TUN may use offloads.
    pub offload: bool,
    /// Further lines of `[daemon]`, values in TOML.
    pub daemon_settings: Vec<(String, String)>,
}

/// The pre-shared key of the sample connection.
pub const PSK: &str = "a-shared-secret-of-the-lab";

/// The sample connection to the strongSwan peer.
pub fn branch() -> Connection {
    Connection {
        name: "branch".into(),
        remote_address: net::PEER_WAN.into(),
        local_id: "gw.example".into(),
        remote_id: "branch.example".into(),
        psk: PSK.into(),
        ike_proposals: vec!["aes256gcm16-prfsha384-x25519".into()],
        encap: "auto".into(),
        settings: Vec::new(),
        children: vec![Child {
            name: "net".into(),
            local_ts: vec![net::LOCAL_TS.into()],
            remote_ts: vec![net::REMOTE_TS.into()],
            esp_proposals: vec!["aes256gcm16-x25519".into()],
            start: "respond".into(),
            settings: Vec::new(),
        }],
    }
}

/// Whether this is a run of all scenarios without offloads.
pub fn offloads_off() -> bool {
    std::env::var_os("LAB_OFFLOAD").is_some_and(|value| value == "off")
}

impl Config {
    /// The sample pair, as in architecture.md.
    pub fn pair() -> Config {
        Config {
            // 64 hexadecimal digits, as `tandem genkey` prints.
            secret: Some("00112233445566778899aabbccddeeff".repeat(2)),
            pair_settings: Vec::new(),
            instances: vec![
                ("left".into(), 0, vec!["172.31.0.1:4600".into(), "10.1.0.2:4600".into()]),
                ("right".into(), 1, vec!["172.31.0.2:4600".into(), "10.1.0.3:4600".into()]),
            ],
            endpoints: vec![Endpoint {
                name: "main".into(),
                home: "left".into(),
                wan: net::VIRTUAL_WAN.into(),
                gateway: "203.0.113.1".into(),
                uplink: "eth0".into(),
                lan: vec![net::VIRTUAL_LAN.into(), net::VIRTUAL_LAN6.into()],
                // Scenarios move it, and want it to stay.
                settings: vec![("preempt".into(), "false".into())],
            }],
            connections: vec![branch()],
            offload: true,
            daemon_settings: Vec::new(),
        }
    }

    /// The same pair with two endpoints: `a` at home on the left, `b` on the right. Both go home soon.
    pub fn active_active() -> Config {
        let endpoint = |name: &str, home: &str, wan: &str, lan: &str| Endpoint {
            name: name.into(),
            home: home.into(),
            wan: wan.into(),
            gateway: "203.0.113.1".into(),
            uplink: "eth0".into(),
            lan: vec![lan.into()],
            settings: vec![("hold_down_s".into(), "2".into())],
        };
        Config {
            endpoints: vec![
                endpoint("a", "left", net::VIRTUAL_WAN, net::VIRTUAL_LAN),
                endpoint("b", "right", net::SECOND_WAN, net::SECOND_LAN),
            ],
            ..Config::pair()
        }
    }

    /// The same with endpoints that stay with their home: what dies with it is withdrawn. We initiate, so that a home
    /// that is back negotiates anew.
    pub fn withdrawing() -> Config {
        let mut config = Config::active_active();
        for endpoint in &mut config.endpoints {
            endpoint.settings.push(("on_failure".into(), "\"withdraw\"".into()));
        }
        config.branch().children[0].start = "initiate".into();
        config
    }

    /// Whether an endpoint stays with its home, come what may.
    pub fn withdraws(&self) -> bool {
        let settings = self.endpoints.iter().flat_map(|endpoint| &endpoint.settings);
        settings.into_iter().any(|(key, value)| key == "on_failure" && value.contains("withdraw"))
    }

    /// One instance on its own, `left`.
    pub fn single() -> Config {
        Config { secret: None, instances: vec![("left".into(), 0, Vec::new())], ..Config::pair() }
    }

    /// One instance in the remote gateway's place (see [`net::Net::virtual_peer`]); it initiates.
    pub fn remote() -> Config {
        let mut connection = branch();
        std::mem::swap(&mut connection.local_id, &mut connection.remote_id);
        connection.name = "gw".into();
        connection.remote_address = net::VIRTUAL_WAN.into();
        for child in &mut connection.children {
            std::mem::swap(&mut child.local_ts, &mut child.remote_ts);
            child.start = "initiate".into();
        }
        Config {
            secret: None,
            instances: vec![("peer".into(), 0, Vec::new())],
            endpoints: vec![Endpoint {
                name: "main".into(),
                home: "peer".into(),
                wan: net::PEER_WAN.into(),
                gateway: "198.51.100.1".into(),
                uplink: "eth0".into(),
                lan: vec!["10.2.0.1".into()],
                settings: Vec::new(),
            }],
            connections: vec![connection],
            ..Config::pair()
        }
    }

    /// The sample connection, to be changed.
    pub fn branch(&mut self) -> &mut Connection {
        if self.connections.is_empty() {
            self.connections.push(branch());
        }
        &mut self.connections[0]
    }

    /// Writes the file and the secrets beside it; returns its path. `dir` also holds this daemon's socket and
    /// state: the lab's hosts share one file system, so that `[daemon]` is all that differs between them.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(dir.join("state")).doing(format!("create {}", dir.display()))?;
        let at = dir.display();
        let mut text =
            format!("[daemon]\nsocket = \"{at}/control.sock\"\nstate_dir = \"{at}/state\"\n");
        if !self.offload || offloads_off() {
            text.push_str("offload = false\n");
        }
        lines(&mut text, &self.daemon_settings);
        if let Some(secret) = &self.secret {
            secret_file(&dir.join("pair.key"), secret)?;
            let _ = writeln!(text, "[pair]\nsecret_file = \"{at}/pair.key\"");
            lines(&mut text, &self.pair_settings);
        }
        for (name, index, links) in &self.instances {
            let _ = writeln!(text, "[instances.{name}]\nindex = {index}");
            if !links.is_empty() {
                let _ = writeln!(text, "links = {}", list(links));
            }
        }
        for endpoint in &self.endpoints {
            let Endpoint { name, home, wan, gateway, uplink, lan, settings } = endpoint;
            let _ = writeln!(text, "[endpoints.{name}]\nhome = \"{home}\"");
            let gateway = match gateway.as_str() {
                "" => String::new(),
                address => format!("gateway = \"{address}\", "),
            };
            let _ = writeln!(
                text,
                "wan = {{ address = \"{wan}\", {gateway}interface = \"{uplink}\" }}"
            );
            let _ = writeln!(text, "lan = {{ address = {}, interface = \"eth1\" }}", list(lan));
            lines(&mut text, settings);
        }
        let everywhere: Vec<String> = self.endpoints.iter().map(|e| e.name.clone()).collect();
        for connection in &self.connections {
            let psk = dir.join(format!("{}.psk", connection.name));
            secret_file(&psk, &connection.psk)?;
            let name = &connection.name;
            let _ = writeln!(text, "[connections.{name}]\nendpoints = {}", list(&everywhere));
            let _ = writeln!(text, "remote_address = \"{}\"", connection.remote_address);
            let _ = writeln!(text, "local_id = \"{}\"", connection.local_id);
            let _ = writeln!(text, "remote_id = \"{}\"", connection.remote_id);
            let _ = writeln!(text, "auth = {{ psk_file = \"{}\" }}", psk.display());
            let _ = writeln!(text, "ike_proposals = {}", list(&connection.ike_proposals));
            let _ = writeln!(text, "encap = \"{}\"", connection.encap);
            lines(&mut text, &connection.settings);
            for child in &connection.children {
                let _ = writeln!(text, "[connections.{name}.children.{}]", child.name);
                let _ = writeln!(text, "local_ts = {}", list(&child.local_ts));
                let _ = writeln!(text, "remote_ts = {}", list(&child.remote_ts));
                let _ = writeln!(text, "esp_proposals = {}", list(&child.esp_proposals));
                let _ = writeln!(text, "start = \"{}\"", child.start);
                lines(&mut text, &child.settings);
            }
        }
        let path = dir.join("tandem.toml");
        write_file(&path, text)?;
        Ok(path)
    }
}

fn list(values: &[String]) -> String {
    let quoted: Vec<String> = values.iter().map(|value| format!("\"{value}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

fn lines(text: &mut String, settings: &[(String, String)]) {
    for (key, value) in settings {
        let _ = writeln!(text, "{key} = {value}");
    }
}

/// Key files are refused when others can read them.
pub(crate) fn secret_file(path: &Path, secret: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    write_file(path, secret)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).doing("protect a secret")
}

/// What `tandem status --json` says, as far as the lab looks.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The instance that answers.
    pub instance: String,
    /// The pair.
    pub pair: Option<PairStatus>,
    /// Endpoints.
    pub endpoints: Vec<EndpointStatus>,
    /// Tunnels.
    pub tunnels: Vec<TunnelStatus>,
    /// How many there are.
    pub tunnel_counts: TunnelCounts,
    /// Totals.
    pub counters: Counters,
}

/// The other instance, as seen from here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PairStatus {
    /// `two_way`, `one_way`, `none`, `refused`.
    pub contact: String,
    /// Why it was refused.
    pub refused: Option<String>,
    /// The format in use.
    pub format: Option<u32>,
    /// The newest that it speaks, and the other.
    pub newest_format: Option<u32>,
    /// The newest that the other speaks.
    pub peer_newest_format: Option<u32>,
}

/// One endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointStatus {
    /// Its name.
    pub name: String,
    /// Who owns it, as far as this instance knows.
    pub owner: Option<String>,
    /// `owner`, `shadow`, `steering`, `none`.
    pub role: String,
    /// The term.
    pub term: u64,
    /// `solo`, `syncing`, `synced`.
    pub mode: String,
    /// Position in the log.
    pub position: u64,
    /// What the other instance has acknowledged of it; the owner says so.
    pub acked_position: Option<u64>,
}

/// How many tunnels there are.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TunnelCounts {
    /// Those that stand.
    pub established: u64,
    /// Child SAs that carry traffic both ways.
    pub children: u64,
}

/// One tunnel.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TunnelStatus {
    /// The connection.
    pub connection: String,
    /// The endpoint.
    pub endpoint: String,
    /// `down`, `connecting`, `established`, `closing`.
    pub state: String,
    /// The IKE SA.
    pub ike: Option<IkeStatus>,
    /// Child SAs.
    pub children: Vec<ChildStatus>,
    /// The last thing that went wrong.
    pub last_error: Option<LastError>,
    /// By an operator's command.
    pub taken_down: bool,
}

/// One flow of `tandem flows`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct FlowStatus {
    /// Source address.
    pub source: String,
    /// Source port.
    pub source_port: Option<u16>,
    /// The endpoint it is pinned to.
    pub endpoint: String,
    /// Its packets cross the pair link.
    pub steered: bool,
}

/// The last failure of a tunnel.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LastError {
    /// One line.
    pub text: String,
}

/// One IKE SA.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct IkeStatus {
    /// Initiator's SPI in hexadecimal.
    pub spi_i: String,
    /// Responder's SPI in hexadecimal.
    pub spi_r: String,
    /// `initiator` or `responder`.
    pub role: String,
    /// The peer's address and port.
    pub remote: String,
}

/// One Child SA.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ChildStatus {
    /// Its name.
    pub name: String,
    /// `installing`, `installed`, …
    pub state: String,
    /// Inbound SPI in hexadecimal.
    pub spi_in: String,
    /// Outbound SPI in hexadecimal.
    pub spi_out: String,
    /// Negotiated selectors.
    pub local_ts: Vec<String>,
    /// Negotiated selectors.
    pub remote_ts: Vec<String>,
}

/// Totals.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Inner packets received through tunnels.
    pub packets_in: u64,
    /// Inner packets sent through tunnels.
    pub packets_out: u64,
    /// Packets handed to the other instance.
    pub steered_out: u64,
    /// Packets that the other instance handed to us.
    pub steered_in: u64,
    /// Packets handed from one worker to another.
    pub handed: u64,
    /// Changes of owner by kind.
    pub changes: BTreeMap<String, u64>,
    /// Dropped packets by reason.
    pub drops: BTreeMap<String, u64>,
    /// Dropped IKE datagrams by reason.
    pub ike_drops: BTreeMap<String, u64>,
    /// Refused frames on the pair link by reason.
    pub pair_drops: BTreeMap<String, u64>,
}

impl Status {
    /// An endpoint by its name.
    pub fn endpoint(&self, name: &str) -> EndpointStatus {
        self.endpoints.iter().find(|endpoint| endpoint.name == name).cloned().unwrap_or_default()
    }

    /// The one endpoint of most configurations.
    pub fn main(&self) -> EndpointStatus {
        self.endpoint("main")
    }

    /// The tunnel of a connection.
    pub fn tunnel(&self, connection: &str) -> TunnelStatus {
        self.tunnels
            .iter()
            .find(|tunnel| tunnel.connection == connection)
            .cloned()
            .unwrap_or_default()
    }

    /// Whether `connection` is established with at least `children` installed children.
    pub fn is_up(&self, connection: &str, children: usize) -> bool {
        let tunnel = self.tunnel(connection);
        let installed = tunnel.children.iter().filter(|child| child.state == "installed").count();
        tunnel.state == "established" && installed >= children
    }
}

/// An instance: a daemon that can be killed and started again in its place.
#[derive(Debug)]
pub struct Daemon {
    proc: Option<Proc>,
    /// Its name: `left`.
    pub name: String,
    /// Its host.
    pub ns: Ns,
    bins: Bins,
    config: PathBuf,
    dir: PathBuf,
    extra: Vec<String>,
}

impl Daemon {
    /// Prepares an instance without starting it.
    pub fn prepare(run: &Run, bins: &Bins, ns: &Ns, name: &str, config: &Config) -> Result<Daemon> {
        Self::prepare_with(run, bins, ns, name, |dir| config.write(dir))
    }

    /// The same with a configuration file that `write` writes into the daemon's folder.
    pub fn prepare_with(
        run: &Run,
        bins: &Bins,
        ns: &Ns,
        name: &str,
        write: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<Daemon> {
        let dir = run.subdir(&format!("tandem-{name}"))?;
        // A folder may be left from an earlier scene of the same run; terms of another life must not be.
        std::fs::remove_dir_all(&dir).doing("empty a folder")?;
        let config = write(&dir)?;
        Ok(Daemon {
            proc: None,
            name: name.to_owned(),
            ns: ns.clone(),
            bins: bins.clone(),
            config,
            dir,
            extra: Vec::new(),
        })
    }

    /// Further arguments of the daemon.
    pub fn with_args(mut self, args: &[&str]) -> Self {
        self.extra.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// The further arguments of the next start, in place of those before.
    pub fn set_args(&mut self, args: &[&str]) {
        self.extra = args.iter().map(|arg| (*arg).to_owned()).collect();
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// Where it keeps its terms.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Changes the configuration that the next start will use.
    pub fn set_config(&mut self, config: &Config) -> Result<()> {
        self.config = config.write(&self.dir)?;
        Ok(())
    }

    /// The configuration file.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// Its log, all lives so far.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("tandemd.log")
    }

    /// Its log's text.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn command(&self) -> Cmd {
        self.ns
            .cmd(&self.bins.tandemd)
            .arg("--config")
            .arg(&self.config)
            .args(["--instance", &self.name])
            .args(&self.extra)
    }

    /// Starts the daemon, without waiting for it.
    pub fn spawn(&mut self) -> Result<()> {
        // A socket file of an earlier life must not be mistaken for an answer of this one.
        let _ = std::fs::remove_file(self.socket());
        self.proc = Some(self.command().spawn(&self.log_path())?);
        Ok(())
    }

    /// Starts the daemon and waits until it answers on its control socket.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_ready(Duration::from_secs(20))
    }

    /// Waits until it answers.
    pub fn wait_ready(&mut self, within: Duration) -> Result<()> {
        let what = format!("instance {} to answer", self.name);
        wait::until(&what, within, Duration::from_millis(10), || {
            if let Some(proc) = &mut self.proc {
                proc.check_alive()?;
            }
            Ok(if self.socket().exists() { self.status().ok().map(drop) } else { None })
        })
    }

    /// Its process, if it runs.
    pub fn proc(&mut self) -> Result<&mut Proc> {
        let name = self.name.clone();
        self.proc.as_mut().ok_or_else(|| Error::check(format!("instance {name} does not run")))
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.proc.as_mut().is_some_and(|proc| proc.ended().is_none())
    }

    /// SIGKILL, at once.
    pub fn kill9(&mut self) -> Result<()> {
        self.proc()?.kill9()
    }

    /// Waits until a killed daemon is gone, so that it can be started again.
    pub fn bury(&mut self) -> Result<()> {
        if let Some(mut proc) = self.proc.take() {
            proc.bury(Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// SIGSTOP.
    pub fn freeze(&mut self) -> Result<()> {
        self.proc()?.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn thaw(&mut self) -> Result<()> {
        self.proc()?.signal(Signal::SIGCONT)
    }

    /// An orderly stop.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut proc) = self.proc.take() {
            proc.stop(Signal::SIGTERM, Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// Runs `tandem` against it.
    pub fn tandem(&self, args: &[&str]) -> Result<String> {
        self.tandem_cmd(args).run(Duration::from_secs(15))
    }

    /// The command, for those who want its exit status.
    pub fn tandem_cmd(&self, args: &[&str]) -> Cmd {
        Cmd::new(&self.bins.tandem)
            .arg("--socket")
            .arg(self.socket())
            .arg("--config")
            .arg(&self.config)
            .args(args)
    }

    /// The command line with which a person asks it something.
    pub fn tandem_line(&self, args: &str) -> String {
        format!("{} --socket {} {args}", self.bins.tandem.display(), self.socket().display())
    }

    /// What it says of itself.
    pub fn status(&self) -> Result<Status> {
        let text = self.tandem_cmd(&["status", "--json"]).run(Duration::from_secs(3))?;
        serde_json::from_str(&text)
            .map_err(|error| Error::parse("tandem status --json", error.to_string()))
    }

    /// The ids of the threads that would have to end before the pair link's TCP sockets close: those in whose table one
    /// of them is, whatever its number there. The control thread has raised them all above 512
    /// (`netio::descriptor::close_first`).
    pub fn holders_of_the_link(&mut self) -> Result<Vec<u32>> {
        let pid = self.proc()?.pid();
        let tasks = format!("/proc/{pid}/task");
        let number = |name: std::ffi::OsString| name.to_string_lossy().parse::<u32>().ok();
        let mut open: Vec<(u32, u32, PathBuf)> = Vec::new();
        for task in std::fs::read_dir(&tasks).doing(tasks.as_str())? {
            let task = task.doing(tasks.as_str())?;
            let Some(id) = number(task.file_name()) else { continue };
            let table = std::fs::read_dir(task.path().join("fd")).doing(tasks.as_str())?;
            for fd in table.flatten() {
                if let (Some(fd_number), Ok(what)) =
                    (number(fd.file_name()), std::fs::read_link(fd.path()))
                {
                    open.push((id, fd_number, what));
                }
            }
        }
        let is_of_the_link = |what: &PathBuf| {
            open.iter().any(|(id, number, other)| *id == pid && *number >= 512 && other == what)
        };
        let mut holders: Vec<u32> =
            open.iter().filter(|(.., what)| is_of_the_link(what)).map(|(id, ..)| *id).collect();
        holders.dedup();
        Ok(holders)
    }

    /// Its process.
    pub fn pid(&mut self) -> Result<u32> {
        Ok(self.proc()?.pid())
    }

    /// The flows that it saw lately, by `tandem flows` with these filters.
    pub fn flows(&self, filters: &[&str]) -> Result<Vec<FlowStatus>> {
        #[derive(Deserialize)]
        struct Answer {
            flows: Vec<FlowStatus>,
        }
        let args = [&["flows", "--json"], filters].concat();
        let text = self.tandem_cmd(&args).run(Duration::from_secs(3))?;
        let answer: Answer = serde_json::from_str(&text)
            .map_err(|error| Error::parse("tandem flows --json", error.to_string()))?;
        Ok(answer.flows)
    }

    /// Resident memory, bytes.
    pub fn resident_bytes(&mut self) -> Result<u64> {
        let pid = self.proc()?.pid();
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .doing("read a process's status")?;
        let kilobytes = text
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        kilobytes
            .map(|kilobytes: u64| kilobytes * 1024)
            .ok_or_else(|| Error::parse("a process's status", "no VmRSS in it"))
    }

    /// Lines of its log at level ERROR, and panics: any of them fails a test.
    pub fn log_errors(&self) -> Vec<String> {
        self.log()
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("panicked"))
            .map(str::to_owned)
            .collect()
    }
}

/// `tandem check FILE` from anywhere.
pub fn check(bins: &Bins, ns: &Ns, config: &Path, instance: &str) -> Result<crate::proc::Finished> {
    ns.cmd(&bins.tandem)
        .arg("check")
        .arg(config)
        .args(["--instance", instance])
        .finish(Duration::from_secs(10))
}
