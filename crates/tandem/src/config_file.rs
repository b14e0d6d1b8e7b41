//! The configuration file: TOML in, a [`gateway::config::Config`] out, or every problem at its place.
//!
//! ```text
//!   text ──► TOML with places ──► parts (values.rs, sections.rs) ──► gateway's cross-checks ──► Config
//!              │ syntax             │ unknown keys, wrong types,        │ findings, by dotted path
//!              ▼                    ▼ bad addresses, key files …        ▼
//!              └──────────────────► Report: file, line, text, what was expected (report.rs) ◄──┘
//! ```
//!
//! One file serves both hosts; which instance this host is comes from outside ([`Options`]). Secrets are
//! never in the file: it names key files, which are refused when anybody but their owner can read them.

mod keyfile;
mod reader;
mod report;
mod sections;
mod values;

use std::path::{Path, PathBuf};

use crypto::Secret;
use gateway::config::Config;
use toml::de::DeTable;

pub use keyfile::{KeyFileError, PAIR_SECRET_LEN, generate, read_key_file, write_key_file};
pub use report::{Problem, ProblemRow, Report, Severity};

use reader::Reader;

/// Where the configuration is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/tandem/tandem.toml";
/// Longest configuration file, bytes.
const MAX_FILE: u64 = 16 << 20;
/// Most syntax errors shown: one slip can cause many.
const MAX_SYNTAX_ERRORS: usize = 5;

/// What decides how a file is read, besides its text.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--instance`; without it a file's only instance, or the one named like the host.
    pub instance: Option<String>,
    /// The host's name.
    pub host: String,
    /// Where neither names an instance, take the file's first: for commands that look at a file on
    /// whatever host. Never set by the daemon.
    pub any_instance: bool,
    /// `--keylog` was given.
    pub keylog: bool,
}

impl Options {
    /// With the name of the host this runs on.
    #[must_use]
    pub fn here(instance: Option<String>) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self { instance, host: host.trim().to_owned(), ..Self::default() }
    }
}

/// Settings of the daemon as a process: they may differ between the two hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSettings {
    /// The control socket.
    pub socket: PathBuf,
    /// Where reserved terms are kept across restarts.
    pub state_dir: PathBuf,
    /// Name of the TUN interface.
    pub tun: String,
    /// MTU of the TUN interface in bytes; `None`: computed from the WAN interface's.
    pub mtu: Option<u16>,
    /// Whether the TUN may use what the kernel offers to carry more at once; without it, one packet a call by tun-tap.
    pub offload: bool,
    /// Whether the host's processors are kept awake while a few packets flow.
    pub low_latency: bool,
    /// Threads that carry packets.
    pub workers: u8,
    /// Called as `HOOK INSTANCE endpoint STATE TERM` at every change of an endpoint's state.
    pub notify: Option<PathBuf>,
}

impl Default for DaemonSettings {
    fn default() -> Self {
        Self {
            socket: crate::control_socket::DEFAULT_PATH.into(),
            state_dir: "/var/lib/tandem".into(),
            tun: "tandem0".into(),
            mtu: None,
            offload: true,
            low_latency: false,
            workers: 1,
            notify: None,
        }
    }
}

/// A file that can be run.
#[derive(Debug)]
pub struct Loaded {
    /// For the gateway.
    pub config: Config,
    /// For the daemon around it.
    pub daemon: DaemonSettings,
    /// For the pair link: 32 bytes. `None` exactly when `config.pair` is.
    pub pair_secret: Option<Secret>,
    /// Warnings alone; often empty.
    pub report: Report,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file itself cannot be read.
    #[error("cannot read {path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file has errors.
    #[error("{0}")]
    Invalid(Report),
}

