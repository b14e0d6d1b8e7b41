//! A remote gateway with a real Linux kernel's ESP: Debian's user-mode-linux as an ordinary process, with
//! charon inside (peers.md).
//!
//! ```text
//!   eth0 ─ br0 ─ tap0 ══ vec0 198.51.100.7 ┐
//!                                          ├ guest kernel 6.1: esp4, charon
//!   eth1 ─ br1 ─ tap1 ══ vec1 10.2.0.1     ┘
//! ```
//! The guest's console is a pair of pipes. Its init is a shell that runs the lines it reads and answers with
//! what they printed and `LAB-END number status`.

use crate::charon::{Backend, Conn, IkeSa, Spis, parse_sas, strongswan_conf, swanctl_conf, tool};
use crate::error::{Error, IoContext, Result, ensure, write_file};
use crate::ns::{self, Ns};
use crate::proc::{Proc, last_lines};
use crate::run::Run;
use crate::{clock, wait};
use nix::sys::signal::Signal;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const INIT: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
stty -echo raw
mkdir -p /lib/modules
mount --bind /usr/lib/uml/modules /lib/modules
modprobe -a xfrm_user esp4 esp6 gcm seqiv ctr ghash-generic cbc hmac sha256_generic authenc echainiv udp_tunnel chacha20poly1305 || echo LAB-MODPROBE-FAILED
echo LAB-READY
while IFS= read -r line; do
  if [ "$line" = quit ]; then sync; echo o > /proc/sysrq-trigger; sleep 5; fi
  number=${line%% *}
  printed=$(eval "${line#* }" 2>&1)
  status=$?
  printf '%s\nLAB-END %s %s\n' "$printed" "$number" "$status"
done
"#;

type Screen = Arc<Mutex<String>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest.
#[derive(Debug)]
pub struct UmlPeer {
    proc: Mutex<Proc>,
    console: Mutex<(ChildStdin, u32)>,
    screen: Screen,
    dir: PathBuf,
    swanctl: PathBuf,
}

impl UmlPeer {
    /// Boots the guest in `ns` (whose eth0 and eth1 become its own), starts charon in it and loads `conns`.
    pub fn start(run: &Run, ns: &Ns, conns: &[Conn]) -> Result<UmlPeer> {
        wire_up(ns)?;
        let dir = run.subdir("uml")?;
        let init = dir.join("init.sh");
        write_file(&init, INIT)?;
        executable(&init)?;
        let charon = tool(run, "/usr/lib/ipsec/charon")?;
        let swanctl = tool(run, "/usr/sbin/swanctl")?;
        let (proc, stdin, stdout) = ns
            .cmd("linux.uml")
            .env("TMPDIR", &dir)
            .args(["mem=512M", "root=/dev/root", "rootfstype=hostfs", "rw", "quiet"])
            .arg(format!("init={}", init.display()))
            .args(["con0=fd:0,fd:1", "con=null", "umid=peer"])
            .arg(format!("uml_dir={}/", dir.display()))
            .args(["vec0:transport=tap,ifname=tap0,depth=128,gro=1"])
            .args(["vec1:transport=tap,ifname=tap1,depth=128,gro=1"])
            .converse(&dir.join("stderr.log"))?;
        let screen = Screen::default();
        let copy = Arc::clone(&screen);
        std::thread::spawn(move || collect(stdout, &copy));
        let peer = UmlPeer {
            proc: Mutex::new(proc),
            console: Mutex::new((stdin, 0)),
            screen,
            dir: dir.clone(),
            swanctl,
        };
        peer.wait_screen("LAB-READY", Duration::from_secs(60))?;
        ensure(!lock(&peer.screen).contains("LAB-MODPROBE-FAILED"), || {
            "the guest lacks ESP modules".into()
        })?;
        peer.run(
            "ip link set lo up; ip addr add 198.51.100.7/24 dev vec0; ip addr add 10.2.0.1/24 dev vec1; \
             ip link set vec0 up; ip link set vec1 up; ip route add default via 198.51.100.1; \
             echo 1 > /proc/sys/net/ipv4/ip_forward; \
             echo 0 > /proc/sys/net/ipv4/conf/all/send_redirects; \
             echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter",
        )?;
        let conf = dir.join("strongswan.conf");
        let log = dir.join("charon.log");
        write_file(
            &conf,
            strongswan_conf(&log, Path::new("/run/charon.vici"), Backend::Kernel, ""),
        )?;
        peer.run(&format!(
            "STRONGSWAN_CONF={} {} > {}/charon.out 2>&1 < /dev/null &",
            conf.display(),
            charon.display(),
            dir.display()
        ))?;
        wait::until_ok(
            "charon in the guest",
            Duration::from_secs(60),
            Duration::from_millis(100),
            || peer.swanctl("--stats").map(drop),
        )?;
        peer.load(conns)?;
        Ok(peer)
    }

    /// Runs a shell line in the guest; fails unless it succeeds. Returns what it printed.
    pub fn run(&self, line: &str) -> Result<String> {
        self.run_within(line, Duration::from_secs(30))
    }

