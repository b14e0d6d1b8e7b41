//! Proposals: what we may use to protect an IKE SA or a Child SA, in swanctl's
//! spelling, and the choice of one suite from two lists (RFC 7296 §2.7, §3.3).
//!
//! Only AEAD ciphers exist here, so an IKE proposal has no integrity transform
//! (RFC 5282 §8) and the spelling needs none.

use core::{fmt, str::FromStr};

use crypto::{aead::AeadAlg, dh::Group, prf::PrfAlg};
use wire::{
    id::EspSpi,
    ike::{
        EncrId, EsnId, GroupId, IntegId, PrfId, Proposal, ProtocolId, Spi, Transform, TransformType,
    },
};

/// One proposal for an IKE SA: alternatives per kind, most preferred first.
/// No list is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IkeProposal {
    /// Ciphers.
    pub aeads: Vec<AeadAlg>,
    /// Pseudo-random functions.
    pub prfs: Vec<PrfAlg>,
    /// Key exchange groups.
    pub groups: Vec<Group>,
}

/// One proposal for a Child SA: alternatives per kind, most preferred first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EspProposal {
    /// Ciphers; never empty.
    pub aeads: Vec<AeadAlg>,
    /// Groups for perfect forward secrecy; empty is none. Not used for the
    /// first Child SA, which IKE_AUTH makes (RFC 7296 §1.2).
    pub groups: Vec<Group>,
}

/// The outcome for an IKE SA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IkeSuite {
    /// Cipher.
    pub aead: AeadAlg,
    /// Pseudo-random function.
    pub prf: PrfAlg,
    /// Key exchange group.
    pub group: Group,
}

/// The outcome for a Child SA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EspSuite {
    /// Cipher.
    pub aead: AeadAlg,
    /// Group of the additional key exchange, if any.
    pub group: Option<Group>,
}

/// What is wrong with a proposal string; `expected` ends the sentence
/// "expected …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{token}`: expected {expected}")]
pub struct ProposalError {
    /// The part that is wrong.
    pub token: String,
    /// What would be right.
    pub expected: &'static str,
}

const IKE_TOKENS: &str = "aes256gcm16, aes128gcm16, chacha20poly1305, prfsha256, prfsha384, \
     prfsha512, x25519, ecp256 or ecp384";
const ESP_TOKENS: &str =
    "aes256gcm16, aes128gcm16, chacha20poly1305, x25519, ecp256, ecp384 or noesn";
const NEED_AEAD: &str = "at least one of aes256gcm16, aes128gcm16, chacha20poly1305";
const NEED_GROUP: &str = "at least one of x25519, ecp256, ecp384";

/// What we offer and accept for IKE SAs when nothing is configured.
#[must_use]
pub fn default_ike() -> Vec<IkeProposal> {
    vec![IkeProposal {
        aeads: AeadAlg::ALL.to_vec(),
        prfs: PrfAlg::ALL.to_vec(),
        groups: Group::ALL.to_vec(),
    }]
}

/// What we offer and accept for Child SAs when nothing is configured: with
/// perfect forward secrecy if the peer will, else without.
#[must_use]
pub fn default_esp() -> Vec<EspProposal> {
    vec![
        EspProposal { aeads: AeadAlg::ALL.to_vec(), groups: Group::ALL.to_vec() },
        EspProposal { aeads: AeadAlg::ALL.to_vec(), groups: Vec::new() },
    ]
}

/// Reads a list of IKE proposals; an entry `default` stands for
/// [`default_ike`].
///
/// # Errors
/// The first wrong token of the first wrong entry.
pub fn parse_ike<S: AsRef<str>>(list: &[S]) -> Result<Vec<IkeProposal>, ProposalError> {
    let mut proposals = Vec::new();
    for text in list {
        match text.as_ref().trim() {
            "default" => proposals.extend(default_ike()),
            text => proposals.push(text.parse()?),
        }
    }
    Ok(if proposals.is_empty() { default_ike() } else { proposals })
}

