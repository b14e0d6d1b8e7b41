//! One pair of SAs: outbound numbers, IVs and leases; the inbound window;
//! sealing and opening in place (RFC 4303 §3.3, §3.4).
//!
//! The counters live in a **term** of the endpoint. Whoever owns the endpoint
//! in a new term lets each SA *enter* it when it is first touched:
//!
//! ```text
//!   shadow, or owner of an older term           owner in term T
//!   ─────────────────────────────────  enter   ─────────────────────────────
//!   ceiling: all below may be used     ─────►  next = max(next, ceiling+jump)
//!   top: all at or below is refused            IVs = T ‖ the endpoint's counter
//!   grant for T, if a switchover       ─────►  next = max(next, grant.next)
//!                                              window = grant.window
//! ```
//!
//! So two owners never share a sequence number as long as each stays below the
//! ceiling the other has acknowledged, and never share an IV at all.

use core::net::SocketAddr;
use core::time::Duration;

use crypto::aead::{AeadKey, IvSequence};
use smallvec::SmallVec;
use wire::esp;
use wire::id::{ConnectionId, EndpointId, EspSpi, Term};
use wire::ip::{Ecn, Packet, set_traffic_class};
use wire::ts::TrafficSelector;

use crate::batch::{Slot, Verdict};
use crate::command::{CommandError, Counters, Sa};
use crate::ecn;
use crate::reason::Reason;
use crate::replay::Window;
use crate::report::{Expiry, Report, SaStats};
use crate::table::Placed;

/// One past the last sequence number. RFC 4303 §3.3.3: without ESN the counter
/// must not cycle.
pub(crate) const SEQ_END: u64 = 1 << 32;
/// From here on a rekey is asked for: 2^29 numbers are left.
const SEQ_EXPIRING: u64 = SEQ_END - (1 << 29);
/// Terms after which a rekey is asked for (ha.md, "ESP counters").
const TERMS_EXPIRING: u64 = 1 << 14;
/// A low lease is reported again after this long, when leases are obeyed or
/// are about to be.
const LEASE_RETRY: Duration = Duration::from_millis(50);
/// The same, while nobody waits for it.
const LEASE_RETRY_SOLO: Duration = Duration::from_secs(1);
/// A peer that is seen elsewhere is reported at most this often: whoever outruns its packets, or a translator that
/// alternates, costs no more.
const MOVED_INTERVAL: Duration = Duration::from_secs(1);
/// Span over which the packet rate is taken.
const RATE_SPAN: Duration = Duration::from_millis(500);

/// What sealing needs to know of the endpoint's ownership.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ownership {
    pub(crate) term: Term,
    pub(crate) seq_jump: u64,
    /// Whether ceilings bind.
    pub(crate) obey: bool,
    /// Whether somebody waits for low leases to be reported, and for window tops: there is a shadow.
    pub(crate) leasing: bool,
}

/// Things to report, until they are polled.
#[derive(Debug, Default)]
struct Notes {
    lease_low: bool,
    expiring_sequence: bool,
    expiring_terms: bool,
    peer_moved: Option<SocketAddr>,
}

#[derive(Debug)]
struct Grant {
    term: Term,
    next_seq: u64,
    ceiling: u64,
    window: Window,
}

#[derive(Debug)]
struct Outbound {
    key: AeadKey,
    next_seq: u64,
    ceiling: u64,
    /// From this number on, `attend` has something to look at.
    attend_at: u64,
    /// From this number on, the lease is low.
    low_at: u64,
    ask_again_at: Duration,
    rate_at: Duration,
    rate_seq: u64,
    rate_per_s: u64,
    told_sequence: bool,
    told_terms: bool,
}

/// What is remembered of an SA that was removed, should it come back.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) endpoint: EndpointId,
    fingerprint: [u8; 32],
    counters: Counters,
}

impl Ended {
    /// What it had used when it was removed.
    pub(crate) fn counters(&self) -> Counters {
        self.counters.clone()
    }
}

/// Mostly one, which then lies beside the rest: each packet that is opened is held against it, and of ten thousand SAs little
/// is near.
type Selectors = SmallVec<[TrafficSelector; 1]>;

