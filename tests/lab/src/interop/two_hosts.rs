//! README's "On two hosts", typed line by line: two hosts and a strongSwan peer, each with a real systemd as its
//! process 1 (see [`crate::host`]), so that it is the hardened unit that runs and systemd that brings the killed
//! instance back. The commands are read from README.md when the scenario is played.
//!
//! Stand-ins: `sudo` (we are root), `ssh` and `scp` (over the lab's network, without keys), `apt-get` (starts the
//! peer's charon, which runs strongSwan's own ESP, as everywhere in the lab), and an `editor` that does what a user
//! does to the sample. `deploy/install` is told where the binaries are, so that it does not build them again.

use super::stage::without_loss;
use super::{Lab, Scenario};
use crate::charon::{self, Backend, Spis};
use crate::clock;
use crate::error::{Error, IoContext, Result, ensure};
use crate::guide::{self, Place};
use crate::host::{Host, Outfit};
use crate::net::{self, Net};
use crate::probe::{UdpProbes, Way};
use crate::proc::Proc;
use crate::scene::PATIENCE;
use crate::tandem::{EndpointStatus, Status};
use crate::wait;
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "two-hosts",
    about: "README's \"On two hosts\", typed line by line under a real systemd",
    play: two_hosts,
}];

const BRIEF: Duration = Duration::from_secs(15);
const TICK: Duration = Duration::from_millis(50);

/// How the guide's commands begin, in order. What each must lead to is in [`Stage::judge`]; so a command that comes or
/// goes in the README needs a decision here.
const GUIDE: [(Place, &str); 16] = [
    (Place::Both, "sudo deploy/install"),
    (Place::Left, "sudo editor "),
    (Place::Left, "sudo tandem genkey "),
    (Place::Left, "sudo tandem genkey "),
    (Place::Left, "sudo scp "),
    (Place::Both, "sudo tandem check"),
    (Place::Peer, "sudo apt-get install "),
    (Place::Left, "sudo tandem peer-config "),
    (Place::Peer, "sudo swanctl --load-all"),
    (Place::Both, "sudo systemctl enable --now tandemd"),
    (Place::Both, "sudo tandem status"),
    (Place::LanHost, "ping "),
    (Place::Peer, "sudo swanctl --list-sas"),
    (Place::Left, "sudo kill -9 "),
    (Place::Right, "sudo tandem status"),
    (Place::Peer, "sudo swanctl --list-sas"),
];
/// The last one, apart because it is typed under the eyes of the probes.
const HAND_BACK: (Place, &str) = (Place::Owner, "sudo tandem failover main");

/// What a user changes in the sample: the interfaces' names. It fails if there was nothing to change.
const EDITOR: &str = r#"#!/bin/bash
set -eu
sed -i 's/right = "ens3"/right = "eth0"/' "$1"
grep -q 'right = "eth0"' "$1"
"#;
/// Debian's packages start their service when they are installed.
const APT_GET: &str = r#"#!/bin/bash
set -eu
[[ $1 == install ]] && shift
for name in "$@"; do
    case $name in
    charon-systemd | strongswan-swanctl | libcharon-extra-plugins) ;;
    *) echo "E: Unable to locate package $name" >&2 && exit 100 ;;
    esac
done
systemctl start strongswan.service
"#;
/// Ready when its control socket is there, as charon-systemd's notification says.
const STRONGSWAN: &str = "[Service]
ExecStart=/lab/bin/charon
ExecStartPost=/bin/sh -c 'for i in $(seq 200); do test -S /run/charon.vici && exit; sleep 0.05; done; exit 1'
";
/// The five capabilities of the unit's bounding set: NET_BIND_SERVICE 10, NET_ADMIN 12, NET_RAW 13, SETPCAP 8,
/// SYS_NICE 23.
const BOUND: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 8 | 1 << 23;

struct Stage {
    left: Host,
    right: Host,
    peer: Host,
    net: Net,
    checkout: PathBuf,
    binaries: PathBuf,
    ping: Option<Proc>,
    probes: Option<UdpProbes>,
    spis: Option<Spis>,
    term: u64,
    killed: Option<Duration>,
    gap: Duration,
}

