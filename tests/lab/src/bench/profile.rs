//! Where processor time goes while a cell is measured: samples of every processor by perf, told apart by what the gateways
//! were doing. Reading stacks costs some per cent itself, so figures are not taken from such a run.

use crate::error::Result;
use crate::proc::{Cmd, Proc};
use serde::Serialize;
use std::fmt::Write as _;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Samples a second of each processor: no multiple of what timers run at.
const RATE: u32 = 4999;
/// perf begins a little late, and must not look beyond the measured time.
const LATE: Duration = Duration::from_millis(500);
/// For reading what was recorded.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a processor was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A gateway's thread that carries packets: its cipher.
    Aead,
    /// The rest of its program.
    Program,
    /// Its reads of the TUN.
    TunRead,
    /// Its writes to the TUN,
    TunWrite,
    /// and in these the host's TCP, which the kernel runs at once.
    TunTcp,
    /// Its sends,
    Send,
    /// and in these the far host's receiving, which a veth runs at once.
    SendFar,
    /// Its receives.
    Receive,
    /// Looking for what is there, and waiting for it.
    Wait,
    /// Interrupts and all else in the kernel.
    Kernel,
    /// Tandem's control threads.
    Control,
    /// The generator at both ends.
    Clients,
    /// Everything else.
    Others,
    /// Nothing.
    Idle,
}

impl Stage {
    /// All, in the order of the table.
    pub const ALL: [Stage; 14] = [
        Stage::Aead,
        Stage::Program,
        Stage::TunRead,
        Stage::TunWrite,
        Stage::TunTcp,
        Stage::Send,
        Stage::SendFar,
        Stage::Receive,
        Stage::Wait,
        Stage::Kernel,
        Stage::Control,
        Stage::Clients,
        Stage::Others,
        Stage::Idle,
    ];

    /// What the table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Stage::Aead => "gateways: AEAD",
            Stage::Program => "gateways: other own code",
            Stage::TunRead => "gateways: TUN read",
            Stage::TunWrite => "gateways: TUN write",
            Stage::TunTcp => "  the host's TCP in it",
            Stage::Send => "gateways: UDP send",
            Stage::SendFar => "  the far host's receiving in it",
            Stage::Receive => "gateways: UDP receive",
            Stage::Wait => "gateways: poll, sleep, wake",
            Stage::Kernel => "gateways: other kernel code",
            Stage::Control => "control threads",
            Stage::Clients => "clients",
            Stage::Others => "others, perf among them",
            Stage::Idle => "idle",
        }
    }

    /// By the thread's name and its stack, innermost function first.
    fn of(thread: &str, stack: &[&str]) -> Stage {
        const GATEWAYS: [&str; 5] = ["worker-", "wireguard-go", "gotatun", "boringtun", "charon"];
        let within = |names: &[&str]| {
            stack.iter().any(|frame| names.iter().any(|name| frame.contains(name)))
        };
        match thread {
            "swapper" => return Stage::Idle,
            "tandemd" | "tokio-rt-worker" => return Stage::Control,
            "bench-probe" => return Stage::Clients,
            gateway if GATEWAYS.iter().any(|name| gateway.starts_with(name)) => {}
            _ => return Stage::Others,
        }
        if within(&["sys_write", "do_writev"]) {
            if within(&["tcp_v4_rcv", "tcp_v6_rcv"]) { Stage::TunTcp } else { Stage::TunWrite }
        } else if within(&["sys_sendm", "sys_sendto"]) {
            if within(&["netif_receive_skb"]) { Stage::SendFar } else { Stage::Send }
        } else if within(&["sys_read", "do_readv"]) {
            Stage::TunRead
        } else if within(&["sys_recvm", "sys_recvfrom"]) {
            Stage::Receive
        } else if within(&["epoll", "sched_yield", "futex", "nanosleep", "ret_from_fork"]) {
            Stage::Wait
        } else if within(&["do_syscall", "asm_", "entry_SYSCALL", "el0_svc"]) {
            Stage::Kernel
        } else {
            let own = stack.first().map(|name| name.to_ascii_lowercase()).unwrap_or_default();
            let cipher = ["gcm", "aes", "aead", "ghash", "init_iv", "chacha", "poly1305"];
            let of_cipher = cipher.iter().any(|word| own.contains(word));
            if of_cipher { Stage::Aead } else { Stage::Program }
        }
    }
}

/// Samples by stage, and what was carried meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Profile {
    samples: [u32; Stage::ALL.len()],
    /// Bytes of payload.
    bytes: f64,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Line {
    /// See [`Stage::title`].
    pub stage: &'static str,
    /// CPU-seconds for 10⁹ bytes of payload: nanoseconds a byte.
    pub cpu_s_per_gb: f64,
    /// Of all processors' time.
    pub share: f64,
}

impl AddAssign for Profile {
    fn add_assign(&mut self, other: Profile) {
        for (sum, more) in self.samples.iter_mut().zip(other.samples) {
            *sum += more;
        }
        self.bytes += other.bytes;
    }
}

