//! A host: its clock, its disk, and the process on it, which is a real gateway core (the control loop) and a real
//! shard (the worker), two actors with queues between them.
//!
//! ```text
//!   sockets ──► inbox ──► control turn ──► outputs ──► commands ──► worker turn ──► leaving ──► the wire
//!                 ▲                                                    │     a gap    │
//!                 └──────────────────── reports ◄──────────────────────┘              └ fence compared here
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use gateway::{Gateway, Request, Start};
use wire::id::{EspSpi, Term};

use crate::clock::{Clock, Nanos};
use crate::dice::{Dice, generator};
use crate::network::Datagram;
use crate::pins::View;
use crate::planned::Wishes;
use crate::scene::{ENDPOINTS, Scene, name_of};

/// What waits for the control loop.
#[derive(Debug)]
pub enum Input {
    /// An IKE message.
    Ike {
        /// Where it came to.
        endpoint: usize,
        /// The peer.
        from: SocketAddr,
        /// Our address.
        to: SocketAddr,
        /// The message.
        bytes: Vec<u8>,
        /// Over the pair link.
        steered: bool,
    },
    /// A heartbeat that the link authenticated.
    Heartbeat(u8, Vec<u8>),
    /// A frame of the stream.
    Frame(Vec<u8>),
    /// The stream stands.
    StreamUp(u8),
    /// It ended; with a goodbye or not.
    StreamDown(bool),
    /// A probe ended.
    Probe(u8, ha::Probe),
    /// An endpoint's WAN interface works, or does not.
    Uplink(usize, bool),
    /// A reservation of an endpoint is on disk.
    Reserved(usize, Term),
    /// The worker's.
    Report(Box<esp::Report>),
    /// The worker steered what came from a peer for this endpoint.
    Steered(usize),
    /// A packet from the other instance, for the worker.
    Handed(Handed),
    /// An operator's.
    Request(Request),
    /// A planned stop that does not wait until everything is handed over.
    Goodbye,
    /// A planned stop.
    Leave,
}

/// What a worker has decided and not yet done.
#[derive(Debug)]
pub enum Leaving {
    /// To the WAN, inside the fence of its endpoint.
    Wan(usize, Datagram),
    /// To the LAN, inside the fence of the endpoint it came through.
    Lan(usize, Vec<u8>),
    /// To the other instance.
    Steer(Handed),
}

/// A packet that goes over the pair link.
#[derive(Debug, Clone)]
pub struct Handed {
    /// The endpoint it belongs to.
    pub endpoint: usize,
    /// An inner packet on its way out, not an ESP packet on its way in.
    pub plain: bool,
    /// It had come from there.
    pub back: bool,
    /// As it was read.
    pub bytes: Vec<u8>,
}

/// What waits for the worker in its ordered queue.
#[derive(Debug)]
pub enum Order {
    /// For the shard.
    Shard(esp::Command),
    /// A packet from the other instance.
    Handed(Handed),
}

/// A packet that waits for the worker.
#[derive(Debug)]
pub struct Packet {
    /// As it was read.
    pub bytes: Vec<u8>,
    /// Source of the outer packet.
    pub peer: Option<SocketAddr>,
}

/// An outbound SA as its shard was told.
#[derive(Debug, Clone, Copy)]
pub struct Outbound {
    /// A hash of its key.
    pub key: u64,
    /// The inbound SPI that names it.
    pub spi_in: EspSpi,
    /// The endpoint of its tunnel, as its owner counts.
    pub endpoint: usize,
}

/// One life of a daemon.
pub struct Process {
    /// Its control plane.
    pub gateway: Gateway,
    /// Its workers' logic.
    pub shard: crate::squad::Squad,
    /// Which life of the host's daemon it is.
    pub life: u64,
    /// For the control loop.
    pub inbox: VecDeque<Input>,
    /// When the control loop's next turn is.
    pub control_due: Nanos,
    /// For the worker.
    pub orders: VecDeque<Order>,
    /// Read from the TUN.
    pub plain: VecDeque<Packet>,
    /// Read from the socket.
    pub sealed: VecDeque<Packet>,
    /// When the worker's next turn is.
    pub worker_due: Nanos,
    /// What the worker is about to do, since its last turn.
    pub leaving: Vec<Leaving>,
    /// The worker is between its decision and its system call.
    pub in_gap: bool,
    /// The fence words.
    pub fence: [Duration; ENDPOINTS],
    /// The virtual addresses that are here.
    pub present: [bool; ENDPOINTS],
    /// When the task that sets addresses and announces them is done with what it has.
    pub address_due: Nanos,
    /// The stream it knows.
    pub stream: Option<u64>,
    /// Whose keys its datagrams bear: the newest stream that stood.
    pub keys: u64,
    /// Until when direct arrivals wait for steered packets, by endpoint.
    pub held_until: [Duration; ENDPOINTS],
    /// Outbound SAs by SPI.
    pub outbound: BTreeMap<u32, Outbound>,
    /// The owner of an endpoint depends on the shadow: leases bind.
    pub synced: [bool; ENDPOINTS],
    /// The tunnels that its shard uses.
    pub view: View,
    /// What operators asked of it.
    pub wishes: Wishes,
    /// It dies after so many more outputs: a kill in the middle of a turn.
    pub dies_after: Option<u64>,
    /// It stops when it owns nothing.
    pub stopping: bool,
    /// It is to stop by then at the latest, and hands over what it owns.
    pub leave_by: Option<Nanos>,
}