fn two_hosts(lab: &Lab<'_>) -> Result<String> {
    let checkout = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .canonicalize()
        .doing("find the checkout that the lab was built from")?;
    let readme = std::fs::read_to_string(checkout.join("README.md")).doing("read README.md")?;
    let mut commands = guide::commands(&readme, "On two hosts")?;
    let told: Vec<_> =
        commands.iter().map(|command| (command.place, command.line.as_str())).collect();
    let wanted: Vec<_> = GUIDE.iter().chain([&HAND_BACK]).collect();
    for (index, (place, start)) in wanted.iter().enumerate() {
        ensure(
            told.get(index).is_some_and(|(at, line)| at == place && line.starts_with(start)),
            || {
                format!(
                    "README, command {}: {:?}, but the lab knows {place:?} {start:?}",
                    index + 1,
                    told.get(index)
                )
            },
        )?;
    }
    ensure(told.len() == wanted.len(), || {
        format!("README has {} commands, the lab knows {}", told.len(), wanted.len())
    })?;
    let hand_back = commands.pop().map(|command| command.line).unwrap_or_default();

    let mut stage = Stage::build(lab, checkout)?;
    let result = stage.play(lab, &commands, &hand_back);
    if result.is_err() {
        stage.save_journals();
    }
    result
}

impl Stage {
    fn build(lab: &Lab<'_>, checkout: PathBuf) -> Result<Stage> {
        let net = Net::build(lab.run)?;
        for host in [&net.left, &net.right] {
            // A fresh host's: what a gateway needs is for deploy/install to set.
            host.sysctl(&[
                "net.ipv4.ip_forward=0",
                "net.ipv6.conf.all.forwarding=0",
                "net.ipv4.conf.all.arp_ignore=0",
                "net.ipv4.conf.all.arp_announce=0",
                "net.ipv4.conf.all.send_redirects=1",
                "net.ipv4.conf.default.send_redirects=1",
            ])?;
        }
        let binaries = lab.bins.tandemd.parent().unwrap_or(Path::new("."));
        let binaries = binaries.canonicalize().doing("find the binaries")?;
        let hosts = "10.1.0.2 left\n10.1.0.3 right\n";
        let instance = Outfit {
            hosts: hosts.into(),
            shown: vec![checkout.clone(), binaries.clone()],
            programs: vec![("editor", EDITOR.into())],
            ..Outfit::default()
        };
        let conf = charon::strongswan_conf(
            Path::new("/lab/charon.log"),
            Path::new("/run/charon.vici"),
            Backend::Libipsec,
            "",
        );
        let remote = Outfit {
            hosts: hosts.into(),
            // Its commands are typed there as well; the hosts have a /tmp of their own.
            shown: vec![checkout.clone()],
            etc: vec![
                ("strongswan.conf", conf),
                ("systemd/system/strongswan.service", STRONGSWAN.into()),
            ],
            programs: vec![("apt-get", APT_GET.into())],
            copies: vec!["/usr/lib/ipsec/charon", "/usr/sbin/swanctl"],
        };
        let mut left = Host::boot(lab.run, &net.left, &instance)?;
        let mut right = Host::boot(lab.run, &net.right, &instance)?;
        let mut peer = Host::boot(lab.run, &net.peer, &remote)?;
        for host in [&mut left, &mut right, &mut peer] {
            host.wait_booted()?;
        }
        Ok(Stage {
            left,
            right,
            peer,
            net,
            checkout,
            binaries,
            ping: None,
            probes: None,
            spis: None,
            term: 0,
            killed: None,
            gap: Duration::ZERO,
        })
    }

