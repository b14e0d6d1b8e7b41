//! The replicated value: everything about one IKE SA and its Child SAs.
//!
//! A step never changes such a value in place. It works on a clone (secrets and
//! messages in it are shared, see [`Key`] and [`Bytes`]), and the endpoint puts
//! the clone in the old one's place once the whole step has succeeded. So a bad
//! message cannot leave half a change behind.
//!
//! ```text
//!  we initiate:   InitSent ──► AuthSent ──► Established ──► Closed
//!  we respond:    InitAnswered ───────────► Established ──► Closed
//! ```
//!
//! | input | state | effect |
//! | --- | --- | --- |
//! | IKE_SA_INIT response | InitSent | COOKIE, INVALID_KE_PAYLOAD: new request; SA, KE, Nr: AuthSent |
//! | IKE_AUTH response | AuthSent | Established, or gone |
//! | IKE_SA_INIT request | none | InitAnswered, after the cookie check |
//! | IKE_AUTH request | InitAnswered | Established, or Closed with the refusal |
//! | any request with the next message id | Established | answer, perhaps Closed |
//! | the response to our request | Established | what the request's [`Task`] says |
//! | anything else | any | nothing |
//!
//! `Closed` only repeats its last response until it expires.

use core::net::SocketAddr;

use crypto::{aead::AeadAlg, dh::Group, prf::PrfAlg};
use minicbor::{Decode, Encode};
use wire::{
    id::{EspSpi, IkeSpi},
    ts::TrafficSelector,
};

use crate::{
    event::DeleteReason,
    keys::{AuthKeys, IkeKeys, Key},
    proposal::{EspSuite, IkeSuite},
    record::{self, Bytes, Now, Stamp},
};

/// One IKE SA.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct IkeSa {
    /// Our SPI; also the record's key.
    #[cbor(n(0), with = "record::ike_spi")]
    pub(crate) spi: IkeSpi,
    /// The peer's SPI; zero while we wait for it.
    #[cbor(n(1), with = "record::ike_spi")]
    pub(crate) peer_spi: IkeSpi,
    /// We are the original initiator (our SPI stands first in the header).
    #[n(2)]
    pub(crate) initiator: bool,
    /// Name of the connection, once known.
    #[n(3)]
    pub(crate) connection: Option<String>,
    #[n(4)]
    pub(crate) path: Path,
    /// When the state below was entered for the first time: half-open SAs and
    /// `Closed` expire by it.
    #[n(5)]
    pub(crate) since: Stamp,
    #[n(6)]
    pub(crate) phase: Phase,
}

/// Where the two sides are and what lies between them (RFC 7296 §2.23).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Path {
    #[cbor(n(0), with = "record::address")]
    pub(crate) local: SocketAddr,
    #[cbor(n(1), with = "record::address")]
    pub(crate) remote: SocketAddr,
    /// A NAT before us: keepalives are ours to send, and we never follow moves.
    #[n(2)]
    pub(crate) nat_here: bool,
    /// A NAT before the peer, or a peer that claims one: we follow its moves.
    #[n(3)]
    pub(crate) nat_there: bool,
    /// ESP goes in UDP.
    #[n(4)]
    pub(crate) encap: bool,
}