    /// Like [`UmlPeer::run`], with a limit.
    pub fn run_within(&self, line: &str, within: Duration) -> Result<String> {
        let mut console = lock(&self.console);
        console.1 += 1;
        let number = console.1;
        let skip = lock(&self.screen).len();
        writeln!(console.0, "{number} {}", line.replace('\n', " "))
            .and_then(|()| console.0.flush())
            .doing("talk to the guest")?;
        let marker = format!("LAB-END {number} ");
        let what = format!("the guest to finish `{line}`");
        let (printed, status) = wait::until(&what, within, Duration::from_millis(2), || {
            lock(&self.proc).check_alive()?;
            let screen = lock(&self.screen);
            let new = screen.get(skip..).unwrap_or_default();
            let Some((printed, rest)) = new.split_once(&marker) else { return Ok(None) };
            let Some((status, _)) = rest.split_once('\n') else { return Ok(None) };
            Ok(Some((printed.replace('\r', ""), status.trim().to_owned())))
        })?;
        if status == "0" {
            return Ok(printed);
        }
        Err(Error::Command {
            command: format!("[guest] {line}"),
            status: format!("exit status {status}"),
            stderr: last_lines(&printed, 8),
        })
    }

    fn wait_screen(&self, text: &str, within: Duration) -> Result<()> {
        wait::until(
            &format!("{text} on the guest's console"),
            within,
            Duration::from_millis(10),
            || {
                lock(&self.proc).check_alive()?;
                Ok(lock(&self.screen).contains(text).then_some(()))
            },
        )
    }

    fn swanctl(&self, args: &str) -> Result<String> {
        let (verb, rest) = args.split_once(' ').unwrap_or((args, ""));
        self.run_within(
            &format!("{} {verb} --uri unix:///run/charon.vici {rest}", self.swanctl.display()),
            Duration::from_secs(60),
        )
    }

    /// Replaces charon's configuration.
    pub fn load(&self, conns: &[Conn]) -> Result<()> {
        let path = self.dir.join("swanctl.conf");
        write_file(&path, swanctl_conf(conns))?;
        self.swanctl(&format!("--load-all --clear --file {}", path.display())).map(drop)
    }

    /// Initiates a child.
    pub fn initiate(&self, child: &str, within: Duration) -> Result<()> {
        self.swanctl(&format!("--initiate --child {child} --timeout {}", within.as_secs()))
            .map(drop)
    }

    /// Rekeys a child, or the IKE SA.
    pub fn rekey(&self, what: &str, name: &str) -> Result<()> {
        self.swanctl(&format!("--rekey --{what} {name}")).map(drop)
    }

    /// Every IKE SA it knows.
    pub fn sas(&self) -> Result<Vec<IkeSa>> {
        parse_sas(&self.swanctl("--list-sas --raw")?)
    }

    /// The SPIs of all that is established.
    pub fn spis(&self) -> Result<Spis> {
        Ok(Spis::of(self.sas()?))
    }

    /// The SPIs in the guest's kernel (`ip xfrm state`): proof that ESP is really there.
    pub fn kernel_spis(&self) -> Result<Vec<u32>> {
        let text = self.run("ip xfrm state")?;
        let words: Vec<&str> = text.split_whitespace().collect();
        Ok(words
            .windows(2)
            .filter(|pair| pair[0] == "spi")
            .filter_map(|pair| u32::from_str_radix(pair[1].trim_start_matches("0x"), 16).ok())
            .collect())
    }

    /// What it is.
    pub fn describe(&self) -> Result<String> {
        let kernel = self.run("uname -r")?;
        let version = self.swanctl("--version --daemon")?;
        let version =
            version.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        let version = version.unwrap_or("?").trim_end_matches(',');
        Ok(format!("strongSwan {version} on Linux {} ESP", kernel.trim()))
    }

    /// Shuts the guest down.
    pub fn stop(self) -> Result<()> {
        let _ = self.swanctl("--terminate --ike gw --timeout 5");
        {
            let mut console = lock(&self.console);
            writeln!(console.0, "quit")
                .and_then(|()| console.0.flush())
                .doing("talk to the guest")?;
        }
        let mut proc = lock(&self.proc);
        let started = clock::now();
        if proc.bury(Duration::from_secs(20)).is_err() {
            proc.stop(Signal::SIGKILL, Duration::from_secs(5))?;
            return Err(Error::check(format!(
                "the guest did not power off in {:?}",
                clock::now() - started
            )));
        }
        Ok(())
    }
}

fn collect(mut stdout: ChildStdout, screen: &Screen) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stdout.read(&mut buffer) {
        lock(screen).push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
        .doing("make the guest's init runnable")
}

/// Hands the namespace's two interfaces to the guest.
fn wire_up(ns: &Ns) -> Result<()> {
    for (eth, tap, bridge) in [("eth0", "tap0", "br0"), ("eth1", "tap1", "br1")] {
        ns.ip(&format!(
            "addr flush dev {eth}\ntuntap add dev {tap} mode tap\nlink set {tap} up\n"
        ))?;
        ns::bridge(ns, bridge, &[eth, tap])?;
    }
    Ok(())
}
