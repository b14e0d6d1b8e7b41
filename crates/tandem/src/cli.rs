//! The `tandem` command: what an operator types.
//!
//! `status`, `flows`, `failover`, `drain`, `undrain`, `up`, `down` and `rekey` ask the running daemon ([`crate::control_socket`]); `check`,
//! `genkey` and `peer-config` need none. Every command takes `--json` and then prints exactly one JSON object
//! on standard output, with exit code 0 when it did what was asked and 1 when not:
//!
//! | command | object |
//! | --- | --- |
//! | `status` | the document of [`gateway::status::Status`] |
//! | `flows`, `failover`, `drain`, `undrain`, `up`, `down`, `rekey` | [`Response`]: `{"result":"failover","moves":[…]}` … |
//! | `check` | [`CheckAnswer`]: `{"result":"check","ok":false,"problems":[{"line":7,…}],…}` |
//! | `protect` | `{"result":"protect","text":"…"}` |
//! | `genkey` | `{"result":"genkey","file":"…"}`, without a file `{"result":"genkey","key":"…"}` |
//! | `peer-config` | `{"result":"peer-config","connection":"…","format":"swanctl","text":"…"}` |
//! | any, failing | `{"result":"error","fault":"not-owner","text":"…","hint":"…"}` |
//!
//! Without `--json`, results go to standard output, failures and hints to standard error; colours only on a
//! terminal, and never with NO_COLOR set.

mod swanctl;
mod table;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::config_file::{self, LoadError, Options, ProblemRow};
use crate::control_socket::{self, Failure, Fault, Request, Response, TunnelUp};
use gateway::config::Config;
use gateway::status::{FlowStatus, TunnelState};

pub use swanctl::peer_config;
pub use table::render as render_status;

/// How long `status` waits for its answer.
const QUICK: Duration = Duration::from_secs(10);
/// How long commands wait that need the peer's or the other instance's word: IKE gives up before that.
const PATIENT: Duration = Duration::from_secs(70);

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, about = "Control a Tandem gateway", long_about = None)]
#[command(propagate_version = true, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Run `tandem COMMAND --help` for more on a command.")]
struct Args {
    /// Print one JSON object instead of text for people
    #[arg(long, global = true)]
    json: bool,
    /// Control socket of the daemon [default: the configuration's, else /run/tandem/control.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = config_file::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show instance, pair, endpoints, tunnels and counters
    Status {
        /// Only count the tunnels: quick for the daemon and the eye where there are thousands
        #[arg(long)]
        summary: bool,
    },
    /// Hand an endpoint, or all this instance owns, to the other instance without losing a packet
    Failover {
        /// Name of the endpoint [default: all that this instance owns]
        endpoint: Option<String>,
    },
    /// Hand everything to the other instance and take nothing back unasked: before an upgrade or a reboot
    ///
    /// Answers when this instance serves nothing any more. A new start ends it, and so does `tandem undrain`. Should the
    /// other instance die meanwhile, this one takes over all the same.
    Drain,
    /// End a drain: endpoints whose home this is come back after their hold-down
    Undrain,
    /// List the flows that this instance saw lately, and which tunnel each is pinned to
    ///
    /// The list comes from the workers' cache: of very many flows some may be missing.
    Flows {
        /// Only flows from or to this address
        #[arg(long)]
        address: Option<std::net::IpAddr>,
        /// Only flows from or to this port
        #[arg(long)]
        port: Option<u16>,
        /// Only flows of this connection
        #[arg(long)]
        connection: Option<String>,
        /// Only flows that are pinned to this endpoint
        #[arg(long)]
        endpoint: Option<String>,
    },
    /// Bring a connection's tunnels up and say how far they came
    Up {
        /// Name of the connection
        connection: String,
    },
    /// Close a connection's tunnels; the peer is told
    Down {
        /// Name of the connection
        connection: String,
        /// Also remove the rules that keep its traffic from leaving in clear
        #[arg(long)]
        purge: bool,
    },
    /// Renew a connection's keys now
    Rekey {
        /// Name of the connection
        connection: String,
        /// Only the IKE SA
        #[arg(long, conflicts_with = "child")]
        ike: bool,
        /// Only the Child SAs
        #[arg(long)]
        child: bool,
    },
    /// Read a configuration exactly as the daemon would, say what is wrong, change nothing
    Check {
        /// The file [default: --config]
        file: Option<PathBuf>,
        /// Check as this instance [default: the one named like this host, else each file's first]
        #[arg(long)]
        instance: Option<String>,
    },
    /// Set the rules that keep protected traffic from passing in clear, daemon or no daemon (run at boot)
    Protect {
        /// Which instance this is [default: the one named like this host]
        #[arg(long)]
        instance: Option<String>,
        /// Take the rules away instead; protected traffic may then pass in clear
        #[arg(long, conflicts_with = "instance")]
        remove: bool,
    },
    /// Draw a random 256-bit key: as pair secret or pre-shared key
    Genkey {
        /// A new file for it, mode 0600; never overwrites [default: print it]
        file: Option<PathBuf>,
    },
    /// Print the configuration for the other side of a connection
    PeerConfig {
        /// Name of the connection
        connection: String,
        /// Whose syntax
        #[arg(long, value_enum, default_value_t = Format::Swanctl)]
        format: Format,
        /// Put the pre-shared key in, instead of a placeholder
        #[arg(long)]
        secrets: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// strongSwan's swanctl.conf
    Swanctl,
}

/// What `tandem check --json` prints.
#[derive(Debug, Serialize)]
pub struct CheckAnswer {
    /// `check`.
    pub result: &'static str,
    /// The daemon would start with this file.
    pub ok: bool,
    /// The file.
    pub file: String,
    /// The instance it was checked as.
    pub instance: Option<String>,
    /// First 16 hexadecimal digits of the configuration's digest; equal on both hosts.
    pub config_digest: Option<String>,
    /// Number of endpoints.
    pub endpoints: usize,
    /// Number of connections.
    pub connections: usize,
    /// What is wrong with the file, errors first.
    pub problems: Vec<ProblemRow>,
    /// What else on this host would be in the way.
    pub host: Vec<HostRow>,
}

/// One thing on the host that would be in the way.
#[derive(Debug, Serialize)]
pub struct HostRow {
    /// `error`: tunnels or takeovers will not work; `warning`: they may not.
    pub severity: config_file::Severity,
    /// A sysctl, an interface, a device.
    pub place: String,
    /// What is wrong and what it would do.
    pub message: String,
    /// A command or a sentence that mends it.
    pub help: String,
}

#[derive(Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
enum LocalAnswer<'a> {
    Genkey {
        #[serde(skip_serializing_if = "Option::is_none")]
        file: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<&'a str>,
    },
    PeerConfig {
        connection: &'a str,
        format: &'static str,
        text: &'a str,
    },
    Protect {
        text: &'a str,
    },
}