/// Reads a list of ESP proposals; an entry `default` stands for
/// [`default_esp`].
///
/// # Errors
/// The first wrong token of the first wrong entry.
pub fn parse_esp<S: AsRef<str>>(list: &[S]) -> Result<Vec<EspProposal>, ProposalError> {
    let mut proposals = Vec::new();
    for text in list {
        match text.as_ref().trim() {
            "default" => proposals.extend(default_esp()),
            text => proposals.push(text.parse()?),
        }
    }
    Ok(if proposals.is_empty() { default_esp() } else { proposals })
}

fn add<T: PartialEq>(list: &mut Vec<T>, value: T) {
    if !list.contains(&value) {
        list.push(value);
    }
}

fn aead_token(token: &str) -> Option<AeadAlg> {
    match token {
        "aes256gcm16" | "aes256gcm" | "aes256gcm128" => Some(AeadAlg::Aes256Gcm16),
        "aes128gcm16" | "aes128gcm" | "aes128gcm128" | "aesgcm16" | "aesgcm" => {
            Some(AeadAlg::Aes128Gcm16)
        }
        "chacha20poly1305" | "chacha20poly1305compat" => Some(AeadAlg::ChaCha20Poly1305),
        _ => None,
    }
}

fn aead_name(alg: AeadAlg) -> &'static str {
    match alg {
        AeadAlg::Aes256Gcm16 => "aes256gcm16",
        AeadAlg::Aes128Gcm16 => "aes128gcm16",
        AeadAlg::ChaCha20Poly1305 => "chacha20poly1305",
    }
}

fn prf_token(token: &str) -> Option<PrfAlg> {
    match token {
        "prfsha256" => Some(PrfAlg::HmacSha256),
        "prfsha384" => Some(PrfAlg::HmacSha384),
        "prfsha512" => Some(PrfAlg::HmacSha512),
        _ => None,
    }
}

fn prf_name(alg: PrfAlg) -> &'static str {
    match alg {
        PrfAlg::HmacSha256 => "prfsha256",
        PrfAlg::HmacSha384 => "prfsha384",
        PrfAlg::HmacSha512 => "prfsha512",
    }
}

fn group_token(token: &str) -> Option<Group> {
    match token {
        "x25519" | "curve25519" => Some(Group::X25519),
        "ecp256" => Some(Group::P256),
        "ecp384" => Some(Group::P384),
        _ => None,
    }
}

fn group_name(group: Group) -> &'static str {
    match group {
        Group::X25519 => "x25519",
        Group::P256 => "ecp256",
        Group::P384 => "ecp384",
    }
}

impl FromStr for IkeProposal {
    type Err = ProposalError;

    /// `aes256gcm16-prfsha384-x25519`: parts in any order, several per kind.
    /// Without a PRF all of them are meant.
    fn from_str(text: &str) -> Result<Self, ProposalError> {
        let error = |token: &str, expected| ProposalError { token: token.to_owned(), expected };
        let mut proposal = Self { aeads: Vec::new(), prfs: Vec::new(), groups: Vec::new() };
        for token in text.split('-') {
            if let Some(alg) = aead_token(token) {
                add(&mut proposal.aeads, alg);
            } else if let Some(alg) = prf_token(token) {
                add(&mut proposal.prfs, alg);
            } else if let Some(group) = group_token(token) {
                add(&mut proposal.groups, group);
            } else {
                return Err(error(token, IKE_TOKENS));
            }
        }
        if proposal.aeads.is_empty() {
            return Err(error(text, NEED_AEAD));
        }
        if proposal.groups.is_empty() {
            return Err(error(text, NEED_GROUP));
        }
        if proposal.prfs.is_empty() {
            proposal.prfs = PrfAlg::ALL.to_vec();
        }
        Ok(proposal)
    }
}

impl FromStr for EspProposal {
    type Err = ProposalError;

