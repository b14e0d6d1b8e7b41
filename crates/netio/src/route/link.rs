//! Interfaces: their state, and news of it. An uplink's health starts here.

use std::ffi::CString;
use std::io;

use futures::StreamExt;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};

/// The state of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Kernel's index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Set up by the operator.
    pub up: bool,
    /// Up and with carrier: packets can pass.
    pub running: bool,
    /// In bytes.
    pub mtu: u32,
    /// Ethernet address, where it has one.
    pub mac: Option<[u8; 6]>,
}

impl LinkState {
    fn from_message(message: &LinkMessage) -> Self {
        let mut state = Self {
            index: message.header.index,
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            running: message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
            mtu: 0,
            mac: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => state.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => state.mtu = *mtu,
                LinkAttribute::Address(bytes) => state.mac = bytes.as_slice().try_into().ok(),
                _ => {}
            }
        }
        state
    }
}

/// News about an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It appeared or changed.
    Changed(LinkState),
    /// It is gone.
    Removed {
        /// Its last name.
        name: String,
    },
    /// News were lost: ask for the state of what matters.
    Lost,
}

/// A subscription to link news.
#[derive(Debug)]
pub struct LinkMonitor {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
}

impl LinkMonitor {
    /// Subscribes; must be called inside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        let (connection, _, messages) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link])?;
        tokio::spawn(connection);
        Ok(Self { messages })
    }

    /// The next piece of news. Cancel-safe. When the subscription broke (an overrun), it is
    /// renewed and the answer is [`LinkEvent::Lost`].
    pub async fn next(&mut self) -> io::Result<LinkEvent> {
        loop {
            let Some((message, _)) = self.messages.next().await else {
                *self = Self::open()?;
                return Ok(LinkEvent::Lost);
            };
            match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    return Ok(LinkEvent::Changed(LinkState::from_message(&message)));
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                    let name = LinkState::from_message(&message).name;
                    return Ok(LinkEvent::Removed { name });
                }
                NetlinkPayload::Overrun(_) => return Ok(LinkEvent::Lost),
                _ => {}
            }
        }
    }
}

/// The index of the interface with that name. Errors: `NotFound`.
pub fn index_of(name: &str) -> io::Result<u32> {
    let c_name = CString::new(name)?;
    // SAFETY: a valid C string that lives through the call.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(io::Error::new(io::ErrorKind::NotFound, format!("no interface \"{name}\""))),
        index => Ok(index),
    }
}

pub(super) async fn query(handle: &Handle, name: &str) -> io::Result<Option<LinkState>> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute().boxed();
    match links.next().await {
        None => Ok(None),
        Some(Ok(message)) => Ok(Some(LinkState::from_message(&message))),
        Some(Err(error)) => match super::failed(error) {
            error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            error => Err(error),
        },
    }
}
