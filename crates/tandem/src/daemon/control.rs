//! The control loop.
//!
//! Each turn: everything that has arrived goes into the gateway; one [`Gateway::handle_turn`]; the outputs are carried
//! out in order. Nothing here waits for disk, netlink or a peer: that is for tasks, and their results come back as
//! inputs. The turn matters for the fence (ha.md): it vouches that the sockets were drained at its time.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use gateway::{Answer, Output};
use netio::clock::{Timer, boottime};
use netio::route::LinkEvent as InterfaceEvent;
use netio::wake::AsyncEvent;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, error, info, warn};
use wire::id::{EndpointId, Term};

use super::addresses::Order;
use super::answers;
use super::setup::{Parts, Place};
use crate::control_socket::{Failure, Fault, Request, Response};
use crate::hook::Change;
use crate::link::{LinkEvent, ProbeResult, SteerHead, SteerKind, StreamEnd};
use crate::routing;
use crate::worker::{WorkerCommand, WorkerEvent};

/// A planned stop hands the endpoints over first, for at most this long.
const HAND_OVER: Duration = Duration::from_millis(1_500);
/// After the hand-over, stragglers are steered for this long before the process ends.
const STRAGGLERS: Duration = Duration::from_millis(300);
/// A term file that could not be written is tried again after this.
const RESERVE_AGAIN: Duration = Duration::from_secs(1);
/// Longest IKE datagram.
const DATAGRAM: usize = 65_535;
/// Messages taken from one source in a turn, so that none starves the others or the heartbeat.
const TURN: usize = 64;
/// Reports of the workers taken in a turn: all that wait with one, in the worst case. They do not make more of them by
/// themselves.
const REPORTS: usize = 1024;

/// What tasks report.
enum Done {
    Reserved {
        endpoint: EndpointId,
        up_to: Term,
    },
    ReserveFailed {
        endpoint: EndpointId,
        up_to: Term,
        problem: String,
    },
    ReserveAgain {
        endpoint: EndpointId,
        up_to: Term,
    },
    Purged {
        ticket: u64,
        outcome: io::Result<()>,
    },
    /// An uplink's state, looked at with its routes set where it is up.
    Uplink {
        endpoint: EndpointId,
        news: u64,
        up: bool,
    },
}

/// A request that waits for its answer.
struct Waiting {
    request: Request,
    reply: oneshot::Sender<Response>,
}