#[derive(Debug, Clone, Encode, Decode)]
#[cbor(context_bound = "Now")]
pub(crate) enum Phase {
    #[n(0)]
    InitSent(#[n(0)] InitSent),
    #[n(1)]
    InitAnswered(#[n(0)] InitAnswered),
    #[n(2)]
    AuthSent(#[n(0)] AuthSent),
    #[n(3)]
    Established(#[n(0)] Box<Established>),
    #[n(4)]
    Closed(#[n(0)] Closed),
}

/// A request of ours that was not answered yet.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Outstanding {
    #[n(0)]
    pub(crate) id: u32,
    /// The datagram; every repetition is these bytes.
    #[n(1)]
    pub(crate) bytes: Bytes,
    /// When it was last sent.
    #[n(2)]
    pub(crate) sent_at: Stamp,
    /// How often it was sent.
    #[n(3)]
    pub(crate) sent: u8,
}

/// Our ephemeral key pair, as bytes.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Eph {
    #[cbor(n(0), with = "record::group")]
    pub(crate) group: Group,
    #[n(1)]
    pub(crate) secret: Key,
}

/// We sent IKE_SA_INIT.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct InitSent {
    #[n(0)]
    pub(crate) request: Outstanding,
    #[n(1)]
    pub(crate) eph: Eph,
    #[n(2)]
    pub(crate) nonce: Bytes,
    #[n(3)]
    pub(crate) cookie: Option<Bytes>,
    /// Requests changed by COOKIE or INVALID_KE_PAYLOAD so far; bounded.
    #[n(4)]
    pub(crate) rounds: u8,
    /// INITIAL_CONTACT may be sent.
    #[n(5)]
    pub(crate) fresh: bool,
    /// An unprotected error notify was already reported.
    #[n(6)]
    pub(crate) complained: bool,
    /// Children to bring up; the first goes into IKE_AUTH.
    #[n(7)]
    pub(crate) wanted: Vec<String>,
}

/// We answered IKE_SA_INIT.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct InitAnswered {
    /// The request: AUTH signs it, and repetitions are recognised by it.
    #[n(0)]
    pub(crate) request: Bytes,
    #[n(1)]
    pub(crate) response: Bytes,
    #[n(2)]
    pub(crate) ni: Bytes,
    #[n(3)]
    pub(crate) nr: Bytes,
    #[n(4)]
    pub(crate) keys: IkeKeys,
    #[n(5)]
    pub(crate) auth: AuthKeys,
    #[cbor(n(6), with = "record::group")]
    pub(crate) group: Group,
    /// The peer takes part in NAT detection.
    #[n(7)]
    pub(crate) natt: bool,
    /// The term in which the keys were made. (Builds that did not know the field, here
    /// and in [`AuthSent`], left it out: the term of the next step, less than a minute
    /// later.)
    #[n(8)]
    pub(crate) term: Option<u64>,
}

/// We sent IKE_AUTH.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct AuthSent {
    #[n(0)]
    pub(crate) request: Outstanding,
    /// The peer's IKE_SA_INIT response, which its AUTH signs.
    #[n(1)]
    pub(crate) init_response: Bytes,
    #[n(2)]
    pub(crate) ni: Bytes,
    #[n(3)]
    pub(crate) nr: Bytes,
    #[n(4)]
    pub(crate) keys: IkeKeys,
    #[n(5)]
    pub(crate) auth: AuthKeys,
    #[cbor(n(6), with = "record::group")]
    pub(crate) group: Group,
    #[n(7)]
    pub(crate) child: Option<NewChild>,
    #[n(8)]
    pub(crate) wanted: Vec<String>,
    /// The term in which the keys were made.
    #[n(9)]
    pub(crate) term: Option<u64>,
}

/// Both sides are authenticated.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Established {
    #[n(0)]
    pub(crate) keys: IkeKeys,
    #[cbor(n(1), with = "record::group")]
    pub(crate) group: Group,
    /// Message id of our next request.
    #[n(2)]
    pub(crate) send_next: u32,
    #[n(3)]
    pub(crate) request: Option<Request>,
    /// Message id of the peer's next request.
    #[n(4)]
    pub(crate) recv_next: u32,
    /// How we answered the request before that.
    #[n(5)]
    pub(crate) answered: Option<Answered>,
    #[n(6)]
    pub(crate) children: Vec<Child>,
    /// Inbound SPIs of Child SAs that the peer may hold and we do not: to be
    /// deleted there.
    #[cbor(n(7), with = "record::esp_spis")]
    pub(crate) orphans: Vec<EspSpi>,
    /// Children we want and do not have.
    #[n(8)]
    pub(crate) wanted: Vec<Wanted>,
    /// Rekey at, and delete at the latest.
    #[n(9)]
    pub(crate) rekey_at: Stamp,
    #[n(10)]
    pub(crate) expires_at: Stamp,
    /// When something authentic last came from the peer.
    #[n(11)]
    pub(crate) heard: Stamp,
    /// RFC 6311 was negotiated.
    #[n(12)]
    pub(crate) sync: bool,
    /// The term in which the keys were made (ha.md: replaced 2^14 terms later).
    #[n(13)]
    pub(crate) term: u64,
    #[n(14)]
    pub(crate) fate: Fate,
    /// Since when the peer has answered TEMPORARY_FAILURE without a success.
    #[n(15)]
    pub(crate) refused_since: Option<Stamp>,
    /// SHA-256 of the IKE_SA_INIT request we answered, to know repetitions.
    #[n(16)]
    pub(crate) init_hash: Option<Bytes>,
    /// The established time of the first IKE SA of this line, for status.
    #[n(17)]
    pub(crate) origin: Stamp,
    /// The last synchronisation of the peer's that we answered, and its M1: a
    /// repetition gets the same bytes, a replay nothing else.
    #[n(18)]
    pub(crate) synced: Option<Answered>,
    #[n(19)]
    pub(crate) synced_m1: u32,
    /// A takeover left the message ids in doubt (ha.md), and they have not been
    /// agreed upon since: see `sync` for what may be said meanwhile.
    #[cbor(n(20), with = "record::flag", has_nil)]
    pub(crate) doubt: bool,
}

