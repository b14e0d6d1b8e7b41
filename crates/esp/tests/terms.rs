//! Sequence numbers, IVs, leases and terms (ha.md, "ESP counters"; invariants
//! 1 and 2), first by hand, then against a model of the pair that does all the
//! pair can do, with ceilings small enough to be met.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use core::time::Duration;
use crypto::aead::AeadAlg;
use esp::{
    Command, Counters, Expiry, INITIAL_CEILING, LEASE_MIN, Reason, Report, Sa, Shard, Verdict,
    Window, ceiling_for,
};
use proptest::prelude::*;
use std::collections::BTreeSet;
use wire::id::{EspSpi, Term};

const END: u64 = 1 << 32;

fn lease_low(shard: &mut Shard, now: Duration) -> Vec<(u64, u64)> {
    reports(shard, now)
        .into_iter()
        .filter_map(|report| match report {
            Report::LeaseLow { next_seq, ceiling, .. } => Some((next_seq, ceiling)),
            _ => None,
        })
        .collect()
}

fn single(next_seq: u64, ceiling: u64, term: u64, obey: bool) -> (Shard, Sa) {
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let sa = Sa { next_seq, ceiling, born: Term(term), ..sa };
    let mut shard = Shard::new(config());
    own(&mut shard, term, 0, obey);
    install(&mut shard, &sa);
    (shard, sa)
}

fn obeying(report: &Report) -> bool {
    matches!(report, Report::Obeying { endpoint: MAIN, .. })
}

// --- by hand ---

// ha.md: [term, low 16 bits | counter:48], counter from 0 in each term.
// RFC 4303 §3.3.3: the first packet of an SA has sequence number 1.
#[test]
fn the_first_packets_of_an_sa() {
    let (mut shard, _) = single(1, INITIAL_CEILING, 0x7_1234, false);
    for n in 0..3u8 {
        let esp = sealed(&mut shard, ms(1), &numbered(0));
        assert_eq!(seq_of(&esp), u32::from(n) + 1);
        assert_eq!(iv_of(&esp), [0x12, 0x34, 0, 0, 0, 0, 0, n]);
    }
    own(&mut shard, 0x7_1236, 0, false);
    let esp = sealed(&mut shard, ms(1), &numbered(0));
    assert_eq!(u64::from(seq_of(&esp)), INITIAL_CEILING);
    assert_eq!(iv_of(&esp), [0x12, 0x36, 0, 0, 0, 0, 0, 0]);
}

// Healing can bring an SA back that was removed; what it sent and received before is not sent or received again.
#[test]
fn an_sa_that_comes_back_repeats_no_number() {
    let (mut shard, sa) = single(1, INITIAL_CEILING, 4, false);
    let (_, theirs) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut peer = Shard::new(config());
    own(&mut peer, 1, 0, false);
    install(&mut peer, &theirs);
    let numbered_back = udp("10.2.0.5:4000", "10.1.0.9:5000", &[0; 4]);
    let packets: Vec<Vec<u8>> = (0..3).map(|_| sealed(&mut peer, ms(1), &numbered_back)).collect();
    for seq in 1..=3 {
        assert_eq!(seq_of(&sealed(&mut shard, ms(1), &numbered(0))), seq);
    }
    for packet in &packets[..2] {
        assert!(matches!(open(&mut shard, ms(1), packet).0, Verdict::Deliver { .. }));
    }
    for term in [4, 6] {
        shard.apply(Command::Remove { spi_in: sa.spi_in }).unwrap();
        own(&mut shard, term, 0, false);
        install(&mut shard, &sa);
        let mut window = Window::new();
        window.commit(1);
        // The other instance knows less of it.
        let counters = Counters { spi_in: sa.spi_in, next_seq: 2, ceiling: 1000, window };
        shard.apply(Command::Resume { term: Term(term), counters: Box::new(counters) }).unwrap();
        assert!(seq_of(&sealed(&mut shard, ms(1), &numbered(0))) > 3, "term {term}");
        for packet in &packets[..2] {
            assert_eq!(open(&mut shard, ms(1), packet).0, Verdict::Drop(Reason::Replayed));
        }
    }
    assert!(matches!(open(&mut shard, ms(1), &packets[2]).0, Verdict::Deliver { .. }));
}