    fn play(
        &mut self,
        lab: &Lab<'_>,
        commands: &[guide::Command],
        hand_back: &str,
    ) -> Result<String> {
        for command in commands {
            self.step(lab, command)
                .map_err(|error| Error::check(format!("README `{}`: {error}", command.line)))?;
        }
        // "A second later systemd has started left again, and it follows as the shadow."
        self.wait_roles("right", PATIENCE)?;
        let restarts = self.left.property("tandemd", "NRestarts")?;
        ensure(restarts == "1", || format!("systemd restarted left {restarts} times"))?;
        self.confined("left")?;

        let probes = self.probes.take().ok_or_else(|| Error::check("README never pings"))?;
        let term = self.status("right")?.main().term;
        let lossless = without_loss(&probes, || {
            let said = self.right.finish(hand_back, BRIEF)?;
            self.right.named(said, hand_back)?;
            self.wait_roles("left", PATIENCE)
        })?;
        ensure(self.status("left")?.main().term > term, || "the failover raised no term".into())?;
        let ping = self.end_ping()?;
        let watchdog = self.hang_the_shadow(&probes)?;
        let upgrade = self.upgrade(&probes)?;
        let now = self.spis()?;
        ensure(self.spis.as_ref() == Some(&now), || "SPIs changed at the peer".into())?;
        for name in ["left", "right"] {
            let journal = self.host(name).journal("tandemd");
            let bad: Vec<_> = journal
                .lines()
                .filter(|line| line.contains("ERROR") || line.contains("panicked"))
                .collect();
            ensure(bad.is_empty(), || format!("{name} logged: {}", bad.join(" / ")))?;
        }
        self.uninstall()?;
        Ok(format!(
            "{} commands of the README; kill: gap {:.1} ms; failover: {lossless}; {ping}; SPIs unchanged; {watchdog}; upgrade of both: {upgrade}; uninstalled without a trace",
            commands.len() + 1,
            clock::millis(self.gap)
        ))
    }

    fn host(&self, name: &str) -> &Host {
        if name == "right" { &self.right } else { &self.left }
    }

    /// Types one command where the README says, and looks at what came of it.
    fn step(&mut self, lab: &Lab<'_>, command: &guide::Command) -> Result<()> {
        if command.place == Place::LanHost {
            return self.start_traffic(lab, &command.line);
        }
        let mut line = command.line.clone();
        if line == "sudo deploy/install" {
            line.push_str(&format!(" --binaries {}", self.binaries.display()));
        }
        if line.starts_with("sudo kill -9 ") {
            self.killed = Some(clock::now());
        }
        let mut said = Vec::new();
        for host in self.at(command.place)? {
            let finished = host.cmd_in(&self.checkout, &line).finish(PATIENCE)?;
            // `tandem check` also tells on standard error; people see both.
            let errors = finished.stderr.clone();
            said.push(format!("{}{errors}", host.named(finished, &line)?));
        }
        self.judge(&line, &said)
    }

    fn at(&self, place: Place) -> Result<Vec<&Host>> {
        Ok(match place {
            Place::Both => vec![&self.left, &self.right],
            Place::Left => vec![&self.left],
            Place::Right => vec![&self.right],
            Place::Peer => vec![&self.peer],
            Place::Owner | Place::LanHost => {
                return Err(Error::check(format!("the lab does not type this at {place:?}")));
            }
        })
    }