/// Reads a configuration file and the key files it names.
///
/// # Errors
/// The file cannot be read, or something in it is wrong: then with everything that is.
pub fn load(path: &Path, options: &Options) -> Result<Loaded, LoadError> {
    let text = read_text(path)
        .map_err(|reason| LoadError::Unreadable { path: path.to_owned(), reason })?;
    let folder = path.parent().unwrap_or(Path::new("")).to_owned();
    let keys = move |named: &Path| read_key_file(&folder.join(named));
    parse(&path.display().to_string(), &text, options, &keys).map_err(LoadError::Invalid)
}

fn read_text(path: &Path) -> Result<String, String> {
    let meta = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if meta.len() > MAX_FILE {
        return Err(format!("it is longer than {} MB", MAX_FILE >> 20));
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned())
}

/// What a configuration wants of the host it runs on, for [`netio::host`]. The TUN's name is to be added
/// once it exists.
#[must_use]
pub fn host_needs(config: &Config) -> netio::host::Needs {
    let here = usize::from(config.local);
    let mut interfaces = std::collections::BTreeSet::new();
    for endpoint in &config.endpoints {
        let lan = endpoint.lan.as_ref().and_then(|lan| lan.interface.get(here));
        let both = endpoint.wan.interface.get(here).into_iter().chain(lan);
        interfaces.extend(both.flatten().cloned());
    }
    let pairs = config.protected_pairs();
    netio::host::Needs {
        interfaces: interfaces.into_iter().collect(),
        tun: None,
        forward_v4: pairs.iter().any(|(local, _)| local.addr().is_ipv4()),
        forward_v6: pairs.iter().any(|(local, _)| local.addr().is_ipv6()),
    }
}

/// The control socket that a configuration file names, if the file can be read and names one. Lenient,
/// for the command line: other errors in the file are not its business.
#[must_use]
pub fn socket_of(path: &Path) -> Option<PathBuf> {
    let text = read_text(path).ok()?;
    let (table, _) = DeTable::parse_recoverable(&text);
    let socket = table.get_ref().get("daemon")?.get_ref().as_table()?.get("socket")?.get_ref();
    socket.as_str().map(PathBuf::from)
}

/// Reads a configuration from its text; `keys` fetches the key files.
///
/// # Errors
/// Every problem found, when at least one is an error.
pub fn parse(
    file: &str,
    text: &str,
    options: &Options,
    keys: &dyn Fn(&Path) -> Result<Secret, KeyFileError>,
) -> Result<Loaded, Report> {
    let reader = Reader::default();
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        for error in errors.iter().take(MAX_SYNTAX_ERRORS) {
            let (what, expected) = match error.message().split_once(", expected") {
                Some((what, expected)) => (what, format!("expected{expected}")),
                None => (error.message(), "expected TOML: `key = value` or `[table]`".to_owned()),
            };
            // The parser may quote the text it stumbled over; our own quotation is masked.
            let what = what.lines().next().unwrap_or_default();
            reader.error(&error.span().unwrap_or_default(), format!("syntax: {what}"), expected);
        }
        return Err(Report::new(file, text, reader.into_problems()));
    }
    let read = sections::read(&reader.root(table.get_ref()), options, keys);
    let Some(sections) = read.filter(|_| !reader.failed()) else {
        return Err(Report::new(file, text, reader.into_problems()));
    };
    match Config::new(sections.parts) {
        Ok((config, warnings)) => {
            note_all(&reader, warnings);
            let report = Report::new(file, text, reader.into_problems());
            let (daemon, pair_secret) = (sections.daemon, sections.pair_secret);
            Ok(Loaded { config, daemon, pair_secret, report })
        }
        Err(findings) => {
            note_all(&reader, findings);
            Err(Report::new(file, text, reader.into_problems()))
        }
    }
}

/// Puts the gateway's findings at their places in the text.
fn note_all(reader: &Reader, findings: Vec<gateway::config::Finding>) {
    for finding in findings {
        let severity = match finding.severity {
            gateway::config::Severity::Error => Severity::Error,
            gateway::config::Severity::Warning => Severity::Warning,
        };
        let span = reader.place(&finding.at);
        reader.note(severity, &span, finding.text, finding.expected, finding.hint);
    }
}