// The same within one term, of IVs (found by the simulation).
#[test]
fn an_sa_that_comes_back_within_a_term_repeats_no_iv() {
    let (mut shard, sa) = single(1, INITIAL_CEILING, 0x7_1234, false);
    let before: Vec<[u8; 8]> =
        (0..3).map(|_| iv_of(&sealed(&mut shard, ms(1), &numbered(0)))).collect();
    shard.apply(Command::Remove { spi_in: sa.spi_in }).unwrap();
    install(&mut shard, &sa);
    for _ in 0..3 {
        assert!(!before.contains(&iv_of(&sealed(&mut shard, ms(1), &numbered(0)))));
    }
    // Nor does hearing of the same term again begin it anew.
    own(&mut shard, 0x7_1234, 0, false);
    assert!(!before.contains(&iv_of(&sealed(&mut shard, ms(1), &numbered(0)))));
}

#[test]
fn a_takeover_starts_at_the_ceiling_plus_the_jump() {
    for (jump, want) in [(0, 5000), (1 << 24, (1 << 24) + 5000), (1 << 28, (1 << 28) + 5000)] {
        let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
        let mut shadow = Shard::new(config());
        install(&mut shadow, &Sa { ceiling: 1000, ..sa });
        shadow.apply(Command::Lease { spi_in: sa.spi_in, ceiling: 5000 }).unwrap();
        shadow.apply(Command::Lease { spi_in: sa.spi_in, ceiling: 4000 }).unwrap();
        own(&mut shadow, 3, jump, false);
        assert_eq!(u64::from(seq_of(&sealed(&mut shadow, ms(1), &numbered(0)))), want);
        // Once in its term it goes on from there, whatever ceilings follow.
        shadow.apply(Command::Lease { spi_in: sa.spi_in, ceiling: END }).unwrap();
        assert_eq!(u64::from(seq_of(&sealed(&mut shadow, ms(1), &numbered(0)))), want + 1);
    }
    // A ceiling that comes in the new term, before the first packet, does not
    // move the start.
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut shadow = Shard::new(config());
    install(&mut shadow, &Sa { ceiling: 1000, ..sa });
    own(&mut shadow, 3, 0, false);
    shadow.apply(Command::Lease { spi_in: sa.spi_in, ceiling: 9000 }).unwrap();
    assert_eq!(seq_of(&sealed(&mut shadow, ms(1), &numbered(0))), 1000);
}

#[test]
fn never_above_the_ceiling_when_leases_are_obeyed() {
    let (mut shard, sa) = single(1, 101, 2, true);
    let mut asked = Vec::new();
    for n in 1..=100 {
        assert_eq!(seq_of(&sealed(&mut shard, ms(1), &numbered(n))), n);
        asked.extend(lease_low(&mut shard, ms(1)));
    }
    // At half, and then not again within 50 ms.
    assert_eq!(asked, [(51, 101)]);
    for at in 1..120 {
        let dropped = Verdict::Drop(Reason::LeaseExhausted);
        assert_eq!(seal(&mut shard, ms(at), &numbered(0)).0, dropped);
        let again = lease_low(&mut shard, ms(at));
        assert_eq!(again.len(), usize::from(at == 51 || at == 101), "{at} ms");
    }
    shard.apply(Command::Lease { spi_in: sa.spi_in, ceiling: 103 }).unwrap();
    assert_eq!(seq_of(&sealed(&mut shard, ms(120), &numbered(0))), 101);
    assert_eq!(lease_low(&mut shard, ms(120)), [(102, 103)]);
    assert_eq!(seq_of(&sealed(&mut shard, ms(120), &numbered(0))), 102);
    let dropped = Verdict::Drop(Reason::LeaseExhausted);
    assert_eq!(seal(&mut shard, ms(120), &numbered(0)).0, dropped);
    // Solo, no ceiling binds.
    shard.apply(Command::ObeyLeases { endpoint: MAIN, on: false }).unwrap();
    assert_eq!(seq_of(&sealed(&mut shard, ms(120), &numbered(0))), 103);
}

