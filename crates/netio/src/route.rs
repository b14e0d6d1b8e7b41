//! Addresses, routes, rules and links, by netlink on the tokio runtime of the caller.
//!
//! Everything here is idempotent: adding what is there and removing what is not both succeed.
//! Routes and rules carry [`PROTOCOL`], so that other daemons can redistribute them and
//! [`Netlink::purge`] finds them again after a crash.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use futures::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

mod link;

pub use link::{LinkEvent, LinkMonitor, LinkState, index_of};

/// Our routing protocol number (`ip route … proto 116`); free in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 116;

/// The main routing table.
pub const MAIN_TABLE: u32 = 254;

/// A metric below (= later than) every other route of the same prefix.
pub const LAST_METRIC: u32 = u32::MAX;

/// An address with a prefix length; host bits are cleared on construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// `None` when `length` is above 32 or 128.
    #[must_use]
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(u32::from(32_u8.checked_sub(length)?)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask =
                    u128::MAX.checked_shl(u32::from(128_u8.checked_sub(length)?)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Some(Self { address, length })
    }

    /// One address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self { address, length: if address.is_ipv4() { 32 } else { 128 } }
    }

    /// The network address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The prefix length in bits.
    #[must_use]
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Every address of `other` is one of this.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && Self::new(other.address, self.length) == Some(*self)
    }

    fn family(&self) -> AddressFamily {
        if self.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
    }
}

impl std::fmt::Display for Prefix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Straight onto an interface (index), as for the TUN.
    Device(u32),
    /// Through a gateway on an interface; `onlink` even when no prefix there covers it.
    Gateway {
        /// The next hop.
        gateway: IpAddr,
        /// Index of the interface.
        interface: u32,
        /// Take the gateway as a neighbour in any case.
        onlink: bool,
    },
    /// Dropped in silence.
    Blackhole,
}

/// A route that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub destination: Prefix,
    /// Routing table; [`MAIN_TABLE`] or one of our own.
    pub table: u32,
    /// Where to.
    pub target: Target,
    /// Lower wins among routes of one prefix. IPv6 turns 0 into 1024.
    pub metric: u32,
    /// Source address for what the host itself sends; must be present on the host.
    pub source: Option<IpAddr>,
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Look into this table.
    Lookup(u32),
    /// Look into this table, but pass over its default route: what only that would take goes on to the next rule.
    LookupNoDefault(u32),
    /// Drop in silence.
    Blackhole,
}

/// What a rule may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// UDP from this port.
    UdpFrom(u16),
    /// ESP as protocol 50.
    Esp,
}

/// A policy routing rule that is ours. All given selectors must match; at least one of `from`
/// and `to` says which family the rule is of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Lower is earlier; the kernel's `main` rule is 32766.
    pub priority: u32,
    /// Source prefix.
    pub from: Option<Prefix>,
    /// Destination prefix.
    pub to: Option<Prefix>,
    /// Name of the interface packets came in by; need not exist yet. `lo`: what this host itself sends.
    pub input: Option<String>,
    /// What it is about, if not everything.
    pub traffic: Option<Traffic>,
    /// What to do.
    pub action: Action,
}

