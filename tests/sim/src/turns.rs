//! The two actors of a daemon: the control loop's turn and the worker's, as `tandem` runs them.

use wire::id::EndpointId;
use wire::natt::NON_ESP_MARKER;

use esp::{Command, Direction, Reason, Verdict};
use gateway::{Gateway, Output};

use crate::bugs::{Bug, Runtime};
use crate::checks::hash;
use crate::clock::{MS, Nanos, US};
use crate::host::{Handed, Input, Leaving, Order, Outbound, Packet, Process};
use crate::log;
use crate::network::{Datagram, Item};
use crate::pins::{Change, Tunnel};
use crate::scene::{ENDPOINTS, virtual_address};
use crate::traffic;
use crate::world::{Event, Steered, World};

/// A planned stop waits for so long for everything to be handed over, as `tandemd` does,
const HAND_OVER: Nanos = 1_500 * MS;
/// and then steers stragglers for so long.
const STRAGGLERS: Nanos = 300 * MS;
/// Room for one batch's packets of one direction.
const BATCH: usize = 32;

impl World {
    // ---- control

    pub(crate) fn control_turn(&mut self, host: usize, life: u64) {
        let paused = self.hosts[host].paused;
        let now = self.now;
        let Some(p) = self.hosts[host].process.as_deref_mut() else { return };
        if p.life != life || p.control_due != now {
            return;
        }
        p.control_due = Nanos::MAX;
        if paused {
            return;
        }
        let Some(mut p) = self.hosts[host].process.take() else { return };
        log::set_turn(now, host);
        let lives = self.turn(host, &mut p);
        if lives {
            let due = self.hosts[host].clock.when(p.gateway.poll_timeout());
            let exit = p.stopping && p.gateway.owns_nothing();
            if exit {
                p.stopping = false;
                let down = self.director.downtime();
                self.at(now + 5 * MS, Event::Exit { host, life, down });
            }
            let commands = !p.orders.is_empty();
            self.hosts[host].process = Some(p);
            let wake = self.hosts[host].wake(&mut self.dice);
            self.wake_control(host, due.max(now + US) + wake);
            if commands {
                self.wake_worker_soon(host);
            }
            if host < 2 {
                self.compare_logs(host);
            }
        } else {
            self.gone(host, &p, false);
            let down = self.director.downtime();
            self.at(
                now + down,
                Event::End(crate::faults::Fault::Crash {
                    host,
                    down,
                    outputs: None,
                    lost_file: false,
                }),
            );
        }
    }

    /// `false` if the process died meanwhile.
    fn turn(&mut self, host: usize, p: &mut Process) -> bool {
        let now = self.hosts[host].local(self.now);
        while let Some(input) = p.inbox.pop_front() {
            let g = &mut p.gateway;
            match input {
                Input::Ike { endpoint, from, to, bytes, steered } => {
                    g.handle_ike(now, id(endpoint), from, to, &bytes, steered)
                }
                Input::Heartbeat(link, bytes) => g.handle_heartbeat(now, link, &bytes),
                Input::Frame(bytes) => g.handle_frame(now, &bytes),
                Input::StreamUp(link) => g.handle_stream_up(now, link),
                Input::StreamDown(goodbye) => g.handle_stream_down(now, goodbye),
                Input::Probe(link, result) => g.handle_probe_result(now, link, result),
                Input::Uplink(endpoint, up) => g.handle_uplink(now, id(endpoint), up),
                Input::Reserved(endpoint, term) => g.handle_reserved(now, id(endpoint), term),
                Input::Report(report) => g.handle_report(now, *report),
                Input::Steered(endpoint) => g.note_steered(now, id(endpoint)),
                Input::Handed(packet) => p.orders.push_back(Order::Handed(packet)),
                Input::Request(request) => {
                    g.handle_request(now, 1, &request);
                    self.note_request(host, p, &request);
                }
                Input::Goodbye => {
                    g.goodbye(now);
                    p.stopping = true;
                }
                Input::Leave => {
                    p.leave_by.get_or_insert(self.now + HAND_OVER);
                }
            }
            if !self.carry_out(host, p) {
                return false;
            }
        }
        p.gateway.handle_turn(now);
        if !self.carry_out(host, p) {
            return false;
        }
        if let Some(deadline) = p.leave_by.filter(|_| !p.stopping) {
            p.gateway.leave(now);
            if !self.carry_out(host, p) {
                return false;
            }
            if p.gateway.owns_nothing() && deadline > self.now + STRAGGLERS {
                p.leave_by = Some(self.now + STRAGGLERS);
            } else if self.now >= deadline {
                p.gateway.goodbye(now);
                p.stopping = true;
                return self.carry_out(host, p);
            }
        }
        true
    }

