//! What `bench-probe` prints: one JSON document a line. And the head of its UDP packets.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The line of a receiver that listens.
pub const READY: &str = "ready";
/// The line of a TCP receiver whose measured time begins.
pub const BEGIN: &str = "begin";

/// What a TCP receiver took in its measured time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpCount {
    /// Payload bytes.
    pub bytes: u64,
    /// The measured time.
    pub nanos: u64,
}

/// What a UDP sender sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpSent {
    /// Packets that the kernel took.
    pub packets: u64,
    /// From the first to the last.
    pub nanos: u64,
}

/// What a UDP receiver has seen of one sender's run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UdpCount {
    /// The sender's run.
    pub run: u64,
    /// Packets.
    pub received: u64,
    /// Packets that came after one that was sent later.
    pub reordered: u64,
    /// One more than the highest number seen.
    pub next: u64,
}

impl UdpCount {
    /// Counts a packet. A later run begins anew; packets of an earlier one are late and count nowhere.
    pub fn take(&mut self, head: Head) {
        if head.run > self.run {
            *self = UdpCount { run: head.run, ..UdpCount::default() };
        }
        if head.run == self.run {
            self.received += 1;
            if head.number < self.next {
                self.reordered += 1;
            } else {
                self.next = head.number + 1;
            }
        }
    }
}

/// Round trips that a client timed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundTrips {
    /// Each that was answered.
    pub nanos: Vec<u64>,
    /// Requests without an answer.
    pub lost: u64,
}

/// The first bytes of each UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The sender's run: later ones have higher numbers.
    pub run: u64,
    /// The packet's number in it, from 0.
    pub number: u64,
}

impl Head {
    /// Its length.
    pub const LEN: usize = 16;

    /// On the wire.
    pub fn bytes(self) -> [u8; Head::LEN] {
        let mut bytes = [0; Head::LEN];
        let (run, number) = bytes.split_at_mut(8);
        run.copy_from_slice(&self.run.to_be_bytes());
        number.copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    /// From a packet, if it is long enough.
    pub fn read(packet: &[u8]) -> Option<Head> {
        let (run, rest) = packet.split_first_chunk()?;
        let (number, _) = rest.split_first_chunk()?;
        Some(Head { run: u64::from_be_bytes(*run), number: u64::from_be_bytes(*number) })
    }
}

/// Reads a line.
pub fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T> {
    serde_json::from_str(line)
        .map_err(|error| Error::parse("bench-probe's answer", format!("{error}: {line}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_comes_back_and_a_short_packet_has_none() {
        let head = Head { run: 3, number: 1 << 40 };
        let mut packet = head.bytes().to_vec();
        packet.push(9);
        assert_eq!(Head::read(&packet), Some(head));
        assert_eq!(Head::read(&packet[..15]), None);
    }

    #[test]
    fn late_packets_are_reordered_and_those_of_an_earlier_run_count_nowhere() {
        let mut count = UdpCount::default();
        for (run, number) in [(1, 0), (1, 2), (1, 1), (1, 3), (2, 5), (1, 4), (2, 6), (2, 4)] {
            count.take(Head { run, number });
        }
        assert_eq!(count, UdpCount { run: 2, received: 3, reordered: 1, next: 7 });
    }
}
