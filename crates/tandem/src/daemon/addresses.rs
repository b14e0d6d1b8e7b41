//! The virtual addresses of one endpoint: on the TUN, in neighbours' caches, and nowhere else.
//!
//! One task an endpoint. It carries out address changes and announcements in the order in which the gateway decided
//! them, and answers ARP and neighbour solicitations in between, only while the endpoint's fence is open: a stopped
//! process answers nothing, and a process that wakes up behind its fence answers nothing either.
//!
//! A change that the kernel refuses is tried again, at growing pauses, until it holds or the next order replaces it.

use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use gateway::config::Endpoint;
use netio::arp::{Responder, Served};
use netio::clock::boottime;
use netio::route::Netlink;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};
use wire::id::EndpointId;

use super::fences::Fences;

/// The first pause before a refused change is tried again; each later one is twice as long …
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A change that has not been carried out in full.
struct Pending {
    present: bool,
    left: Vec<IpAddr>,
    tries: u32,
    pause: Duration,
    again: Instant,
}

/// What the gateway decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The addresses are, or are not, on the TUN.
    Present(bool),
    /// Tell the neighbours.
    Announce,
}

/// Where one endpoint's addresses live.
pub(super) struct Addresses {
    endpoint: EndpointId,
    name: String,
    addresses: Vec<IpAddr>,
    tun: u32,
    netlink: Netlink,
    fences: Fences,
    responders: Vec<Responder>,
    pending: Option<Pending>,
}