    /// Carries the outputs out, in order; `false` if the process died between two of them.
    fn carry_out(&mut self, host: usize, p: &mut Process) -> bool {
        while let Some(output) = Gateway::poll_output(&mut p.gateway) {
            if let Some(left) = &mut p.dies_after {
                match left.checked_sub(1) {
                    Some(less) => *left = less,
                    None => return false,
                }
            }
            match output {
                Output::Ike { endpoint, from, to, bytes } => {
                    // ha.md, the fence: control compares it before IKE.
                    let endpoint = usize::from(endpoint.0);
                    if self.outside_fence(host, p, endpoint) {
                        continue;
                    }
                    let bytes = if from.port() == 500 || bytes.len() == 1 {
                        bytes
                    } else {
                        [&NON_ESP_MARKER[..], &bytes].concat()
                    };
                    self.send_wan(host, p, endpoint, Datagram { from, to, bytes, inner: None });
                }
                Output::SteerIke { endpoint, from, to, bytes } => {
                    let keys = p.keys;
                    let endpoint = usize::from(endpoint.0);
                    self.steer(host, keys, &Steered::Ike(endpoint, from, to, bytes));
                }
                Output::Pair(transmit) => self.pair_transmit(host, p, transmit),
                Output::Shard(command) => self.command(host, p, command),
                Output::Fence { endpoint, valid_until } => {
                    let local = self.hosts[host].local(self.now);
                    let fence = &mut p.fence[usize::from(endpoint.0)];
                    if log::verbose() && (valid_until > local) != (*fence > local) {
                        let what = if valid_until > local { "opens" } else { "closes" };
                        log::say(&format!("  fence of {endpoint} {what}"));
                    }
                    *fence = valid_until;
                }
                Output::Addresses { endpoint, present } => {
                    self.address_task(host, p, usize::from(endpoint.0), Some(present))
                }
                Output::Announce { endpoint } => {
                    self.address_task(host, p, usize::from(endpoint.0), None)
                }
                Output::Reserve { endpoint, up_to } => {
                    let delay = self.dice.us(100, 20_000);
                    let (endpoint, life) = (usize::from(endpoint.0), p.life);
                    self.at(self.now + delay, Event::Disk { host, life, endpoint, term: up_to });
                }
                Output::Answer { answer, .. } => {
                    if log::verbose() && !matches!(answer, gateway::Answer::Status(_)) {
                        log::say(&format!("  answers {answer:?}"));
                    }
                }
                Output::Notify { .. } | Output::KeyLog(_) => {}
            }
        }
        true
    }

    fn outside_fence(&self, host: usize, p: &Process, endpoint: usize) -> bool {
        self.hosts[host].local(self.now) >= self.fences(p)[endpoint]
    }

    /// The fence words as the worker and the IKE sockets read them.
    fn fences(&self, p: &Process) -> [std::time::Duration; ENDPOINTS] {
        match self.bug {
            Some(Bug::Runtime(Runtime::IgnoreFence)) => [std::time::Duration::MAX; ENDPOINTS],
            Some(Bug::Runtime(Runtime::OneFenceForAll)) => [p.fence[0].max(p.fence[1]); ENDPOINTS],
            _ => p.fence,
        }
    }