/// An installed pair of SAs.
#[derive(Debug)]
pub(crate) struct SaState {
    pub(crate) endpoint: EndpointId,
    pub(crate) connection: ConnectionId,
    pub(crate) spi_in: EspSpi,
    pub(crate) spi_out: EspSpi,
    pub(crate) local_ts: Selectors,
    pub(crate) remote_ts: Selectors,
    verdict: Verdict,
    peer: SocketAddr,
    follow_peer: bool,
    /// When another address was reported last.
    told_peer_at: Option<Duration>,
    born: Term,
    /// Hash of endpoint, SPIs, algorithm and keys, to know a repeated installation.
    fingerprint: [u8; 32],
    term: Option<Term>,
    grant: Option<Box<Grant>>,
    out: Outbound,
    key_in: AeadKey,
    window: Window,
    notes: Notes,
    /// Whether it is in outbound use.
    pub(crate) used: bool,
    /// Whether it is in the shard's list of SAs with notes.
    pub(crate) listed: bool,
    /// Whether it is in the shard's list of moved windows.
    pub(crate) moved: bool,
    stats: SaStats,
}

impl Placed for SaState {
    #[inline]
    fn spi_in(&self) -> EspSpi {
        self.spi_in
    }
}

impl SaState {
    /// Expands the keys. `owned` is the term, if the endpoint is owned here
    /// now: then the SA starts in it, at `sa.next_seq`.
    pub(crate) fn new(sa: Sa, owned: Option<Term>) -> Result<Self, CommandError> {
        let bad_key = |error| CommandError::Key(sa.spi_in, error);
        let key_out = AeadKey::new(sa.alg, sa.keymat_out.expose()).map_err(bad_key)?;
        let key_in = AeadKey::new(sa.alg, sa.keymat_in.expose()).map_err(bad_key)?;
        let stats = SaStats {
            spi_in: sa.spi_in,
            spi_out: sa.spi_out,
            connection: sa.connection,
            endpoint: sa.endpoint,
            outbound: false,
            packets_out: 0,
            bytes_out: 0,
            packets_in: 0,
            bytes_in: 0,
            last_in: None,
            last_out: None,
            next_seq: 0,
            ceiling: 0,
            top: 0,
        };
        let out = Outbound {
            key: key_out,
            // RFC 4303 §3.3.3: the first packet has number 1.
            next_seq: sa.next_seq.clamp(1, SEQ_END),
            ceiling: sa.ceiling.min(SEQ_END),
            attend_at: 0,
            low_at: 0,
            ask_again_at: Duration::ZERO,
            rate_at: Duration::ZERO,
            rate_seq: 0,
            rate_per_s: 0,
            told_sequence: false,
            told_terms: false,
        };
        let mut state = Self {
            endpoint: sa.endpoint,
            connection: sa.connection,
            spi_in: sa.spi_in,
            spi_out: sa.spi_out,
            verdict: verdict(&sa),
            peer: sa.remote,
            follow_peer: sa.udp_encap,
            born: sa.born,
            fingerprint: fingerprint(&sa),
            term: owned,
            grant: None,
            out,
            key_in,
            window: Window::new(),
            notes: Notes::default(),
            told_peer_at: None,
            used: false,
            listed: false,
            moved: false,
            stats,
            local_ts: Selectors::from_slice(&sa.local_ts),
            remote_ts: Selectors::from_slice(&sa.remote_ts),
        };
        state.out.new_lease();
        if let Some(term) = owned {
            state.check_age(term);
        }
        Ok(state)
    }

    /// Whether `sa` has the same endpoint, SPIs, algorithm and keys.
    pub(crate) fn is_same(&self, sa: &Sa) -> bool {
        crypto::ct_eq(&self.fingerprint, &fingerprint(sa))
    }

    /// What to remember of it.
    pub(crate) fn ended(&self) -> Ended {
        Ended { endpoint: self.endpoint, fingerprint: self.fingerprint, counters: self.counters() }
    }

    /// Goes on above what was sent, and refuses what was received, before it was removed. False if that was another SA.
    pub(crate) fn recall(&mut self, ended: &Ended) -> bool {
        let same = crypto::ct_eq(&self.fingerprint, &ended.fingerprint);
        if same {
            self.out.next_seq = self.out.next_seq.max(ended.counters.next_seq);
            self.out.new_lease();
            self.window.merge(&ended.counters.window);
        }
        same
    }

    /// Takes what may change while an SA lives: addresses, encapsulation,
    /// selectors, ceiling. The counters go on.
    pub(crate) fn update(&mut self, sa: Sa) {
        self.relocate(sa.local, sa.remote, sa.udp_encap);
        self.local_ts = Selectors::from_slice(&sa.local_ts);
        self.remote_ts = Selectors::from_slice(&sa.remote_ts);
        self.connection = sa.connection;
        self.stats.connection = sa.connection;
        if sa.ceiling > self.out.ceiling {
            self.out.ceiling = sa.ceiling.min(SEQ_END);
            self.out.new_lease();
        }
    }

