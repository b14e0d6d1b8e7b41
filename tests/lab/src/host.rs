//! A whole host in a network namespace: a root of its own, and a real systemd as its process 1, so that units run as
//! they do on a user's machine. See `host.sh` for how it is made.
//!
//! What such a host can not show: it shares the machine's kernel, clock and users.

use crate::error::{Error, IoContext, Result, write_file};
use crate::ns::Ns;
use crate::proc::{Cmd, Finished, Proc};
use crate::run::{self, Run};
use crate::wait;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long booting may take on a busy machine: a second is usual.
const BOOT: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(50);
const PATH: &str = "PATH=/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The only target: what every unit wants by default, a journal, and the kernel settings of the network.
const TARGET: &str = "[Unit]
Requires=sysinit.target basic.target systemd-journald.service
Wants=systemd-sysctl.service lab-ssh.service multi-user.target
After=sysinit.target basic.target systemd-journald.service multi-user.target
AllowIsolate=yes
";
const SYSCTL: &str = "[Service]\nExecStart=\nExecStart=/lib/systemd/systemd-sysctl --prefix=/net\n";
const SSH_UNIT: &str = "[Service]\nExecStart=/usr/bin/python3 /lab/bin/lab-sshd\n";

/// `ssh HOST COMMAND` without keys and ciphers, over the lab's network: the command's length, the command, its input.
/// Back come its output and one byte, its exit status.
const SSH: &str = r#"#!/usr/bin/python3
import socket, sys
command = " ".join(sys.argv[2:]).encode()
link = socket.create_connection((sys.argv[1].rpartition("@")[2], 22), timeout=10)
link.settimeout(20)
link.sendall(len(command).to_bytes(4, "big") + command + sys.stdin.buffer.read())
link.shutdown(socket.SHUT_WR)
answer = b"".join(iter(lambda: link.recv(65536), b""))
sys.stdout.buffer.write(answer[:-1])
sys.stdout.flush()
sys.exit(answer[-1] if answer else 255)
"#;
const SSHD: &str = r#"import socketserver, subprocess
class Session(socketserver.BaseRequestHandler):
    def handle(self):
        data = b"".join(iter(lambda: self.request.recv(65536), b""))
        end = 4 + int.from_bytes(data[:4], "big")
        done = subprocess.run(["bash", "-c", data[4:end].decode()], input=data[end:],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=15)
        self.request.sendall(done.stdout + bytes([done.returncode & 255]))
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("", 22), Session).serve_forever()
"#;
const SCP: &str = r#"#!/bin/bash
set -euo pipefail
[[ $1 == -p ]] || { echo "the lab's scp wants -p" >&2; exit 1; }
target=${!#}
tar -cf - --absolute-names --transform 's|.*/||' -- "${@:2:$#-2}" |
    ssh "${target%%:*}" "tar -xpf - -C '${target#*:}'"
"#;
const SUDO: &str = "#!/bin/sh\nexec \"$@\"\n";

/// What a host is given beyond the machine's own root.
#[derive(Debug, Default)]
pub struct Outfit {
    /// Names of other hosts: the text of `/etc/hosts`.
    pub hosts: String,
    /// Folders that it sees at their own path, read-only.
    pub shown: Vec<PathBuf>,
    /// Files below `/etc`, by their path there.
    pub etc: Vec<(&'static str, String)>,
    /// Programs that stand before all others on its PATH, by name.
    pub programs: Vec<(&'static str, String)>,
    /// Copies of the machine's programs there: the machine's AppArmor profiles attach by path.
    pub copies: Vec<&'static str>,
}

/// A booted host. It is gone, with all that runs in it, when this is dropped.
#[derive(Debug)]
pub struct Host {
    proc: Proc,
    init: u32,
    dir: PathBuf,
    /// Its network.
    pub ns: Ns,
}

impl Host {
    /// Boots a host in `ns` without waiting for it (see [`Host::wait_booted`]).
    pub fn boot(run: &Run, ns: &Ns, outfit: &Outfit) -> Result<Host> {
        let cgroups = run::cgroup_root()
            .ok_or_else(|| Error::Machine("no cgroup2 file system is mounted".into()))?;
        let name = format!("host-{}", ns.short());
        let dir = run.subdir(&name)?;
        std::fs::remove_dir_all(&dir).doing("empty a folder")?;
        let lab = run.subdir(&format!("{name}/lab"))?;
        let standard: [(&str, String); 4] = [
            ("sudo", SUDO.into()),
            ("ssh", SSH.into()),
            ("scp", SCP.into()),
            ("lab-sshd", SSHD.into()),
        ];
        for (program, text) in standard.iter().chain(&outfit.programs) {
            install(&lab.join("bin").join(program), text, 0o755)?;
        }
        for path in &outfit.copies {
            let copy = crate::charon::tool(run, path)?;
            let target = lab.join("bin").join(copy.file_name().unwrap_or_default());
            std::fs::copy(&copy, target).doing(format!("copy {path}"))?;
        }
        let units: [(&str, String); 3] = [
            ("systemd/system/lab.target", TARGET.into()),
            ("systemd/system/systemd-sysctl.service.d/lab.conf", SYSCTL.into()),
            ("systemd/system/lab-ssh.service", SSH_UNIT.into()),
        ];
        for (path, text) in units.iter().chain(&outfit.etc) {
            install(&lab.join("etc").join(path), text, 0o644)?;
        }
        write_file(
            &lab.join("hosts"),
            format!("127.0.0.1 localhost {}\n{}", ns.short(), outfit.hosts),
        )?;
        let script = dir.join("host.sh");
        install(&script, include_str!("host.sh"), 0o755)?;
        let log = dir.join("boot.log");
        let proc = Cmd::new("sh")
            .arg(&script)
            .arg("enter")
            .arg(cgroups.join(ns.name()))
            .args([ns.name(), ns.short()])
            .arg(&dir)
            .args(&outfit.shown)
            .spawn(&log)?;
        Ok(Host { proc, init: 0, dir, ns: ns.clone() })
    }

    /// Waits until systemd says that everything has started.
    pub fn wait_booted(&mut self) -> Result<()> {
        let pid = self.proc.pid();
        let children = format!("/proc/{pid}/task/{pid}/children");
        self.init = wait::until("a host's process 1", BOOT, TICK, || {
            self.proc.check_alive()?;
            let text = std::fs::read_to_string(&children).unwrap_or_default();
            let Some(pid) = text.split_whitespace().next() else { return Ok(None) };
            // Until it is systemd, it is the script's shell, or even one of its commands.
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Ok(if name.trim() == "systemd" { pid.parse().ok() } else { None })
        })?;
        let what = format!("systemd on {}", self.ns.short());
        wait::until_ok(&what, BOOT, TICK, || {
            let said = self.finish(
                "systemctl is-system-running; systemctl --failed --plain --no-legend",
                BOOT,
            )?;
            if said.stdout.trim() == "running" {
                return Ok(());
            }
            Err(Error::check(crate::proc::last_lines(
                &format!("{}\n{}", said.stdout, said.stderr),
                4,
            )))
        })
        .map_err(|error| Error::check(format!("{error} {}", self.proc.log_tail())))
    }

    /// A line for bash, run as root on this host, in its folder `/`.
    pub fn cmd(&self, line: &str) -> Cmd {
        self.cmd_in(Path::new("/"), line)
    }

    /// The same in another folder. A failure anywhere in a pipe is the line's failure.
    pub fn cmd_in(&self, folder: &Path, line: &str) -> Cmd {
        // No `--fork`: with a process namespace nsenter forks anyway, and what it started ends with the host.
        Cmd::new("nsenter")
            .args(["-t", &self.init.to_string(), "-m", "-u", "-i", "-n", "-p"])
            .args(["env", "-i", "-C"])
            .arg(folder)
            .args(["HOME=/root", "LANG=C.UTF-8", "TERM=dumb", PATH])
            .args(["bash", "-o", "pipefail", "-c", line])
    }

    /// Runs a line; fails unless it succeeds. Returns its standard output.
    pub fn run(&self, line: &str, within: Duration) -> Result<String> {
        self.named(self.cmd(line).finish(within)?, line)
    }

    /// Runs a line and returns what it left.
    pub fn finish(&self, line: &str, within: Duration) -> Result<Finished> {
        self.cmd(line).finish(within)
    }

    /// The standard output of a line that succeeded; else an error that names the host and the line alone.
    pub fn named(&self, finished: Finished, line: &str) -> Result<String> {
        if finished.status.success() {
            return Ok(finished.stdout);
        }
        Err(Error::Command {
            command: format!("{}# {line}", self.ns.short()),
            status: finished.status.to_string(),
            stderr: crate::proc::last_lines(
                &format!("{}\n{}", finished.stdout, finished.stderr),
                6,
            ),
        })
    }

    /// A property of a unit, as systemd knows it.
    pub fn property(&self, unit: &str, property: &str) -> Result<String> {
        let text = self.run(
            &format!("systemctl show -p {property} --value {unit}"),
            Duration::from_secs(10),
        )?;
        Ok(text.trim().to_owned())
    }

    /// What a unit wrote to the journal.
    pub fn journal(&self, unit: &str) -> String {
        self.run(
            &format!("journalctl --no-pager -o short-precise -u {unit}"),
            Duration::from_secs(10),
        )
        .unwrap_or_default()
    }

    /// The folder that the host has as `/lab`.
    pub fn lab_dir(&self) -> PathBuf {
        self.dir.join("lab")
    }
}

fn install(path: &Path, text: &str, mode: u32) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).doing(format!("create {}", dir.display()))?;
    }
    write_file(path, text)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).doing("set a file's mode")
}