#[test]
fn leases_are_max_of_2_20_and_two_seconds() {
    assert_eq!(ceiling_for(1, 0), 1 + LEASE_MIN);
    assert_eq!(ceiling_for(1, LEASE_MIN / 2), 1 + LEASE_MIN);
    assert_eq!(ceiling_for(7, 1_000_000), 2_000_007);
    assert_eq!(ceiling_for(END - 5, 0), END);
    assert_eq!(ceiling_for(u64::MAX, u64::MAX), END);
}

#[test]
fn the_rate_is_reported_with_the_lease() {
    let (mut shard, _) = single(1, 40_001, 2, true);
    let mut rates = Vec::new();
    // 20,000 packets a second.
    for n in 0..25_000u64 {
        let now = Duration::from_micros(1_000_000 + n * 50);
        sealed(&mut shard, now, &numbered(0));
        rates.extend(reports(&mut shard, now).into_iter().map(|r| match r {
            Report::LeaseLow { rate_per_s, .. } => rate_per_s,
            other => panic!("{other:?}"),
        }));
    }
    assert!(!rates.is_empty());
    assert!(rates.iter().all(|rate| (19_500..20_500).contains(rate)), "{rates:?}");
}

// solo → syncing → synced: obedience begins when all counters are below.
#[test]
fn obedience_begins_when_all_counters_are_below() {
    let (sa0, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let (sa1, _) = sas(AeadAlg::Aes128Gcm16, 1);
    let sa0 = Sa { ceiling: 10, ..sa0 };
    let sa1 = Sa { ceiling: 10, remote_ts: vec![ts("10.3.0.0/16")], ..sa1 };
    let mut shard = owner(2);
    install(&mut shard, &sa0);
    install(&mut shard, &sa1);
    for n in 0..20 {
        sealed(&mut shard, ms(1), &numbered(n));
    }
    lease_low(&mut shard, ms(1));
    shard.apply(Command::ObeyLeases { endpoint: MAIN, on: true }).unwrap();
    let all = reports(&mut shard, ms(2));
    let low = Report::LeaseLow { spi_in: sa0.spi_in, next_seq: 21, ceiling: 10, rate_per_s: 0 };
    assert!(all.contains(&low), "{all:?}");
    assert!(!all.iter().any(obeying));
    // It goes on meanwhile, past the ceiling that is under way.
    for n in 0..10 {
        sealed(&mut shard, ms(2), &numbered(n));
    }
    shard.apply(Command::Lease { spi_in: sa0.spi_in, ceiling: 31 }).unwrap();
    assert!(!reports(&mut shard, ms(2)).iter().any(obeying));
    shard.apply(Command::Lease { spi_in: sa0.spi_in, ceiling: 32 }).unwrap();
    assert_eq!(shard.next_wakeup(), Some(Duration::ZERO));
    assert!(reports(&mut shard, ms(2)).iter().any(obeying));
    assert_eq!(seq_of(&sealed(&mut shard, ms(2), &numbered(0))), 31);
    let dropped = Verdict::Drop(Reason::LeaseExhausted);
    assert_eq!(seal(&mut shard, ms(2), &numbered(0)).0, dropped);
}

#[test]
fn after_a_takeover_idle_sas_need_leases_too() {
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut shadow = Shard::new(config());
    install(&mut shadow, &Sa { ceiling: 500, ..sa });
    own(&mut shadow, 3, 0, false);
    shadow.apply(Command::ObeyLeases { endpoint: MAIN, on: true }).unwrap();
    assert_eq!(lease_low(&mut shadow, ms(1)), [(500, 500)]);
    shadow.apply(Command::Lease { spi_in: sa.spi_in, ceiling: 600 }).unwrap();
    assert!(reports(&mut shadow, ms(1)).iter().any(obeying));
}

// RFC 4303 §3.3.3: the counter must not cycle; the SA is to be replaced before.
#[test]
fn the_end_of_the_numbers() {
    let expiring = END - (1 << 29);
    let (mut shard, sa) = single(expiring - 2, END, 2, false);
    let mut at = Vec::new();
    for n in 0..2000u64 {
        sealed(&mut shard, ms(1), &numbered(0));
        for report in reports(&mut shard, ms(1)) {
            assert!(
                matches!(report, Report::Expiring { why: Expiry::Sequence, spi_in, .. } if spi_in == sa.spi_in),
                "{report:?}"
            );
            at.push(n);
        }
    }
    // Looked at every 1,024 packets, told once.
    assert_eq!(at.len(), 1, "{at:?}");
    assert!(at[0] < 1100);

    let (mut shard, _) = single(END - 2, END, 2, false);
    assert_eq!(seq_of(&sealed(&mut shard, ms(1), &numbered(0))), u32::MAX - 1);
    assert_eq!(seq_of(&sealed(&mut shard, ms(1), &numbered(0))), u32::MAX);
    for term in [2, 4] {
        own(&mut shard, term, 0, false);
        for _ in 0..3 {
            let dropped = Verdict::Drop(Reason::SaExhausted);
            assert_eq!(seal(&mut shard, ms(1), &numbered(0)).0, dropped);
        }
    }
    // A jump over the end stops the SA too.
    let (mut shard, _) = single(1, END - 100, 2, false);
    own(&mut shard, 4, 1 << 28, false);
    assert_eq!(seal(&mut shard, ms(1), &numbered(0)).0, Verdict::Drop(Reason::SaExhausted));
    assert!(
        reports(&mut shard, ms(1))
            .iter()
            .any(|r| matches!(r, Report::Expiring { why: Expiry::Sequence, .. }))
    );
}

// ha.md: "A key is replaced 2^14 terms after its installation, long before the
// field wraps." Where it was not, it seals nothing rather than repeat an IV.
#[test]
fn the_end_of_the_terms() {
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut shard = Shard::new(config());
    own(&mut shard, 10, 0, false);
    install(&mut shard, &Sa { born: Term(10), ..copy(&sa) });
    let old = |r: &Report| matches!(r, Report::Expiring { why: Expiry::Terms, .. });
    for (term, told) in [(11, 0), (10 + (1 << 14) - 1, 0), (10 + (1 << 14), 1), (40_000, 0)] {
        own(&mut shard, term, 0, false);
        sealed(&mut shard, ms(1), &numbered(0));
        let all = reports(&mut shard, ms(1));
        assert_eq!(all.iter().filter(|r| old(r)).count(), told, "{term}");
    }
    own(&mut shard, 10 + (1 << 16) - 1, 0, false);
    sealed(&mut shard, ms(1), &numbered(0));
    own(&mut shard, 10 + (1 << 16), 0, false);
    assert_eq!(seal(&mut shard, ms(1), &numbered(0)).0, Verdict::Drop(Reason::SaExhausted));
}

#[test]
fn healing_goes_on_above_the_larger_of_the_two() {
    for (theirs, want) in [(50, 1000 + 1), (5000, 5000)] {
        let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
        let mut winner = Shard::new(config());
        install(&mut winner, &Sa { ceiling: 1000, ..copy(&sa) });
        own(&mut winner, 3, 0, false);
        assert_eq!(seq_of(&sealed(&mut winner, ms(1), &numbered(0))), 1000);
        let mut window = Window::new();
        window.commit(77);
        let counters =
            Box::new(Counters { spi_in: sa.spi_in, next_seq: theirs, ceiling: 900, window });
        winner.apply(Command::Resume { term: Term(3), counters }).unwrap();
        assert_eq!(u64::from(seq_of(&sealed(&mut winner, ms(1), &numbered(0)))), want);
        // What the loser has delivered is not delivered again.
        let esp = [&sa.spi_in.to_bytes()[..], &77u32.to_be_bytes(), &[0; 60]].concat();
        assert_eq!(open(&mut winner, ms(1), &esp).0, Verdict::Drop(Reason::Replayed));
    }
}

// The winner of a split may still have an SA that the loser removed meanwhile: its numbers are told as well. A grant has
// none of them, since the other shard removed what was removed.
#[test]
fn a_loser_tells_what_it_removed() {
    for steer in [false, true] {
        let (mut shard, sa) = single(1, INITIAL_CEILING, 4, false);
        for _ in 0..3 {
            sealed(&mut shard, ms(1), &numbered(0));
        }
        shard.apply(Command::Remove { spi_in: sa.spi_in }).unwrap();
        shard.apply(Command::Disown { endpoint: MAIN, steer }).unwrap();
        let told: Vec<_> = reports(&mut shard, ms(1))
            .into_iter()
            .filter_map(|report| match report {
                Report::Disowned { counters, .. } => Some(counters),
                _ => None,
            })
            .flatten()
            .map(|counters| (counters.spi_in, counters.next_seq))
            .collect();
        assert_eq!(told, if steer { vec![] } else { vec![(sa.spi_in, 4)] });
    }
}

// An SA without traffic since the heal keeps its own window and its own counters beside the loser's.
#[test]
fn healing_merges_also_where_nothing_moved_in_the_term_yet() {
    let (sa, _) = sas(AeadAlg::Aes128Gcm16, 0);
    let mut winner = Shard::new(config());
    install(&mut winner, &Sa { ceiling: 1000, ..copy(&sa) });
    winner.apply(Command::Window { spi_in: sa.spi_in, top: 500 }).unwrap();
    own(&mut winner, 3, 0, false);
    let mut window = Window::new();
    window.commit(77);
    let counters = Box::new(Counters { spi_in: sa.spi_in, next_seq: 50, ceiling: 900, window });
    winner.apply(Command::Resume { term: Term(3), counters }).unwrap();
    let esp = [&sa.spi_in.to_bytes()[..], &400u32.to_be_bytes(), &[0; 60]].concat();
    assert_eq!(open(&mut winner, ms(1), &esp).0, Verdict::Drop(Reason::Replayed));
    assert_eq!(seq_of(&sealed(&mut winner, ms(1), &numbered(0))), 1000);
}

// --- the pair, against a model ---

const LEASE: u64 = 40;

#[derive(Debug, Clone)]
enum Step {
    /// The owner gets this many packets to send.
    Send(u32),
    /// The owner's reports are acted on; the shadow's acknowledgement may be
    /// lost.
    Renew { acked: bool },
    /// The owner dies and comes back empty; the other takes over, if it has
    /// anything to take over with.
    Crash,
    /// A planned switchover.
    Switch,
    /// One that is refused after the grant was delivered.
    Refused,
    /// One whose new owner gets to send some, and then contact is lost and the
    /// old owner goes on by a new term.
    LostAfterGrant(u32),
    /// Both go on; then they heal.
    Partition(u32, u32),
    /// The owner goes solo.
    Solo,
    /// The owner brings the other up to date, and obeys again.
    Sync,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1..60u32).prop_map(Step::Send),
        6 => any::<bool>().prop_map(|acked| Step::Renew { acked }),
        2 => Just(Step::Crash),
        2 => Just(Step::Switch),
        1 => Just(Step::Refused),
        1 => (0..80u32).prop_map(Step::LostAfterGrant),
        1 => (0..100u32, 0..100u32).prop_map(|(a, b)| Step::Partition(a, b)),
        2 => Just(Step::Solo),
        6 => Just(Step::Sync),
    ];
    prop::collection::vec(step, 1..60)
}

