//! The named real-peer scenarios: each builds its own network, does one thing with a real strongSwan, and says in
//! one line what it found. `lab interop` runs them.

mod active;
mod active_faults;
mod bad_input;
mod basic;
mod esp50;
mod ipv6;
mod lifecycle;
mod nat;
mod operator;
mod pair;
mod protection;
mod rolling;
mod stage;
mod steering;
mod topologies;
mod two_hosts;
mod uplink;
mod workers;

use crate::Result;
use crate::run::Run;
use crate::tandem::Bins;

/// What a scenario has at hand.
#[derive(Clone, Copy, Debug)]
pub struct Lab<'a> {
    /// The run.
    pub run: &'a Run,
    /// The binaries under test.
    pub bins: &'a Bins,
    /// Full counts and lengths, as the bars want them, instead of a few.
    pub full: bool,
}

/// One scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Does it; says what it found.
    pub play: fn(&Lab<'_>) -> Result<String>,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// The scenarios in three parts, so that a machine of two cores need not wait for them one by one: those of the first two
/// mostly wait themselves, and judge no trial of a pair by its gap, so that the two may be played beside each other. Each
/// by its own process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Lane {
    /// Nearly all of single gateways, and some of pairs.
    First,
    /// Pairs with a real kernel for a peer, and others of pairs.
    Second,
    /// All others: nothing may run beside them.
    Alone,
}

impl Lane {
    /// Beside [`SINGLE`].
    const FIRST: [&str; 2] = ["pair-cold-restart", "active-refused"];
    const SECOND: [&str; 5] = [
        "kernel-esp-50",
        "pair-kernel-esp",
        "esp50-pair-kernel",
        "pair-kill-in-rekey",
        "pair-mismatch",
    ];
    /// Of [`SINGLE`], what loads all processors, and what loses a packet when strongSwan has to wait for one.
    const NOT_BESIDE: [&str; 2] = ["plain-tun", "reauthentication"];

    /// Where this scenario belongs.
    pub fn of(scenario: &Scenario) -> Lane {
        let single = || SINGLE.iter().copied().flatten().any(|s| s.name == scenario.name);
        if Self::NOT_BESIDE.contains(&scenario.name) {
            Lane::Alone
        } else if Self::SECOND.contains(&scenario.name) {
            Lane::Second
        } else if Self::FIRST.contains(&scenario.name) || single() {
            Lane::First
        } else {
            Lane::Alone
        }
    }
}

/// Those of a gateway without another instance.
const SINGLE: [&[Scenario]; 6] = [
    basic::SCENARIOS,
    lifecycle::SCENARIOS,
    nat::SCENARIOS,
    bad_input::SCENARIOS,
    operator::SCENARIOS,
    protection::SCENARIOS,
];

/// All, in the order in which a new daemon learns them.
pub fn all() -> Vec<Scenario> {
    let pairs = [
        pair::SCENARIOS,
        uplink::SCENARIOS,
        active::SCENARIOS,
        rolling::SCENARIOS,
        steering::SCENARIOS,
        active_faults::SCENARIOS,
        topologies::SCENARIOS,
        ipv6::SCENARIOS,
        esp50::SCENARIOS,
        workers::SCENARIOS,
        two_hosts::SCENARIOS,
    ];
    [&SINGLE[..], &pairs].concat().concat()
}

/// Runs the scenarios (of the lane) whose name contains one of `names` (or all). Prints a line for each and the totals.
/// Returns how many failed, or `None` when no scenario has such a name.
pub fn run(lab: &Lab<'_>, names: &[String], lane: Option<Lane>) -> Option<usize> {
    let named = |scenario: &Scenario| {
        names.is_empty() || names.iter().any(|name| scenario.name.contains(name.as_str()))
    };
    let mut chosen = all();
    chosen.retain(|scenario| lane.is_none_or(|lane| Lane::of(scenario) == lane) && named(scenario));
    if chosen.is_empty() {
        return None;
    }
    let (mut failed, mut retried) = (0, 0);
    for scenario in &chosen {
        // A machine that is shared steals milliseconds at random, and many scenarios count single packets. So a failure is
        // shown with its logs and played once more, and only a second one counts; the bars (`--full`) get no second try,
        // nor does what no slow machine explains ([`is_final`]).
        let mut tries = if lab.full { 1 } else { 2 };
        loop {
            tries -= 1;
            // The log of an earlier scenario must not be taken for this one's.
            for (dir, file) in LOGS {
                let _ = std::fs::remove_file(lab.run.dir().join(dir).join(file));
            }
            let started = crate::clock::now();
            let result = (scenario.play)(lab);
            let seconds = (crate::clock::now() - started).as_secs_f64();
            let passed = result.is_ok();
            match result {
                Ok(found) => println!("pass  {:<28} {seconds:5.1} s  {found}", scenario.name),
                Err(error) => {
                    lab.run.keep_files();
                    if is_final(&error.to_string()) || logged_error(lab.run) {
                        tries = 0;
                    }
                    let word = if tries > 0 { "AGAIN" } else { "FAIL " };
                    println!("{word} {:<28} {seconds:5.1} s  {error}", scenario.name);
                    save_logs(lab.run, scenario.name);
                }
            }
            // Whatever a scenario left behind must not be there for the next.
            lab.run.clear_namespaces();
            retried += usize::from(!passed && tries > 0);
            if passed || tries == 0 {
                failed += usize::from(!passed);
                break;
            }
        }
    }
    if retried > 0 {
        println!("{retried} of these were played a second time (see AGAIN above)");
    }
    // The last line is what `tests/run` shows of the phase: a second try must not hide behind a pass.
    println!("{} passed, {failed} failed, {retried} of them played twice", chosen.len() - failed);
    Some(failed)
}

