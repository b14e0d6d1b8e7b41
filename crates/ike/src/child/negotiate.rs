//! What both sides of a Child SA agree on: selectors (RFC 7296 §2.9), algorithms
//! (§2.7), keys (§2.17); as the responder, and from a response.

use crypto::dh::{Ephemeral, Group};
use wire::{
    id::EspSpi,
    ike::{
        GroupId, KeyExchange, NotifyType, Payload, Payloads, Proposal, ProtocolId, SealedBuilder,
    },
    ts::{TrafficSelector, narrow},
};

use super::{Nonces, lifetime};
use crate::{
    config::{ChildConfig, ConnectionConfig},
    error::Refusal,
    event::{Event, Failure, Selectors, Side, What},
    keys::{IkeKeys, Key},
    proposal::{self, EspProposal, choose_esp, offers},
    state::{Child, ChildState, Eph, IkeSa, NewChild},
    step::Step,
};

/// What a responder agreed to.
pub(crate) struct Made {
    pub(crate) child: Child,
    proposals: Vec<Proposal>,
    public: Option<(Group, Vec<u8>)>,
    tsi: Vec<TrafficSelector>,
    tsr: Vec<TrafficSelector>,
}

/// Adds SA, \[KE,\] TSi, TSr of an offer. Nonce and notifies are the caller's.
pub(crate) fn push_offer(
    builder: &mut SealedBuilder,
    config: &ChildConfig,
    new: &NewChild,
    exchange: bool,
) {
    builder.push(&Payload::Sa(proposal::esp_payload(&config.esp_proposals, new.spi_in, exchange)));
    if exchange {
        builder.push(&Payload::Nonce(&new.nonce));
        push_ke(builder, new.eph.as_ref());
    }
    builder.push(&Payload::TsI(new.local_ts.clone())).push(&Payload::TsR(new.remote_ts.clone()));
}

pub(crate) fn push_ke(builder: &mut SealedBuilder, eph: Option<&Eph>) {
    let key = eph.and_then(|e| Ephemeral::from_secret_bytes(e.group, e.secret.expose()).ok());
    if let Some(key) = key {
        let group = GroupId(key.group().transform_id());
        builder.push(&Payload::Ke(KeyExchange { group, data: &key.public() }));
    }
}

/// Adds what answers the offer that led to `made`. In CREATE_CHILD_SA the nonce
/// goes between SA and KE, and is the caller's: `push_answer_with`.
pub(crate) fn push_answer(builder: &mut SealedBuilder, made: &Made) {
    push_answer_with(builder, made, None);
}

pub(super) fn push_answer_with(builder: &mut SealedBuilder, made: &Made, nonce: Option<&[u8]>) {
    builder.push(&Payload::Sa(made.proposals.clone()));
    if let Some(nonce) = nonce {
        builder.push(&Payload::Nonce(nonce));
    }
    if let Some((group, public)) = &made.public {
        builder
            .push(&Payload::Ke(KeyExchange { group: GroupId(group.transform_id()), data: public }));
    }
    builder.push(&Payload::TsI(made.tsi.clone())).push(&Payload::TsR(made.tsr.clone()));
}

/// Which of our children an offer means, and what remains of its selectors
/// (RFC 7296 §2.9). An exact match wins, then one that contains the
/// initiator's first selectors, which may come from a packet; then one that is
/// not up yet.
fn select<'a>(
    conn: &'a ConnectionConfig,
    only: Option<&str>,
    live: impl Fn(&str) -> bool,
    tsi: &[TrafficSelector],
    tsr: &[TrafficSelector],
) -> Option<(&'a ChildConfig, Vec<TrafficSelector>, Vec<TrafficSelector>)> {
    let first_in = |narrowed: &[TrafficSelector], offered: &[TrafficSelector]| {
        offered.first().is_some_and(|f| narrowed.iter().any(|n| n.contains(f)))
    };
    let mut best = None;
    let mut best_score = 0;
    for config in conn.children.iter().filter(|c| only.is_none_or(|name| name == c.name)) {
        let remote = narrow(tsi, &config.remote_ts);
        let local = narrow(tsr, &config.local_ts);
        if remote.is_empty() || local.is_empty() {
            continue;
        }
        let exact = remote == config.remote_ts && local == config.local_ts;
        let first = first_in(&remote, tsi) && first_in(&local, tsr);
        let score = 1 + u8::from(exact) * 4 + u8::from(first) * 2 + u8::from(!live(&config.name));
        if score > best_score {
            best_score = score;
            best = Some((config, local, remote));
        }
    }
    best
}

