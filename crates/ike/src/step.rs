//! One atomic step: what a handler may read, and what it collects.
//!
//! Handlers put whole new values; nothing is visible before the endpoint
//! commits the step, and nothing remains of a step that failed. Only IV
//! counters move at once: a number given to a message that was then not sent
//! is simply never used.

use core::net::SocketAddr;
use std::collections::BTreeMap;

use crypto::aead::{AeadKey, IvSequence};
use wire::{
    id::{EspSpi, IkeSpi, MessageId},
    ike::{ExchangeType, Header, Message, Payloads, SealedBuilder},
};
use zeroize::Zeroizing;

use crate::{
    Context, Transmit,
    config::{ConnectionConfig, Limits},
    error::Error,
    event::{Event, KeyLogLine, KeyLogTable},
    keys::IkeKeys,
    record::Stamp,
    state::{Child, IkeSa, Path},
    table::{Registry, Table},
};

pub(crate) struct Step<'a, 'c> {
    pub(crate) cx: &'a mut Context<'c>,
    pub(crate) registry: &'a Registry,
    pub(crate) table: &'a Table,
    pub(crate) term: u64,
    /// No exchange of ours may begin (ha.md, split brain: the first 10 s).
    pub(crate) quiet: bool,
    pub(crate) ivs: &'a mut IvSequence,
    pub(crate) done: Collected,
}

/// What a step leaves behind.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) changes: BTreeMap<IkeSpi, Option<IkeSa>>,
    pub(crate) transmits: Vec<Transmit>,
    pub(crate) events: Vec<Event>,
    pub(crate) allocated: Vec<EspSpi>,
}

impl<'a> Step<'a, '_> {
    pub(crate) fn now(&self) -> Stamp {
        Stamp::at(self.cx.now)
    }

    pub(crate) fn limits(&self) -> &'a Limits {
        &self.registry.config.limits
    }

    /// The connection of an SA.
    pub(crate) fn connection(&self, sa: &IkeSa) -> Result<&'a ConnectionConfig, Error> {
        self.registry.of(sa).ok_or(Error::Internal("SA without connection"))
    }

    /// The value as this step sees it.
    pub(crate) fn get(&self, spi: IkeSpi) -> Option<&IkeSa> {
        match self.done.changes.get(&spi) {
            Some(change) => change.as_ref(),
            None => self.table.get(spi),
        }
    }

    pub(crate) fn put(&mut self, sa: IkeSa) {
        self.done.changes.insert(sa.spi, Some(sa));
    }

    pub(crate) fn delete(&mut self, spi: IkeSpi) {
        self.done.changes.insert(spi, None);
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.done.events.push(event);
    }

    pub(crate) fn transmit(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        self.done.transmits.push(Transmit { from, to, bytes });
    }

    pub(crate) fn send(&mut self, path: &Path, bytes: Vec<u8>) {
        self.transmit(path.local, path.remote, bytes);
    }

    /// The other SAs of a connection, as this step sees them.
    pub(crate) fn of_connection(&self, name: &str) -> Vec<&IkeSa> {
        let changed = self.done.changes.values().flatten();
        self.table
            .of_connection(name)
            .filter(|sa| !self.done.changes.contains_key(&sa.spi))
            .chain(changed.filter(|sa| sa.connection.as_deref() == Some(name)))
            .collect()
    }

    /// The number that makes a Child SA the sender of its child.
    pub(crate) fn next_outbound(&self, sa: &IkeSa) -> u64 {
        let name = sa.connection.as_deref().unwrap_or_default();
        let others = self.of_connection(name).into_iter().flat_map(IkeSa::children);
        others.chain(sa.children()).map(|c| c.outbound).max().unwrap_or(0).saturating_add(1)
    }

    /// An IKE SPI that nothing has, and no note's key.
    pub(crate) fn new_ike_spi(&mut self) -> IkeSpi {
        loop {
            let spi = IkeSpi(self.cx.rng.next_u64());
            let is_note = self.registry.noted(spi).is_some();
            if !spi.is_zero() && self.get(spi).is_none() && !is_note {
                return spi;
            }
        }
    }

    /// An inbound ESP SPI for a Child SA beside these, given back if the step fails or does not use it.
    pub(crate) fn new_esp_spi(&mut self, beside: &[Child]) -> Result<EspSpi, Error> {
        let like = beside.last().map(|child| child.spi_in);
        let spi = self.cx.spis.allocate(like).ok_or(Error::Internal("no ESP SPI is free"))?;
        self.done.allocated.push(spi);
        Ok(spi)
    }

    /// 32 bytes: at least half the key size of every PRF we have (RFC 7296 §2.10).
    pub(crate) fn nonce(&mut self) -> Vec<u8> {
        let mut nonce = vec![0; 32];
        self.cx.rng.fill_bytes(&mut nonce);
        nonce
    }

    /// `time`, less a drawn part of up to `percent` (RFC 7296 §2.8.1).
    pub(crate) fn jittered(
        &mut self,
        time: core::time::Duration,
        percent: u8,
    ) -> core::time::Duration {
        let span = u64::try_from(time.as_millis()).unwrap_or(u64::MAX) / 100 * u64::from(percent);
        let part = if span == 0 { 0 } else { self.cx.rng.next_u64() % span };
        time.saturating_sub(core::time::Duration::from_millis(part))
    }

    /// Encrypts a message of ours with the next IV of this term. `born` is the term in
    /// which the keys were made: an error once their IVs would begin to repeat.
    pub(crate) fn seal(
        &mut self,
        we_initiated: bool,
        keys: &IkeKeys,
        born: u64,
        builder: SealedBuilder,
    ) -> Result<Vec<u8>, Error> {
        let key = AeadKey::new(keys.aead, keys.outbound(we_initiated).expose())?;
        let iv = self
            .ivs
            .next_iv(born)
            .ok_or(Error::Internal("the IVs of this key, or of this term, are used up"))?;
        let sealed =
            builder.finish()?.seal(iv, |iv, aad, text| key.seal_in_place(iv, aad, text))?;
        Ok(sealed)
    }

    /// A line for tshark's `ikev2_decryption_table`.
    pub(crate) fn log_ike_keys(&mut self, sa: &IkeSa, keys: &IkeKeys) {
        if !self.registry.config.keylog {
            return;
        }
        let (spi_i, spi_r) = sa.spis();
        let line = Zeroizing::new(format!(
            "{spi_i},{spi_r},{},{},\"{}\",,,\"NONE [RFC4306]\"",
            *hex(keys.sk_ei.expose()),
            *hex(keys.sk_er.expose()),
            match keys.aead {
                crypto::aead::AeadAlg::Aes128Gcm16 => "AES-GCM-128 with 16 octet ICV [RFC5282]",
                crypto::aead::AeadAlg::Aes256Gcm16 => "AES-GCM-256 with 16 octet ICV [RFC5282]",
                crypto::aead::AeadAlg::ChaCha20Poly1305 => "ChaCha20-Poly1305 [RFC7634]",
            },
        ));
        self.event(Event::KeyLog(KeyLogLine { table: KeyLogTable::Ike, line }));
    }

    /// Two lines for tshark's `esp_sa`, one per direction.
    pub(crate) fn log_child_keys(&mut self, path: &Path, child: &Child) {
        if !self.registry.config.keylog {
            return;
        }
        let (local, remote) = (path.local.ip(), path.remote.ip());
        let ways = [
            (remote, local, child.spi_in, &child.key_in),
            (local, remote, child.spi_out, &child.key_out),
        ];
        for (from, to, spi, key) in ways {
            let line = Zeroizing::new(format!(
                "\"{}\",\"{from}\",\"{to}\",\"0x{spi}\",\"{}\",\"0x{}\",\"NULL\",\"\"",
                if from.is_ipv4() { "IPv4" } else { "IPv6" },
                match child.aead {
                    crypto::aead::AeadAlg::ChaCha20Poly1305 => "ChaCha20 with Poly1305 [RFC7634]",
                    _ => "AES-GCM with 16 octet ICV [RFC4106]",
                },
                *hex(key.expose()),
            ));
            self.event(Event::KeyLog(KeyLogLine { table: KeyLogTable::Esp, line }));
        }
    }
}