    /// The outer addresses changed.
    pub(crate) fn relocate(&mut self, local: SocketAddr, remote: SocketAddr, udp_encap: bool) {
        self.verdict =
            Verdict::Send { endpoint: self.endpoint, from: local, to: remote, udp_encap };
        self.peer = remote;
        self.follow_peer = udp_encap;
        self.notes.peer_moved = None;
    }

    /// Brings the counters into the owner's term; see the drawing at the top.
    #[inline]
    pub(crate) fn enter_term(&mut self, own: Ownership) {
        if self.term != Some(own.term) {
            self.enter_new_term(own);
        }
    }

    #[cold]
    fn enter_new_term(&mut self, own: Ownership) {
        let out = &mut self.out;
        match self.grant.take() {
            Some(grant) if grant.term == own.term => {
                out.next_seq = out.next_seq.max(grant.next_seq).min(SEQ_END);
                // Not the highest we ever heard of: the other instance would
                // start at the one it holds acknowledged.
                out.ceiling = grant.ceiling.min(SEQ_END);
                self.window = grant.window;
            }
            stale => {
                // A grant for a later term may still come into its own.
                self.grant = stale.filter(|grant| grant.term > own.term);
                let start = out.ceiling.saturating_add(own.seq_jump);
                out.next_seq = out.next_seq.max(start).min(SEQ_END);
            }
        }
        out.rate_at = Duration::ZERO;
        out.rate_per_s = 0;
        out.ask_again_at = Duration::ZERO;
        out.new_lease();
        self.term = Some(own.term);
        self.check_age(own.term);
    }

    fn check_age(&mut self, term: Term) {
        let age = term.0.saturating_sub(self.born.0);
        if age >= IvSequence::TERMS {
            // The term's bits in the IV are back where the key began.
            self.out.next_seq = SEQ_END;
        }
        if age >= TERMS_EXPIRING && !self.out.told_terms {
            self.out.told_terms = true;
            self.notes.expiring_terms = true;
        }
    }

    /// Exact counters of a grant, good for `term` alone.
    pub(crate) fn resume(&mut self, term: Term, counters: &Counters) {
        if self.term == Some(term) {
            // Already under way: go above the larger of the two (ha.md, "Split
            // brain": the winner continues above both).
            self.out.next_seq = self.out.next_seq.max(counters.next_seq).min(SEQ_END);
            self.out.ceiling = self.out.ceiling.max(counters.ceiling).min(SEQ_END);
            self.out.new_lease();
            self.window.merge(&counters.window);
            return;
        }
        self.grant = Some(Box::new(Grant {
            term,
            next_seq: counters.next_seq,
            ceiling: counters.ceiling,
            window: counters.window,
        }));
    }

    /// Raises the ceiling.
    pub(crate) fn lease(&mut self, ceiling: u64) {
        if ceiling > self.out.ceiling {
            self.out.ceiling = ceiling.min(SEQ_END);
            self.out.new_lease();
        }
    }

    /// A window top streamed by the owner.
    pub(crate) fn refuse_through(&mut self, top: u32) {
        self.window.refuse_through(top);
    }

    /// Whether the next number is below the ceiling.
    pub(crate) fn below_ceiling(&self) -> bool {
        self.out.next_seq < self.out.ceiling || self.out.next_seq >= SEQ_END
    }