/// What is to become of an IKE SA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(context_bound = "Now")]
pub(crate) enum Fate {
    /// It lives.
    #[n(0)]
    Live,
    /// We will send, or have sent, its Delete.
    #[n(1)]
    Deleting(#[cbor(n(0), with = "reason")] DeleteReason),
    /// The peer rekeyed it and is to delete it; we do at the time given.
    #[n(2)]
    Replaced(#[n(0)] Stamp),
    /// It came from the peer's half of a simultaneous rekeying. The old IKE SA
    /// (our SPI) still holds the children. Deleted at the time given unless it
    /// gets them.
    #[n(3)]
    Rival(#[n(0)] Stamp, #[cbor(n(1), with = "record::ike_spi")] IkeSpi),
    /// Its message ids are in doubt after a takeover: another IKE SA is being
    /// established and will replace it.
    #[n(4)]
    Doubtful,
}

/// A request of ours in an established IKE SA, and what it is for.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Request {
    #[n(0)]
    pub(crate) out: Outstanding,
    #[n(1)]
    pub(crate) task: Task,
}

/// What a request of ours is for: all that is needed to act on its response.
#[derive(Debug, Clone, Encode, Decode)]
pub(crate) enum Task {
    /// Is the peer alive?
    #[n(0)]
    Liveness,
    /// Make or rekey a Child SA.
    #[n(1)]
    Child(#[n(0)] NewChild),
    /// Rekey the IKE SA.
    #[n(2)]
    Rekey(#[n(0)] NewIke),
    /// Delete Child SAs, by our inbound SPIs.
    #[n(3)]
    DeleteChildren(#[cbor(n(0), with = "record::esp_spis")] Vec<EspSpi>),
    /// Delete the IKE SA.
    #[n(4)]
    DeleteIke,
    /// RFC 6311: agree on message ids after a takeover in doubt.
    #[n(5)]
    Sync(#[n(0)] u32, #[n(1)] u32),
}

/// A Child SA we have asked for.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct NewChild {
    #[n(0)]
    pub(crate) name: String,
    #[cbor(n(1), with = "record::esp_spi")]
    pub(crate) spi_in: EspSpi,
    /// Our nonce; empty in IKE_AUTH, which has those of IKE_SA_INIT.
    #[n(2)]
    pub(crate) nonce: Bytes,
    #[n(3)]
    pub(crate) eph: Option<Eph>,
    /// Inbound SPI of the Child SA it is to replace.
    #[cbor(n(4), with = "record::opt_esp_spi")]
    pub(crate) rekeys: Option<EspSpi>,
    /// The peer rekeyed the same Child SA meanwhile.
    #[n(5)]
    pub(crate) rival: Option<ChildRival>,
    /// Key exchange groups tried so far, to bound INVALID_KE_PAYLOAD.
    #[n(6)]
    pub(crate) rounds: u8,
    /// What we proposed; an answer must lie within.
    #[cbor(n(7), with = "record::selectors")]
    pub(crate) local_ts: Vec<TrafficSelector>,
    #[cbor(n(8), with = "record::selectors")]
    pub(crate) remote_ts: Vec<TrafficSelector>,
}

/// The Child SA that the peer's half of a simultaneous rekeying made.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct ChildRival {
    #[cbor(n(0), with = "record::esp_spi")]
    pub(crate) spi_in: EspSpi,
    /// The lower of the two nonces of its exchange (RFC 7296 §2.8.1).
    #[n(1)]
    pub(crate) nonce: Bytes,
}

/// An IKE SA we have asked for.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct NewIke {
    #[cbor(n(0), with = "record::ike_spi")]
    pub(crate) spi: IkeSpi,
    #[n(1)]
    pub(crate) nonce: Bytes,
    #[n(2)]
    pub(crate) eph: Eph,
    #[n(3)]
    pub(crate) rival: Option<IkeRival>,
    #[n(4)]
    pub(crate) rounds: u8,
}

/// The IKE SA that the peer's half of a simultaneous rekeying made.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct IkeRival {
    #[cbor(n(0), with = "record::ike_spi")]
    pub(crate) spi: IkeSpi,
    #[n(1)]
    pub(crate) nonce: Bytes,
}

/// A request of the peer's, and our answer to it.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
pub(crate) struct Answered {
    /// SHA-256 of the whole request: a repetition is the same bytes.
    #[n(0)]
    pub(crate) request: Bytes,
    #[n(1)]
    pub(crate) response: Bytes,
}

/// A child we want and do not have.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Wanted {
    #[n(0)]
    pub(crate) name: String,
    /// Not to be asked for before.
    #[n(1)]
    pub(crate) at: Stamp,
    #[n(2)]
    pub(crate) tries: u8,
}

/// One Child SA.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Child {
    #[n(0)]
    pub(crate) name: String,
    #[cbor(n(1), with = "record::esp_spi")]
    pub(crate) spi_in: EspSpi,
    #[cbor(n(2), with = "record::esp_spi")]
    pub(crate) spi_out: EspSpi,
    #[cbor(n(3), with = "record::aead")]
    pub(crate) aead: AeadAlg,
    #[cbor(n(4), with = "record::opt_group")]
    pub(crate) group: Option<Group>,
    #[n(5)]
    pub(crate) key_in: Key,
    #[n(6)]
    pub(crate) key_out: Key,
    #[cbor(n(7), with = "record::selectors")]
    pub(crate) local_ts: Vec<TrafficSelector>,
    #[cbor(n(8), with = "record::selectors")]
    pub(crate) remote_ts: Vec<TrafficSelector>,
    #[n(9)]
    pub(crate) since: Stamp,
    #[n(10)]
    pub(crate) rekey_at: Stamp,
    #[n(11)]
    pub(crate) expires_at: Stamp,
    /// Zero: not used outbound yet, unless no other is (see [`Child::is_deferred`]). Of all Child SAs of one name the one with
    /// the highest number sends.
    #[n(12)]
    pub(crate) outbound: u64,
    #[n(13)]
    pub(crate) state: ChildState,
    #[n(14)]
    pub(crate) term: u64,
    /// Inbound SPI of the Child SA it replaces, while the peer has not deleted
    /// that one.
    #[cbor(n(15), with = "record::opt_esp_spi")]
    pub(crate) replaces: Option<EspSpi>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(context_bound = "Now")]