/// What a command has to say when it worked.
struct Answer {
    text: String,
    json: String,
    /// False when it answered, but with bad news (`check` found errors).
    good: bool,
}

impl Answer {
    fn new<T: Serialize>(text: String, value: &T) -> Result<Self, Failure> {
        let json = serde_json::to_string(value)
            .map_err(|e| Failure::new(Fault::Failed, format!("cannot write JSON: {e}")))?;
        Ok(Self { text, json, good: true })
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    // Several commands read keys. Refused only in a sandbox, and no reason not to serve.
    let _ = netio::sched::forbid_core_dumps();
    let json = args.json;
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let outcome = run(args, colour);
    let mut out = std::io::stdout().lock();
    // A closed pipe (`tandem status | head -1`) is no failure of ours.
    match outcome {
        Ok(answer) => {
            let shown = if json { &answer.json } else { &answer.text };
            let _ = writeln!(out, "{}", shown.trim_end());
            if answer.good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(failure) => {
            if json {
                let value = serde_json::to_string(&Response::Error(failure));
                let _ = writeln!(out, "{}", value.unwrap_or_default());
            } else {
                eprintln!("tandem: {}", failure.text);
                if let Some(hint) = failure.hint {
                    eprintln!("  hint: {hint}");
                }
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args, colour: bool) -> Result<Answer, Failure> {
    let daemon = Daemon { socket: args.socket, config: &args.config };
    match args.command {
        Command::Status { summary } => {
            let request = if summary { Request::Summary {} } else { Request::Status {} };
            let response = daemon.ask(request, QUICK)?;
            let Response::Status { status } = &response else { return Err(unexpected(&response)) };
            Answer::new(render_status(status, colour), status)
        }
        Command::Failover { endpoint } => daemon.tell(Request::Failover { endpoint }),
        Command::Drain => daemon.tell(Request::Drain {}),
        Command::Undrain => daemon.tell(Request::Undrain {}),
        Command::Flows { address, port, connection, endpoint } => {
            let mut response = daemon.ask(Request::Flows {}, QUICK)?;
            let Response::Flows { flows } = &mut response else {
                return Err(unexpected(&response));
            };
            let address = address.map(|address| address.to_string());
            flows.retain(|flow| {
                let FlowStatus { source, destination, source_port, destination_port, .. } = flow;
                address.as_ref().is_none_or(|a| a == source || a == destination)
                    && port.is_none_or(|p| [*source_port, *destination_port].contains(&Some(p)))
                    && connection.as_ref().is_none_or(|c| flow.connection.as_ref() == Some(c))
                    && endpoint.as_ref().is_none_or(|e| flow.endpoint == *e)
            });
            Answer::new(table::flows(flows, colour), &response)
        }
        Command::Up { connection } => daemon.tell(Request::Up { connection }),
        Command::Down { connection, purge } => daemon.tell(Request::Down { connection, purge }),
        Command::Rekey { connection, ike, child } => {
            let what = match (ike, child) {
                (true, _) => control_socket::RekeyWhat::Ike,
                (_, true) => control_socket::RekeyWhat::Child,
                _ => control_socket::RekeyWhat::Both,
            };
            daemon.tell(Request::Rekey { connection, what })
        }
        Command::Check { file, instance } => {
            check(file.as_deref().unwrap_or(&args.config), instance, colour)
        }
        Command::Protect { instance, remove } => protect(&args.config, instance, remove),
        Command::Genkey { file } => genkey(file.as_deref()),
        Command::PeerConfig { connection, format: Format::Swanctl, secrets } => {
            let loaded = load(&args.config)?;
            let text = peer_config(&loaded.config, &connection, secrets).ok_or_else(|| {
                let names = loaded.config.connections.iter().map(|c| c.ike.name.as_str());
                Failure::new(Fault::UnknownName, format!("there is no connection `{connection}`"))
                    .hint(format!("one of: {}", names.collect::<Vec<_>>().join(", ")))
            })?;
            let format = "swanctl";
            let value = LocalAnswer::PeerConfig { connection: &connection, format, text: &text };
            let answer = Answer::new(String::new(), &value)?;
            Ok(Answer { text, ..answer })
        }
    }
}

/// Sets or removes the rules that outlive the daemon ([`crate::routing`]).
fn protect(config: &Path, instance: Option<String>, remove: bool) -> Result<Answer, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(Fault::Failed, format!("rules cannot be changed: {error}"))
            .hint("this needs root")
    };
    let loaded = if remove { None } else { Some(load_as(config, Options::here(instance))?) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let text = runtime.block_on(async {
        let netlink = netio::route::Netlink::open().map_err(failed)?;
        match loaded {
            Some(loaded) => {
                crate::routing::Protection::of(&loaded.config)
                    .set(&netlink)
                    .await
                    .map_err(failed)?;
                let pairs = loaded.config.protected_pairs().len();
                let plural = if pairs == 1 { " is" } else { "s are" };
                let mut text = format!("{pairs} pair{plural} kept from passing in clear");
                // A running daemon may still serve what an earlier configuration says: that stays protected.
                if crate::routing::claim().is_err() {
                    text += "; rules of an earlier configuration, if any, stay until tandemd starts again";
                } else {
                    let (_, rules) =
                        crate::routing::remove_stale(&netlink, &loaded.config).await.map_err(failed)?;
                    if rules > 0 {
                        text += &format!("; rules of an earlier configuration removed: {rules}");
                    }
                }
                Ok(text)
            }
            None => {
                let (routes, rules) = netlink.purge().await.map_err(failed)?;
                Ok(format!("{routes} route(s) and {rules} rule(s) removed"))
            }
        }
    })?;
    let value = LocalAnswer::Protect { text: &text };
    let answer = Answer::new(String::new(), &value)?;
    Ok(Answer { text, ..answer })
}

/// The daemon's end of the control socket.
struct Daemon<'a> {
    socket: Option<PathBuf>,
    config: &'a Path,
}

impl Daemon<'_> {
    fn ask(&self, request: Request, patience: Duration) -> Result<Response, Failure> {
        let named = || config_file::socket_of(self.config);
        let socket = self.socket.clone().or_else(named);
        let socket = socket.unwrap_or_else(|| control_socket::DEFAULT_PATH.into());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::new(Fault::Failed, format!("cannot start: {e}")))?;
        runtime.block_on(control_socket::ask(&socket, &request, patience))
    }

    fn tell(&self, request: Request) -> Result<Answer, Failure> {
        let response = self.ask(request, PATIENT)?;
        let mut answer = Answer::new(sentence(&response), &response)?;
        answer.good = is_good(&response);
        Ok(answer)
    }
}

fn unexpected(response: &Response) -> Failure {
    let text = format!("tandemd answered something else: {}", sentence(response));
    Failure::new(Fault::BadRequest, text).hint("are tandem and tandemd of one release?")
}

/// Whether the answer says that what was asked is done.
fn is_good(response: &Response) -> bool {
    match response {
        Response::Up { tunnels, .. } => {
            !tunnels.is_empty() && tunnels.iter().all(|t| t.state == TunnelState::Established)
        }
        Response::Rekey { ike, children, .. } => *ike > 0 || *children > 0,
        _ => true,
    }
}

/// An answer in a line or a few.
fn sentence(response: &Response) -> String {
    let count = |n: u32, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    match response {
        Response::Status { .. } => "the status".to_owned(),
        Response::Failover { moves } if moves.is_empty() => {
            "nothing to move: this instance owns no endpoint".to_owned()
        }
        Response::Failover { moves } => moved(moves),
        Response::Drain { instance, moves, withdrawn }
            if moves.is_empty() && withdrawn.is_empty() =>
        {
            format!("{instance} is drained: it served nothing")
        }
        Response::Drain { instance, moves, withdrawn } => {
            let ended = withdrawn.iter().map(|e| format!("{e}: its tunnels were ended\n"));
            let moved = if moves.is_empty() { String::new() } else { moved(moves) + "\n" };
            format!("{moved}{}{instance} is drained", ended.collect::<String>())
        }
        Response::Undrain { instance } => {
            format!("{instance}: endpoints whose home it is come back after their hold-down")
        }
        Response::Flows { flows } => table::flows(flows, false),
        Response::Up { tunnels, .. } => {
            let line = |t: &TunnelUp| {
                format!("{} at {}: {}", t.connection, t.endpoint, table::state(t.state))
            };
            tunnels.iter().map(line).collect::<Vec<_>>().join("\n")
        }
        Response::Down { connection, closed, purged } => {
            let rules = if *purged { "; the rules against clear text are removed" } else { "" };
            format!("{connection}: {} closed{rules}", count(*closed, "tunnel"))
        }
        Response::Rekey { connection, ike: 0, children: 0 } => {
            format!(
                "{connection}: nothing to rekey here; `tandem status` shows which tunnels stand, and where"
            )
        }
        Response::Rekey { connection, ike, children } => {
            let (ike, children) = (count(*ike, "IKE SA"), count(*children, "Child SA"));
            format!("{connection}: rekeying {ike} and {children}")
        }
        Response::Error(failure) => failure.text.clone(),
    }
}

/// A line for each endpoint that moved.
fn moved(moves: &[control_socket::Move]) -> String {
    let line = |m: &control_socket::Move| {
        let control_socket::Move { endpoint, from, to, term, took_ms } = m;
        format!("{endpoint}: {from} → {to}, term {term}, in {took_ms} ms")
    };
    moves.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn load(path: &Path) -> Result<config_file::Loaded, Failure> {
    load_as(path, Options { any_instance: true, ..Options::here(None) })
}

fn load_as(path: &Path, options: Options) -> Result<config_file::Loaded, Failure> {
    config_file::load(path, &options).map_err(|error| match error {
        LoadError::Unreadable { .. } => {
            Failure::new(Fault::File, error.to_string()).hint("--config names another file")
        }
        LoadError::Invalid(report) => Failure::new(Fault::Config, report.render(false)),
    })
}

fn check(path: &Path, instance: Option<String>, colour: bool) -> Result<Answer, Failure> {
    let mut options = Options::here(instance);
    options.any_instance = true;
    let file = path.display().to_string();
    let mut answer = CheckAnswer {
        result: "check",
        ok: false,
        file: file.clone(),
        instance: None,
        config_digest: None,
        endpoints: 0,
        connections: 0,
        problems: Vec::new(),
        host: Vec::new(),
    };
    let text = match config_file::load(path, &options) {
        Err(error @ LoadError::Unreadable { .. }) => {
            return Err(Failure::new(Fault::File, error.to_string()));
        }
        Err(LoadError::Invalid(report)) => {
            answer.problems = report.rows();
            let errors = report.problems().iter();
            let errors = errors.filter(|p| p.severity == config_file::Severity::Error).count();
            let plural = if errors == 1 { "" } else { "s" };
            format!(
                "{}\n\n{file}: {errors} error{plural}; tandemd would not start",
                report.render(colour)
            )
        }
        Ok(loaded) => {
            answer.ok = true;
            answer.problems = loaded.report.rows();
            let (config, name) = (&loaded.config, loaded.config.instance_name(loaded.config.local));
            answer.instance = Some(name.to_owned());
            answer.config_digest = Some(short_digest(config));
            answer.endpoints = config.endpoints.len();
            answer.connections = config.connections.len();
            // What the host lacks can only be told on a host that the file speaks of.
            if options.instance.is_some() || name == options.host {
                answer.host = host_rows(&loaded);
            }
            fine(&answer, &loaded, &options, colour)
        }
    };
    Ok(Answer { good: answer.ok, ..Answer::new(text, &answer)? })
}

/// What `check` says about a file without errors.
fn fine(
    answer: &CheckAnswer,
    loaded: &config_file::Loaded,
    options: &Options,
    colour: bool,
) -> String {
    let mut text = String::new();
    if !loaded.report.is_empty() {
        text += &loaded.report.render(colour);
        text += "\n\n";
    }
    for row in &answer.host {
        let level = if row.severity == config_file::Severity::Error { "error" } else { "warning" };
        text += &format!(
            "{level}: this host: {}: {}\n  to fix: {}\n",
            row.place, row.message, row.help
        );
    }
    let name = answer.instance.as_deref().unwrap_or("?");
    let pair = match &loaded.config.pair {
        Some(pair) => format!("paired with `{}`", loaded.config.instance_name(pair.peer)),
        None => "a gateway on its own".to_owned(),
    };
    let digest = answer.config_digest.as_deref().unwrap_or_default();
    let (endpoints, connections) = (answer.endpoints, answer.connections);
    text += &format!(
        "{}: fine for `{name}`, {pair}; endpoints {endpoints}, connections {connections}, digest {digest}",
        answer.file
    );
    if answer.host.iter().any(|row| row.severity == config_file::Severity::Error) {
        text += "\nbut this host is not ready: see above";
    }
    if options.instance.is_none() && name != options.host && loaded.config.instances.len() > 1 {
        text += &format!(
            "\nnote: this host is called `{}`, which is no instance: start tandemd with --instance",
            options.host
        );
    }
    text
}

fn host_rows(loaded: &config_file::Loaded) -> Vec<HostRow> {
    // These the daemon sets by itself at its start (`netio::host::prepare`): no news before that.
    let set_by_daemon = ["arp_ignore", "arp_announce", "send_redirects"];
    let mut problems = netio::host::check(&config_file::host_needs(&loaded.config));
    problems.retain(|p| !set_by_daemon.iter().any(|name| p.place.ends_with(name)));
    let row = |problem: netio::host::HostProblem| HostRow {
        severity: match problem.severity {
            netio::host::Severity::Breaks => config_file::Severity::Error,
            netio::host::Severity::Advice => config_file::Severity::Warning,
        },
        place: problem.place,
        message: problem.what,
        help: problem.fix,
    };
    problems.into_iter().map(row).collect()
}

/// The digest as it is shown: enough to compare by eye.
#[must_use]
pub fn short_digest(config: &Config) -> String {
    config.digest().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn genkey(file: Option<&Path>) -> Result<Answer, Failure> {
    let key = config_file::generate(&mut crypto::rand_core::OsRng);
    let Some(path) = file else {
        return Answer::new(key.to_string(), &LocalAnswer::Genkey { file: None, key: Some(&key) });
    };
    config_file::write_key_file(path, &key).map_err(|error| {
        let failure = Failure::new(Fault::File, format!("cannot write {error}"));
        if path.exists() {
            failure.hint("an existing key is never overwritten: choose another name, or remove it")
        } else {
            failure
        }
    })?;
    let shown = path.display().to_string();
    let text = format!(
        "wrote a new key to {shown} (mode 0600); copy it to the other side over a safe way"
    );
    Answer::new(text, &LocalAnswer::Genkey { file: Some(shown), key: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn up_is_good_only_when_every_tunnel_stands() {
        let up = |states: &[TunnelState]| Response::Up {
            connection: "b".into(),
            tunnels: states
                .iter()
                .map(|state| TunnelUp {
                    connection: "c".into(),
                    endpoint: "e".into(),
                    state: *state,
                })
                .collect(),
        };
        assert!(is_good(&up(&[TunnelState::Established])));
        assert!(!is_good(&up(&[TunnelState::Established, TunnelState::Connecting])));
        assert!(!is_good(&up(&[])));
        let rekey = |ike| Response::Rekey { connection: "b".into(), ike, children: 0 };
        assert!(is_good(&rekey(1)) && !is_good(&rekey(0)));
        assert!(sentence(&rekey(0)).contains("nothing to rekey"));
    }
}