    /// What the README says comes of a command.
    fn judge(&mut self, line: &str, said: &[String]) -> Result<()> {
        let word = |start: &str| line.starts_with(start);
        if word("sudo deploy/install") {
            for host in [&self.left, &self.right] {
                let settings = "sysctl -n net.ipv4.ip_forward net.ipv4.conf.all.arp_ignore";
                let settings = host.run(settings, BRIEF)?;
                ensure(settings == "1\n1\n", || format!("kernel settings: {settings:?}"))?;
                let state = (
                    host.property("tandemd", "LoadState")?,
                    host.property("tandemd", "ActiveState")?,
                );
                ensure(state == ("loaded".into(), "inactive".into()), || {
                    format!("unit: {state:?}")
                })?;
            }
        } else if word("sudo scp") {
            let [ours, theirs] = [&self.left, &self.right].map(|host| {
                host.run("cd /etc/tandem && stat -c '%n %a %Y' * && sha256sum *", BRIEF)
            });
            let (ours, theirs) = (ours?, theirs?);
            ensure(ours == theirs, || format!("left has {ours:?}, right {theirs:?}"))?;
        } else if word("sudo tandem check") {
            for text in said {
                ensure(text.lines().count() == 1, || format!("it complains: {text}"))?;
            }
        } else if word("sudo tandem peer-config") {
            let mode = self.peer.run("stat -c %a /etc/swanctl/conf.d/branch.conf", BRIEF)?;
            ensure(mode == "600\n", || format!("the secret's file has mode {mode}"))?;
        } else if word("sudo swanctl --load-all") {
            let loaded = said.iter().any(|text| text.contains("successfully loaded 1 connections"));
            ensure(loaded, || format!("swanctl said {said:?}"))?;
        } else if word("sudo systemctl enable --now tandemd") {
            for host in [&self.left, &self.right] {
                host.run("systemctl is-active tandemd tandem-protect && systemctl is-enabled tandemd tandem-protect", BRIEF)?;
            }
            self.confined("left")?;
            self.confined("right")?;
        } else if word("sudo kill") {
            self.wait_owner_after_kill()?;
        } else if word("sudo tandem status") {
            self.judge_status(said)?;
        } else if word("sudo swanctl --list-sas") {
            ensure(
                said.iter().any(|text| text.contains("ESTABLISHED") && text.contains("INSTALLED")),
                || format!("swanctl said {said:?}"),
            )?;
            let now = self.spis()?;
            ensure(now.0.len() == 1, || format!("the peer has {} IKE SAs", now.0.len()))?;
            let before = self.spis.get_or_insert_with(|| now.clone());
            ensure(*before == now, || format!("SPIs changed from {before:?} to {now:?}"))?;
        }
        Ok(())
    }

    /// A first time on both hosts, a second time on the survivor.
    fn judge_status(&mut self, said: &[String]) -> Result<()> {
        if said.len() == 2 {
            self.wait_roles("left", PATIENCE)?;
            wait::until("the tunnel", PATIENCE, TICK, || {
                Ok(self.status("left")?.is_up("branch", 1).then_some(()))
            })?;
            self.term = self.status("left")?.main().term;
            return Ok(());
        }
        let words = ["owner"];
        for text in said {
            ensure(words.iter().all(|word| text.contains(word)), || format!("it said {text}"))?;
        }
        Ok(())
    }

    fn start_traffic(&mut self, lab: &Lab<'_>, line: &str) -> Result<()> {
        self.net.lhost.ping_until("10.2.0.1", PATIENCE)?;
        let log = lab.run.dir().join("ping.log");
        let _ = std::fs::remove_file(&log);
        let words = line.split_whitespace().skip(1);
        self.ping = Some(self.net.lhost.cmd("ping").args(words).spawn(&log)?);
        let probes = UdpProbes::start(
            lab.run,
            (&self.net.lhost, net::LHOST),
            (&self.net.rhost, net::RHOST),
            1000,
        )?;
        probes.wait_flowing(PATIENCE)?;
        self.probes = Some(probes);
        Ok(())
    }

    fn wait_owner_after_kill(&mut self) -> Result<()> {
        let from = self.killed.ok_or_else(|| Error::check("nobody was killed"))?;
        let term = wait::until("right to own", BRIEF, TICK, || {
            let main = self.status("right")?.main();
            Ok((main.role == "owner").then_some(main.term))
        })?;
        ensure(term > self.term, || format!("term {term} after {}", self.term))?;
        let probes = self.probes.as_ref().ok_or_else(|| Error::check("README never pings"))?;
        // The takeover's packets have all come or never will.
        let to = clock::now() + Duration::from_millis(500);
        probes.settle(to)?;
        let gaps = Way::BOTH.map(|way| probes.measure(way, from, to).gap);
        self.gap = gaps.into_iter().max().unwrap_or_default();
        ensure(self.gap < Duration::from_millis(400), || {
            format!("{:.0} ms of silence", clock::millis(self.gap))
        })
    }