pub(crate) enum ChildState {
    #[n(0)]
    Live,
    /// We will delete it, or have asked the peer to.
    #[n(1)]
    Doomed,
    /// Deleted; still receives what was on its way until then (ha.md: 5 s).
    #[n(2)]
    Retired(#[n(0)] Stamp),
}

/// Repeats its last answer until it expires.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map, context_bound = "Now")]
pub(crate) struct Closed {
    #[n(0)]
    pub(crate) answered: Answered,
    #[n(1)]
    pub(crate) until: Stamp,
    /// It never was established, so it counts as half-open.
    #[n(2)]
    pub(crate) half_open: bool,
}

impl IkeSa {
    pub(crate) fn established(&self) -> Option<&Established> {
        match &self.phase {
            Phase::Established(e) => Some(e),
            _ => None,
        }
    }

    /// SPIs in the order of the header.
    pub(crate) fn spis(&self) -> (IkeSpi, IkeSpi) {
        if self.initiator { (self.spi, self.peer_spi) } else { (self.peer_spi, self.spi) }
    }

    pub(crate) fn children(&self) -> &[Child] {
        self.established().map_or(&[], |e| &e.children)
    }

    /// The request of ours that waits for its response, and may be repeated until
    /// that comes. One from before a takeover in doubt may not: the old owner may
    /// have sent others since.
    pub(crate) fn outstanding(&self) -> Option<&Outstanding> {
        match &self.phase {
            Phase::InitSent(s) => Some(&s.request),
            Phase::AuthSent(s) => Some(&s.request),
            Phase::Established(e) if e.waits() => None,
            Phase::Established(e) => e.request.as_ref().map(|r| &r.out),
            _ => None,
        }
    }

