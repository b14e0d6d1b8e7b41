//! What happens on the WAN and behind it: datagrams on the wire, addresses and neighbours, inner packets that set out.

use crate::checks::{Kind, esp_of};
use crate::clock::{MS, US};
use crate::host::{Host, Input, Packet, Process};
use crate::log;
use crate::network::Datagram;
use crate::pins::Pinned;
use crate::scene::{endpoint_at, peer_of};
use crate::world::{Event, SOCKET, World};
use wire::natt;

impl World {
    /// A datagram leaves a host from one of its endpoints: everything on the wire passes here.
    pub(crate) fn send_wan(
        &mut self,
        host: usize,
        p: &Process,
        endpoint: usize,
        mut datagram: Datagram,
    ) {
        self.must_pass(host, p, endpoint);
        let tunnel = if host < 2 { endpoint } else { self.scene.tunnel_of(host).1 };
        let kind = self
            .checks
            .wan(self.now, &datagram, tunnel, |spi| p.outbound.get(&spi).map(|out| out.key));
        match kind {
            Kind::Esp => self.look_inside(host, p, &mut datagram),
            Kind::Ike(exchange, id, response) if log::verbose() => {
                log::set_turn(self.now, host);
                let spi = datagram.bytes.get(4..12).unwrap_or_default();
                let what = if response { "response" } else { "request" };
                log::say(&format!("  IKE {exchange} {what} {id} ({spi:02x?}) to {}", datagram.to));
            }
            Kind::Ike(..) | Kind::Keepalive => {}
        }
        if !self.hosts[host].wan_up[endpoint] {
            return;
        }
        for delay in self.net.wan.copies(&mut self.dice).into_iter().flatten() {
            self.at(self.now + delay, Event::Wan(datagram.clone()));
        }
    }

    /// Opens an ESP packet on the wire. What leaves the pair must keep to its flow's tunnel.
    pub(crate) fn look_inside(&mut self, host: usize, p: &Process, datagram: &mut Datagram) {
        let Some(packet) = esp_of(datagram) else { return };
        let out = wire::esp::Header::parse(packet).and_then(|head| p.outbound.get(&head.spi.0));
        let Some(out) = out else { return };
        datagram.inner = self.keys.open(out.key, packet);
        let Some(inner) = datagram.inner.filter(|_| host < 2) else { return };
        let Some(flow) = self.traffic.flows.get_mut(inner.flow) else { return };
        if log::verbose() {
            log::set_turn(self.now, host);
            log::say(&format!("  sends {inner} through {}", out.endpoint));
        }
        let mut sure = p.view.sure(self.now, flow.peer);
        let entry = flow.entry_of(inner.number).filter(|entry| *entry != host);
        if let Some(entry) = entry {
            let view = self.hosts[entry].process.as_deref().map(|p| &p.view);
            for (n, sure) in sure.iter_mut().enumerate() {
                *sure &= view.is_some_and(|view| view.is_sure(self.now, (flow.peer, n)));
            }
        }
        let left = flow.leaves(inner.number, Pinned { endpoint: out.endpoint, sure });
        if let Err(why) = left
            && !self.is_stopped()
        {
            self.checks.violate(6, why);
        }
    }

    /// Whoever sends for an endpoint of the pair, or delivers, passes its fence.
    pub(crate) fn must_pass(&mut self, host: usize, p: &Process, endpoint: usize) {
        if host < 2 && self.hosts[host].local(self.now) >= p.fence[endpoint] {
            self.checks.violate(3, "something left outside the fence".into());
        } else if host < 2 && self.hosts[1 - host].passes(self.now, endpoint) {
            self.overlap(endpoint);
        }
    }

    pub(crate) fn wan_arrives(&mut self, datagram: Datagram) {
        let (to, endpoint) = match (endpoint_at(datagram.to.ip()), endpoint_at(datagram.from.ip()))
        {
            (Some(endpoint), _) => (self.net.switch[endpoint], endpoint),
            (None, Some(endpoint)) => {
                let peer = peer_of(datagram.to.ip(), self.scene.peers);
                (peer.map(|peer| self.scene.far_end(peer, endpoint)), 0)
            }
            (None, None) => return,
        };
        let Some(to) = to.filter(|to| self.hosts[*to].wan_up[endpoint]) else { return };
        if let (Some(inner), 0..=1) = (datagram.inner, to)
            && let Some(flow) = self.traffic.flows.get_mut(inner.flow)
        {
            flow.reaches(inner.number);
        }
        let Some(p) = self.reads(to).filter(|p| p.present[endpoint]) else { return };
        let ike = if datagram.to.port() == 500 {
            datagram.bytes.as_slice()
        } else {
            match natt::classify(&datagram.bytes) {
                natt::Datagram::Ike(ike) => ike,
                natt::Datagram::Esp(_) => {
                    if p.sealed.len() < SOCKET {
                        let peer = Some(datagram.from);
                        p.sealed.push_back(Packet { bytes: datagram.bytes, peer });
                        self.wake_worker_soon(to);
                    }
                    return;
                }
                natt::Datagram::Keepalive | natt::Datagram::Short => return,
            }
        };
        if p.inbox.len() < 4 * SOCKET {
            let bytes = ike.to_vec();
            p.inbox.push_back(Input::Ike {
                endpoint,
                from: datagram.from,
                to: datagram.to,
                bytes,
                steered: false,
            });
            self.wake_soon(to);
        }
    }

