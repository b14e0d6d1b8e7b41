//! What happens on the pair link: heartbeats, the stream, probes, steered packets.

use crate::checks::hash;
use crate::clock::{MS, Nanos};
use crate::host::{Handed, Input, Process};
use crate::log;
use crate::network::{Item, Stream};
use crate::world::{Event, SOCKET, Steered, World};

impl World {
    /// A datagram to the other instance over one link.
    pub(crate) fn send_link(&mut self, from: usize, link: usize, event: impl Fn() -> Event) {
        if !self.net.carries(link, from) || !self.hosts[from].up {
            return;
        }
        for delay in self.net.pair.copies(&mut self.dice).into_iter().flatten() {
            self.at(self.now + delay, event());
        }
    }

    pub(crate) fn send_item(&mut self, from: usize, p: &Process, item: Item) {
        let Some(id) = p.stream else { return };
        if self.net.stream.as_ref().is_none_or(|stream| stream.id != id) {
            return;
        }
        if let Some(at) = self.net.stream_at(self.now, from, &item, &mut self.dice) {
            self.at(at, Event::Stream { to: 1 - from, id, sent: self.now, item });
        }
    }

    pub(crate) fn stream_arrives(&mut self, to: usize, id: u64, sent: Nanos, item: Item) {
        let from = 1 - to;
        if self.hosts[to].suspended {
            // TCP tries again.
            return self.at(self.now + 100 * MS, Event::Stream { to, id, sent, item });
        }
        let newest = self.net.stream.as_ref().filter(|stream| stream.id == id);
        let lost = newest.is_some_and(|stream| sent > stream.lost_after[from])
            && matches!(item, Item::Frame(_));
        let up = self.hosts[to].up;
        match self.reads(to) {
            Some(p) if p.stream == Some(id) => {
                match item {
                    Item::Frame(_) if lost => return,
                    Item::Frame(bytes) => p.inbox.push_back(Input::Frame(bytes)),
                    Item::End { goodbye } => {
                        p.stream = None;
                        p.inbox.push_back(Input::StreamDown(goodbye));
                    }
                }
                self.wake_soon(to);
            }
            // Nobody there knows it: the kernel resets it.
            _ if up => {
                let answers = newest_is(&self.net.stream, id) && self.net.carries_stream(to);
                if answers && matches!(item, Item::Frame(_)) {
                    let at = self.now + self.net.pair.delay(&mut self.dice);
                    let item = Item::End { goodbye: false };
                    self.at(at, Event::Stream { to: from, id, sent: self.now, item });
                }
            }
            _ => {}
        }
    }

    /// Something for the other instance sets out.
    pub(crate) fn steer(&mut self, host: usize, keys: u64, what: &Steered) {
        if host >= 2 {
            return;
        }
        let link = self.net.two_way().unwrap_or(0);
        if !self.net.carries(link, host) || !self.hosts[host].up {
            return;
        }
        if let Steered::Packet(packet) = what {
            self.crosses(packet);
            if log::verbose() {
                log::set_turn(self.now, host);
                let Handed { endpoint, plain, back, .. } = packet;
                let inner = crate::traffic::inner(&packet.bytes).filter(|_| *plain);
                let what = inner.map_or("ESP".into(), |inner| inner.to_string());
                let back = if *back { ", back" } else { "" };
                log::say(&format!("  steers {what} for {endpoint}{back}"));
            }
        }
        // The link refuses a second copy.
        let Some(delay) = self.net.pair.copies(&mut self.dice)[0] else { return };
        let mut at = self.now + delay;
        if self.net.pair.loss == 0 {
            at = at.max(self.net.steered_at[host] + 1);
            self.net.steered_at[host] = at;
        }
        self.at(at, Event::Steered { to: 1 - host, keys, what: what.clone() });
    }

    /// ha.md, "Switchover": steered packets are never steered again, but back, once, while an endpoint moves. Seen on
    /// inner packets, of which there is one copy of each.
    pub(crate) fn crosses(&mut self, packet: &Handed) {
        if !packet.plain {
            return;
        }
        let before = self.crossings.entry(hash(&packet.bytes)).or_default();
        *before = before.saturating_add(1);
        let times = *before;
        if times > 2 || (times == 2) != packet.back {
            let text =
                format!("a packet crossed the pair link {times} times (back: {})", packet.back);
            self.checks.violate(0, text);
        }
    }

    pub(crate) fn steered_arrives(&mut self, to: usize, keys: u64, what: Steered) {
        let Some(p) = self.reads(to).filter(|p| p.keys == keys) else { return };
        p.inbox.push_back(match what {
            Steered::Ike(endpoint, from, to, bytes) => {
                Input::Ike { endpoint, from, to, bytes, steered: true }
            }
            Steered::Packet(packet) if p.inbox.len() < 4 * SOCKET => Input::Handed(packet),
            Steered::Packet(_) => return,
        });
        self.wake_soon(to);
    }

    pub(crate) fn probed(&mut self, from: usize, life: u64, link: usize) {
        let to = 1 - from;
        let there = self.net.carries(link, from) && self.net.carries(link, to) && self.hosts[to].up;
        let open = self.hosts[to].process.is_some() || self.now < self.hosts[to].closing_until;
        let result = match (there, open) {
            (false, _) => ha::Probe::Unknown,
            (true, true) => ha::Probe::Accepted,
            (true, false) => ha::Probe::Refused,
        };
        let delay = if there { self.net.pair.delay(&mut self.dice) } else { 100 * MS };
        self.at(
            self.now + delay,
            Event::Tell { host: from, life, input: Input::Probe(link as u8, result) },
        );
    }

    pub(crate) fn connect(&mut self) {
        if !self.hosts[0].runs() || !self.hosts[1].runs() {
            return;
        }
        let (Some(left), Some(right)) = (&self.hosts[0].process, &self.hosts[1].process) else {
            return;
        };
        if left.stream.is_some() || left.stopping || right.stopping {
            return;
        }
        let lives = [left.life, right.life];
        let Some(link) = self.net.two_way() else { return };
        self.net.streams += 1;
        let id = self.net.streams;
        self.net.stream = Some(Stream {
            id,
            link,
            next_at: [self.now; 2],
            lost_after: [Nanos::MAX; 2],
            stalled: [Vec::new(), Vec::new()],
        });
        for (to, life) in lives.into_iter().enumerate() {
            let delay = self.net.pair.delay(&mut self.dice) * 2 + self.dice.us(100, 1_500);
            let at = self.now + delay;
            if let Some(stream) = &mut self.net.stream {
                // What is said arrives after the other end stands, too.
                stream.next_at[1 - to] = stream.next_at[1 - to].max(at + 1);
            }
            self.at(at, Event::StreamUp { to, life, id, link });
        }
    }

    /// A link works again: what TCP still holds is sent anew.
    pub(crate) fn thaw_stream(&mut self) {
        for from in 0..2 {
            let Some(stream) = &mut self.net.stream else { return };
            if !self.net.links.get(stream.link).is_some_and(|link| link[from]) {
                continue;
            }
            let id = stream.id;
            let waiting = std::mem::take(&mut stream.stalled[from]);
            let mut at = self.now + self.dice.ms(1, 200);
            for (sent, item) in waiting {
                at += 1_000;
                if let Some(stream) = &mut self.net.stream {
                    at = at.max(stream.next_at[from] + 1);
                    stream.next_at[from] = at;
                }
                self.at(at, Event::Stream { to: 1 - from, id, sent, item });
            }
        }
    }
}

fn newest_is(stream: &Option<Stream>, id: u64) -> bool {
    stream.as_ref().is_some_and(|stream| stream.id == id)
}