/// A machine.
pub struct Host {
    /// 0 and 1 are the pair.
    pub index: usize,
    /// Its CLOCK_BOOTTIME.
    pub clock: Clock,
    /// It has power.
    pub up: bool,
    /// Nothing on it runs (SIGSTOP of the daemon, or the hypervisor).
    pub paused: bool,
    /// Paused so that what arrives meanwhile is lost (suspended).
    pub suspended: bool,
    /// The hypervisor's pause or its aftermath: the fence may be open although the other took over.
    pub stopped_until: Nanos,
    /// Its WAN interfaces work, by endpoint.
    pub wan_up: [bool; ENDPOINTS],
    /// When an interface came back last.
    pub wan_back: [Option<Nanos>; ENDPOINTS],
    /// The kernel still frees the memory of a dead daemon: its port looks open.
    pub closing_until: Nanos,
    /// Its threads wake up late.
    pub slow: bool,
    /// The term files.
    pub disk: [Option<Term>; ENDPOINTS],
    /// The daemon.
    pub process: Option<Box<Process>>,
    /// Lives so far.
    pub lives: u64,
}

impl Host {
    /// A machine that runs nothing yet.
    #[must_use]
    pub fn new(index: usize, now: Nanos, dice: &mut Dice) -> Self {
        let clock = boot_clock(now, dice);
        Self {
            index,
            clock,
            up: true,
            paused: false,
            suspended: false,
            stopped_until: 0,
            wan_up: [true; ENDPOINTS],
            wan_back: [None; ENDPOINTS],
            closing_until: 0,
            slow: false,
            disk: [None; ENDPOINTS],
            process: None,
            lives: 0,
        }
    }

    /// Whether the daemon runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.up && !self.paused && self.process.is_some()
    }

    /// What its clock shows.
    #[must_use]
    pub fn local(&self, now: Nanos) -> Duration {
        self.clock.local(now)
    }

    /// Whether what leaves now passes the fence of an endpoint.
    #[must_use]
    pub fn passes(&self, now: Nanos, endpoint: usize) -> bool {
        self.up && self.process.as_ref().is_some_and(|p| self.local(now) < p.fence[endpoint])
    }

    /// How long a thread takes to wake up.
    pub fn wake(&self, dice: &mut Dice) -> Nanos {
        if self.slow && dice.chance(50) { dice.us(1_000, 15_000) } else { dice.us(5, 60) }
    }

    /// Starts the daemon.
    ///
    /// # Errors
    /// What it refuses in its configuration.
    pub fn start(
        &mut self,
        now: Nanos,
        seed: u64,
        scene: &Scene,
        bug: Option<crate::bugs::Bug>,
    ) -> Result<(), String> {
        self.lives += 1;
        let config = match self.index {
            index @ 0..=1 => scene.instance(index as u8)?,
            index => scene.gateway(index)?,
        };
        // Streams of chance: one per host and life, far from those of the world.
        let stream = 1_000 + self.index as u64 * 1_000_000 + self.lives;
        // One to three, another number in each life.
        let workers = 1 + (Dice::new(seed, stream + 900_000).any() % 3) as u8;
        let start = Start {
            config,
            rng: Box::new(generator(seed, stream)),
            seed: Dice::new(seed, stream + 500_000).any(),
            terms: self.disk.to_vec(),
            workers,
            release: "sim".into(),
            // Neighbouring builds, in every order of upgrades and ways back.
            hold_format: Dice::new(seed, stream + 700_000).chance(400).then_some(1),
        };
        let mut gateway =
            Gateway::new(start, self.local(now)).map_err(|error| error.to_string())?;
        match bug {
            Some(crate::bugs::Bug::Pair(bug)) if self.index < 2 => gateway.set_pair_bug(bug),
            Some(crate::bugs::Bug::Gateway(bug)) if self.index < 2 => gateway.set_bug(bug),
            _ => {}
        }
        let config = esp::Config {
            endpoints: if self.index < 2 { scene.endpoints.len() } else { 1 },
            max_slots: 8192,
            queue_len: 128,
            slot_len: 512,
            ..esp::Config::default()
        };
        let mut shard = crate::squad::Squad::new(config, workers);
        if let (Some(crate::bugs::Bug::Shard(bug)), 0..=1) = (bug, self.index) {
            shard.set_bug(bug);
        }
        self.process = Some(Box::new(Process {
            gateway,
            shard,
            life: self.lives,
            inbox: VecDeque::new(),
            control_due: Nanos::MAX,
            orders: VecDeque::new(),
            plain: VecDeque::new(),
            sealed: VecDeque::new(),
            worker_due: Nanos::MAX,
            leaving: Vec::new(),
            in_gap: false,
            fence: [Duration::ZERO; ENDPOINTS],
            present: [false; ENDPOINTS],
            held_until: [Duration::ZERO; ENDPOINTS],
            address_due: now,
            stream: None,
            keys: 0,
            outbound: BTreeMap::new(),
            synced: [false; ENDPOINTS],
            view: View::default(),
            wishes: Wishes::default(),
            dies_after: None,
            stopping: false,
            leave_by: None,
        }));
        Ok(())
    }

    /// The machine was switched off and on: its clock starts anew.
    pub fn reboot(&mut self, now: Nanos, dice: &mut Dice) {
        self.up = true;
        self.paused = false;
        self.suspended = false;
        self.clock = boot_clock(now, dice);
    }
}

fn boot_clock(now: Nanos, dice: &mut Dice) -> Clock {
    let base =
        if dice.chance(500) { dice.ms(1_000, 60_000) } else { dice.ms(60_000, 1_000_000_000) };
    Clock::new(now, base, dice.between(900_000, 1_100_000))
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("life", &self.life).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("name", &name_of(self.index))
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}