    /// Its message ids are in doubt. (Builds that did not know the flag wrote the
    /// ways out alone.)
    pub(crate) fn in_doubt(&self) -> bool {
        self.established().is_some_and(|e| {
            e.doubt || e.fate == Fate::Doubtful || matches!(e.task(), Some(Task::Sync(..)))
        })
    }

    pub(crate) fn outstanding_mut(&mut self) -> Option<&mut Outstanding> {
        match &mut self.phase {
            Phase::InitSent(s) => Some(&mut s.request),
            Phase::AuthSent(s) => Some(&mut s.request),
            Phase::Established(e) => e.request.as_mut().map(|r| &mut r.out),
            _ => None,
        }
    }

    /// Begun by a peer and not authenticated.
    pub(crate) fn is_half_open(&self) -> bool {
        match &self.phase {
            Phase::InitAnswered(_) => true,
            Phase::Closed(c) => c.half_open,
            _ => false,
        }
    }

    /// Begun by us and not authenticated.
    pub(crate) fn is_initiating(&self) -> bool {
        matches!(self.phase, Phase::InitSent(_) | Phase::AuthSent(_))
    }

    /// Begun by us, and refused by an answer for which nobody vouches: we go on asking.
    pub(crate) fn is_refused(&self) -> bool {
        matches!(&self.phase, Phase::InitSent(sent) if sent.complained)
    }

    /// Every inbound ESP SPI that is in use or reserved here.
    pub(crate) fn esp_spis(&self) -> impl Iterator<Item = EspSpi> + '_ {
        let asked = match &self.phase {
            Phase::AuthSent(s) => s.child.as_ref(),
            Phase::Established(e) => match e.request.as_ref().map(|r| &r.task) {
                Some(Task::Child(child)) => Some(child),
                _ => None,
            },
            _ => None,
        };
        self.children().iter().map(|c| c.spi_in).chain(asked.map(|c| c.spi_in))
    }
}

impl Established {
    pub(crate) fn suite(&self) -> IkeSuite {
        IkeSuite { aead: self.keys.aead, prf: self.keys.prf, group: self.group }
    }

    pub(crate) fn child(&self, spi_in: EspSpi) -> Option<&Child> {
        self.children.iter().find(|c| c.spi_in == spi_in)
    }

    pub(crate) fn child_mut(&mut self, spi_in: EspSpi) -> Option<&mut Child> {
        self.children.iter_mut().find(|c| c.spi_in == spi_in)
    }

    pub(crate) fn task(&self) -> Option<&Task> {
        self.request.as_ref().map(|r| &r.task)
    }

    /// A Child SA of it sends.
    pub(crate) fn carries(&self) -> bool {
        let sends = |c: &Child| c.state == ChildState::Live && c.outbound > 0;
        self.children.iter().any(|c| sends(c) || c.is_deferred())
    }

    /// In doubt, and nothing was begun yet to end that.
    pub(crate) fn waits(&self) -> bool {
        self.doubt && self.fate != Fate::Doubtful && !matches!(self.task(), Some(Task::Sync(..)))
    }