    fn address_task(
        &mut self,
        host: usize,
        p: &mut Process,
        endpoint: usize,
        present: Option<bool>,
    ) {
        p.address_due = p.address_due.max(self.now) + self.dice.us(30, 1_500);
        self.at(p.address_due, Event::Address { host, life: p.life, endpoint, present });
    }

    fn pair_transmit(&mut self, host: usize, p: &mut Process, transmit: ha::Transmit) {
        let keys = p.keys;
        match transmit {
            ha::Transmit::Heartbeat { link, bytes } => {
                let link = usize::from(link.0);
                self.send_link(host, link, || Event::Heartbeat {
                    to: 1 - host,
                    link,
                    keys,
                    bytes: bytes.clone(),
                });
            }
            ha::Transmit::Frame(bytes) => {
                self.check_ack(host, p, &bytes);
                self.send_item(host, p, Item::Frame(bytes.to_vec()));
            }
            ha::Transmit::Probe { link } => {
                let delay = self.net.pair.delay(&mut self.dice);
                let probe = Event::Probed { from: host, life: p.life, link: usize::from(link.0) };
                self.at(self.now + delay, probe);
            }
            ha::Transmit::CloseStream { goodbye } => {
                self.send_item(host, p, Item::End { goodbye });
                if p.stream.take().is_some() {
                    p.inbox.push_back(Input::StreamDown(false));
                }
            }
        }
    }

    /// ha.md, "Takeover, in order": nothing of the old term is acknowledged by a new owner.
    fn check_ack(&mut self, host: usize, p: &Process, bytes: &[u8]) {
        if let Some(term) = crate::checks::acked_term(bytes) {
            let status = p.gateway.pair().status(self.hosts[host].local(self.now)).endpoints;
            // An owner of all acknowledges nothing but what is of its own terms.
            if status.iter().all(|s| matches!(s.role, ha::Role::Owner(_)) && s.term.0 != term) {
                self.checks
                    .violate(4, format!("an owner acknowledged a record of the old term {term}"));
            }
        }
    }

    /// A command on its way to the shard: what it means is noted, then it queues.
    fn command(&mut self, host: usize, p: &mut Process, mut command: Command) {
        if let Command::HoldDirect { endpoint, until } = &command {
            p.held_until[usize::from(endpoint.0)] = *until;
        }
        if let (Some(Bug::Runtime(bug)), 0..=1) = (self.bug, host)
            && !bug.spoil(host, &mut command)
        {
            return;
        }
        match &mut command {
            Command::Install(sa) => {
                let key = hash(sa.keymat_out.expose());
                let endpoint = if host < 2 {
                    usize::from(sa.endpoint.0)
                } else {
                    self.scene.tunnel_of(host).1
                };
                let out = Outbound { key, spi_in: sa.spi_in, endpoint };
                self.keys.note(sa);
                p.outbound.insert(sa.spi_out.0, out);
                if host < 2 {
                    self.checks.ceiling(host, sa.spi_in, sa.ceiling);
                }
                // As if a burst had used up most of the first lease.
                let few = out.key % if out.key.is_multiple_of(2) { 8 } else { 200 };
                if self.scene.tight_leases && sa.next_seq == 1 && !out.key.is_multiple_of(5) {
                    sa.next_seq = esp::INITIAL_CEILING - 2 - few;
                }
            }
            Command::Own { endpoint, seq_jump, .. } if host < 2 => {
                self.checks.doubt |= *seq_jump >= 1 << 28;
                p.wishes.owns(usize::from(endpoint.0));
            }
            // This is said in a grant alone.
            Command::HoldDirect { endpoint, .. } if host < 2 => {
                self.note_grant(host, p, usize::from(endpoint.0));
            }
            Command::Lease { spi_in, ceiling } if host < 2 => {
                self.checks.ceiling(host, *spi_in, *ceiling)
            }
            _ => {}
        }
        if log::verbose()
            && !matches!(
                command,
                Command::Query { .. } | Command::Window { .. } | Command::Policies(_)
            )
        {
            log::say(&format!("  shard ← {}", brief(&command)));
        }
        p.orders.push_back(Order::Shard(command));
    }