struct Control {
    parts: Parts,
    done: mpsc::UnboundedSender<Done>,
    waiting: BTreeMap<u64, Waiting>,
    /// Answers that wait for the rules to be purged.
    purging: BTreeMap<u64, Answer>,
    next_ticket: u64,
    buffer: Vec<u8>,
    stopping: Option<Duration>,
    /// The term file could not be written, which was said.
    terms_stuck: bool,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Something without which the daemon cannot go on: a timer, a signal handler, the worker.
pub(super) async fn run(parts: Parts) -> Result<(), String> {
    let fail = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(fail("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail("signals"))?;
    let mut timer = Timer::new().map_err(fail("timer"))?;
    let wake = AsyncEvent::new(parts.workers.event().clone()).map_err(fail("worker"))?;
    let (done, mut results) = mpsc::unbounded_channel();
    let mut parts = parts;
    let mut link_events = parts.link_events.take();
    let mut watchdog = Watchdog::start();
    let mut control = Control {
        parts,
        done,
        waiting: BTreeMap::new(),
        purging: BTreeMap::new(),
        next_ticket: 0,
        buffer: vec![0; DATAGRAM],
        stopping: None,
        terms_stuck: false,
    };
    control.uplinks().await;
    sd_notify::notify(false, &[sd_notify::NotifyState::Ready]).map_err(fail("systemd"))?;
    loop {
        // A flood on port 500 keeps a socket readable for ever, and waiting for that is never charged to the task: give
        // the link, ARP and the control socket their turn.
        tokio::task::yield_now().await;
        // Read before the sockets are: the turn vouches that all that came until then was seen.
        let now = boottime();
        control.drain(&mut link_events, &mut results)?;
        control.parts.gateway.handle_turn(now);
        control.carry_out()?;
        if control.stopped(now) {
            break;
        }
        watchdog.ping(now);
        let mut deadline = control.parts.gateway.poll_timeout();
        if let Some(latency) = &mut control.parts.low_latency {
            let workers = &control.parts.workers;
            deadline = deadline.min(latency.look(now, || {
                let carried = workers.counters();
                carried.tun_read + carried.esp_received
            }));
        }
        if let Some(stopping) = control.stopping {
            deadline = deadline.min(stopping.max(now + Duration::from_millis(20)));
        }
        timer.set(Some(deadline)).map_err(fail("timer"))?;
        tokio::select! {
            biased;
            _ = terminate.recv() => control.stop(),
            _ = interrupt.recv() => control.stop(),
            event = next_event(&mut link_events) => control.link_event(event),
            woken = wake.wait() => woken.map_err(fail("worker"))?,
            result = timer.expired() => result.map_err(fail("timer"))?,
            () = readable(&control.parts.places) => {}
            call = control.parts.calls.recv() => if let Some(call) = call { control.request(call) },
            result = results.recv() => if let Some(result) = result { control.task_done(result) },
            news = control.parts.monitor.next() => control.interface(news),
        }
    }
    info!("tandemd stops");
    if let Some(handle) = &control.parts.link {
        let _ = handle.close_stream(true).await;
    }
    Ok(())
}

async fn next_event(events: &mut Option<mpsc::Receiver<LinkEvent>>) -> LinkEvent {
    let event = match events {
        Some(events) => events.recv().await,
        None => None,
    };
    match event {
        Some(event) => event,
        None => std::future::pending().await,
    }
}

/// Waits until some port 500 has a datagram; the turn's drain reads it.
async fn readable(places: &[Place]) {
    let waits = places.iter().map(|place| Box::pin(place.port_500.readable()));
    if places.is_empty() {
        std::future::pending::<()>().await;
    }
    let _ = futures::future::select_all(waits).await;
}

impl Control {
    /// Everything that has arrived, bounded per source.
    fn drain(
        &mut self,
        link_events: &mut Option<mpsc::Receiver<LinkEvent>>,
        results: &mut mpsc::UnboundedReceiver<Done>,
    ) -> Result<(), String> {
        if let Some(events) = link_events {
            for _ in 0..TURN {
                let Ok(event) = events.try_recv() else { break };
                self.link_event(event);
            }
        }
        // The event was cleared before, so what comes from now on wakes the loop again; what is left must.
        let mut quota = Quota::new();
        while let Some(event) = self.parts.workers.poll().map_err(|error| error.to_string())? {
            let spent = quota.take(&event);
            self.worker_event(event);
            if spent {
                self.parts.workers.event().set();
                break;
            }
        }
        for index in 0..self.parts.places.len() {
            for _ in 0..TURN {
                let Some(place) = self.parts.places.get(index) else { break };
                let Ok((len, from)) = place.port_500.try_recv_from(&mut self.buffer) else { break };
                let (endpoint, at) = (EndpointId(index as u8), place.at_500);
                if let Some(bytes) = self.buffer.get(..len) {
                    self.parts.gateway.handle_ike(boottime(), endpoint, from, at, bytes, false);
                }
            }
        }
        while let Ok(result) = results.try_recv() {
            self.task_done(result);
        }
        Ok(())
    }

    fn link_event(&mut self, event: LinkEvent) {
        let now = boottime();
        let gateway = &mut self.parts.gateway;
        match event {
            LinkEvent::Heartbeat { link, bytes } => gateway.handle_heartbeat(now, link, &bytes),
            LinkEvent::Frame(bytes) => gateway.handle_frame(now, &bytes),
            LinkEvent::StreamUp { link } => {
                debug!(link, "pair stream is up");
                gateway.handle_stream_up(now, link);
                self.renew_steering();
            }
            LinkEvent::StreamDown { link, end } => {
                debug!(link, ?end, "pair stream is down");
                gateway.handle_stream_down(now, end == StreamEnd::Goodbye);
            }
            LinkEvent::ProbeResult { link, result } => {
                let probe = match result {
                    ProbeResult::Refused => ha::Probe::Refused,
                    ProbeResult::Accepted => ha::Probe::Accepted,
                    ProbeResult::Unknown => ha::Probe::Unknown,
                };
                gateway.handle_probe_result(now, link, probe);
            }
            LinkEvent::Steered { link, datagram } => {
                self.command(WorkerCommand::Steered { link, datagram })
            }
        }
    }

    /// Workers steer under the newest keys, on the link that was heard last.
    fn renew_steering(&mut self) {
        if let Some(handle) = &self.parts.link
            && let Some(sender) = handle.steer_sender()
        {
            self.command(WorkerCommand::Steering(sender));
        }
    }

    fn steered_ike(&mut self, head: SteerHead, bytes: &[u8]) {
        let place = self.parts.places.get(usize::from(head.endpoint.0));
        let (Some(place), Some(from)) = (place, head.from) else { return };
        let to = if head.local_port == 500 { place.at_500 } else { place.at_4500 };
        self.parts.gateway.handle_ike(boottime(), head.endpoint, from, to, bytes, true);
    }

    fn worker_event(&mut self, event: WorkerEvent) {
        let now = boottime();
        match event {
            WorkerEvent::Report(report) => self.parts.gateway.handle_report(now, report),
            WorkerEvent::Steered(endpoint) => self.parts.gateway.note_steered(now, endpoint),
            WorkerEvent::SteeredIke { head, bytes } => self.steered_ike(head, &bytes),
            WorkerEvent::Stray { link, mut datagram } => {
                let handle = self.parts.link.as_ref();
                if let Some(event) =
                    handle.and_then(|link_of| link_of.take_stray(link, &mut datagram))
                {
                    self.link_event(event);
                }
            }
            WorkerEvent::Ike { endpoint, from, bytes } => {
                if let Some(place) = self.parts.places.get(usize::from(endpoint.0)) {
                    self.parts.gateway.handle_ike(
                        now,
                        endpoint,
                        from,
                        place.at_4500,
                        &bytes,
                        false,
                    );
                }
            }
        }
    }

    fn command(&mut self, command: WorkerCommand) {
        if self.parts.workers.send(command).is_err() {
            error!("a worker has ended");
        }
    }

    fn carry_out(&mut self) -> Result<(), String> {
        while let Some(output) = self.parts.gateway.poll_output() {
            match output {
                Output::Shard(command) => self.command(WorkerCommand::Shard(command)),
                Output::Ike { endpoint, from, to, bytes } => {
                    self.send_ike(endpoint, from, to, &bytes)
                }
                Output::Pair(transmit) => self.send_pair(transmit),
                Output::Fence { endpoint, valid_until } => {
                    self.parts.fences.set(endpoint, valid_until)
                }
                Output::Addresses { endpoint, present } => {
                    self.order(endpoint, Order::Present(present))
                }
                Output::Announce { endpoint } => self.order(endpoint, Order::Announce),
                Output::Reserve { endpoint, up_to } => self.reserve(endpoint, up_to),
                Output::Notify { endpoint, state, term } => {
                    if let Some(place) = self.parts.places.get(usize::from(endpoint.0)) {
                        self.parts.hook.notify(Change {
                            endpoint: place.name.clone(),
                            state,
                            term: term.0,
                        });
                    }
                }
                Output::SteerIke { endpoint, from, to, bytes } => {
                    if let Some(handle) = &self.parts.link {
                        let head = SteerHead {
                            kind: SteerKind::Ike,
                            endpoint,
                            from: Some(from),
                            local_port: to.port(),
                            back: false,
                        };
                        handle.send_steer(&head, &bytes);
                    }
                }
                Output::KeyLog(line) => self.keylog(&line),
                Output::Answer { ticket, answer } => self.answer(ticket, answer),
            }
        }
        self.parts.workers.flush().map_err(|error| error.to_string())
    }

    fn send_ike(
        &mut self,
        endpoint: EndpointId,
        from: std::net::SocketAddr,
        to: std::net::SocketAddr,
        bytes: &[u8],
    ) {
        let Some(place) = self.parts.places.get(usize::from(endpoint.0)) else { return };
        // ha.md, the fence: compared right before the system call.
        if !self.parts.fences.is_open(endpoint, boottime()) {
            debug!(endpoint = place.name, "an IKE message is withheld: the fence is closed");
            return;
        }
        let sent = if from.port() == 500 {
            place.port_500.try_send_to(bytes, to).map(drop)
        } else if bytes.len() == 1 {
            place.port_4500.send_to(bytes, to)
        } else {
            // RFC 3948 §2.2: four zero bytes where ESP has its SPI.
            let mut marked = Vec::with_capacity(bytes.len() + 4);
            marked.extend_from_slice(&[0; 4]);
            marked.extend_from_slice(bytes);
            place.port_4500.send_to(&marked, to)
        };
        if let Err(problem) = sent {
            // Lost like a packet on the wire: retransmission covers it.
            debug!(endpoint = place.name, %to, %problem, "an IKE message could not be sent");
        }
    }

    fn send_pair(&mut self, transmit: ha::Transmit) {
        let Some(handle) = &self.parts.link else { return };
        match transmit {
            ha::Transmit::Heartbeat { link, bytes } => {
                handle.send_heartbeat(link.0, &bytes);
            }
            ha::Transmit::Frame(frame) => {
                handle.send_frame(&frame);
            }
            ha::Transmit::Probe { link } => handle.probe(link.0),
            ha::Transmit::CloseStream { goodbye } => drop(handle.close_stream(goodbye)),
        }
    }

    fn order(&self, endpoint: EndpointId, order: Order) {
        if let Some(place) = self.parts.places.get(usize::from(endpoint.0)) {
            // The task lives as long as the places do.
            let _ = place.orders.send(order);
        }
    }

    fn reserve(&self, endpoint: EndpointId, up_to: Term) {
        let Some(place) = self.parts.places.get(usize::from(endpoint.0)) else { return };
        let (name, done) = (place.name.clone(), self.done.clone());
        let terms = std::sync::Arc::clone(&self.parts.terms);
        tokio::task::spawn_blocking(move || {
            let mut terms = terms.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let report = match terms.reserve(&name, up_to.0) {
                Ok(()) => Done::Reserved { endpoint, up_to },
                Err(error) => Done::ReserveFailed { endpoint, up_to, problem: error.to_string() },
            };
            let _ = done.send(report);
        });
    }

    fn task_done(&mut self, done: Done) {
        match done {
            Done::Reserved { endpoint, up_to } => {
                if std::mem::take(&mut self.terms_stuck) {
                    info!("terms can be reserved again");
                }
                self.parts.gateway.handle_reserved(boottime(), endpoint, up_to)
            }
            Done::ReserveFailed { endpoint, up_to, problem } => {
                // Once, not every second.
                if !std::mem::replace(&mut self.terms_stuck, true) {
                    error!(
                        problem,
                        "terms cannot be reserved: until they are, this instance cannot take an endpoint over; tried again every second"
                    );
                }
                let done = self.done.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RESERVE_AGAIN).await;
                    let _ = done.send(Done::ReserveAgain { endpoint, up_to });
                });
            }
            Done::ReserveAgain { endpoint, up_to } => self.reserve(endpoint, up_to),
            Done::Uplink { endpoint, news, up } => {
                let place = self.parts.places.get(usize::from(endpoint.0));
                if let Some(place) = place.filter(|place| place.uplink_news == news) {
                    info!(endpoint = place.name, interface = place.wan, up, "uplink");
                    self.parts.gateway.handle_uplink(boottime(), endpoint, up);
                }
            }
            Done::Purged { ticket, outcome } => {
                let Some(answer) = self.purging.remove(&ticket) else { return };
                if let Err(problem) = &outcome {
                    error!(%problem, "the rules against clear text could not be removed");
                }
                self.reply(ticket, answer, outcome.is_ok());
            }
        }
    }