impl Addresses {
    /// Opens the packet sockets.
    ///
    /// # Errors
    /// An interface is missing; the text names it.
    pub(super) fn open(
        endpoint: &Endpoint,
        local: u8,
        tun: u32,
        netlink: Netlink,
        fences: Fences,
    ) -> Result<Self, String> {
        let here = usize::from(local);
        let wan = endpoint
            .wan
            .interface
            .get(here)
            .cloned()
            .flatten()
            .map(|name| (name, endpoint.wan.address));
        let lan = endpoint.lan.iter().flat_map(|lan| {
            let interface = lan.interface.get(here).cloned().flatten();
            lan.addresses.iter().filter_map(move |address| Some((interface.clone()?, *address)))
        });
        let mut responders = Vec::new();
        for (interface, address) in wan.into_iter().chain(lan) {
            match Responder::open(&interface, address) {
                Ok(responder) => responders.push(responder),
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    debug!(interface, "not Ethernet: no neighbour asks for {address} there");
                }
                Err(error) => {
                    return Err(format!(
                        "cannot answer for {address} on interface {interface:?}: {error}; does the interface exist, and does this process have CAP_NET_RAW?"
                    ));
                }
            }
        }
        let mut addresses = vec![endpoint.wan.address];
        addresses.extend(endpoint.lan.iter().flat_map(|lan| &lan.addresses));
        Ok(Self {
            endpoint: endpoint.id,
            name: endpoint.name.clone(),
            addresses,
            tun,
            netlink,
            fences,
            responders,
            pending: None,
        })
    }

    /// Runs until the gateway is gone.
    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            let again = self.pending.as_ref().map(|pending| pending.again);
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Present(present)) => self.place(present).await,
                    Some(Order::Announce) => self.announce(),
                    None => return,
                },
                () = until(again) => self.place_again().await,
                served = serve(&mut self.responders, &self.fences, self.endpoint) => {
                    let (index, served) = served;
                    self.note(index, served).await;
                }
            }
        }
    }

    /// A new order; what was left of the last one no longer counts.
    async fn place(&mut self, present: bool) {
        self.pending = None;
        let left = self.addresses.clone();
        self.change(Pending { present, left, tries: 0, pause: FIRST_PAUSE, again: Instant::now() })
            .await;
    }

    async fn place_again(&mut self) {
        let Some(pending) = self.pending.take() else { return };
        self.change(pending).await;
        // What was announced meanwhile led to nobody. (Announcing is for open fences alone: it checks.)
        if self.pending.is_none() {
            self.announce();
        }
    }

    async fn change(&mut self, mut change: Pending) {
        let present = change.present;
        let mut refused = Vec::new();
        for address in change.left {
            let outcome = match present {
                true => self.netlink.add_address(self.tun, address).await,
                false => self.netlink.remove_address(self.tun, address).await,
            };
            match outcome {
                Ok(()) => {
                    info!(endpoint = self.name, %address, present, tries = change.tries + 1, "virtual address")
                }
                Err(problem) => {
                    // One line for each address: the first time.
                    if change.tries == 0 {
                        error!(endpoint = self.name, %address, present, %problem, "virtual address could not be changed; it is tried again until that works");
                    } else {
                        debug!(endpoint = self.name, %address, present, %problem, tries = change.tries + 1, "virtual address");
                    }
                    refused.push(address);
                }
            }
        }
        if refused.is_empty() {
            return;
        }
        change.left = refused;
        change.tries = change.tries.saturating_add(1);
        change.again = Instant::now() + change.pause;
        change.pause = (change.pause * 2).min(LONGEST_PAUSE);
        self.pending = Some(change);
    }

    fn is_open(&self) -> bool {
        self.fences.is_open(self.endpoint, boottime())
    }

    fn announce(&mut self) {
        for responder in &mut self.responders {
            if !self.fences.is_open(self.endpoint, boottime()) {
                return;
            }
            if let Err(error) = responder.announce() {
                warn!(endpoint = self.name, interface = responder.interface(), %error, "could not announce the address");
            }
        }
    }

    async fn note(&mut self, index: usize, served: io::Result<Served>) {
        let ours = self.is_open();
        let Some(responder) = self.responders.get_mut(index) else { return };
        match served {
            Ok(Served { conflict: Some(mac), .. }) if ours => {
                debug!(
                    endpoint = self.name,
                    interface = responder.interface(),
                    ?mac,
                    "somebody else claims the address"
                );
            }
            Ok(_) => {}
            Err(error) => {
                warn!(endpoint = self.name, interface = responder.interface(), %error, "ARP socket lost, opening it again");
                if responder.reopen().is_err() {
                    // The interface is gone; the uplink monitor reports that. Do not spin until it is back.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}

/// Waits for a time, or for ever.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}

/// The first responder that has served something.
async fn serve(
    responders: &mut [Responder],
    fences: &Fences,
    endpoint: EndpointId,
) -> (usize, io::Result<Served>) {
    let may_answer = || fences.is_open(endpoint, boottime());
    if responders.is_empty() {
        return pending().await;
    }
    // Boxed because `serve` is not `Unpin`; ARP is no path of many packets.
    let all = responders.iter_mut().map(|responder| Box::pin(responder.serve(may_answer)));
    let (served, index, _) = futures::future::select_all(all).await;
    (index, served)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUN: u32 = 7_777;
    const WAN: &str = "203.0.113.10";
    const LAN: &str = "10.1.0.1";

    fn ip(arguments: &str) -> String {
        let output =
            std::process::Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "ip {arguments}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The interface with the index that the task was told: what it orders before must fail (ENODEV).
    fn tun_appears() {
        ip(&format!("link add t0 index {TUN} type veth peer name t1"));
    }

    async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}: not within 10 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Runs the task of an endpoint whose TUN is not there yet.
    fn with_task<F: Future<Output = ()>>(
        body: impl FnOnce(mpsc::UnboundedSender<Order>) -> F + Send + 'static,
    ) {
        let run = move || {
            netio::netns::isolate_thread().expect("these tests need root");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let addresses = Addresses {
                    endpoint: EndpointId(0),
                    name: "main".into(),
                    addresses: vec![WAN.parse().unwrap(), LAN.parse().unwrap()],
                    tun: TUN,
                    netlink: Netlink::open().unwrap(),
                    fences: Fences::new(1),
                    responders: Vec::new(),
                    pending: None,
                };
                let (orders, received) = mpsc::unbounded_channel();
                tokio::spawn(addresses.run(received));
                body(orders).await;
            });
        };
        if let Err(panic) = std::thread::spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn a_refused_placement_is_tried_until_it_holds() {
        with_task(|orders| async move {
            orders.send(Order::Present(true)).unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            tun_appears();
            eventually("both addresses", || {
                let shown = ip("address show dev t0");
                shown.contains(WAN) && shown.contains(LAN)
            })
            .await;
        });
    }

    #[test]
    fn a_refused_removal_is_tried_until_it_holds() {
        with_task(|orders| async move {
            orders.send(Order::Present(false)).unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            tun_appears();
            ip(&format!("address add {WAN}/32 dev t0"));
            eventually("removal", || !ip("address show dev t0").contains(WAN)).await;
        });
    }

    #[test]
    fn the_next_order_ends_the_trying() {
        with_task(|orders| async move {
            orders.send(Order::Present(true)).unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            orders.send(Order::Present(false)).unwrap();
            tun_appears();
            // Longer than any pause: the old order would have been tried again by now.
            tokio::time::sleep(LONGEST_PAUSE + FIRST_PAUSE * 10).await;
            let shown = ip("address show dev t0");
            assert!(!shown.contains(WAN) && !shown.contains(LAN), "{shown}");
        });
    }
}