/// A handle on the kernel's routing. Cheap to clone; all clones share one socket.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens the socket and spawns its task; must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Adds a /32 or /128 address to an interface. IPv6 is usable at once (no duplicate check:
    /// a TUN has no neighbours).
    pub async fn add_address(&self, interface: u32, address: IpAddr) -> io::Result<()> {
        use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
        let length = Prefix::host(address).length;
        let mut request = self.handle.address().add(interface, address, length);
        // Without it an IPv6 address is tentative until a kernel worker has looked at it.
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        accept(request.execute().await, libc::EEXIST)
    }

    /// Gives an interface an address that never leaves, 169.254.0.1/32 of link scope: when the last IPv4
    /// address goes, the kernel flushes every IPv4 route over the interface, and ours must outlive the
    /// virtual addresses. Of link scope, so that it is never chosen as a source.
    pub async fn anchor(&self, interface: u32) -> io::Result<()> {
        use rtnetlink::packet_route::address::AddressScope;
        let address = IpAddr::from([169, 254, 0, 1]);
        let mut request =
            self.handle.address().add(interface, address, Prefix::host(address).length);
        request.message_mut().header.scope = AddressScope::Link;
        accept(request.execute().await, libc::EEXIST)
    }

    /// Removes an address added by [`Netlink::add_address`].
    pub async fn remove_address(&self, interface: u32, address: IpAddr) -> io::Result<()> {
        let length = Prefix::host(address).length;
        let mut request = self.handle.address().add(interface, address, length);
        let message = std::mem::take(request.message_mut());
        accept(self.handle.address().del(message).execute().await, libc::EADDRNOTAVAIL)
    }

    /// The addresses of an interface.
    pub async fn addresses(&self, interface: u32) -> io::Result<Vec<IpAddr>> {
        use rtnetlink::packet_route::address::AddressAttribute;
        let mut all =
            self.handle.address().get().set_link_index_filter(interface).execute().boxed();
        let mut addresses = Vec::new();
        while let Some(message) = all.next().await {
            let message = message.map_err(failed)?;
            if message.header.index != interface {
                continue;
            }
            // IPv4 names the host's own address in Local, IPv6 in Address.
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            addresses.extend(local.or(any));
        }
        Ok(addresses)
    }

    /// Adds a route, or replaces ours of the same prefix, table and metric.
    pub async fn set_route(&self, route: &Route) -> io::Result<()> {
        let message = route.message()?;
        let outcome = self.handle.route().add(message).replace().execute().await;
        accept(outcome, libc::EEXIST)
    }

    /// Removes a route; succeeds when it is not there.
    pub async fn remove_route(&self, route: &Route) -> io::Result<()> {
        let message = route.message()?;
        accept(self.handle.route().del(message).execute().await, libc::ESRCH)
    }

    /// Adds a rule; succeeds when it is there already.
    ///
    /// The kernel looks for one that is there without comparing a /0 side (fib4_rule_compare): a rule to 0.0.0.0/0
    /// counts as there when one to any network has the same priority. Give rules with such sides a priority apart.
    pub async fn add_rule(&self, rule: &Rule) -> io::Result<()> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRule(rule.message()?));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE;
        let mut handle = self.handle.clone();
        let mut response = handle.request(request).map_err(failed)?;
        let mut outcome = Ok(());
        while let Some(message) = response.next().await {
            if let NetlinkPayload::Error(error) = message.payload
                && error.code.is_some()
            {
                outcome = Err(rtnetlink::Error::NetlinkError(error));
            }
        }
        accept(outcome, libc::EEXIST)
    }

    /// Removes a rule; succeeds when it is not there.
    pub async fn remove_rule(&self, rule: &Rule) -> io::Result<()> {
        let message = rule.message()?;
        accept(self.handle.rule().del(message).execute().await, libc::ENOENT)
    }

    /// Removes every route and rule that carries our number: `tandem protect --remove`.
    /// Gives how many of each there were.
    pub async fn purge(&self) -> io::Result<(usize, usize)> {
        self.remove_where(|_| true, |_| true).await
    }

    /// Removes the routes and rules that carry our number and are none of these. Those stay throughout: the kernel
    /// deletes the first rule that fits a request, so a rule whose deletion would hit an earlier one is left alone.
    /// Gives how many of each are gone.
    pub async fn remove_all_but(
        &self,
        rules: &[Rule],
        routes: &[Route],
    ) -> io::Result<(usize, usize)> {
        let wanted: BTreeSet<Rule> = rules.iter().map(Rule::in_full).collect();
        let routes: BTreeSet<_> =
            routes.iter().map(|route| (route.table, route.destination, route.metric)).collect();
        self.remove_where(
            // What we cannot read is not ours to judge.
            |rule| rule.is_some_and(|rule| !wanted.contains(rule)),
            |key| key.is_some_and(|key| !routes.contains(&key)),
        )
        .await
    }

    async fn remove_where(
        &self,
        rule_goes: impl Fn(Option<&Rule>) -> bool,
        route_goes: impl Fn(Option<(u32, Prefix, u32)>) -> bool,
    ) -> io::Result<(usize, usize)> {
        let (mut gone_routes, mut gone_rules) = (0, 0);
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            // Rules first: none may lead into a table that is no longer filled.
            let mut ours = self.our_rules(family).await?;
            let mut at = 0;
            while let Some((message, rule)) = ours.get(at) {
                let stays = !rule_goes(rule.as_ref());
                let hits_another = || {
                    ours.iter().take(at).any(|(_, earlier)| match (rule, earlier) {
                        (Some(rule), Some(earlier)) => rule.deletes(earlier),
                        _ => false,
                    })
                };
                if stays || hits_another() {
                    if !stays {
                        tracing::warn!(
                            ?rule,
                            "a rule of an earlier configuration cannot be told from a needed one and stays"
                        );
                    }
                    at += 1;
                    continue;
                }
                let request = self.handle.rule().del(message.clone());
                accept(request.execute().await, libc::ENOENT)?;
                gone_rules += 1;
                ours.remove(at);
            }
            for message in self.our_routes(family).await? {
                if route_goes(key_of(&message)) {
                    accept(self.handle.route().del(message).execute().await, libc::ESRCH)?;
                    gone_routes += 1;
                }
            }
        }
        Ok((gone_routes, gone_rules))
    }

    /// In the kernel's order.
    async fn our_rules(
        &self,
        family: AddressFamily,
    ) -> io::Result<Vec<(RuleMessage, Option<Rule>)>> {
        let version = if family == AddressFamily::Inet { IpVersion::V4 } else { IpVersion::V6 };
        let ours = RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL));
        let mut found = Vec::new();
        let mut all = self.handle.rule().get(version).execute().boxed();
        while let Some(message) = all.next().await {
            let message = message.map_err(failed)?;
            if message.attributes.contains(&ours) {
                let rule = Rule::of(&message);
                found.push((message, rule));
            }
        }
        Ok(found)
    }

    async fn our_routes(&self, family: AddressFamily) -> io::Result<Vec<RouteMessage>> {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        let mut found = Vec::new();
        let mut all = self.handle.route().get(query).execute().boxed();
        while let Some(message) = all.next().await {
            let message = message.map_err(failed)?;
            if message.header.protocol == RouteProtocol::from(PROTOCOL) {
                found.push(message);
            }
        }
        Ok(found)
    }

    /// The state of one interface, `None` when there is none of that name.
    pub async fn link(&self, name: &str) -> io::Result<Option<LinkState>> {
        link::query(&self.handle, name).await
    }
}