/// Two instances, their peer, and all that was ever sent.
struct World {
    sa: Sa,
    shards: [Shard; 2],
    peer: Shard,
    owner: usize,
    term: u64,
    synced: bool,
    /// What the other instance has acknowledged to this one.
    ceiling: [u64; 2],
    seqs: BTreeSet<u32>,
    ivs: BTreeSet<[u8; 8]>,
    now: Duration,
    in_order: bool,
    has_sa: [bool; 2],
    jumps: u32,
}

impl World {
    fn new() -> Self {
        let (sa, peer_sa) = sas(AeadAlg::Aes128Gcm16, 0);
        let sa = Sa { ceiling: 1 + LEASE, ..sa };
        let mut peer = owner(2);
        install(&mut peer, &peer_sa);
        let mut shards = [Shard::new(config()), Shard::new(config())];
        own(&mut shards[0], 2, 0, true);
        for shard in &mut shards {
            install(shard, &sa);
        }
        World {
            ceiling: [sa.ceiling; 2],
            sa,
            shards,
            peer,
            owner: 0,
            term: 2,
            synced: true,
            seqs: BTreeSet::new(),
            ivs: BTreeSet::new(),
            now: ms(1000),
            in_order: true,
            has_sa: [true; 2],
            jumps: 0,
        }
    }