impl Profile {
    /// The samples of `perf script -F comm,ip,sym`.
    fn parse(text: &str) -> Profile {
        let mut profile = Profile::default();
        for sample in text.split("\n\n") {
            let mut lines = sample.lines().filter(|line| !line.trim().is_empty());
            let Some(thread) = lines.next().map(str::trim) else { continue };
            // An address, then the function, whose name may hold spaces.
            let names = lines.filter_map(|line| Some(line.trim().split_once(' ')?.1));
            let stack: Vec<&str> = names.collect();
            let stage = Stage::of(thread, &stack);
            if let Some(count) = profile.samples.get_mut(stage as usize) {
                *count += 1;
            }
        }
        profile
    }

    /// What each stage took.
    pub fn lines(&self) -> Vec<Line> {
        let all: u32 = self.samples.iter().sum();
        let line = |(stage, count): (Stage, u32)| Line {
            stage: stage.title(),
            cpu_s_per_gb: f64::from(count) / f64::from(RATE) / (self.bytes.max(1.0) / 1e9),
            share: f64::from(count) / f64::from(all.max(1)),
        };
        Stage::ALL.into_iter().zip(self.samples).map(line).collect()
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = format!("{:<34}{:>12}{:>10}\n", "", "CPU-s a GB", "share");
        for Line { stage, cpu_s_per_gb, share } in self.lines() {
            let percent = share * 100.0;
            let _ = writeln!(text, "{stage:<34}{cpu_s_per_gb:>12.3}{percent:>8.1} %");
        }
        text
    }
}

/// perf at work.
#[derive(Debug)]
pub(super) struct Recording {
    perf: Proc,
    file: PathBuf,
    time: Duration,
}

impl Recording {
    /// Begins; it ends by itself a little before `time` is over. The samples go to `dir`.
    pub(super) fn start(dir: &Path, time: Duration) -> Result<Recording> {
        let file = dir.join("perf.data");
        let time = time.saturating_sub(LATE);
        let perf = Cmd::new("perf").args(["record", "-q", "-a", "-g", "-e", "cpu-clock", "-F"]);
        let perf = perf.arg(RATE.to_string()).arg("-o").arg(&file);
        let perf = perf.args(["--", "sleep", &format!("{:.3}", time.as_secs_f64())]);
        Ok(Recording { perf: perf.spawn(&dir.join("perf.log"))?, file, time })
    }

    /// What was found, given what was carried in all of the measured time.
    pub(super) fn finish(mut self, bytes: u64, measured: Duration) -> Result<Profile> {
        self.perf.bury(PATIENCE)?;
        let script = Cmd::new("perf").args(["script", "-F", "comm,ip,sym", "-i"]).arg(&self.file);
        let profile = Profile::parse(&script.run(PATIENCE)?);
        let part = self.time.as_secs_f64() / measured.as_secs_f64().max(1e-9);
        Ok(Profile { bytes: bytes as f64 * part, ..profile })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_apart_by_their_stacks() {
        let text = "worker-0 \n\tffffffff8205fdcc fib_validate_source\n\tffffffff81e6671f netif_receive_skb\n\
            \tffffffff81e2ffdd __x64_sys_sendmmsg\n\tffffffff821ed511 do_syscall_64\n\t 10b106 __sendmmsg\n\n\
            worker-0 \n\tffffffff81b6a534 _copy_from_iter\n\tffffffff81e2ffdd __x64_sys_sendmmsg\n\n\
            worker-1 \n\t12 tcp_v4_rcv\n\t13 do_writev\n\t14 do_syscall_64\n\n\
            worker-1 \n\t12 aws_lc_0_47_0_aes_gcm_encrypt_avx512\n\t13 esp::shard::Shard::outbound_one\n\n\
            worker-1 \n\t13 <esp::shard::Shard as Foo>::outbound one\n\n\
            worker-1 \n\t12 finish_task_switch.isra.0\n\t13 __x64_sys_epoll_wait\n\t14 do_syscall_64\n\n\
            swapper \n\tffffffff8 pv_native_safe_halt\n\nbench-probe \n\t1 _copy_to_iter\n\t2 __x64_sys_read\n\n";
        let profile = Profile { bytes: 2e9, ..Profile::parse(text) };
        let count = |stage: Stage| profile.samples[stage as usize];
        for stage in Stage::ALL {
            let there = [
                Stage::SendFar,
                Stage::Send,
                Stage::TunTcp,
                Stage::Aead,
                Stage::Program,
                Stage::Wait,
                Stage::Idle,
                Stage::Clients,
            ];
            assert_eq!(count(stage), u32::from(there.contains(&stage)), "{stage:?}");
        }
        let line = profile.lines()[0];
        assert!((line.share - 0.125).abs() < 1e-9);
        assert!((line.cpu_s_per_gb - 0.5 / f64::from(RATE)).abs() < 1e-12);
    }
}