fn hex(bytes: &[u8]) -> Zeroizing<String> {
    // Reserved at once: growing would leave unwiped copies behind.
    let mut text = Zeroizing::new(String::with_capacity(bytes.len() * 2));
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    text
}

/// The header of a message of ours in an SA.
pub(crate) fn header(sa: &IkeSa, exchange: ExchangeType, response: bool, id: u32) -> Header {
    let (initiator_spi, responder_spi) = sa.spis();
    Header {
        initiator_spi,
        responder_spi,
        exchange,
        from_initiator: sa.initiator,
        response,
        message_id: MessageId(id),
    }
}

/// A decrypted message; the plaintext is wiped on drop.
pub(crate) struct Opened {
    text: Zeroizing<Vec<u8>>,
    sealed: wire::ike::Sealed,
}

impl Opened {
    /// The payloads. What is wrong in here was said by the authentic peer.
    pub(crate) fn payloads(&self) -> Result<Payloads<'_>, wire::ike::ParseError> {
        let payloads = self.sealed.parse_opened(&self.text)?;
        match payloads.doubled() {
            // security.md 2: a doubled payload is malformed.
            Some(payload) => {
                Err(wire::ike::ParseError::Malformed { payload, fault: wire::ike::Fault::TooMany })
            }
            None => Ok(payloads),
        }
    }
}

/// Decrypts a message to us. The datagram itself stays as it is.
pub(crate) fn open(
    datagram: &[u8],
    message: &Message<'_>,
    we_initiated: bool,
    keys: &IkeKeys,
) -> Result<Opened, Error> {
    // Fragments are not negotiated, so none is expected (RFC 7383 §2.3).
    let sealed = message.sealed.filter(|s| s.fragment.is_none()).ok_or(Error::NotExpected)?;
    if !message.payloads.is_empty() {
        return Err(Error::NotExpected);
    }
    let key = AeadKey::new(keys.aead, keys.inbound(we_initiated).expose())?;
    let mut copy = Zeroizing::new(datagram.to_vec());
    let parts = sealed.split(&mut copy).ok_or(Error::NotExpected)?;
    let text =
        key.open_in_place(parts.iv, parts.aad, parts.body).map_err(|_| Error::NotAuthentic)?;
    Ok(Opened { text: Zeroizing::new(text.to_vec()), sealed })
}
