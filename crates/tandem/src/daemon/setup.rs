//! Opens everything a daemon needs. Every failure is one sentence that names the thing and says what to do.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use gateway::config::{Config, Endpoint};
use gateway::{Gateway, Start};
use ike::config::Encap;
use netio::clock::boottime;
use netio::esp::EspSocket;
use netio::idle::IdleStates;
use netio::route::{LinkMonitor, Netlink};
use netio::tun::{Offloads, Tun};
use netio::udp::{BatchSocket, Group, SOCKET_BUFFER, UdpSender};
use rand_core::{OsRng, RngCore};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tracing::{info, warn};
use wire::id::Term;

use super::addresses::{Addresses, Order};
use super::fences::Fences;
use super::latency::LowLatency;
use crate::config_file::{Loaded, host_needs};
use crate::control_socket::{Call, Server};
use crate::hook::Hook;
use crate::link::{Link, LinkConfig, LinkEvent, LinkHandle, LinkPath, STEER_OVERHEAD, Started};
use crate::routing::{self, Keeper};
use crate::terms::TermFile;
use crate::worker::{self, EndpointSocket, Share, Workers};

/// How often the pair link tries to connect (ha.md).
const RETRY: std::time::Duration = std::time::Duration::from_millis(200);
/// Outer header and ESP at their largest: IPv4 20, ESP 8, IV 8, padding 3, trailer 2, tag 16.
const OVERHEAD: u32 = 57;
/// With UDP.
const UDP_OVERHEAD: u32 = OVERHEAD + 8;
/// What a link takes where nothing else is known.
const ETHERNET_MTU: u32 = 1500;
/// IPv6 needs links of at least this MTU (RFC 8200 §5).
const LEAST_MTU: u32 = 1280;
/// Packets that may wait in the TUN (dataplane.md).
const TUN_QUEUE: u32 = 2000;

/// One endpoint's sockets and tasks, as the control loop uses them.
pub(super) struct Place {
    pub(super) name: String,
    /// As configured: its uplink's routes are set again whenever the interface comes back.
    pub(super) endpoint: Endpoint,
    pub(super) wan: Option<String>,
    /// News of the uplink so far: a look at it that began before the latest counts no more.
    pub(super) uplink_news: u64,
    pub(super) port_500: UdpSocket,
    pub(super) port_4500: UdpSender,
    pub(super) at_500: SocketAddr,
    pub(super) at_4500: SocketAddr,
    pub(super) orders: mpsc::UnboundedSender<Order>,
}

/// A daemon, opened.
pub(super) struct Parts {
    /// This network namespace's rules and routes are ours while it is open.
    pub(super) _claim: std::os::unix::net::UnixListener,
    pub(super) gateway: Gateway,
    pub(super) local: String,
    pub(super) peer: String,
    pub(super) places: Vec<Place>,
    pub(super) fences: Fences,
    pub(super) workers: Workers,
    pub(super) link: Option<LinkHandle>,
    pub(super) link_events: Option<mpsc::Receiver<LinkEvent>>,
    pub(super) calls: mpsc::Receiver<Call>,
    pub(super) terms: Arc<Mutex<TermFile>>,
    pub(super) hook: Hook,
    pub(super) netlink: Netlink,
    /// For `down --purge` and the `up` after it.
    pub(super) keeper: Keeper,
    pub(super) monitor: LinkMonitor,
    pub(super) keylog: Option<PathBuf>,
    pub(super) low_latency: Option<LowLatency>,
}