    fn request(&mut self, call: crate::control_socket::Call) {
        let needs_another = matches!(
            call.request,
            Request::Failover { .. } | Request::Drain {} | Request::Undrain {}
        );
        if needs_another && self.parts.link.is_none() {
            let text = "this gateway is on its own: there is no other instance to hand over to";
            let failure = Failure::new(Fault::NotReady, text)
                .hint("a [pair] section and a second host make it a pair");
            let _ = call.reply.send(Response::Error(failure));
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let request = answers::request(&call.request);
        if let Request::Up { connection } = &call.request {
            // It may have been purged: the way into the tunnel stands again before the tunnel does.
            let (keeper, connection) =
                (self.parts.keeper.clone(), configured(connection).to_owned());
            tokio::spawn(async move {
                if let Err(problem) = keeper.keep(&connection, true).await {
                    error!(%problem, "the rules and routes of a connection could not be set");
                }
            });
        }
        self.waiting.insert(ticket, Waiting { request: call.request, reply: call.reply });
        self.parts.gateway.handle_request(boottime(), ticket, &request);
    }

    fn answer(&mut self, ticket: u64, answer: Answer) {
        let purge = matches!(
            self.waiting.get(&ticket),
            Some(Waiting { request: Request::Down { purge: true, .. }, .. })
        );
        if !purge || matches!(answer, Answer::Refused { .. }) {
            self.reply(ticket, answer, false);
            return;
        }
        self.purging.insert(ticket, answer);
        let connection = match self.waiting.get(&ticket).map(|waiting| &waiting.request) {
            Some(Request::Down { connection, .. }) => connection.clone(),
            _ => String::new(),
        };
        let (keeper, done) = (self.parts.keeper.clone(), self.done.clone());
        tokio::spawn(async move {
            let outcome = keeper.keep(configured(&connection), false).await;
            let _ = done.send(Done::Purged { ticket, outcome });
        });
    }

    fn reply(&mut self, ticket: u64, mut answer: Answer, purged: bool) {
        let Some(Waiting { request, reply }) = self.waiting.remove(&ticket) else { return };
        if let Answer::Status(status) = &mut answer {
            let workers = self.parts.workers.counters();
            status.counters.steered_in = workers.steered_in;
            status.counters.drops.extend(workers.drops().map(|(why, n)| (why.to_owned(), n)));
        }
        if let (Answer::Status(status), Some(handle)) = (&mut answer, &self.parts.link) {
            status
                .counters
                .pair_drops
                .extend(handle.counters().drops().map(|(why, n)| (why.to_owned(), n)));
        }
        let response =
            answers::response(&request, answer, &self.parts.local, &self.parts.peer, purged);
        // The caller may have left.
        let _ = reply.send(response);
    }

    fn keylog(&self, line: &ike::KeyLogLine) {
        let Some(folder) = &self.parts.keylog else { return };
        if let Err(problem) = super::keylog::append(folder, line) {
            warn!(%problem, "the key log cannot be written");
        }
    }

    /// The uplinks as they are at the start.
    async fn uplinks(&mut self) {
        for index in 0..self.parts.places.len() {
            let Some(name) = self.parts.places.get(index).and_then(|place| place.wan.clone())
            else {
                continue;
            };
            let up = matches!(self.parts.netlink.link(&name).await, Ok(Some(link)) if link.running);
            self.parts.gateway.handle_uplink(boottime(), EndpointId(index as u8), up);
        }
    }

    fn interface(&mut self, news: io::Result<InterfaceEvent>) {
        let changed = match news {
            Ok(InterfaceEvent::Changed(link)) => Some((link.name, link.running)),
            Ok(InterfaceEvent::Removed { name }) => Some((name, false)),
            Ok(InterfaceEvent::Lost) => {
                warn!("interface news were lost: the uplinks are looked at again");
                None
            }
            Err(problem) => {
                warn!(%problem, "interface news");
                return;
            }
        };
        for (endpoint, place) in (0_u8..).map(EndpointId).zip(&mut self.parts.places) {
            let Some(interface) = &place.wan else { continue };
            if changed.as_ref().is_some_and(|(name, _)| name != interface) {
                continue;
            }
            place.uplink_news += 1;
            match &changed {
                // At once: packets fail already.
                Some((_, false)) => {
                    info!(endpoint = place.name, interface, up = false, "uplink");
                    self.parts.gateway.handle_uplink(boottime(), endpoint, false);
                }
                Some((_, true)) | None => {
                    let (netlink, done) = (self.parts.netlink.clone(), self.done.clone());
                    let look =
                        routing::look_at_uplink(netlink, place.endpoint.clone(), interface.clone());
                    let news = place.uplink_news;
                    tokio::spawn(async move {
                        let up = look.await;
                        let _ = done.send(Done::Uplink { endpoint, news, up });
                    });
                }
            }
        }
    }

    /// A planned stop: endpoints go to the other instance first.
    fn stop(&mut self) {
        if self.stopping.is_none() {
            info!("stopping: endpoints go to the other instance, or their peers are told");
            let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
            let now = boottime();
            self.stopping = Some(now + HAND_OVER);
        }
    }

    /// Whether the time has come to end: all handed over and stragglers steered, or patience is at its end.
    fn stopped(&mut self, now: Duration) -> bool {
        let Some(deadline) = self.stopping else { return false };
        self.parts.gateway.leave(now);
        let _ = self.carry_out();
        let left = !self.parts.gateway.has_tunnels();
        let stragglers = self.parts.gateway.hands_on();
        if left && stragglers && deadline > now + STRAGGLERS {
            self.stopping = Some(now + STRAGGLERS);
            return false;
        }
        if now < deadline && (stragglers || !left) {
            return false;
        }
        self.parts.gateway.goodbye(now);
        let _ = self.carry_out();
        true
    }
}

/// What a turn may still take from the worker, which goes on filling its queues meanwhile.
struct Quota {
    reports: usize,
    messages: usize,
}

impl Quota {
    fn new() -> Self {
        Self { reports: REPORTS, messages: TURN }
    }