/// Agrees to an offered Child SA, or says why not.
pub(crate) fn accept(
    step: &mut Step<'_, '_>,
    sa: &IkeSa,
    conn: &ConnectionConfig,
    keys: &IkeKeys,
    payloads: &Payloads<'_>,
    nonces: Nonces<'_>,
    rekeyed: Option<(&str, bool)>,
) -> Result<Made, Refusal> {
    let (Some(proposals), Some(tsi), Some(tsr)) = (payloads.sa(), payloads.ts_i(), payloads.ts_r())
    else {
        return Err(Refusal::syntax());
    };
    if sa.children().len() >= step.limits().children_per_ike {
        return Err(Refusal::new(NotifyType::NO_ADDITIONAL_SAS));
    }
    // In IKE_AUTH there is no key exchange (RFC 7296 §1.2).
    let exchange = sa.established().is_some();
    let fail = |step: &mut Step<'_, '_>, child: Option<&str>, what, sent, expected| {
        step.event(Event::Failed(Failure {
            connection: Some(conn.name.clone()),
            child: child.map(str::to_owned),
            peer: sa.path.remote,
            what,
            began: Side::Peer,
            sender: Side::Peer,
            sent,
            expected,
        }));
    };
    let live = |name: &str| sa.established().is_some_and(|e| e.has_live(name));
    let only = rekeyed.map(|(name, _)| name);
    let Some((config, local_ts, remote_ts)) = select(conn, only, live, tsi, tsr) else {
        let ours: Vec<String> = conn
            .children
            .iter()
            .map(|c| format!("{} === {}", Selectors(&c.remote_ts), Selectors(&c.local_ts)))
            .collect();
        let sent = format!("TSi {} === TSr {}", Selectors(tsi), Selectors(tsr));
        fail(step, only, What::Selectors, sent, format!("part of {}", ours.join(" or ")));
        return Err(Refusal::new(NotifyType::TS_UNACCEPTABLE));
    };
    let theirs = offers(proposals, ProtocolId::ESP);
    let ke = payloads.ke().filter(|_| exchange);
    let sent_group = ke.and_then(|ke| Group::from_transform_id(ke.group.0));
    let chosen = choose_esp(&config.esp_proposals, &theirs, sent_group, exchange)
        .and_then(|(offer, suite)| Some((offer, suite, offer.spi.esp()?)));
    let Some((offer, suite, spi_out)) = chosen else {
        let ours: Vec<String> = config.esp_proposals.iter().map(EspProposal::to_string).collect();
        let sent = format!("esp_proposals {}", proposal::describe(proposals));
        fail(step, Some(&config.name), What::EspProposal, sent, ours.join(", "));
        return Err(Refusal::new(NotifyType::NO_PROPOSAL_CHOSEN));
    };
    let mut public = None;
    let mut shared = None;
    if let Some(group) = suite.group {
        let Some(ke) = ke.filter(|_| sent_group == Some(group)) else {
            // RFC 7296 §1.3: name the group we want.
            let mut refusal = Refusal::new(NotifyType::INVALID_KE_PAYLOAD);
            refusal.data = group.transform_id().to_be_bytes().to_vec();
            return Err(refusal);
        };
        let eph = Ephemeral::generate(group, step.cx.rng);
        // security.md 6: a refused value ends the exchange, not the IKE SA.
        shared = match eph.agree(ke.data) {
            Ok(shared) => Some(shared),
            Err(_) => return Err(Refusal::new(NotifyType::NO_PROPOSAL_CHOSEN)),
        };
        public = Some((group, eph.public()));
    }
    let child_keys = keys
        .child(suite.aead, shared.as_ref(), nonces.ni, nonces.nr)
        .map_err(|_| Refusal::temporary())?;
    let spi_in =
        step.new_esp_spi(sa.children()).map_err(|_| Refusal::new(NotifyType::NO_ADDITIONAL_SAS))?;
    let child = make(
        step,
        conn,
        Agreed {
            name: &config.name,
            spi_in,
            spi_out,
            suite,
            key_in: child_keys.to_responder,
            key_out: child_keys.to_initiator,
            local_ts: local_ts.clone(),
            remote_ts: remote_ts.clone(),
        },
    );
    Ok(Made {
        child,
        proposals: proposal::esp_answer(offer.number, suite, spi_in),
        public,
        tsi: remote_ts,
        tsr: local_ts,
    })
}