/// Opens everything.
///
/// # Errors
/// The first thing that cannot be opened.
pub(super) async fn open(
    loaded: Loaded,
    keylog: Option<PathBuf>,
    hold_format: Option<u32>,
) -> Result<Parts, String> {
    let Loaded { config, daemon: settings, pair_secret, report } = loaded;
    for row in report.rows() {
        warn!(line = row.line, "configuration: {}", row.message);
    }
    if let Some(folder) = &keylog {
        warn!(folder = %folder.display(), "KEY LOG IS ON: every key of every tunnel is written to disk in clear");
        std::fs::create_dir_all(folder)
            .map_err(|error| format!("key log {}: {error}", folder.display()))?;
    }
    // Before anything of the host is changed: a second daemon must not touch the routes of the first.
    let server = Server::bind(&settings.socket).await.map_err(|failure| match &failure.hint {
        Some(hint) => format!("{failure}; {hint}"),
        None => failure.to_string(),
    })?;
    let claim = routing::claim().map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another tandemd runs in this network namespace: one serves all endpoints".to_owned()
        }
        _ => format!("the host's rules cannot be claimed: {error}"),
    })?;
    let terms = TermFile::open(&settings.state_dir).map_err(|error| error.to_string())?;
    let queues = open_tun(&settings.tun, settings.offload, settings.workers).map_err(|error| {
        format!("the TUN {:?} cannot be opened: {error}; {}", settings.tun, tun_hint(&error))
    })?;
    let mut shares = share_queues(queues, settings.workers);
    let tun = match shares.first() {
        Some(first) => Arc::clone(&first.tun),
        None => return Err("there are no workers".to_owned()),
    };
    let netlink = Netlink::open().map_err(|error| format!("netlink: {error}"))?;
    let mtu = match settings.mtu {
        Some(mtu) => u32::from(mtu),
        None => tunnel_mtu(&netlink, &config).await?,
    };
    tun.configure(mtu, TUN_QUEUE)
        .map_err(|error| format!("the TUN {:?} cannot be configured: {error}", settings.tun))?;
    let needs = netio::host::Needs { tun: Some(settings.tun.clone()), ..host_needs(&config) };
    for problem in netio::host::prepare(&needs) {
        warn!("host: {problem}");
    }
    let routes =
        |error: io::Error| format!("routes: {error}; does this process have CAP_NET_ADMIN?");
    let keeper = Keeper::start(netlink.clone(), tun.index(), &config).await.map_err(routes)?;

    let fences = Fences::new(config.endpoints.len());
    let mut places = Vec::new();
    for endpoint in &config.endpoints {
        let interface = endpoint.wan.interface.get(usize::from(config.local)).cloned().flatten();
        if let Some(name) = &interface {
            let index = netio::route::index_of(name).map_err(|error| {
                format!(
                    "endpoint {}: there is no interface {name:?}: {error} (ip -br link)",
                    endpoint.name
                )
            })?;
            routing::set_uplink(&netlink, endpoint, index).await.map_err(routes)?;
        }
        let at_500 = SocketAddr::new(endpoint.wan.address, 500);
        let at_4500 = SocketAddr::new(endpoint.wan.address, 4500);
        let taken = |at: SocketAddr| {
            move |error: io::Error| {
                let hint = match error.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "ports below 1024 need root or CAP_NET_BIND_SERVICE"
                    }
                    _ => "another IKE daemon may have the port (ss -lunp)",
                };
                format!("UDP {at} cannot be opened: {error}; {hint}")
            }
        };
        let port_500 = netio::udp::control_socket(at_500)
            .and_then(UdpSocket::from_std)
            .map_err(taken(at_500))?;
        let group = Group::bind(at_4500, worker::SOCKET_OPTIONS, settings.workers);
        let Group { sockets, unsorted } = group.map_err(taken(at_4500))?;
        if let Some(problem) = unsorted {
            warn!(%problem, "the kernel does not sort ESP by its worker: workers hand most packets to each other");
        }
        // The kernel is the same for all.
        if places.is_empty()
            && let Some(netio::udp::Offloads { receive, send }) =
                sockets.first().map(BatchSocket::offloads)
            && !(receive && send)
        {
            warn!(receive, send, "the kernel joins no UDP datagrams this way: each goes by itself");
        }
        let port_4500 = sockets.first().map(BatchSocket::sender);
        let port_4500 = port_4500.ok_or_else(|| format!("UDP {at_4500}: no socket"))?;
        let addresses =
            Addresses::open(endpoint, config.local, tun.index(), netlink.clone(), fences.clone())
                .map_err(|error| format!("endpoint {}: {error}", endpoint.name))?;
        let (orders, received) = mpsc::unbounded_channel();
        tokio::spawn(addresses.run(received));
        places.push(Place {
            name: endpoint.name.clone(),
            endpoint: endpoint.clone(),
            wan: interface,
            uplink_news: 0,
            port_500,
            port_4500,
            at_500,
            at_4500,
            orders,
        });
        for ((share, socket), worker) in shares.iter_mut().zip(sockets).zip(0..) {
            let raw = open_raw(&config, endpoint, worker, settings.workers)?;
            share.sockets.push(EndpointSocket { endpoint: endpoint.id, socket, raw });
        }
    }

    // All that is wanted stands by now.
    match routing::remove_stale(&netlink, &config).await {
        Ok((0, 0)) => {}
        Ok((routes, rules)) => {
            info!(routes, rules, "removed what an earlier configuration left in the routing");
        }
        Err(problem) => {
            warn!(%problem, "rules of an earlier configuration could not be removed (ip rule show: proto 116)")
        }
    }

    let (link, link_events, steering) = match (&config.pair, pair_secret) {
        (Some(pair), Some(secret)) => {
            let links = pair
                .links
                .iter()
                .map(|link| LinkPath { local: link.local, remote: link.remote })
                .collect();
            let started = Link::start(LinkConfig {
                index: config.local,
                secret: zeroize::Zeroizing::new(secret.expose().to_vec()),
                links,
                dead_after: pair.timers.dead_after,
                retry: RETRY,
            });
            let Started { handle, events, steering } =
                started.map_err(|error| error.to_string())?;
            (Some(handle), Some(events), Some(steering))
        }
        _ => (None, None, None),
    };
    let (sender, calls) = mpsc::channel(16);
    tokio::spawn(server.run(sender));
    let monitor = LinkMonitor::open().map_err(|error| format!("netlink monitor: {error}"))?;
    let hook = Hook::start(settings.notify.clone(), config.instance_name(config.local).to_owned());

    let low_latency = settings.low_latency.then(IdleStates::open).and_then(|opened| {
        let failed = |error: &io::Error| {
            warn!(%error, "low_latency: /dev/cpu_dma_latency cannot be opened; goes on without");
        };
        opened.inspect_err(failed).ok().map(LowLatency::new)
    });

    // Privileges belong to threads: give them up before the worker starts, so that it starts without them.
    let priority = netio::sched::raise_thread_priority();
    netio::sched::drop_privileges()
        .map_err(|error| format!("privileges cannot be dropped: {error}"))?;
    let workers = worker::spawn(worker::Start {
        shares,
        fences: fences.words(),
        endpoints: config.endpoints.len(),
        mtu: mtu as usize,
        steering,
    })
    .map_err(|error| format!("the workers cannot be started: {error}"))?;

    let local = config.instance_name(config.local).to_owned();
    let peer = config
        .pair
        .as_ref()
        .map_or_else(String::new, |pair| config.instance_name(pair.peer).to_owned());
    info!(
        instance = local,
        ?priority,
        mtu,
        tun = settings.tun,
        workers = settings.workers,
        "tandemd {} starts",
        env!("CARGO_PKG_VERSION")
    );
    let start = Start {
        terms: config.endpoints.iter().map(|e| terms.reserved(&e.name).map(Term)).collect(),
        config,
        rng: Box::new(OsRng),
        seed: OsRng.next_u64(),
        workers: settings.workers,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        hold_format,
    };
    let gateway = Gateway::new(start, boottime()).map_err(|error| error.to_string())?;
    netio::memory::give_back();
    Ok(Parts {
        _claim: claim,
        gateway,
        local,
        peer,
        places,
        fences,
        workers,
        link,
        link_events,
        calls,
        terms: Arc::new(Mutex::new(terms)),
        hook,
        netlink,
        keeper,
        monitor,
        keylog,
        low_latency,
    })
}