    /// Has the low lease reported now, however lately it was.
    pub(crate) fn ask_lease(&mut self) {
        self.notes.lease_low = true;
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            spi_in: self.spi_in,
            next_seq: self.out.next_seq,
            ceiling: self.out.ceiling,
            window: self.window,
        }
    }

    pub(crate) fn stats(&self) -> SaStats {
        SaStats {
            outbound: self.used,
            next_seq: self.out.next_seq,
            ceiling: self.out.ceiling,
            top: self.window.top(),
            ..self.stats
        }
    }

    /// Highest inbound number seen.
    pub(crate) fn top(&self) -> u32 {
        self.window.top()
    }

    /// Whether there is something to report.
    #[inline]
    pub(crate) fn has_notes(&self) -> bool {
        let n = &self.notes;
        n.lease_low || n.expiring_sequence || n.expiring_terms || n.peer_moved.is_some()
    }

    /// The next thing to report.
    pub(crate) fn take_note(&mut self) -> Option<Report> {
        let (spi_in, connection) = (self.spi_in, self.connection);
        if core::mem::take(&mut self.notes.lease_low) {
            return Some(Report::LeaseLow {
                spi_in,
                next_seq: self.out.next_seq,
                ceiling: self.out.ceiling,
                rate_per_s: self.out.rate_per_s,
            });
        }
        if core::mem::take(&mut self.notes.expiring_sequence) {
            return Some(Report::Expiring { spi_in, connection, why: Expiry::Sequence });
        }
        if core::mem::take(&mut self.notes.expiring_terms) {
            return Some(Report::Expiring { spi_in, connection, why: Expiry::Terms });
        }
        let from = self.notes.peer_moved.take()?;
        Some(Report::PeerMoved { spi_in, connection, from })
    }

    /// Makes the inner packet in `slot` an ESP packet, in place. The caller
    /// has seen to it that the SA is in the owner's term, whose IVs `ivs` are.
    pub(crate) fn seal(
        &mut self,
        slot: &mut Slot,
        packet: &Packet,
        own: Ownership,
        ivs: &mut IvSequence,
        now: Duration,
    ) -> Result<Verdict, Reason> {
        let taken = self.out.take(own.obey, ivs, self.born);
        if self.out.next_seq >= self.out.attend_at {
            self.attend(own, now);
        }
        let (seq, iv) = taken?;
        let inner_len = packet.total_len;
        let next_header =
            if packet.is_ipv4() { esp::next_header::IPV4 } else { esp::next_header::IPV6 };

        if !slot.narrow(0, inner_len) {
            return Err(Reason::MalformedInner);
        }
        let front = esp::HEADER_LEN + esp::IV_LEN;
        let back = esp::padding_len(inner_len) + esp::TRAILER_LEN + esp::ICV_LEN;
        let whole = slot.widen(front, back).ok_or(Reason::TooLong)?;
        let fit = || Reason::TooLong;
        let (aad, rest) = whole.split_first_chunk_mut::<{ esp::HEADER_LEN }>().ok_or_else(fit)?;
        let (iv_out, rest) = rest.split_first_chunk_mut::<{ esp::IV_LEN }>().ok_or_else(fit)?;
        let (body, tag) = rest.split_last_chunk_mut::<{ esp::ICV_LEN }>().ok_or_else(fit)?;
        *aad = esp::Header { spi: self.spi_out, seq }.to_bytes();
        *iv_out = iv;
        let trailer = body.get_mut(inner_len..).ok_or_else(fit)?;
        esp::write_trailer(inner_len, next_header, trailer).ok_or_else(fit)?;
        *tag = self.out.key.seal_in_place(iv, aad, body).map_err(|_| Reason::TooLong)?;

        slot.traffic_class = packet.traffic_class;
        self.stats.packets_out += 1;
        self.stats.bytes_out += inner_len as u64;
        self.stats.last_out = Some(now);
        Ok(self.verdict)
    }

    /// Looks after lease, rate and expiry; called for few packets.
    fn attend(&mut self, own: Ownership, now: Duration) {
        let out = &mut self.out;
        if out.next_seq >= SEQ_EXPIRING && !out.told_sequence {
            out.told_sequence = true;
            self.notes.expiring_sequence = true;
        }
        let span = now.saturating_sub(out.rate_at);
        if out.rate_at == Duration::ZERO {
            (out.rate_at, out.rate_seq) = (now, out.next_seq);
        } else if span >= RATE_SPAN {
            let sent = u128::from(out.next_seq - out.rate_seq.min(out.next_seq));
            let rate = sent * 1_000_000 / span.as_micros().max(1);
            out.rate_per_s = u64::try_from(rate).unwrap_or(u64::MAX);
            (out.rate_at, out.rate_seq) = (now, out.next_seq);
        }
        if out.next_seq >= out.low_at && out.next_seq < SEQ_END && now >= out.ask_again_at {
            out.ask_again_at = now + if own.leasing { LEASE_RETRY } else { LEASE_RETRY_SOLO };
            self.notes.lease_low = true;
        }
        out.attend_next();
    }

    /// Makes the ESP packet in `slot` the inner packet, in place. The caller
    /// has seen to it that the SA is in the owner's term. The window may move
    /// also with an error: the tag was right, but not what was inside.
    pub(crate) fn open(&mut self, slot: &mut Slot, now: Duration) -> Result<(), Reason> {
        let (outer_ecn, from) = (slot.ecn, slot.peer);
        let parts = esp::split(slot.packet_mut()).ok_or(Reason::MalformedEsp)?;
        let seq = parts.header.seq;
        // RFC 4303 §3.4.3: first check whether the number is new, then the ICV,
        // and move the window only when that was right.
        self.window.check(seq)?;
        let plain = self
            .key_in
            .open_in_place(parts.iv, &parts.aad, parts.body)
            .map_err(|_| Reason::NotAuthentic)?;
        let newest = seq > self.window.top();
        self.window.commit(seq);
        self.stats.last_in = Some(now);
        if newest
            && self.follow_peer
            && let Some(from) = from.filter(|from| *from != self.peer)
            && self.told_peer_at.is_none_or(|at| now >= at + MOVED_INTERVAL)
        {
            self.told_peer_at = Some(now);
            self.notes.peer_moved = Some(from);
        }

        let (inner_len, next_header) = esp::read_trailer(plain).ok_or(Reason::BadPadding)?;
        match next_header {
            esp::next_header::IPV4 | esp::next_header::IPV6 => {}
            esp::next_header::DUMMY => return Err(Reason::Dummy),
            _ => return Err(Reason::NextHeader),
        }
        let inner = plain.get_mut(..inner_len).ok_or(Reason::BadInner)?;
        let packet = Packet::parse(inner).map_err(|_| Reason::BadInner)?;
        if packet.is_ipv4() != (next_header == esp::next_header::IPV4) {
            return Err(Reason::BadInner);
        }
        // RFC 4301 §5.2, step 4: the packet must be one that its SA is for.
        if !packet.matches(&self.remote_ts, &self.local_ts) {
            return Err(Reason::Selectors);
        }
        let inner_ecn = Ecn::of(packet.traffic_class);
        let ecn = ecn::decapsulate(inner_ecn, outer_ecn).ok_or(Reason::Congestion)?;
        if ecn != inner_ecn {
            set_traffic_class(inner, ecn.apply(packet.traffic_class));
        }
        // RFC 4303 §2.7: the inner header's own length takes off what else was
        // put behind the packet to hide its length.
        if !slot.narrow(esp::HEADER_LEN + esp::IV_LEN, packet.total_len) {
            return Err(Reason::BadInner);
        }
        self.stats.packets_in += 1;
        self.stats.bytes_in += packet.total_len as u64;
        Ok(())
    }
}

