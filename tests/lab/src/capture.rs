//! Captures: tcpdump in a namespace, and what it recorded.

use crate::charon::tool;
use crate::error::{Error, IoContext, Result, ensure, write_file};
use crate::ns::Ns;
use crate::pcap::{self, Packet};
use crate::proc::{Cmd, Proc};
use crate::run::Run;
use crate::{clock, wait};
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A running tcpdump.
#[derive(Debug)]
pub struct Capture {
    proc: Proc,
    path: PathBuf,
    lead: Duration,
}

impl Capture {
    /// Starts capturing on `interface` of `ns` and waits until it really does. `filter` is tcpdump's (empty: all);
    /// `snap` the bytes kept of each frame. The ring of 8 MB has slots of that size (rounded up), so that a large
    /// `snap` on a busy interface loses packets, which [`Capture::stop`] notices; a larger ring would cost every
    /// other process of the machine a pause while the kernel clears it.
    pub fn start(run: &Run, ns: &Ns, interface: &str, filter: &str, snap: u32) -> Result<Capture> {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let stem = format!("{}-{interface}-{number}", ns.short());
        let path = run.subdir("captures")?.join(format!("{stem}.pcap"));
        let log = run.dir().join(format!("tcpdump-{stem}.log"));
        let mut cmd = ns
            .cmd(tool(run, "/usr/bin/tcpdump")?)
            .args(["-i", interface, "-n", "-U", "-Z", "root", "--immediate-mode", "-B", "8192"])
            .args(["--time-stamp-precision=nano", "-s", &snap.to_string(), "-w"])
            .arg(&path);
        if !filter.is_empty() {
            cmd = cmd.arg(filter);
        }
        let mut proc = cmd.nice(-5).spawn(&log)?;
        wait::until(
            "tcpdump to listen",
            Duration::from_secs(20),
            Duration::from_millis(5),
            || {
                proc.check_alive()?;
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                Ok(text.contains("listening on").then_some(()))
            },
        )?;
        Ok(Capture { proc, path, lead: clock::realtime_lead() })
    }

    /// Ends the capture and reads it. Fails if the kernel dropped packets: then "0 seen" would say nothing.
    pub fn stop(mut self) -> Result<Recording> {
        // Frames of this instant may still be on their way through the ring.
        clock::sleep_until(clock::now() + Duration::from_millis(50));
        self.proc.stop(Signal::SIGINT, Duration::from_secs(10))?;
        let log = std::fs::read_to_string(self.proc.log()).unwrap_or_default();
        let count = |what: &str| -> Option<u64> {
            let line = log.lines().find(|line| line.contains(what))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let dropped = count("dropped by kernel");
        ensure(dropped == Some(0), || format!("tcpdump missed packets: {}", self.proc.log_tail()))?;
        let file = std::fs::read(&self.path).doing(format!("read {}", self.path.display()))?;
        pcap::frames(&file)?;
        Ok(Recording { file, path: self.path.clone(), lead: self.lead })
    }

    /// What was captured so far, without ending it.
    pub fn peek(&self) -> Result<Recording> {
        let file = std::fs::read(&self.path).doing(format!("read {}", self.path.display()))?;
        pcap::frames(&file)?;
        Ok(Recording { file, path: self.path.clone(), lead: self.lead })
    }
}

/// What a capture recorded.
#[derive(Debug)]
pub struct Recording {
    file: Vec<u8>,
    path: PathBuf,
    lead: Duration,
}

impl Recording {
    /// Every packet, in order.
    pub fn packets(&self) -> impl Iterator<Item = Packet<'_>> {
        // The file was parsed once when it was read.
        pcap::frames(&self.file).unwrap_or_default().into_iter().map(|frame| pcap::dissect(&frame))
    }

    /// A packet's time on the lab's clock.
    pub fn boot_time(&self, at: Duration) -> Duration {
        at.saturating_sub(self.lead)
    }

    /// Saves the frames that `wanted` picks, for tshark. Returns how many.
    pub fn select(&self, path: &Path, wanted: impl Fn(&Packet<'_>) -> bool) -> Result<usize> {
        let all = pcap::frames(&self.file)?.into_iter();
        let chosen: Vec<_> = all
            .filter(|frame| wanted(&pcap::dissect(frame)))
            .map(|frame| (frame.at, frame.bytes.to_vec()))
            .collect();
        save(&chosen, path)?;
        Ok(chosen.len())
    }

    /// The pcap file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, when its contents have been judged.
    pub fn discard(self) {
        let _ = std::fs::remove_file(&self.path);
    }

    #[cfg(test)]
    pub(crate) fn from_frames(frames: &[Vec<u8>]) -> Recording {
        let list: Vec<_> = frames.iter().map(|frame| (Duration::ZERO, frame.clone())).collect();
        Self::from_timed(&list)
    }

    #[cfg(test)]
    pub(crate) fn from_timed(frames: &[(Duration, Vec<u8>)]) -> Recording {
        Recording { file: pcap::write(frames), path: PathBuf::new(), lead: Duration::ZERO }
    }
}

/// What tshark, an independent eye, makes of a capture with a key log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decrypted {
    /// ESP packets in the capture.
    pub esp: u64,
    /// Of those, how many are in UDP.
    pub esp_in_udp: u64,
    /// How many it decrypted to an inner IP packet, the tag being right.
    pub esp_opened: u64,
    /// Identities it read in decrypted IKE_AUTH messages.
    pub identities: Vec<String>,
}

