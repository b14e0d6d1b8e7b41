//! The two actors of a daemon: the control loop's turn and the worker's, as `tandem` runs them.

use wire::id::{EndpointId, Term};
use wire::natt::NON_ESP_MARKER;

use esp::{Command, Direction, Reason, Verdict};
use gateway::{Gateway, Output};

use crate::bugs::{Bug, Runtime};
use crate::checks::hash;
use crate::clock::{MS, Nanos, US};
use crate::host::{Input, Leaving, Outbound, Packet, Process};
use crate::log;
use crate::network::{Datagram, Item};
use crate::scene::VIRTUAL;
use crate::world::{Event, Steered, World};

/// The only endpoint.
pub(crate) const MAIN: EndpointId = EndpointId(0);
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
            let commands = !p.commands.is_empty();
            self.hosts[host].process = Some(p);
            let wake = self.hosts[host].wake(&mut self.dice);
            self.wake_control(host, due.max(now + US) + wake);
            if commands {
                self.wake_worker_soon(host);
            }
            if host < 2 {
                let role = self.pair_status(host).map(|status| status.role);
                if let Some(p) = &mut self.hosts[host].process {
                    p.synced = matches!(
                        role,
                        Some(ha::Role::Owner(ha::Mode::Synced) | ha::Role::Offering)
                    );
                }
                self.compare_logs();
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
                Input::Ike { from, to, bytes, steered } => {
                    g.handle_ike(now, MAIN, from, to, &bytes, steered)
                }
                Input::Heartbeat(link, bytes) => g.handle_heartbeat(now, link, &bytes),
                Input::Frame(bytes) => g.handle_frame(now, &bytes),
                Input::StreamUp(link) => g.handle_stream_up(now, link),
                Input::StreamDown(goodbye) => g.handle_stream_down(now, goodbye),
                Input::Probe(link, result) => g.handle_probe_result(now, link, result),
                Input::Uplink(up) => g.handle_uplink(now, MAIN, up),
                Input::Reserved(term) => g.handle_reserved(now, MAIN, term),
                Input::Report(report) => g.handle_report(now, *report),
                Input::Steered => g.note_steered(now, MAIN),
                Input::Request(request) => g.handle_request(now, 1, &request),
                Input::Goodbye => {
                    g.goodbye(now);
                    p.stopping = true;
                }
            }
            if !self.carry_out(host, p) {
                return false;
            }
        }
        p.gateway.handle_turn(now);
        self.carry_out(host, p)
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
                Output::Ike { endpoint: _, from, to, bytes } => {
                    // ha.md, the fence: control compares it before IKE.
                    if self.outside_fence(host, p) {
                        continue;
                    }
                    let bytes = if from.port() == 500 || bytes.len() == 1 {
                        bytes
                    } else {
                        [&NON_ESP_MARKER[..], &bytes].concat()
                    };
                    self.send_wan(host, p, Datagram { from, to, bytes });
                }
                Output::SteerIke { endpoint: _, from, to, bytes } => {
                    let keys = p.keys;
                    self.steer(host, keys, &Steered::Ike(from, to, bytes));
                }
                Output::Pair(transmit) => self.pair_transmit(host, p, transmit),
                Output::Shard(command) => self.command(host, p, command),
                Output::Fence { endpoint: _, valid_until } => {
                    let local = self.hosts[host].local(self.now);
                    if log::verbose() && (valid_until > local) != (p.fence > local) {
                        log::say(if valid_until > local {
                            "  fence opens"
                        } else {
                            "  fence closes"
                        });
                    }
                    p.fence = valid_until;
                }
                Output::Addresses { endpoint: _, present } => {
                    self.address_task(host, p, Some(present))
                }
                Output::Announce { endpoint: _ } => self.address_task(host, p, None),
                Output::Reserve { endpoint: _, up_to } => {
                    let delay = self.dice.us(100, 20_000);
                    self.at(self.now + delay, Event::Disk { host, life: p.life, term: up_to });
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

    fn outside_fence(&self, host: usize, p: &Process) -> bool {
        self.hosts[host].local(self.now) >= p.fence
            && self.bug != Some(Bug::Runtime(Runtime::IgnoreFence))
    }

    fn address_task(&mut self, host: usize, p: &mut Process, present: Option<bool>) {
        p.address_due = p.address_due.max(self.now) + self.dice.us(30, 1_500);
        self.at(p.address_due, Event::Address { host, life: p.life, present });
    }

    fn steer(&mut self, host: usize, keys: u64, what: &Steered) {
        if host >= 2 {
            return;
        }
        let link = (0..self.scene.links)
            .find(|link| self.net.links[*link].iter().all(|up| *up))
            .unwrap_or(0);
        self.send_link(host, link, || Event::Steered { to: 1 - host, keys, what: what.clone() });
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
            let status = p.gateway.pair().status(self.hosts[host].local(self.now));
            let owned = status.endpoints.first().filter(|s| matches!(s.role, ha::Role::Owner(_)));
            if owned.is_some_and(|owned| owned.term.0 != term) {
                self.checks
                    .violate(4, format!("an owner acknowledged a record of the old term {term}"));
            }
        }
    }

    /// A command on its way to the shard: what it means is noted, then it queues.
    fn command(&mut self, host: usize, p: &mut Process, mut command: Command) {
        if self.bug == Some(Bug::Runtime(Runtime::TermNotInIv)) && host < 2 {
            match &mut command {
                Command::Own { term, .. } => *term = Term(2),
                // Keys know their first term, and none gives an IV in a term before that.
                Command::Install(sa) => sa.born = Term(2),
                _ => {}
            }
        }
        match &mut command {
            Command::Install(sa) => {
                let out = Outbound { key: hash(sa.keymat_out.expose()), spi_in: sa.spi_in };
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
            Command::Own { seq_jump, .. } if host < 2 && *seq_jump >= 1 << 28 => {
                self.checks.doubt = true;
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
        p.commands.push_back(command);
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
        while let Some(command) = p.commands.pop_front() {
            if let Command::Own { term, .. } = &command {
                p.term = *term;
            }
            if let Err(error) = p.shard.apply(command) {
                match error {
                    // A removal overtook a lease or a window: ordinary.
                    esp::CommandError::UnknownSa(_) => {}
                    error => {
                        self.checks.violate(0, format!("the shard refused a command: {error}"))
                    }
                }
            }
        }
        let open = self.bug == Some(Bug::Runtime(Runtime::IgnoreFence));
        let fences = [if open { std::time::Duration::MAX } else { p.fence }];
        let mut batch = std::mem::replace(&mut self.batch, esp::Batch::new(0, 0));
        while p.shard.flush(local, &fences, &mut batch) > 0 {
            self.decide(host, p, &mut batch);
        }
        if !p.plain.is_empty() {
            fill(&mut batch, &mut p.plain);
            p.shard.outbound(local, &fences, &mut batch);
            self.decide(host, p, &mut batch);
        }
        if !p.sealed.is_empty() {
            fill(&mut batch, &mut p.sealed);
            p.shard.inbound(local, &fences, &mut batch);
            self.decide(host, p, &mut batch);
        }
        batch.clear();
        self.batch = batch;
        while let Some(report) = p.shard.poll_report(local) {
            p.inbox.push_back(Input::Report(Box::new(report)));
        }
    }

    fn decide(&mut self, host: usize, p: &mut Process, batch: &mut esp::Batch) {
        for slot in batch.slots_mut() {
            match slot.verdict() {
                Verdict::Send { from, to, .. } => {
                    let bytes = slot.packet().to_vec();
                    if host < 2
                        && p.synced
                        && let Some(head) = wire::esp::Header::parse(&bytes)
                        && let Some(out) = p.outbound.get(&head.spi.0)
                    {
                        let seq = bytes
                            .get(4..8)
                            .and_then(|b| b.try_into().ok())
                            .map_or(0, u32::from_be_bytes);
                        self.checks.sealed(host, out.spi_in, out.key, seq);
                    }
                    p.leaving.push(Leaving::Wan(Datagram { from, to, bytes }));
                }
                Verdict::Deliver { .. } => p.leaving.push(Leaving::Lan(slot.packet().to_vec())),
                Verdict::Steer { .. } => {
                    let plain = slot.direction() == Direction::Outbound;
                    let back = slot.steered.is_some();
                    p.leaving.push(Leaving::Steer { plain, back, bytes: slot.packet().to_vec() });
                    p.inbox.push_back(Input::Steered);
                }
                Verdict::Drop(Reason::NoSa)
                    if self.bug == Some(Bug::Runtime(Runtime::SendInClear)) =>
                {
                    let at = |port| std::net::SocketAddr::from((VIRTUAL, port));
                    let datagram =
                        Datagram { from: at(4500), to: at(4500), bytes: slot.packet().to_vec() };
                    p.leaving.push(Leaving::Wan(datagram));
                }
                Verdict::Drop(Reason::Unjudged) | Verdict::Pending => {
                    self.checks.violate(0, "the shard did not decide on a packet".into());
                }
                Verdict::Drop(reason) if log::verbose() => {
                    log::say(&format!("  drops {:?}: {reason:?}", slot.direction()));
                }
                Verdict::Drop(_) | Verdict::Held => {}
            }
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
        let outside = self.outside_fence(host, &p);
        for leaving in std::mem::take(&mut p.leaving) {
            match leaving {
                Leaving::Steer { plain, back, bytes } => {
                    let what = match plain {
                        true => Steered::Plain(bytes, back),
                        false => Steered::Esp(bytes, back),
                    };
                    self.steer(host, p.keys, &what);
                }
                _ if outside => {}
                Leaving::Wan(datagram) => self.send_wan(host, &p, datagram),
                Leaving::Lan(packet) => {
                    self.must_pass(host, &p);
                    if let Err(why) = self.traffic.arrive(self.now, host < 2, &packet) {
                        self.checks.violate(0, why);
                    }
                }
            }
        }
        let pending = !p.plain.is_empty() || !p.sealed.is_empty() || !p.commands.is_empty();
        let wakeup =
            p.shard.next_wakeup().map(|at| self.hosts[host].clock.when(at).max(self.now + 20 * US));
        self.hosts[host].process = Some(p);
        if pending {
            self.wake_worker(host, self.now + 2 * US);
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
        slot.steered = packet.steered;
        slot.peer = packet.peer;
    }
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