    /// A takeover: nobody knows how far the old owner got. Its synchronisation, if
    /// it began one, is never sent again, and the next one starts above it.
    pub(crate) fn set_in_doubt(&mut self) {
        self.doubt = true;
        if let Some(Task::Sync(_, m1)) = self.task() {
            self.send_next = self.send_next.max(*m1);
            self.request = None;
        }
    }

    /// Forget a wish that came true, or wish for `name` at `at`.
    pub(crate) fn unwant(&mut self, name: &str) {
        self.wanted.retain(|w| w.name != name);
    }

    /// A Child SA of that name that is not on its way out.
    pub(crate) fn has_live(&self, name: &str) -> bool {
        self.children.iter().any(|c| c.name == name && c.state == ChildState::Live)
    }
}

impl Child {
    pub(crate) fn suite(&self) -> EspSuite {
        EspSuite { aead: self.aead, group: self.group }
    }

    pub(crate) fn is_retired(&self) -> bool {
        matches!(self.state, ChildState::Retired(_))
    }

    /// The peer asked for it, beside one that sends: it waits (`child::first_use`).
    pub(crate) fn is_deferred(&self) -> bool {
        self.state == ChildState::Live && self.outbound == 0 && self.replaces.is_none()
    }
}

impl<C> Encode<C> for IkeKeys {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        c: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.array(5)?;
        record::aead::encode(&self.aead, e, c)?;
        record::prf::encode(&self.prf, e, c)?;
        self.sk_d.encode(e, c)?;
        self.sk_ei.encode(e, c)?;
        self.sk_er.encode(e, c)
    }
}

impl<'b, C> Decode<'b, C> for IkeKeys {
    fn decode(d: &mut minicbor::Decoder<'b>, c: &mut C) -> Result<Self, minicbor::decode::Error> {
        if d.array()? != Some(5) {
            return Err(minicbor::decode::Error::message("keys of an IKE SA"));
        }
        let aead: AeadAlg = record::aead::decode(d, c)?;
        let prf: PrfAlg = record::prf::decode(d, c)?;
        let mut key = || Key::decode(d, c);
        Ok(Self { aead, prf, sk_d: key()?, sk_ei: key()?, sk_er: key()? })
    }
}

impl<C> Encode<C> for AuthKeys {
    fn encode<W: minicbor::encode::Write>(
        &self,
        e: &mut minicbor::Encoder<W>,
        c: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.array(3)?;
        record::prf::encode(&self.prf, e, c)?;
        self.sk_pi.encode(e, c)?;
        self.sk_pr.encode(e, c)
    }
}

impl<'b, C> Decode<'b, C> for AuthKeys {
    fn decode(d: &mut minicbor::Decoder<'b>, c: &mut C) -> Result<Self, minicbor::decode::Error> {
        if d.array()? != Some(3) {
            return Err(minicbor::decode::Error::message("keys of an authentication"));
        }
        let prf: PrfAlg = record::prf::decode(d, c)?;
        let mut key = || Key::decode(d, c);
        Ok(Self { prf, sk_pi: key()?, sk_pr: key()? })
    }
}

mod reason {
    use minicbor::{Decoder, Encoder};

    use super::DeleteReason;

    const ALL: [DeleteReason; 11] = [
        DeleteReason::Peer,
        DeleteReason::Command,
        DeleteReason::PeerDead,
        DeleteReason::InitialContact,
        DeleteReason::Rekeyed,
        DeleteReason::Redundant,
        DeleteReason::Expired,
        DeleteReason::Error,
        DeleteReason::NotEstablished,
        DeleteReason::InDoubt,
        DeleteReason::Crowded,
    ];

    pub(super) fn encode<C, W: minicbor::encode::Write>(
        value: &DeleteReason,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        let index = ALL.iter().position(|r| r == value).unwrap_or(0);
        e.u8(u8::try_from(index).unwrap_or(0))?.ok()
    }

    pub(super) fn decode<C>(
        d: &mut Decoder<'_>,
        _: &mut C,
    ) -> Result<DeleteReason, minicbor::decode::Error> {
        let index = usize::from(d.u8()?);
        ALL.get(index).copied().ok_or_else(|| minicbor::decode::Error::message("unknown reason"))
    }
}