    // ---- worker

    pub(crate) fn worker_turn(&mut self, host: usize, life: u64) {
        let now = self.now;
        let paused = self.hosts[host].paused;
        let Some(p) = self.hosts[host].process.as_deref_mut() else { return };
        if p.life != life || p.worker_due != now {
            return;
        }
        p.worker_due = Nanos::MAX;
        if paused || p.in_gap {
            return;
        }
        let Some(mut p) = self.hosts[host].process.take() else { return };
        log::set_turn(now, host);
        self.work(host, &mut p);
        if p.leaving.is_empty() {
            self.report(host, &mut p);
        }
        let report = !p.inbox.is_empty();
        let wakeup =
            p.shard.next_wakeup().map(|at| self.hosts[host].clock.when(at).max(now + 20 * US));
        let more = !p.plain.is_empty() || !p.sealed.is_empty();
        if !p.leaving.is_empty() {
            p.in_gap = true;
            // Between the decision and the system call: usually microseconds, sometimes another thread's turn.
            let gap =
                if self.hosts[host].slow { self.dice.us(5, 10_000) } else { self.dice.us(1, 40) };
            self.at(now + gap, Event::Leave { host, life });
        }
        self.hosts[host].process = Some(p);
        if report {
            self.wake_soon(host);
        }
        if more {
            self.wake_worker(host, now + 10 * US);
        }
        if let Some(at) = wakeup {
            self.wake_worker(host, at);
        }
    }

    fn work(&mut self, host: usize, p: &mut Process) {
        let local = self.hosts[host].local(self.now);
        let fences = self.fences(p);
        let mut batch = std::mem::replace(&mut self.batch, esp::Batch::new(0, 0));
        batch.clear();
        // Steered packets keep their place among the commands.
        let mut collected = None;
        while let Some(order) = p.orders.pop_front() {
            let plain = match &order {
                Order::Handed(packet) => Some(packet.plain),
                Order::Shard(_) => None,
            };
            if collected != plain || batch.is_full() {
                if let Some(plain) = collected {
                    judge(&mut p.shard, plain, local, &fences, &mut batch);
                    self.decide(host, p, &mut batch);
                    batch.clear();
                }
                collected = plain;
            }
            match order {
                Order::Handed(packet) => self.collect(&mut batch, &packet),
                Order::Shard(command) => self.apply(host, p, command),
            }
        }
        if let Some(plain) = collected {
            judge(&mut p.shard, plain, local, &fences, &mut batch);
            self.decide(host, p, &mut batch);
        }
        while p.shard.flush(local, &fences, &mut batch) > 0 {
            self.decide(host, p, &mut batch);
        }
        for plain in [true, false] {
            let packets = if plain { &mut p.plain } else { &mut p.sealed };
            if !packets.is_empty() {
                fill(&mut batch, packets);
                judge(&mut p.shard, plain, local, &fences, &mut batch);
                self.decide(host, p, &mut batch);
            }
        }
        batch.clear();
        self.batch = batch;
    }

    /// The worker tells what it knows, after its system calls.
    fn report(&mut self, host: usize, p: &mut Process) {
        let local = self.hosts[host].local(self.now);
        while let Some(report) = p.shard.poll_report(local) {
            p.inbox.push_back(Input::Report(Box::new(report)));
        }
    }

    fn apply(&mut self, host: usize, p: &mut Process, command: Command) {
        if matches!(command, Command::Hold { .. }) {
            self.burst();
        }
        let change = Change::of(&command);
        match (p.shard.apply(command), change) {
            (Ok(()), Some(change)) => {
                if let (Some((tunnel, lives)), 0..=1) = (p.view.note(self.now, change), host) {
                    self.burst();
                    if lives {
                        self.note_use(host, tunnel);
                    }
                }
            }
            // A removal overtook a lease or a window: ordinary.
            (Ok(()), None) | (Err(esp::CommandError::UnknownSa(_)), _) => {}
            (Err(error), _) => {
                self.checks.violate(0, format!("the shard refused a command: {error}"))
            }
        }
    }