    /// Counts an event. True when it is the turn's last.
    fn take(&mut self, event: &WorkerEvent) -> bool {
        let left = match event {
            WorkerEvent::Report(_) | WorkerEvent::Steered(_) => &mut self.reports,
            // Anybody can send these, as fast as they are taken.
            WorkerEvent::Ike { .. }
            | WorkerEvent::SteeredIke { .. }
            | WorkerEvent::Stray { .. } => &mut self.messages,
        };
        *left = left.saturating_sub(1);
        *left == 0
    }
}

/// The name in the configuration: of a remote gateway with several addresses, `NAME#1` is the connection to the first.
fn configured(connection: &str) -> &str {
    connection.split_once('#').map_or(connection, |(name, _)| name)
}

/// systemd's watchdog: a control loop that hangs is restarted.
struct Watchdog {
    every: Option<Duration>,
    next: Duration,
}

impl Watchdog {
    fn start() -> Self {
        let mut micros = 0;
        let on = sd_notify::watchdog_enabled(false, &mut micros);
        Self { every: on.then(|| Duration::from_micros(micros / 3)), next: Duration::ZERO }
    }

    fn ping(&mut self, now: Duration) {
        if let Some(every) = self.every
            && now >= self.next
        {
            self.next = now + every;
            let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Watchdog]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // security.md 1, ha.md "The fence": no flood keeps a turn from its end, after which heartbeats leave.
    #[test]
    fn a_turn_ends_however_fast_the_worker_refills_its_queues() {
        let ike = || WorkerEvent::Ike {
            endpoint: EndpointId(0),
            from: "192.0.2.1:4500".parse().unwrap(),
            bytes: vec![0; 28],
        };
        let taken = |mut quota: Quota, flood: &dyn Fn() -> WorkerEvent| {
            (1..=100_000).find(|_| quota.take(&flood()))
        };
        assert_eq!(taken(Quota::new(), &ike), Some(TURN));
        assert_eq!(
            taken(Quota::new(), &|| WorkerEvent::Stray { link: 0, datagram: Vec::new() }),
            Some(TURN)
        );
        // And reports do not come out of what messages may take.
        let mut quota = Quota::new();
        assert!((0..TURN * 2).all(|_| !quota.take(&WorkerEvent::Steered(EndpointId(0)))));
        assert_eq!(taken(quota, &ike), Some(TURN));
        let report = || WorkerEvent::Steered(EndpointId(0));
        assert_eq!(taken(Quota::new(), &report), Some(REPORTS));
    }
}