    /// `aes256gcm16-x25519`: parts in any order, several per kind.
    fn from_str(text: &str) -> Result<Self, ProposalError> {
        let error = |token: &str, expected| ProposalError { token: token.to_owned(), expected };
        let mut proposal = Self { aeads: Vec::new(), groups: Vec::new() };
        for token in text.split('-') {
            if let Some(alg) = aead_token(token) {
                add(&mut proposal.aeads, alg);
            } else if let Some(group) = group_token(token) {
                add(&mut proposal.groups, group);
            } else if token != "noesn" {
                return Err(error(token, ESP_TOKENS));
            }
        }
        if proposal.aeads.is_empty() {
            return Err(error(text, NEED_AEAD));
        }
        Ok(proposal)
    }
}

fn join(f: &mut fmt::Formatter<'_>, names: impl Iterator<Item = &'static str>) -> fmt::Result {
    for (n, name) in names.enumerate() {
        if n > 0 {
            f.write_str("-")?;
        }
        f.write_str(name)?;
    }
    Ok(())
}

impl fmt::Display for IkeProposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(
            f,
            self.aeads
                .iter()
                .map(|a| aead_name(*a))
                .chain(self.prfs.iter().map(|p| prf_name(*p)))
                .chain(self.groups.iter().map(|g| group_name(*g))),
        )
    }
}

impl fmt::Display for EspProposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(
            f,
            self.aeads
                .iter()
                .map(|a| aead_name(*a))
                .chain(self.groups.iter().map(|g| group_name(*g))),
        )
    }
}

impl fmt::Display for IkeSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, [aead_name(self.aead), prf_name(self.prf), group_name(self.group)].into_iter())
    }
}

impl fmt::Display for EspSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, [Some(aead_name(self.aead)), self.group.map(group_name)].into_iter().flatten())
    }
}

/// One of the peer's proposals, reduced to what we can use. Built by
/// [`offers`] from the SA payload; a proposal with a transform type we
/// do not know, or with a mandatory separate integrity transform, is left out
/// there (RFC 7296 §3.3.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The proposal's number, which the answer repeats (§3.3.1).
    pub(crate) number: u8,
    /// The peer's SPI: of a rekeyed IKE SA, of an ESP SA, none at first.
    pub(crate) spi: Spi,
    pub(crate) aeads: Vec<AeadAlg>,
    pub(crate) prfs: Vec<PrfAlg>,
    pub(crate) groups: Vec<Group>,
    /// No group at all, or NONE among them.
    pub(crate) group_optional: bool,
    /// "No extended sequence numbers" is among the choices (or, for IKE, not
    /// asked for).
    pub(crate) without_esn: bool,
}

/// Reduces an SA payload to what we can use of it, keeping the order.
pub(crate) fn offers(proposals: &[Proposal], protocol: ProtocolId) -> Vec<Offer> {
    proposals.iter().filter(|p| p.protocol == protocol).filter_map(Offer::new).collect()
}

impl Offer {
    fn new(proposal: &Proposal) -> Option<Self> {
        let mut offer = Self {
            number: proposal.number,
            spi: proposal.spi,
            aeads: Vec::new(),
            prfs: Vec::new(),
            groups: Vec::new(),
            group_optional: true,
            without_esn: true,
        };
        let has = |kind, id| proposal.of_kind(kind).any(|t| t.id == id);
        // RFC 7296 §3.3.6: one transform of each type present must be chosen,
        // so a type we do not know, or a separate integrity algorithm that is
        // not optional, makes the whole proposal unusable.
        let known = |t: &Transform| {
            matches!(
                t.kind,
                TransformType::ENCR
                    | TransformType::PRF
                    | TransformType::INTEG
                    | TransformType::KE
                    | TransformType::ESN
            )
        };
        if !proposal.transforms.iter().all(known) {
            return None;
        }
        let separate_integrity = proposal.of_kind(TransformType::INTEG).next().is_some()
            && !has(TransformType::INTEG, IntegId::NONE.0);
        if separate_integrity {
            return None;
        }
        for transform in proposal.transforms.iter().filter(|t| !t.foreign) {
            match transform.kind {
                TransformType::ENCR => {
                    offer.aeads.extend(AeadAlg::from_transform(transform.id, transform.key_bits));
                }
                TransformType::PRF => offer.prfs.extend(PrfAlg::from_transform_id(transform.id)),
                TransformType::KE => offer.groups.extend(Group::from_transform_id(transform.id)),
                _ => {}
            }
        }
        offer.group_optional = proposal.of_kind(TransformType::KE).next().is_none()
            || has(TransformType::KE, GroupId::NONE.0);
        offer.without_esn = proposal.of_kind(TransformType::ESN).next().is_none()
            || has(TransformType::ESN, EsnId::OFF.0);
        Some(offer)
    }
}