    pub(crate) fn address(
        &mut self,
        host: usize,
        life: u64,
        endpoint: usize,
        present: Option<bool>,
    ) {
        let open = self.hosts[host].passes(self.now, endpoint);
        if self.hosts[host].paused {
            let again = Event::Address { host, life, endpoint, present };
            return self.at(self.now + 5 * MS, again);
        }
        let Some(p) = self.reads(host).filter(|p| p.life == life) else { return };
        match present {
            Some(present) => p.present[endpoint] = present,
            // The fence is compared before ARP leaves, too.
            None if host < 2
                && open
                && self.hosts[host].wan_up[endpoint]
                && !self.dice.chance(self.net.deaf) =>
            {
                let before = self.net.switch[endpoint].replace(host);
                if before != Some(host) {
                    self.note_switched(host, endpoint);
                }
            }
            None => {}
        }
    }

    /// Neighbours send to another instance from now on. Direct arrivals wait there for steered packets, but not for ever:
    /// where neighbours learn of it so late that what they sent before may still be under way then, order is not kept.
    pub(crate) fn note_switched(&mut self, host: usize, endpoint: usize) {
        let steering = self.net.pair.delay + self.net.pair.jitter + 500 * US;
        let then = self.hosts[host].local(self.now + steering);
        let held = self.hosts[host].process.as_ref().map(|p| p.held_until[endpoint]);
        self.director.unordered |= held.is_none_or(|held| then >= held);
        for flow in &mut self.traffic.flows {
            flow.next_hop_moves(endpoint);
        }
    }

    /// Neighbours whose entry does not answer ask everybody.
    pub(crate) fn ask(&mut self) {
        for endpoint in 0..self.scene.endpoints.len() {
            let answers = |host: &Host| {
                host.runs()
                    && host.wan_up[endpoint]
                    && host.passes(self.now, endpoint)
                    && host.process.as_ref().is_some_and(|p| p.present[endpoint])
            };
            if self.net.switch[endpoint].is_some_and(|host| answers(&self.hosts[host])) {
                self.net.unanswered[endpoint] = 0;
                continue;
            }
            // An entry is given up after several questions without an answer.
            self.net.unanswered[endpoint] += 1;
            if self.net.switch[endpoint].is_none() || self.net.unanswered[endpoint] >= 3 {
                self.net.switch[endpoint] = (0..2).find(|host| answers(&self.hosts[*host]));
            }
        }
    }

    pub(crate) fn traffic_tick(&mut self) {
        let several = self.scene.endpoints.len() > 1;
        for flow in 0..self.traffic.flows.len() {
            let f = &mut self.traffic.flows[flow];
            if several && f.outward && self.dice.chance(10) {
                // Its host, or a router there, takes the other next hop from now on.
                f.via = 1 - f.via;
                f.rests_until = self.now + 3 * MS;
            }
            if self.now < f.rests_until {
                continue;
            }
            let (to, place) = if f.outward {
                (self.net.switch[f.via], f.via)
            } else {
                (Some(self.scene.far_end(f.peer, f.via)), 0)
            };
            // About as many packets in all, however many flows.
            let (low, high) = if several { (0, 2) } else { (1, 2) };
            for _ in 0..self.dice.between(low, high) {
                let Some(bytes) = self.traffic.packet(flow) else { continue };
                let Some(to) = to else { continue };
                let reads = |p: &&mut Process| p.present[place] && p.plain.len() < SOCKET;
                if let Some(p) = self.reads(to).filter(reads) {
                    p.plain.push_back(Packet { bytes, peer: None });
                    if to < 2 {
                        self.traffic.flows[flow].enters_at(to);
                    }
                    self.wake_worker_soon(to);
                }
            }
        }
    }

    /// Packets set out now and every moment for a few milliseconds.
    pub(crate) fn burst(&mut self) {
        let mut at = self.now;
        for _ in 0..12 {
            self.at(at, Event::Burst);
            at += self.dice.us(20, 400);
        }
    }
}