    /// An instance uses a tunnel from now on: its owner does already, unless it has heard nothing of that so far.
    fn note_use(&mut self, host: usize, (peer, endpoint): Tunnel) {
        let owns = |s: ha::EndpointStatus| matches!(s.role, ha::Role::Owner(_));
        if !self.is_calm() || !self.endpoint_status(1 - host, endpoint).is_some_and(owns) {
            return;
        }
        let Some(owner) = self.hosts[1 - host].process.as_deref() else { return };
        let of = (peer, endpoint);
        if !owner.view.lives(of) && owner.view.is_steady(self.now, of) {
            let text = format!(
                "a shadow uses the tunnel of peer {peer} at endpoint {endpoint} before its owner"
            );
            self.checks.violate(6, text);
        }
    }

    /// Puts a packet of the other instance into the batch.
    fn collect(&self, batch: &mut esp::Batch, packet: &Handed) {
        let Some(slot) = batch.push() else { return };
        slot.fill(&packet.bytes);
        let steered = esp::Steered { endpoint: id(packet.endpoint), back: packet.back };
        let unmarked = self.bug == Some(Bug::Runtime(Runtime::SteeredUnmarked));
        slot.steered = (!unmarked).then_some(steered);
    }

    fn decide(&mut self, host: usize, p: &mut Process, batch: &mut esp::Batch) {
        for slot in batch.slots_mut() {
            match slot.verdict() {
                Verdict::Send { endpoint, from, to, .. } => {
                    let bytes = slot.packet().to_vec();
                    if host < 2 {
                        self.sealed(host, p, &bytes);
                    }
                    let datagram = Datagram { from, to, bytes, inner: None };
                    p.leaving.push(Leaving::Wan(usize::from(endpoint.0), datagram));
                }
                Verdict::Deliver { endpoint } => {
                    let bytes = slot.packet().to_vec();
                    p.leaving.push(Leaving::Lan(usize::from(endpoint.0), bytes));
                }
                Verdict::Steer { endpoint } => {
                    let plain = slot.direction() == Direction::Outbound;
                    let back = slot.steered.is_some();
                    let endpoint = usize::from(endpoint.0);
                    let bytes = slot.packet().to_vec();
                    p.leaving.push(Leaving::Steer(Handed { endpoint, plain, back, bytes }));
                    if !plain {
                        p.inbox.push_back(Input::Steered(endpoint));
                    }
                }
                Verdict::Drop(Reason::NoSa)
                    if self.bug == Some(Bug::Runtime(Runtime::SendInClear)) =>
                {
                    let at = |port| std::net::SocketAddr::from((virtual_address(0), port));
                    let bytes = slot.packet().to_vec();
                    let datagram = Datagram { from: at(4500), to: at(4500), bytes, inner: None };
                    p.leaving.push(Leaving::Wan(0, datagram));
                }
                Verdict::Drop(Reason::NoSa) if host < 2 => self.unsealed(p, slot.packet()),
                Verdict::Drop(Reason::Unjudged) | Verdict::Pending => {
                    self.checks.violate(0, "the shard did not decide on a packet".into());
                }
                Verdict::Drop(reason) if log::verbose() => {
                    log::say(&format!("  drops {:?}: {reason:?}", slot.direction()));
                }
                Verdict::Drop(_) | Verdict::Held | Verdict::Hand { .. } => {}
            }
        }
    }

    /// A shard of the pair sealed a packet: below its lease, and with an SA that it may use.
    fn sealed(&mut self, host: usize, p: &Process, packet: &[u8]) {
        let Some(head) = wire::esp::Header::parse(packet) else { return };
        let Some(out) = p.outbound.get(&head.spi.0) else { return };
        let seq = packet.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
        if p.synced[out.endpoint] {
            self.checks.sealed(host, out, seq);
        }
        if !p.view.uses(out.spi_in.0) {
            let text = format!("SA {} seals, and is not in use", out.spi_in);
            self.checks.violate(6, text);
        }
    }