impl Offer {
    /// Whether it is an answer: at most one choice of each kind.
    pub(crate) fn is_single(&self) -> bool {
        self.aeads.len() == 1 && self.prfs.len() <= 1 && self.groups.len() <= 1
    }
}

impl IkeSuite {
    /// Whether one of the proposals allows it.
    pub(crate) fn is_in(&self, proposals: &[IkeProposal]) -> bool {
        proposals.iter().any(|p| {
            p.aeads.contains(&self.aead)
                && p.prfs.contains(&self.prf)
                && p.groups.contains(&self.group)
        })
    }
}

fn encr(alg: AeadAlg) -> Transform {
    let (id, key_bits) = alg.transform();
    Transform::encr(EncrId(id), key_bits)
}

fn ke(group: Group) -> Transform {
    Transform::ke(GroupId(group.transform_id()))
}

/// The SA payload that offers `ours` for an IKE SA.
pub(crate) fn ike_payload(ours: &[IkeProposal], spi: Spi) -> Vec<Proposal> {
    (1..)
        .zip(ours)
        .map(|(number, own)| Proposal {
            number,
            protocol: ProtocolId::IKE,
            spi,
            transforms: own
                .aeads
                .iter()
                .map(|a| encr(*a))
                .chain(own.prfs.iter().map(|p| Transform::prf(PrfId(p.transform_id()))))
                .chain(own.groups.iter().map(|g| ke(*g)))
                .collect(),
        })
        .collect()
}

/// The SA payload that offers `ours` for a Child SA. RFC 7296 §1.2: without
/// groups in IKE_AUTH.
pub(crate) fn esp_payload(ours: &[EspProposal], spi: EspSpi, exchange: bool) -> Vec<Proposal> {
    (1..)
        .zip(ours)
        .map(|(number, own)| Proposal {
            number,
            protocol: ProtocolId::ESP,
            spi: Spi::Esp(spi),
            transforms: own
                .aeads
                .iter()
                .map(|a| encr(*a))
                .chain(own.groups.iter().filter(|_| exchange).map(|g| ke(*g)))
                .chain([Transform::esn(EsnId::OFF)])
                .collect(),
        })
        .collect()
}

/// The answer that accepts one IKE proposal.
pub(crate) fn ike_answer(number: u8, suite: IkeSuite, spi: Spi) -> Vec<Proposal> {
    vec![Proposal {
        number,
        protocol: ProtocolId::IKE,
        spi,
        transforms: vec![
            encr(suite.aead),
            Transform::prf(PrfId(suite.prf.transform_id())),
            ke(suite.group),
        ],
    }]
}

/// The answer that accepts one ESP proposal.
pub(crate) fn esp_answer(number: u8, suite: EspSuite, spi: EspSpi) -> Vec<Proposal> {
    vec![Proposal {
        number,
        protocol: ProtocolId::ESP,
        spi: Spi::Esp(spi),
        transforms: [encr(suite.aead)]
            .into_iter()
            .chain(suite.group.map(ke))
            .chain([Transform::esn(EsnId::OFF)])
            .collect(),
    }]
}