/// A worker's socket for the endpoint's ESP as protocol 50, if a connection may use it. Only for one that does unless a
/// NAT is found it must be there.
fn open_raw(
    config: &Config,
    endpoint: &Endpoint,
    worker: u8,
    workers: u8,
) -> Result<Option<EspSocket>, String> {
    let served = config.connections.iter().filter(|c| c.endpoints.contains(&endpoint.id));
    let wanted: Vec<_> = served.map(|c| c.ike.encap).filter(|e| *e != Encap::Always).collect();
    if wanted.is_empty() {
        return Ok(None);
    }
    let address = endpoint.wan.address;
    match EspSocket::bind_share(address, SOCKET_BUFFER, worker, workers) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied => "this needs CAP_NET_RAW",
                io::ErrorKind::AddrNotAvailable => "for a virtual address this needs Linux 5.17",
                _ => "does this kernel have raw sockets?",
            };
            let problem =
                format!("ESP (protocol 50) at {address} cannot be opened: {error}; {hint}");
            if wanted.contains(&Encap::Never) {
                return Err(problem);
            }
            if worker == 0 {
                warn!("{problem}; what knows no NAT traversal cannot be a peer");
            }
            Ok(None)
        }
    }
}

/// The TUN with vnet headers and a queue for each worker, or where that is switched off or not to be had, the plain one
/// with its one queue.
fn open_tun(name: &str, offload: bool, workers: u8) -> io::Result<Vec<Tun>> {
    open_tun_by(name, offload, workers, Tun::open_queues)
}

/// The same, by this way to make one with vnet headers.
fn open_tun_by(
    name: &str,
    offload: bool,
    workers: u8,
    open_queues: impl Fn(&str, u8) -> io::Result<Vec<Tun>>,
) -> io::Result<Vec<Tun>> {
    if !offload {
        if workers > 1 {
            info!("without offloads the TUN has one queue: one worker reads it for all");
        }
        return Ok(vec![Tun::open_plain(name)?]);
    }
    let mut queues = open_queues(name, workers);
    if workers > 1
        && let Err(problem) = &queues
        && problem.kind() == io::ErrorKind::InvalidInput
    {
        warn!(%problem, "the kernel has not so many queues for a TUN: one worker reads it for all");
        queues = open_queues(name, 1);
    }
    match queues {
        Err(problem) if problem.kind() == io::ErrorKind::InvalidInput => {
            warn!(%problem, "the kernel has no vnet headers for a TUN: one packet a call");
            Ok(vec![Tun::open_plain(name)?])
        }
        Ok(queues) => {
            let none = Offloads { tcp: false, udp: false };
            let Offloads { tcp, udp } = queues.first().map_or(none, Tun::offloads);
            if !(tcp && udp) {
                tracing::info!(
                    tcp,
                    udp,
                    "the kernel leaves no segmentation of this kind to a TUN: one packet a call"
                );
            }
            Ok(queues)
        }
        Err(error) => Err(error),
    }
}