    /// A packet found no SA: then none of its connection's tunnels lives.
    fn unsealed(&mut self, p: &Process, packet: &[u8]) {
        let flow = traffic::inner(packet).and_then(|inner| self.traffic.flows.get(inner.flow));
        let Some(flow) = flow else { return };
        let sure = p.view.sure(self.now, flow.peer);
        if let Some(lives) = sure.iter().position(|sure| *sure) {
            let text = format!("a packet found no SA, and the tunnel at endpoint {lives} lives");
            self.checks.violate(6, text);
        }
    }

    /// The worker's system calls; the fence is compared right before.
    pub(crate) fn leave(&mut self, host: usize, life: u64) {
        if self.hosts[host].paused {
            return;
        }
        let Some(mut p) = self.hosts[host].process.take() else { return };
        if p.life != life || !p.in_gap {
            self.hosts[host].process = Some(p);
            return;
        }
        p.in_gap = false;
        for leaving in std::mem::take(&mut p.leaving) {
            match leaving {
                Leaving::Steer(packet) => self.steer(host, p.keys, &Steered::Packet(packet)),
                Leaving::Wan(endpoint, _) | Leaving::Lan(endpoint, _)
                    if self.outside_fence(host, &p, endpoint) => {}
                Leaving::Wan(endpoint, datagram) => self.send_wan(host, &p, endpoint, datagram),
                Leaving::Lan(endpoint, packet) => {
                    if let (true, Some(inner)) = (log::verbose(), traffic::inner(&packet)) {
                        log::set_turn(self.now, host);
                        log::say(&format!("  delivers {inner} of {endpoint}"));
                    }
                    self.must_pass(host, &p, endpoint);
                    if let Err(why) = self.traffic.arrive(self.now, host < 2, &packet) {
                        self.checks.violate(0, why);
                    }
                }
            }
        }
        self.report(host, &mut p);
        let reported = !p.inbox.is_empty();
        let pending = !p.plain.is_empty() || !p.sealed.is_empty() || !p.orders.is_empty();
        let wakeup =
            p.shard.next_wakeup().map(|at| self.hosts[host].clock.when(at).max(self.now + 20 * US));
        self.hosts[host].process = Some(p);
        if pending {
            self.wake_worker(host, self.now + 2 * US);
        }
        if reported {
            self.wake_soon(host);
        }
        if let Some(at) = wakeup {
            self.wake_worker(host, at);
        }
    }
}

fn fill(batch: &mut esp::Batch, packets: &mut std::collections::VecDeque<Packet>) {
    batch.clear();
    for _ in 0..BATCH {
        let Some(packet) = packets.pop_front() else { break };
        let Some(slot) = batch.push() else { break };
        slot.fill(&packet.bytes);
        slot.peer = packet.peer;
    }
}

fn judge(
    shard: &mut crate::squad::Squad,
    plain: bool,
    now: std::time::Duration,
    fences: &[std::time::Duration],
    batch: &mut esp::Batch,
) {
    let way = if plain { Direction::Outbound } else { Direction::Inbound };
    shard.judge(now, fences, batch, way);
}

fn id(endpoint: usize) -> EndpointId {
    EndpointId(endpoint as u8)
}

/// A command without its keys and selectors.
fn brief(command: &Command) -> String {
    match command {
        Command::Install(sa) => {
            format!("Install {} out {} ceiling {}", sa.spi_in, sa.spi_out, sa.ceiling)
        }
        Command::Resume { term, counters } => {
            format!(
                "Resume {} term {} next {} ceiling {}",
                counters.spi_in, term.0, counters.next_seq, counters.ceiling
            )
        }
        other => format!("{other:?}"),
    }
}