/// The peer's proposals as one would write them, for the log.
pub(crate) fn describe(proposals: &[Proposal]) -> String {
    let one = |p: &Proposal| {
        let parts: Vec<String> = p.transforms.iter().map(describe_transform).collect();
        parts.join("-")
    };
    proposals.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn describe_transform(t: &Transform) -> String {
    let known = match t.kind {
        TransformType::ENCR => AeadAlg::from_transform(t.id, t.key_bits).map(aead_name),
        TransformType::PRF => PrfAlg::from_transform_id(t.id).map(prf_name),
        TransformType::KE => Group::from_transform_id(t.id).map(group_name),
        TransformType::ESN if t.id == EsnId::OFF.0 => Some("noesn"),
        TransformType::ESN => Some("esn"),
        _ => None,
    };
    match (known, t.kind) {
        (Some(name), _) => name.to_owned(),
        (None, TransformType::ENCR) => match t.key_bits {
            Some(bits) => format!("{}[{bits}]", EncrId(t.id)),
            None => EncrId(t.id).to_string(),
        },
        (None, TransformType::PRF) => format!("PRF_{}", PrfId(t.id)),
        (None, TransformType::INTEG) => format!("INTEG_{}", IntegId(t.id)),
        (None, TransformType::KE) => GroupId(t.id).to_string(),
        (None, kind) => format!("{kind}:{}", t.id),
    }
}

/// The proposals with the PRF of the IKE SA being rekeyed alone. RFC 7296 §2.18
/// wants the new IKE SA's keys from the new PRF; strongSwan 5.9.8 takes them from
/// the old one, so the PRF had better not change.
pub(crate) fn with_prf(ours: &[IkeProposal], prf: PrfAlg) -> Vec<IkeProposal> {
    let usable = ours.iter().filter(|p| p.prfs.contains(&prf));
    usable.map(|p| IkeProposal { prfs: vec![prf], ..p.clone() }).collect()
}

fn first_common<T: PartialEq + Copy>(ours: &[T], theirs: &[T]) -> Option<T> {
    ours.iter().copied().find(|x| theirs.contains(x))
}

/// A common group, the one whose value the peer already sent if possible: that
/// saves a round trip (RFC 7296 §1.2).
fn common_group(ours: &[Group], theirs: &[Group], sent: Option<Group>) -> Option<Group> {
    match sent {
        Some(group) if ours.contains(&group) && theirs.contains(&group) => Some(group),
        _ => first_common(ours, theirs),
    }
}

/// Chooses a suite for an IKE SA: our order of preference, then the peer's.
/// `sent` is the group of the peer's KE payload.
pub(crate) fn choose_ike<'a>(
    ours: &[IkeProposal],
    theirs: &'a [Offer],
    sent: Option<Group>,
) -> Option<(&'a Offer, IkeSuite)> {
    ours.iter().find_map(|own| {
        theirs.iter().find_map(|offer| {
            // RFC 7296 §2.18: NONE is no group for an IKE SA; `common_group`
            // never yields it.
            let suite = IkeSuite {
                aead: first_common(&own.aeads, &offer.aeads)?,
                prf: first_common(&own.prfs, &offer.prfs)?,
                group: common_group(&own.groups, &offer.groups, sent)?,
            };
            offer.without_esn.then_some((offer, suite))
        })
    })
}