    /// What the README's ping said when it was ended.
    fn end_ping(&mut self) -> Result<String> {
        let mut ping = self.ping.take().ok_or_else(|| Error::check("README never pings"))?;
        ping.stop(Signal::SIGINT, BRIEF)?;
        let text = std::fs::read_to_string(ping.log()).doing("read ping's words")?;
        // 61 packets transmitted, 61 received, 0% packet loss, time 12213ms
        let line =
            text.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
        let mut numbers = line.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        let (Some(sent), Some(received)) = (numbers.next(), numbers.next()) else {
            return Err(Error::parse("ping's words", text));
        };
        // One may have been in the owner's hands as it died, and one under way as ping ended.
        ensure(sent >= 5 && received + 2 >= sent, || line.to_owned())?;
        Ok(format!("ping: {received} of {sent}"))
    }

    /// The unit's watchdog: a daemon that hangs is ended and started again, and nobody loses a packet by it.
    fn hang_the_shadow(&self, probes: &UdpProbes) -> Result<String> {
        let before = self.right.property("tandemd", "NRestarts")?;
        let began = clock::now();
        without_loss(probes, || {
            self.right.run("kill -STOP $(systemctl show -p MainPID --value tandemd)", BRIEF)?;
            wait::until("systemd to notice a hung daemon", Duration::from_secs(20), TICK, || {
                Ok((self.right.property("tandemd", "NRestarts")? != before).then_some(()))
            })?;
            self.wait_roles("left", PATIENCE)
        })?;
        let took = (clock::now() - began).as_secs_f64();
        let journal = self.right.journal("tandemd");
        ensure(journal.contains("Watchdog timeout"), || "it was not the watchdog".into())?;
        Ok(format!("hung shadow restarted by the watchdog and in sync after {took:.1} s"))
    }

    fn deploy(&self, host: &Host, line: &str) -> Result<String> {
        let finished = host.cmd_in(&self.checkout, line).finish(PATIENCE)?;
        let errors = finished.stderr.clone();
        Ok(format!("{}{errors}", host.named(finished, line)?))
    }

    /// README's "An upgrade is this, twice": the shadow, a failover, the other. It keeps configuration, keys and terms,
    /// and no packet is lost.
    fn upgrade(&self, probes: &UdpProbes) -> Result<String> {
        let kept = "sha256sum /etc/tandem/*";
        let mut said = Vec::new();
        for (shadow, owner) in [("right", "left"), ("left", "right")] {
            let host = self.host(shadow);
            let before = (host.run(kept, BRIEF)?, self.status(shadow)?.main().term);
            let pid = host.property("tandemd", "MainPID")?;
            said.push(without_loss(probes, || {
                let install = format!("deploy/install --binaries {}", self.binaries.display());
                let text = self.deploy(host, &install)?;
                ensure(text.contains("old release still runs"), || format!("it said {text}"))?;
                ensure(host.property("tandemd", "MainPID")? == pid, || "it restarted".into())?;
                host.run("systemctl restart tandemd", PATIENCE)?;
                self.wait_roles(owner, PATIENCE)?;
                ensure(host.property("tandemd", "MainPID")? != pid, || "the old one runs".into())?;
                self.confined(shadow)?;
                self.host(owner).run("tandem failover main", BRIEF)?;
                self.wait_roles(shadow, PATIENCE)
            })?);
            let after = (host.run(kept, BRIEF)?, self.status(shadow)?.main().term);
            ensure(after.0 == before.0, || format!("{shadow}: /etc/tandem changed"))?;
            ensure(after.1 > before.1, || format!("term {} after {}", after.1, before.1))?;
        }
        Ok(said.join(", "))
    }