    fn spi(&self) -> EspSpi {
        self.sa.spi_in
    }

    /// The next term of an instance: even for 0, odd for 1.
    fn next_term(&mut self, who: usize) -> u64 {
        self.term += 1;
        if self.term % 2 != who as u64 {
            self.term += 1;
        }
        self.term
    }

    fn send(&mut self, who: usize, count: u32, obeys: bool) {
        for n in 0..count {
            let (verdict, esp) = seal(&mut self.shards[who], self.now, &numbered(n));
            if verdict == Verdict::Drop(Reason::LeaseExhausted) {
                assert!(obeys, "solo, but dropped");
                continue;
            }
            assert!(matches!(verdict, Verdict::Send { .. }), "{verdict:?}");
            let seq = seq_of(&esp);
            assert!(!obeys || u64::from(seq) < self.ceiling[who], "{seq} above the ceiling");
            assert!(self.seqs.insert(seq), "sequence number {seq} twice");
            assert!(self.ivs.insert(iv_of(&esp)), "IV {:?} twice", iv_of(&esp));
            let at_peer = open(&mut self.peer, self.now, &esp).0;
            if self.in_order {
                assert_eq!(at_peer, Verdict::Deliver { endpoint: MAIN });
            }
        }
    }

    /// Acts on the owner's reports as the control threads would.
    fn renew(&mut self, acked: bool) -> bool {
        let mut obeying = false;
        for report in reports(&mut self.shards[self.owner], self.now) {
            match report {
                Report::LeaseLow { spi_in, next_seq, .. } => {
                    let ceiling = next_seq + LEASE;
                    let lease = || Command::Lease { spi_in, ceiling };
                    let other = 1 - self.owner;
                    self.shards[other].apply(lease()).unwrap();
                    if acked {
                        self.shards[self.owner].apply(lease()).unwrap();
                        self.ceiling[self.owner] = self.ceiling[self.owner].max(ceiling);
                    }
                }
                Report::Obeying { .. } => obeying = true,
                _ => {}
            }
        }
        obeying
    }