/// All that both sides agreed on.
struct Agreed<'a> {
    name: &'a str,
    spi_in: EspSpi,
    spi_out: EspSpi,
    suite: proposal::EspSuite,
    key_in: Key,
    key_out: Key,
    local_ts: Vec<TrafficSelector>,
    remote_ts: Vec<TrafficSelector>,
}

fn make(step: &mut Step<'_, '_>, conn: &ConnectionConfig, agreed: Agreed<'_>) -> Child {
    let (rekey_at, expires_at) = lifetime(step, &conn.timers, conn.timers.child_rekey);
    Child {
        name: agreed.name.to_owned(),
        spi_in: agreed.spi_in,
        spi_out: agreed.spi_out,
        aead: agreed.suite.aead,
        group: agreed.suite.group,
        key_in: agreed.key_in,
        key_out: agreed.key_out,
        local_ts: agreed.local_ts,
        remote_ts: agreed.remote_ts,
        since: step.now(),
        rekey_at,
        expires_at,
        outbound: 0,
        state: ChildState::Live,
        term: step.term,
        replaces: None,
    }
}

/// Checks the answer against our offer and makes the Child SA of it.
pub(super) fn conclude(
    step: &mut Step<'_, '_>,
    conn: &ConnectionConfig,
    keys: &IkeKeys,
    new: &NewChild,
    payloads: &Payloads<'_>,
    nonces: Nonces<'_>,
) -> Result<Child, (What, String, String)> {
    let exchange = !new.nonce.is_empty();
    let (Some(proposals), Some(tsi), Some(tsr)) = (payloads.sa(), payloads.ts_i(), payloads.ts_r())
    else {
        return Err((
            What::Protocol,
            "an answer without SA, TSi or TSr".to_owned(),
            "all three".to_owned(),
        ));
    };
    // RFC 7296 §2.9: the answer is a subset of what we proposed.
    let within = |narrowed: &[TrafficSelector], offered: &[TrafficSelector]| {
        !narrowed.is_empty() && narrowed.iter().all(|n| offered.iter().any(|o| o.contains(n)))
    };
    if !within(tsi, &new.local_ts) || !within(tsr, &new.remote_ts) {
        return Err((
            What::Selectors,
            format!("TSi {} === TSr {}", Selectors(tsi), Selectors(tsr)),
            format!("part of {} === {}", Selectors(&new.local_ts), Selectors(&new.remote_ts)),
        ));
    }
    let config = conn.children.iter().find(|c| c.name == new.name);
    let ours = config.map(|c| c.esp_proposals.as_slice()).unwrap_or_default();
    let theirs = offers(proposals, ProtocolId::ESP);
    let sent_group = new.eph.as_ref().map(|e| e.group);
    let chosen = match (proposals.as_slice(), theirs.as_slice()) {
        ([_], [offer]) if offer.is_single() => choose_esp(ours, &theirs, sent_group, exchange)
            .filter(|(_, suite)| suite.group.is_none() || suite.group == sent_group)
            .and_then(|(_, suite)| Some((suite, offer.spi.esp()?))),
        _ => None,
    };
    let Some((suite, spi_out)) = chosen else {
        let ours: Vec<String> = ours.iter().map(EspProposal::to_string).collect();
        return Err((What::EspProposal, proposal::describe(proposals), ours.join(", ")));
    };
    let shared = match (suite.group, &new.eph) {
        (Some(group), Some(eph)) => {
            let agreed = payloads
                .ke()
                .filter(|ke| ke.group.0 == group.transform_id())
                .zip(Ephemeral::from_secret_bytes(eph.group, eph.secret.expose()).ok())
                .and_then(|(ke, own)| own.agree(ke.data).ok());
            let Some(shared) = agreed else {
                return Err((
                    What::Group,
                    "no usable KE payload".to_owned(),
                    "a value of the group chosen".to_owned(),
                ));
            };
            Some(shared)
        }
        _ => None,
    };
    let child_keys = keys
        .child(suite.aead, shared.as_ref(), nonces.ni, nonces.nr)
        .map_err(|e| (What::Protocol, e.to_string(), String::new()))?;
    Ok(make(
        step,
        conn,
        Agreed {
            name: &new.name,
            spi_in: new.spi_in,
            spi_out,
            suite,
            key_in: child_keys.to_initiator,
            key_out: child_keys.to_responder,
            local_ts: tsi.clone(),
            remote_ts: tsr.clone(),
        },
    ))
}