impl Route {
    fn message(&self) -> io::Result<RouteMessage> {
        let invalid =
            |_| io::Error::new(io::ErrorKind::InvalidInput, "route with mixed address families");
        let builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(self.destination.address, self.destination.length)
            .map_err(invalid)?
            .table_id(self.table)
            .protocol(RouteProtocol::from(PROTOCOL))
            .priority(self.metric);
        let mut builder = match self.target {
            Target::Device(interface) => {
                builder.scope(RouteScope::Link).output_interface(interface)
            }
            Target::Gateway { gateway, interface, onlink } => {
                let builder =
                    builder.gateway(gateway).map_err(invalid)?.output_interface(interface);
                if onlink { builder.onlink() } else { builder }
            }
            Target::Blackhole => builder.kind(RouteType::BlackHole),
        };
        if let Some(source) = self.source {
            builder.get_mut().attributes.push(RouteAttribute::PrefSource(source.into()));
        }
        Ok(builder.build())
    }
}

impl Rule {
    fn message(&self) -> io::Result<RuleMessage> {
        let mut message = RuleMessage::default();
        let families = (self.from.map(|p| p.family()), self.to.map(|p| p.family()));
        message.header.family = match families {
            (Some(from), Some(to)) if from != to => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "rule with mixed address families",
                ));
            }
            (Some(family), _) | (None, Some(family)) => family,
            (None, None) => AddressFamily::Inet,
        };
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(self.priority));
        attributes.push(RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL)));
        if let Some(from) = self.from {
            message.header.src_len = from.length;
            attributes.push(RuleAttribute::Source(from.address));
        }
        if let Some(to) = self.to {
            message.header.dst_len = to.length;
            attributes.push(RuleAttribute::Destination(to.address));
        }
        if let Some(input) = &self.input {
            attributes.push(RuleAttribute::Iifname(input.clone()));
        }
        match self.traffic {
            Some(Traffic::UdpFrom(port)) => {
                attributes.push(RuleAttribute::IpProtocol(IpProtocol::Udp));
                let range = RulePortRange { start: port, end: port };
                attributes.push(RuleAttribute::SourcePortRange(range));
            }
            Some(Traffic::Esp) => attributes.push(RuleAttribute::IpProtocol(IpProtocol::Esp)),
            None => {}
        }
        match self.action {
            Action::Lookup(table) | Action::LookupNoDefault(table) => {
                message.header.action = RuleAction::ToTable;
                // The attribute takes every table; the header's byte only those below 256.
                attributes.push(RuleAttribute::Table(table));
                if matches!(self.action, Action::LookupNoDefault(_)) {
                    attributes.push(RuleAttribute::SuppressPrefixLen(0));
                }
            }
            Action::Blackhole => message.header.action = RuleAction::Blackhole,
        }
        Ok(message)
    }
}

