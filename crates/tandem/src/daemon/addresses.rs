//! The virtual addresses of one endpoint: on the TUN, in neighbours' caches, and nowhere else.
//!
//! One task an endpoint. It carries out address changes and announcements in the order in which the gateway decided
//! them, and answers ARP and neighbour solicitations in between, only while the endpoint's fence is open: a stopped
//! process answers nothing, and a process that wakes up behind its fence answers nothing either.

use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use gateway::config::Endpoint;
use netio::arp::{Responder, Served};
use netio::clock::boottime;
use netio::route::Netlink;
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};
use wire::id::EndpointId;

use super::fences::Fences;

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
        let lan = endpoint
            .lan
            .as_ref()
            .and_then(|lan| Some((lan.interface.get(here).cloned().flatten()?, lan.address)));
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
        addresses.extend(endpoint.lan.as_ref().map(|lan| lan.address));
        Ok(Self {
            endpoint: endpoint.id,
            name: endpoint.name.clone(),
            addresses,
            tun,
            netlink,
            fences,
            responders,
        })
    }

    /// Runs until the gateway is gone.
    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Present(present)) => self.place(present).await,
                    Some(Order::Announce) => self.announce(),
                    None => return,
                },
                served = serve(&mut self.responders, &self.fences, self.endpoint) => {
                    let (index, served) = served;
                    self.note(index, served).await;
                }
            }
        }
    }

    async fn place(&self, present: bool) {
        for address in &self.addresses {
            let outcome = match present {
                true => self.netlink.add_address(self.tun, *address).await,
                false => self.netlink.remove_address(self.tun, *address).await,
            };
            match outcome {
                Ok(()) => info!(endpoint = self.name, %address, present, "virtual address"),
                Err(error) => {
                    error!(endpoint = self.name, %address, present, %error, "virtual address could not be changed")
                }
            }
        }
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

/// The first responder that has served something.
async fn serve(
    responders: &mut [Responder],
    fences: &Fences,
    endpoint: EndpointId,
) -> (usize, io::Result<Served>) {
    let may_answer = || fences.is_open(endpoint, boottime());
    match responders {
        [] => pending().await,
        [one] => (0, one.serve(may_answer).await),
        [one, two, ..] => tokio::select! {
            served = one.serve(may_answer) => (0, served),
            served = two.serve(may_answer) => (1, served),
        },
    }
}