/// Chooses a suite for a Child SA. `exchange` is false in IKE_AUTH, where no
/// key exchange is possible and groups are ignored (RFC 7296 §1.2).
pub(crate) fn choose_esp<'a>(
    ours: &[EspProposal],
    theirs: &'a [Offer],
    sent: Option<Group>,
    exchange: bool,
) -> Option<(&'a Offer, EspSuite)> {
    ours.iter().find_map(|own| {
        theirs.iter().find_map(|offer| {
            if !offer.without_esn {
                return None;
            }
            let aead = first_common(&own.aeads, &offer.aeads)?;
            let group = if !exchange {
                None
            } else if own.groups.is_empty() {
                if !offer.group_optional {
                    return None;
                }
                None
            } else {
                Some(common_group(&own.groups, &offer.groups, sent)?)
            };
            Some((offer, EspSuite { aead, group }))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_read_and_print() {
        for text in [
            "aes256gcm16-prfsha384-x25519",
            "chacha20poly1305-prfsha256-ecp256",
            "aes256gcm16-aes128gcm16-prfsha384-prfsha256-x25519-ecp384",
        ] {
            assert_eq!(text.parse::<IkeProposal>().unwrap().to_string(), text);
        }
        let all = "aes128gcm16-x25519-ecp384".parse::<IkeProposal>().unwrap();
        assert_eq!(all.prfs, PrfAlg::ALL);
        for text in ["aes256gcm16", "aes256gcm16-chacha20poly1305-x25519"] {
            assert_eq!(text.parse::<EspProposal>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn errors_name_the_token() {
        let error = "aes256gcm16-prfsha1-x25519".parse::<IkeProposal>().unwrap_err();
        assert_eq!(error.token, "prfsha1");
        assert!("aes256gcm16".parse::<IkeProposal>().is_err(), "an IKE SA needs a group");
        assert!("x25519".parse::<EspProposal>().is_err());
        assert!("aes256gcm16-prfsha256".parse::<EspProposal>().is_err());
        assert!("".parse::<EspProposal>().is_err());
        assert_eq!(parse_esp(&["default"]).unwrap(), default_esp());
        assert_eq!(parse_ike::<&str>(&[]).unwrap(), default_ike());
    }

    fn offer(aeads: &[AeadAlg], groups: &[Group], optional: bool) -> Offer {
        Offer {
            number: 1,
            spi: Spi::None,
            aeads: aeads.to_vec(),
            prfs: PrfAlg::ALL.to_vec(),
            groups: groups.to_vec(),
            group_optional: optional,
            without_esn: true,
        }
    }

    #[test]
    fn our_order_decides_but_a_sent_group_saves_a_round_trip() {
        let ours = parse_ike(&["chacha20poly1305-aes256gcm16-x25519-ecp256"]).unwrap();
        let theirs = [offer(&AeadAlg::ALL, &Group::ALL, false)];
        let (_, suite) = choose_ike(&ours, &theirs, Some(Group::P256)).unwrap();
        assert_eq!(suite.to_string(), "chacha20poly1305-prfsha384-ecp256");
        // A group that we do not want is answered with our first choice.
        let (_, suite) = choose_ike(&ours, &theirs, Some(Group::P384)).unwrap();
        assert_eq!(suite.group, Group::X25519);
        assert!(
            choose_ike(&ours, &[offer(&[AeadAlg::Aes128Gcm16], &Group::ALL, false)], None)
                .is_none()
        );
    }

    #[test]
    fn forward_secrecy_is_neither_dropped_nor_forced() {
        let with = parse_esp(&["aes256gcm16-x25519"]).unwrap();
        let without = parse_esp(&["aes256gcm16"]).unwrap();
        let plain = [offer(&AeadAlg::ALL, &[], true)];
        let pfs = [offer(&AeadAlg::ALL, &[Group::X25519], false)];
        assert!(choose_esp(&with, &plain, None, true).is_none());
        assert!(choose_esp(&without, &pfs, None, true).is_none());
        assert_eq!(choose_esp(&with, &pfs, None, true).unwrap().1.group, Some(Group::X25519));
        // RFC 7296 §1.2: IKE_AUTH has no key exchange, whatever is offered.
        assert_eq!(choose_esp(&with, &plain, None, false).unwrap().1.group, None);
        assert_eq!(choose_esp(&default_esp(), &plain, None, true).unwrap().1.group, None);
    }
}