    /// The exact counters of an instance that stops.
    fn hold(&mut self, who: usize) -> Counters {
        self.shards[who].apply(Command::Hold { endpoint: MAIN }).unwrap();
        for report in reports(&mut self.shards[who], self.now) {
            if let Report::Held { counters, .. } = report {
                return counters[0].clone();
            }
        }
        panic!("no answer to Hold");
    }

    fn grant(&mut self, to: usize, term: u64, counters: &Counters) {
        let counters = Box::new(counters.clone());
        self.shards[to].apply(Command::Resume { term: Term(term), counters }).unwrap();
    }

    fn disown(&mut self, who: usize) {
        self.shards[who].apply(Command::Disown { endpoint: MAIN, steer: true }).unwrap();
    }

    fn take_over(&mut self, who: usize, jump: u64) {
        let term = self.next_term(who);
        own(&mut self.shards[who], term, jump, false);
        self.owner = who;
        self.synced = false;
    }

    fn step(&mut self, step: &Step) {
        self.now += ms(60);
        let (owner, other) = (self.owner, 1 - self.owner);
        match *step {
            Step::Send(count) => self.send(owner, count, self.synced),
            Step::Renew { acked } if self.synced => {
                self.renew(acked);
            }
            // 2^28 at a time, the numbers last for 16 jumps.
            Step::Crash if self.has_sa[other] && (self.synced || self.jumps < 12) => {
                let jump = if self.synced { 0 } else { 1 << 28 };
                self.jumps += u32::from(!self.synced);
                self.shards[owner] = Shard::new(config());
                self.has_sa[owner] = false;
                self.ceiling[owner] = 0;
                self.take_over(other, jump);
            }
            Step::Switch if self.synced => {
                let counters = self.hold(owner);
                let term = self.next_term(other);
                self.grant(other, term, &counters);
                own(&mut self.shards[other], term, 0, true);
                self.ceiling[other] = self.ceiling[owner];
                self.disown(owner);
                self.owner = other;
            }
            Step::Refused if self.synced => {
                let counters = self.hold(owner);
                let term = self.next_term(other);
                self.grant(other, term, &counters);
                self.shards[owner].apply(Command::Release { endpoint: MAIN }).unwrap();
            }
            Step::LostAfterGrant(count) if self.synced => {
                let counters = self.hold(owner);
                let term = self.next_term(other);
                self.grant(other, term, &counters);
                own(&mut self.shards[other], term, 0, true);
                self.ceiling[other] = self.ceiling[owner];
                self.send(other, count, true);
                self.disown(other);
                self.take_over(owner, 0);
            }
            Step::Partition(a, b) if self.synced => {
                // ha.md, "Split brain without a witness".
                self.in_order = false;
                let solo = Command::ObeyLeases { endpoint: MAIN, on: false };
                self.shards[owner].apply(solo).unwrap();
                self.take_over(other, 1 << 24);
                self.send(owner, a, false);
                self.send(other, b, false);
                self.send(owner, b, false);
                let counters = self.hold(owner);
                let term = self.next_term(other);
                // The winner takes a new term above both, and goes on above
                // the larger of the two counters.
                own(&mut self.shards[other], term, 0, false);
                self.grant(other, term, &counters);
                // What the loser holds acknowledged, it knows: it would start
                // there.
                self.ceiling[other] = self.ceiling[other].max(self.ceiling[owner]);
                self.disown(owner);
                self.in_order = true;
            }
            Step::Solo if self.synced => {
                let solo = Command::ObeyLeases { endpoint: MAIN, on: false };
                self.shards[owner].apply(solo).unwrap();
                self.synced = false;
            }
            Step::Sync if !self.synced => {
                install(&mut self.shards[other], &self.sa);
                self.disown(other);
                let on = Command::ObeyLeases { endpoint: MAIN, on: true };
                self.shards[owner].apply(on).unwrap();
                // It goes on sending meanwhile.
                let mut obeying = false;
                for _ in 0..4 {
                    obeying |= self.renew(true);
                    if !obeying {
                        self.send(owner, 7, false);
                    }
                }
                assert!(obeying, "never came to obey");
                self.has_sa[other] = true;
                self.synced = true;
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn no_number_and_no_iv_twice_whatever_happens(steps in steps()) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        // And it still works.
        world.step(&Step::Solo);
        world.step(&Step::Sync);
        let sent = world.seqs.len();
        world.step(&Step::Send(1));
        prop_assert_eq!(world.seqs.len(), sent + 1);
        prop_assert_eq!(world.spi(), world.sa.spi_in);
    }
}