impl Rule {
    /// The rule that the kernel describes; `None` when it selects by something that ours never do.
    fn of(message: &RuleMessage) -> Option<Self> {
        let any: IpAddr = match message.header.family {
            AddressFamily::Inet => [0_u8; 4].into(),
            AddressFamily::Inet6 => [0_u8; 16].into(),
            _ => return None,
        };
        let (mut from, mut to) = (any, any);
        let (mut priority, mut input, mut protocol, mut port) = (0, None, None, None);
        let (mut table, mut no_default) = (None, false);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Source(address) => from = *address,
                RuleAttribute::Destination(address) => to = *address,
                RuleAttribute::Priority(number) => priority = *number,
                RuleAttribute::Iifname(name) => input = Some(name.clone()),
                RuleAttribute::Table(number) => table = Some(*number),
                RuleAttribute::SuppressPrefixLen(0) => no_default = true,
                RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::Protocol(_) => {}
                RuleAttribute::IpProtocol(number) => protocol = Some(*number),
                RuleAttribute::SourcePortRange(range) if range.start == range.end => {
                    port = Some(range.start);
                }
                // Younger than this release; no selector of ours.
                RuleAttribute::Other(_) => {}
                _ => return None,
            }
        }
        let action = match (message.header.action, table) {
            (RuleAction::ToTable, Some(table)) if no_default => Action::LookupNoDefault(table),
            (RuleAction::ToTable, Some(table)) => Action::Lookup(table),
            (RuleAction::Blackhole, _) => Action::Blackhole,
            _ => return None,
        };
        let traffic = match (protocol, port) {
            (None, None) => None,
            (Some(IpProtocol::Udp), Some(port)) => Some(Traffic::UdpFrom(port)),
            (Some(IpProtocol::Esp), None) => Some(Traffic::Esp),
            _ => return None,
        };
        Some(Self {
            priority,
            from: Some(Prefix::new(from, message.header.src_len)?),
            to: Some(Prefix::new(to, message.header.dst_len)?),
            input,
            traffic,
            action,
        })
    }

    /// Both sides written out, so that "any" has one form.
    fn in_full(&self) -> Self {
        let v4 = [self.from, self.to].into_iter().flatten().all(|p| p.address.is_ipv4());
        let any = if v4 { IpAddr::from([0_u8; 4]) } else { IpAddr::from([0_u8; 16]) };
        let any = Prefix { address: any, length: 0 };
        Self { from: self.from.or(Some(any)), to: self.to.or(Some(any)), ..self.clone() }
    }

    /// Whether the kernel, told to delete this rule, would take `other` for it: what is empty in the request is not
    /// compared (net/core/fib_rules.c, rule_find), and a /0 counts as empty.
    fn deletes(&self, other: &Self) -> bool {
        let (own, other) = (self.in_full(), other.in_full());
        let side = |own: Option<Prefix>, other: Option<Prefix>| match (own, other) {
            (Some(own), Some(other)) => {
                own.family() == other.family() && (own.length == 0 || own == other)
            }
            _ => true,
        };
        let table = |action: Action| match action {
            Action::Lookup(table) | Action::LookupNoDefault(table) => Some(table),
            Action::Blackhole => None,
        };
        own.priority == other.priority
            && table(own.action) == table(other.action)
            && (own.input.is_none() || own.input == other.input)
            && (own.traffic.is_none() || own.traffic == other.traffic)
            && side(own.from, other.from)
            && side(own.to, other.to)
    }
}

/// What makes a route one that can stand beside others: table, destination, metric.
fn key_of(message: &RouteMessage) -> Option<(u32, Prefix, u32)> {
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => [0_u8; 4].into(),
        AddressFamily::Inet6 => [0_u8; 16].into(),
        _ => return None,
    };
    let (mut table, mut destination, mut metric) = (u32::from(message.header.table), any, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                destination = (*address).into();
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                destination = (*address).into();
            }
            _ => {}
        }
    }
    Some((table, Prefix::new(destination, message.header.destination_prefix_length)?, metric))
}

/// Takes one errno for success.
fn accept(outcome: Result<(), rtnetlink::Error>, code: i32) -> io::Result<()> {
    match outcome {
        Ok(()) => Ok(()),
        Err(error) => match failed(error) {
            error if error.raw_os_error() == Some(code) => Ok(()),
            error => Err(error),
        },
    }
}

fn failed(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests;