/// Lets tshark decrypt a capture. `keylog` is the folder that `tandemd --keylog` filled: it holds tshark's tables
/// `esp_sa` and `ikev2_decryption_table` under their own names.
pub fn tshark(capture: &Path, keylog: &Path) -> Result<Decrypted> {
    let tshark = || {
        Cmd::new("tshark").env("WIRESHARK_CONFIG_DIR", keylog).args(["-n", "-r"]).arg(capture).args(
            [
                "-o",
                "esp.enable_encryption_decode:TRUE",
                "-o",
                "esp.enable_authentication_check:TRUE",
            ],
        )
    };
    let within = Duration::from_secs(60);
    let esp = tshark()
        .args(["-Y", "esp", "-T", "fields", "-e", "ip.proto", "-e", "ip.src"])
        .run(within)?;
    let ids =
        tshark().args(["-Y", "isakmp", "-T", "fields", "-e", "isakmp.id.data.fqdn"]).run(within)?;
    let mut identities: Vec<String> =
        ids.split([',', '\n']).filter(|word| !word.is_empty()).map(str::to_owned).collect();
    identities.sort();
    identities.dedup();
    Ok(Decrypted {
        esp: esp.lines().count() as u64,
        // A decrypted packet has two IP headers: `17,1 198.51.100.7,10.2.0.9`.
        esp_in_udp: esp.lines().filter(|line| line.starts_with("17")).count() as u64,
        esp_opened: esp.lines().filter(|line| line.contains(',')).count() as u64,
        identities,
    })
}

/// What tshark reads of a flow inside ESP: the outer source address, the inner source and destination, the protocol and
/// the inner ports. One line for each packet that it opened.
pub fn tshark_flows(capture: &Path, keylog: &Path) -> Result<Vec<InnerFlow>> {
    let text = Cmd::new("tshark")
        .env("WIRESHARK_CONFIG_DIR", keylog)
        .args(["-n", "-r"])
        .arg(capture)
        .args(["-o", "esp.enable_encryption_decode:TRUE"])
        .args(["-Y", "esp", "-T", "fields", "-E", "separator=;", "-E", "occurrence=a"])
        .args(["-e", "frame.time_epoch", "-e", "ip.src", "-e", "ip.dst", "-e", "ip.proto"])
        .args(["-e", "udp.srcport", "-e", "udp.dstport", "-e", "tcp.srcport", "-e", "tcp.dstport"])
        .run(Duration::from_secs(120))?;
    Ok(text.lines().filter_map(InnerFlow::read).collect())
}

/// A packet inside ESP, as tshark opened it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerFlow {
    /// When it was captured (CLOCK_REALTIME), see [`Recording::boot_time`].
    pub at: Duration,
    /// Outer source address.
    pub outer: String,
    /// Outer destination address.
    pub target: String,
    /// Inner addresses, protocol and ports, as one flow's packets of one way have them alike.
    pub flow: String,
}

impl InnerFlow {
    /// `1790.5;203.0.113.10,10.1.0.9;198.51.100.7,10.2.0.9;17,17;4500,20000;4500,7002;;`, or as protocol 50
    /// `1790.5;203.0.113.10,10.1.0.9;198.51.100.7,10.2.0.9;50,17;20000;7002;;`
    fn read(line: &str) -> Option<InnerFlow> {
        let (at, line) = line.split_once(';')?;
        let at = Duration::try_from_secs_f64(at.parse().ok()?).ok()?;
        let mut fields = line.split(';').map(|field| field.split(',').collect::<Vec<_>>());
        let (sources, destinations) = (fields.next()?, fields.next()?);
        let protocols = fields.next()?;
        let (inner, protocol) = (usize::from(*protocols.first()? == "17"), *protocols.get(1)?);
        let (udp, tcp) = ([fields.next()?, fields.next()?], [fields.next()?, fields.next()?]);
        let ports = match protocol {
            "17" => udp.map(|list| list.get(inner).map(|port| (*port).to_owned())),
            "6" => tcp.map(|list| list.first().map(|port| (*port).to_owned())),
            _ => return None,
        };
        let [from, to] = ports;
        let flow =
            format!("{} {}:{} {}:{}", protocol, sources.get(1)?, from?, destinations.get(1)?, to?);
        let (outer, target) = (*sources.first()?, *destinations.first()?);
        Some(InnerFlow { at, outer: outer.to_owned(), target: target.to_owned(), flow })
    }
}

/// Saves part of a recording for tshark or a person.
pub fn save(frames: &[(Duration, Vec<u8>)], path: &Path) -> Result<()> {
    if frames.is_empty() {
        return Err(Error::check("nothing to save"));
    }
    write_file(path, pcap::write(frames))
}

#[cfg(test)]
mod tests {
    use super::InnerFlow;

    #[test]
    fn inner_flows_are_read_behind_either_form_of_esp() {
        let flow = |line: &str| InnerFlow::read(line).map(|flow| (flow.outer, flow.flow));
        let expected =
            Some(("203.0.113.10".to_owned(), "17 10.1.0.9:20000 10.2.0.9:7002".to_owned()));
        let addresses = "203.0.113.10,10.1.0.9;198.51.100.7,10.2.0.9";
        assert_eq!(flow(&format!("1.5;{addresses};17,17;4500,20000;4500,7002;;")), expected);
        assert_eq!(flow(&format!("1.5;{addresses};50,17;20000;7002;;")), expected);
        let tcp = flow(&format!("1.5;{addresses};50,6;;;80;81"));
        assert_eq!(tcp.map(|(_, flow)| flow).as_deref(), Some("6 10.1.0.9:80 10.2.0.9:81"));
        assert_eq!(flow("1.5;203.0.113.10;198.51.100.7;50;;;;"), None, "not opened");
    }
}