/// A queue for each worker; where there are too few, the others write to the first.
fn share_queues(queues: Vec<Tun>, workers: u8) -> Vec<Share> {
    let mut queues = queues.into_iter().map(Arc::new);
    let Some(first) = queues.next() else { return Vec::new() };
    let share = |tun, reads_tun| Share { tun, reads_tun, sockets: Vec::new() };
    let others = (1..workers).map(|_| match queues.next() {
        Some(own) => share(own, true),
        None => share(Arc::clone(&first), false),
    });
    std::iter::once(share(Arc::clone(&first), true)).chain(others).collect()
}

/// What to do about a TUN that cannot be opened (tun.c, tun_set_iff; tun_chr_open).
fn tun_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ResourceBusy => {
            "an interface of this name is there already: [daemon] tun chooses another name"
        }
        io::ErrorKind::PermissionDenied => {
            "this needs root or CAP_NET_ADMIN, and in a container the device /dev/net/tun"
        }
        io::ErrorKind::NotFound => {
            "there is no /dev/net/tun: modprobe tun, or give the container the device"
        }
        _ => "does this process have /dev/net/tun and CAP_NET_ADMIN?",
    }
}

/// The smallest WAN MTU, less what a tunnel adds. With several endpoints packets cross the pair link all the time: they must
/// also fit it whole, with what steering adds.
async fn tunnel_mtu(netlink: &Netlink, config: &Config) -> Result<u32, String> {
    let mut least = ETHERNET_MTU;
    for endpoint in &config.endpoints {
        let Some(Some(name)) = endpoint.wan.interface.get(usize::from(config.local)) else {
            continue;
        };
        match netlink.link(name).await {
            Ok(Some(link)) => least = least.min(link.mtu),
            Ok(None) => {
                return Err(format!(
                    "endpoint {}: there is no interface {name:?} (ip -br link)",
                    endpoint.name
                ));
            }
            Err(error) => return Err(format!("interface {name:?}: {error}")),
        }
    }
    let in_udp = config.connections.iter().any(|connection| connection.ike.encap != Encap::Never);
    let mut mtu = least.saturating_sub(if in_udp { UDP_OVERHEAD } else { OVERHEAD });
    if let Some(pair) = config.pair.as_ref().filter(|_| config.endpoints.len() > 1) {
        let links = pair.links.iter().map(|link| steered_mtu(link.local, link.remote));
        mtu = mtu.min(links.min().unwrap_or(mtu));
    }
    Ok(mtu.max(LEAST_MTU))
}

/// The largest packet that can be handed over on a link without being cut.
fn steered_mtu(local: SocketAddr, remote: SocketAddr) -> u32 {
    // A link that is not there yet is taken for an Ethernet.
    let mtu = netio::udp::path_mtu(local, remote).unwrap_or(ETHERNET_MTU);
    let headers = if local.is_ipv4() { 20 + 8 } else { 40 + 8 };
    mtu.saturating_sub(headers + STEER_OVERHEAD as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::tests::isolated;

    #[test]
    fn each_feature_of_the_tun_that_the_kernel_refuses_is_done_without() {
        isolated(|| {
            let refused = || io::Error::from(io::ErrorKind::InvalidInput);
            let one_queue = |name: &str, count| match count {
                1 => Tun::open_queues(name, 1),
                _ => Err(refused()),
            };
            let queues = open_tun_by("tdm0", true, 3, one_queue).unwrap();
            assert!(matches!(&queues[..], [Tun::Vnet(_)]), "{queues:?}");
            let reading: Vec<_> =
                share_queues(queues, 3).iter().map(|share| share.reads_tun).collect();
            assert_eq!(reading, [true, false, false]);
            for workers in [1, 3] {
                let queues = open_tun_by("tdm1", true, workers, |_, _| Err(refused())).unwrap();
                assert!(matches!(&queues[..], [Tun::Plain(_)]), "{queues:?}");
            }
            let queues = open_tun_by("tdm2", false, 3, |_, _| unreachable!()).unwrap();
            assert!(matches!(&queues[..], [Tun::Plain(_)]), "{queues:?}");
            let busy = || io::Error::from(io::ErrorKind::ResourceBusy);
            let error = open_tun_by("tdm3", true, 3, |_, _| Err(busy())).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "what is no refusal stays one");
        });
    }
}
