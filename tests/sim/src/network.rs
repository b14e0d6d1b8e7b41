//! The pair links, the WAN and the switch in front of the virtual addresses.
//!
//! ```text
//!   left ══ link 0, 1 (datagrams; one stream) ══ right
//!     └──────────── switch ─────────────┘
//!                     │ to whoever announced an address last
//!                    WAN ── peers
//! ```

use std::net::SocketAddr;

use crate::clock::{Nanos, US};
use crate::dice::Dice;
use crate::scene::ENDPOINTS;
use crate::traffic::Inner;

/// A UDP datagram on the WAN.
#[derive(Debug, Clone)]
pub struct Datagram {
    /// Source address and port.
    pub from: SocketAddr,
    /// Destination address and port.
    pub to: SocketAddr,
    /// UDP payload.
    pub bytes: Vec<u8>,
    /// Which inner packet is inside, as far as it was opened.
    pub inner: Option<Inner>,
}

/// How a medium treats datagrams.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Lost, in a thousand.
    pub loss: u64,
    /// Delivered twice, in a thousand.
    pub duplicate: u64,
    /// Shortest delay.
    pub delay: Nanos,
    /// Added at random, so that datagrams overtake each other.
    pub jitter: Nanos,
}

impl Weather {
    /// When each copy of a datagram that is sent now arrives.
    pub fn copies(&self, dice: &mut Dice) -> [Option<Nanos>; 2] {
        let first = (!dice.chance(self.loss)).then(|| self.delay(dice));
        let second = dice.chance(self.duplicate).then(|| self.delay(dice));
        [first, second]
    }

    /// One delay.
    pub fn delay(&self, dice: &mut Dice) -> Nanos {
        self.delay + dice.below(self.jitter + 1)
    }
}

/// What travels on the stream.
#[derive(Debug, Clone)]
pub enum Item {
    /// A frame.
    Frame(Vec<u8>),
    /// The end, on purpose or not.
    End {
        /// With a goodbye before it.
        goodbye: bool,
    },
}

/// The stream between the instances, as far as the network knows it.
#[derive(Debug)]
pub struct Stream {
    /// Number of the stream.
    pub id: u64,
    /// Over which link.
    pub link: usize,
    /// By sender: nothing arrives before this, so that order is kept.
    pub next_at: [Nanos; 2],
    /// By sender: what was sent after this is lost (a reset).
    pub lost_after: [Nanos; 2],
    /// By sender: what waits for the link to work again.
    pub stalled: [Vec<(Nanos, Item)>; 2],
}

/// Everything between hosts.
#[derive(Debug)]
pub struct Network {
    /// By link and sender: whether it carries anything.
    pub links: Vec<[bool; 2]>,
    /// Datagrams between the instances.
    pub pair: Weather,
    /// Datagrams between the pair and its peers.
    pub wan: Weather,
    /// Added to every frame, by sender: a slow shadow.
    pub lag: [Nanos; 2],
    /// The newest stream.
    pub stream: Option<Stream>,
    /// Streams so far.
    pub streams: u64,
    /// By endpoint: which instance gets what is sent to its virtual address.
    pub switch: [Option<usize>; ENDPOINTS],
    /// Questions about it without an answer, in a row.
    pub unanswered: [u32; ENDPOINTS],
    /// By sender: nothing that is steered arrives before this. A link without loss keeps the order.
    pub steered_at: [Nanos; 2],
    /// Announcements that the switch misses, in a thousand.
    pub deaf: u64,
}

impl Network {
    /// Everything works; how well, the dice say.
    #[must_use]
    pub fn draw(dice: &mut Dice, links: usize) -> Self {
        let lossy = dice.chance(400);
        let pair = Weather {
            loss: if lossy { dice.below(20) } else { 0 },
            duplicate: if lossy { dice.below(20) } else { 0 },
            delay: dice.us(20, 300),
            jitter: dice.us(10, 400),
        };
        let wan = Weather {
            loss: if dice.chance(400) { dice.below(20) } else { 0 },
            duplicate: if dice.chance(400) { dice.below(20) } else { 0 },
            delay: dice.us(100, 10_000),
            jitter: dice.us(10, 2_000),
        };
        Self {
            links: vec![[true; 2]; links],
            pair,
            wan,
            lag: [0; 2],
            stream: None,
            streams: 0,
            switch: [None; ENDPOINTS],
            unanswered: [0; ENDPOINTS],
            steered_at: [0; 2],
            deaf: if dice.chance(300) { 300 } else { 0 },
        }
    }

    /// Whether a link carries datagrams of a sender.
    #[must_use]
    pub fn carries(&self, link: usize, from: usize) -> bool {
        self.links.get(link).and_then(|link| link.get(from)).copied().unwrap_or(false)
    }

    /// The first link that works both ways.
    #[must_use]
    pub fn two_way(&self) -> Option<usize> {
        self.links.iter().position(|link| link.iter().all(|up| *up))
    }

    /// Nothing passes between the instances, in either direction.
    #[must_use]
    pub fn partitioned(&self) -> bool {
        self.links.iter().flatten().all(|up| !up)
    }

    /// When an item that is sent now on the newest stream arrives; `None` if it waits for the link.
    pub fn stream_at(
        &mut self,
        now: Nanos,
        from: usize,
        item: &Item,
        dice: &mut Dice,
    ) -> Option<Nanos> {
        let delay = self.pair.delay(dice) + self.lag.get(from).copied().unwrap_or(0);
        let stream = self.stream.as_mut()?;
        let carries =
            self.links.get(stream.link).and_then(|link| link.get(from)).copied().unwrap_or(false);
        let waits = stream.stalled.get_mut(from)?;
        if !carries || !waits.is_empty() {
            waits.push((now, item.clone()));
            return None;
        }
        let next = stream.next_at.get_mut(from)?;
        *next = (now + delay).max(*next + US);
        Some(*next)
    }
}

impl Network {
    /// Whether the newest stream's link carries what this instance sends.
    #[must_use]
    pub fn carries_stream(&self, from: usize) -> bool {
        self.stream.as_ref().is_some_and(|stream| self.carries(stream.link, from))
    }
}