impl Outbound {
    /// The next sequence number and IV.
    #[inline]
    fn take(
        &mut self,
        obey: bool,
        ivs: &mut IvSequence,
        born: Term,
    ) -> Result<(u32, [u8; 8]), Reason> {
        let seq = u32::try_from(self.next_seq).map_err(|_| Reason::SaExhausted)?;
        if obey && self.next_seq >= self.ceiling {
            return Err(Reason::LeaseExhausted);
        }
        let iv = ivs.next_iv(born.0).ok_or(Reason::SaExhausted)?;
        self.next_seq += 1;
        Ok((seq, iv))
    }

    /// The lease from `next_seq` to `ceiling` has just been given: half of it
    /// may be used before more is asked for.
    fn new_lease(&mut self) {
        let left = self.ceiling.saturating_sub(self.next_seq);
        self.low_at = self.next_seq.saturating_add(left / 2);
        // At the end of the numbers no higher ceiling can come.
        if self.ceiling >= SEQ_END && left > 0 {
            self.low_at = SEQ_END;
        }
        self.ask_again_at = Duration::ZERO;
        self.attend_at = self.next_seq;
    }

    /// Sets the number from which `attend` is wanted again. Looking in every
    /// 1,024 packets keeps the rate fresh at no cost.
    fn attend_next(&mut self) {
        self.attend_at = if self.next_seq >= self.low_at {
            self.next_seq
        } else {
            (self.next_seq + 1024).min(self.low_at)
        };
    }
}

fn verdict(sa: &Sa) -> Verdict {
    Verdict::Send { endpoint: sa.endpoint, from: sa.local, to: sa.remote, udp_encap: sa.udp_encap }
}

fn fingerprint(sa: &Sa) -> [u8; 32] {
    let (id, bits) = sa.alg.transform();
    crypto::hash::sha256(&[
        &[sa.endpoint.0],
        &sa.spi_in.to_bytes(),
        &sa.spi_out.to_bytes(),
        &id.to_be_bytes(),
        &bits.unwrap_or(0).to_be_bytes(),
        sa.keymat_in.expose(),
        sa.keymat_out.expose(),
    ])
}