    /// What `deploy/uninstall` leaves is what it says, and with `--purge` it leaves nothing.
    fn uninstall(&self) -> Result<()> {
        for (host, purge) in [(&self.left, false), (&self.right, true)] {
            let rules = "ip rule show; ip -6 rule show; ip route show table all; ip -6 route show table all";
            let ours = |text: &str| -> Vec<String> {
                // `proto 116` is our mark on rules and routes.
                let lines = text.lines().filter(|line| line.contains("proto 116"));
                lines.map(str::to_owned).collect()
            };
            ensure(!ours(&host.run(rules, BRIEF)?).is_empty(), || "there were no rules".into())?;
            let line = if purge { "deploy/uninstall --purge" } else { "deploy/uninstall" };
            self.deploy(host, line)?;
            let files = "find /usr/local /etc /var/lib /run -xdev -iname '*tandem*' | sort";
            let files = host.run(files, BRIEF)?;
            let wanted =
                if purge { "" } else { "/etc/tandem\n/etc/tandem/tandem.toml\n/var/lib/tandem\n" };
            ensure(files == wanted, || format!("{line} left {files:?}"))?;
            let units = host.run("systemctl list-units --all --no-legend '*tandem*'; systemctl list-unit-files --no-legend '*tandem*'; ip -br link", BRIEF)?;
            ensure(!units.contains("tandem"), || format!("{line} left {units}"))?;
            let left = ours(&host.run(rules, BRIEF)?);
            ensure(left.is_empty() == purge, || format!("{line} left {left:?}"))?;
        }
        Ok(())
    }

    /// Waits until `owner` owns, says `synced`, and the other is its shadow.
    fn wait_roles(&self, owner: &str, within: Duration) -> Result<()> {
        let other = if owner == "left" { "right" } else { "left" };
        wait::until_ok(&format!("{owner} to own, in sync"), within, TICK, || {
            let states: [EndpointStatus; 2] =
                [self.status(owner)?.main(), self.status(other)?.main()];
            ensure(
                states[0].role == "owner"
                    && states[0].mode == "synced"
                    && states[1].role == "shadow",
                || {
                    format!(
                        "{owner} is {} ({}), {other} is {} ({})",
                        states[0].role, states[0].mode, states[1].role, states[1].mode
                    )
                },
            )
        })
    }

    fn status(&self, name: &str) -> Result<Status> {
        let text = self.host(name).run("tandem status --json", BRIEF)?;
        serde_json::from_str(&text)
            .map_err(|error| Error::parse("tandem status --json", error.to_string()))
    }

    fn spis(&self) -> Result<Spis> {
        Ok(Spis::of(charon::parse_sas(&self.peer.run("swanctl --list-sas --raw", BRIEF)?)?))
    }

    /// That the unit's hardening is on the running daemon: seen from the kernel, not from the unit's file.
    fn confined(&self, name: &str) -> Result<()> {
        let host = self.host(name);
        let pid = host.property("tandemd", "MainPID")?;
        let status = host.run(&format!("cat /proc/{pid}/status"), BRIEF)?;
        let field = |key: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let bits = |key: &str| u64::from_str_radix(&field(key), 16).unwrap_or(u64::MAX);
        ensure(bits("CapBnd:") & !BOUND == 0, || format!("CapBnd is {}", field("CapBnd:")))?;
        ensure(bits("CapEff:") & !BOUND == 0, || format!("CapEff is {}", field("CapEff:")))?;
        ensure(field("NoNewPrivs:") == "1", || "it may gain privileges".into())?;
        ensure(field("Seccomp:") == "2", || "no system call is filtered".into())?;
        let limit = host.run(&format!("grep 'Max core' /proc/{pid}/limits"), BRIEF)?;
        ensure(limit.split_whitespace().nth(4) == Some("0"), || limit.clone())?;
        // ProtectSystem=strict: it sees the root read-only.
        let mounts = host.run(&format!("cat /proc/{pid}/mounts"), BRIEF)?;
        let options = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|words| words.get(1) == Some(&"/"))
            .filter_map(|words| words.get(3).map(|options| (*options).to_owned()))
            .next_back()
            .unwrap_or_default();
        ensure(options.split(',').any(|option| option == "ro"), || {
            format!("{name}: the daemon's root is mounted {options:?}")
        })
    }

    fn save_journals(&self) {
        for host in [&self.left, &self.right] {
            let text =
                host.run("journalctl --no-pager -o short-precise", BRIEF).unwrap_or_default();
            let _ = std::fs::write(host.lab_dir().with_file_name("journal.txt"), text);
        }
    }
}