/// Whether a failure says what no slow machine explains: a repeated IV or number, clear text, SPIs that changed, an ERROR
/// in a log.
fn is_final(error: &str) -> bool {
    const WORDS: [&str; 13] = [
        "repeat",
        "reused",
        "in clear",
        "clear text",
        "SPIs changed",
        "SAs changed",
        "in both tunnels",
        "in another tunnel",
        "ARP claims",
        "ARP replies from the stopped host",
        "after SIGCONT",
        "logged: ",
        "ERROR",
    ];
    // What follows is the log's tail, which may hold any word.
    let error = error.split("; daemon: ").next().unwrap_or_default();
    WORDS.iter().any(|word| error.contains(word))
}

/// Whether a daemon's log of the failed scenario has an ERROR.
fn logged_error(run: &Run) -> bool {
    LOGS.iter().filter(|(_, file)| *file == "tandemd.log").any(|(dir, file)| {
        let bytes = std::fs::read(run.dir().join(dir).join(file)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).lines().any(|line| line.contains(" ERROR "))
    })
}

/// Where a scenario leaves logs and configurations: folder, file.
const LOGS: [(&str, &str); 17] = [
    ("tandem-left", "tandemd.log"),
    ("tandem-right", "tandemd.log"),
    ("tandem-peer", "tandemd.log"),
    ("tandem-north", "tandemd.log"),
    ("tandem-south", "tandemd.log"),
    ("tandem-left", "tandem.toml"),
    ("charon-peer", "charon.log"),
    ("charon-peer", "swanctl.conf"),
    (".", "dump-left.txt"),
    (".", "dump-right.txt"),
    ("uml", "charon.log"),
    ("host-left", "journal.txt"),
    ("host-right", "journal.txt"),
    ("host-left", "boot.log"),
    ("host-right", "boot.log"),
    ("host-peer", "boot.log"),
    ("host-peer/lab", "charon.log"),
];

/// Copies the logs of a failed scenario aside, before the next one overwrites them.
fn save_logs(run: &Run, name: &str) {
    let Ok(target) = run.subdir(&format!("failed-{name}")) else { return };
    let mut saved = Vec::new();
    for (dir, file) in LOGS {
        let source = run.dir().join(dir).join(file);
        let name = format!("{}-{file}", dir.replace('/', "-"));
        if source.exists() && std::fs::copy(&source, target.join(&name)).is_ok() {
            saved.push(name);
        }
    }
    println!("      logs in {}: {}", target.display(), saved.join(", "));
}

#[cfg(test)]
mod tests {
    use super::{Lane, all, is_final};

    #[test]
    fn lanes_name_scenarios_that_exist() {
        let scenarios = all();
        for name in Lane::FIRST.iter().chain(&Lane::SECOND).chain(&Lane::NOT_BESIDE) {
            assert_eq!(scenarios.iter().filter(|s| s.name == *name).count(), 1, "{name}");
        }
        let count = |lane| scenarios.iter().filter(|s| Lane::of(s) == lane).count();
        assert_eq!(count(Lane::Second), Lane::SECOND.len());
        assert!(count(Lane::First) > Lane::FIRST.len() && count(Lane::Alone) > 0);
    }

    #[test]
    fn only_lost_time_is_played_again() {
        for error in [
            "IV repeats: [ESP]",
            "message id repeats: []",
            "3 packets in clear on the WAN",
            "2 SPIs changed",
            "3 flows in both tunnels: []",
            "round 1: clear text",
            "left logged: 2026 ERROR x",
            "the daemon logged: thread panicked",
        ] {
            assert!(is_final(error), "{error}");
        }
        for error in [
            "waited 30.0 s in vain for other SPIs at the peer; daemon: WARN a repeat in clear",
            "1 of 4000 packets lost",
            "left logged 600 lines",
        ] {
            assert!(!is_final(error), "{error}");
        }
    }
}
