//! The rules of ha.md, each drawn and played once between two instances.

use super::world::{Fault, MS, World};
use crate::codec::{self, Frame, Record};
use crate::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Both instances, two endpoints if wanted, in sync; the owner of endpoint 0 is `left` (0).
pub(super) fn pair_in_sync(bug: Bug) -> World {
    let mut world = World::new(1, 1, bug);
    for host in 0..2 {
        world.fault(Fault::Start { host, lose_terms: false });
    }
    world.run_for(1500 * MS);
    assert!(world.converged(), "not in sync");
    world
}

pub(super) fn owner(world: &World) -> Vec<usize> {
    (0..2)
        .filter(|host| world.status(*host, 0).is_some_and(|s| matches!(s.role, Role::Owner(_))))
        .collect()
}

pub(super) fn last_own(world: &World) -> (usize, Own) {
    world.ledger.owns.last().cloned().unwrap()
}

pub(super) fn open(world: &World, host: usize) -> bool {
    let h = &world.hosts[host];
    h.pair.as_ref().is_some_and(|pair| world.local(host) < pair.fence(EndpointId(0))) && !h.paused
}

/// Steps of 1 ms until the condition holds; how long it took.
pub(super) fn until(world: &mut World, most_ms: u64, mut holds: impl FnMut(&World) -> bool) -> u64 {
    for ms in 0..most_ms {
        if holds(world) {
            return ms;
        }
        world.run_for(MS);
    }
    world.fail("did not happen in time");
}

// ---- boot

#[test]
fn in_contact_the_home_takes_a_free_endpoint() {
    let world = pair_in_sync(Bug::None);
    let (host, own) = last_own(&world);
    assert_eq!((host, own.how, own.synced, own.seq_jump), (0, How::Boot, true, 0));
    assert_eq!(world.ledger.owns.len(), 1);
}

#[test]
fn in_contact_the_other_takes_it_only_if_the_home_reports_a_dead_uplink() {
    let mut world = World::new(2, 1, Bug::None);
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.fault(Fault::Uplink(0, 0, false));
    world.fault(Fault::Start { host: 1, lose_terms: false });
    world.run_for(600 * MS);
    assert_eq!(owner(&world), [1]);
}

#[test]
fn without_contact_an_empty_instance_waits_boot_wait() {
    let mut world = World::new(3, 1, Bug::None);
    world.boot_wait = 10_000 * MS;
    world.fault(Fault::Start { host: 1, lose_terms: false });
    world.run_for(9_900 * MS);
    assert!(owner(&world).is_empty());
    world.run_for(200 * MS);
    assert_eq!(owner(&world), [1], "also if it is not the home");
}

#[test]
fn an_empty_instance_never_beats_a_living_one() {
    a_home_that_comes_back_empty(Bug::None);
}

fn a_home_that_comes_back_empty(bug: Bug) {
    let mut world = pair_in_sync(bug);
    let lineage = world.status(1, 0).unwrap().lineage;
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    assert_eq!(owner(&world), [1]);
    // The home comes back empty, at once and with the higher term in its file.
    world.hosts[0].disk[0] = Some(Term(5000));
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.run_for(1500 * MS);
    if owner(&world) != [1] || !world.converged() {
        world.fail("invariant 5: an empty instance beat a living one");
    }
    assert_eq!(world.status(0, 0).unwrap().lineage, lineage);
}

#[test]
fn a_fast_restart_of_the_owner_hands_over_to_the_shadow_by_its_hello() {
    let mut world = pair_in_sync(Bug::None);
    // Miss the signs of death, so that the hello of the new process is the first news: the stream
    // comes back at the next multiple of 200 ms.
    world.run_for(80 * MS);
    world.fault(Fault::Pause(1, 12 * MS));
    world.fault(Fault::Kill(0));
    world.run_for(10 * MS);
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.run_for(1500 * MS);
    let (host, own) = last_own(&world);
    assert_eq!((host, own.synced), (1, true));
    assert!(world.converged());
}

// ---- death

#[test]
fn proven_death_takes_milliseconds_and_costs_no_jump() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Kill(0));
    let ms = until(&mut world, 50, |world| owner(world) == [1]);
    let (_, own) = last_own(&world);
    assert!(ms <= 20, "{ms} ms");
    assert_eq!(
        (own.how, own.synced, own.seq_jump, own.quiet_until),
        (How::ProvenDeath, true, 0, None)
    );
    assert_eq!(own.term, Term(3), "the next odd one");
}

#[test]
fn silence_takes_dead_after_and_jumps() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::PowerOff(0));
    let ms = until(&mut world, 200, |world| owner(world) == [1]);
    assert!((80..=130).contains(&ms), "{ms} ms");
    let (_, own) = last_own(&world);
    assert_eq!((own.how.clone(), own.synced, own.seq_jump), (How::Silence, true, 1 << 24));
    assert!(own.quiet_until.unwrap() > world.local(1) + core::time::Duration::from_secs(9));
}

#[test]
fn a_hung_owner_is_replaced_and_sends_nothing_when_it_wakes() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Pause(0, 2000 * MS));
    until(&mut world, 200, |world| owner(world).contains(&1));
    world.run_for(1900 * MS);
    for _ in 0..400 {
        assert!(!open(&world, 0), "the old owner's fence opened");
        world.run_for(MS);
    }
    assert_eq!(world.ledger.stood_down, [(0, Why::Superseded)]);
    assert_eq!(world.ledger.handovers, 1, "its final counters reached the new owner");
    world.run_for(500 * MS);
    assert!(world.converged());
}

#[test]
fn a_hung_shadow_neither_stalls_the_owner_nor_takes_over_when_it_wakes() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Pause(1, 700 * MS));
    for _ in 0..700 {
        world.run_for(MS);
        assert!(open(&world, 0));
    }
    assert!(matches!(world.status(0, 0).unwrap().role, Role::Owner(Mode::Solo)));
    world.run_for(1500 * MS);
    assert_eq!(world.ledger.owns.len(), 1);
    assert!(world.converged());
    world.check_nothing_lost();
}

#[test]
fn a_dead_shadow_costs_the_owner_nothing() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Kill(1));
    for _ in 0..300 {
        world.run_for(MS);
        assert!(open(&world, 0));
    }
    assert_eq!(world.ledger.quiet, 0, "death was proven");
    assert!(matches!(world.status(0, 0).unwrap().role, Role::Owner(Mode::Solo)));
}

#[test]
fn silence_needs_a_working_uplink_and_proof_does_not() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Uplink(1, 0, false));
    world.fault(Fault::PowerOff(0));
    world.run_for(500 * MS);
    assert!(owner(&world).is_empty());
    // Back: reported for dead_after before it counts; and after so long the state is in doubt.
    world.run_for(1000 * MS);
    world.fault(Fault::Uplink(1, 0, true));
    world.run_for(80 * MS);
    assert!(owner(&world).is_empty());
    world.run_for(60 * MS);
    let (_, own) = last_own(&world);
    assert_eq!((own.how, own.synced, own.seq_jump), (How::Silence, false, (1 << 28) + (1 << 27)));

    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Uplink(1, 0, false));
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    assert_eq!(owner(&world), [1]);
}

#[test]
fn one_link_of_two_is_enough() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Cut { link: Some(0), towards: None, cut: true });
    for _ in 0..1000 {
        world.run_for(MS);
        assert!(open(&world, 0));
    }
    assert_eq!(world.ledger.owns.len(), 1);
    assert!(world.converged(), "the stream moved to the other link, still in sync");
    let solo = world.ledger.modes.iter().filter(|mode| **mode == (0, Mode::Solo)).count();
    assert!(solo <= 1, "at the start alone");
    assert_eq!(world.ledger.modes.last(), Some(&(0, Mode::Synced)), "said again on the other link");
}

// ---- the fence in the network

#[test]
fn a_one_way_cut_from_the_owner_closes_its_fence_before_the_other_takes_over() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Cut { link: None, towards: Some(1), cut: true });
    let closed = until(&mut world, 200, |world| !open(world, 0));
    let taken = until(&mut world, 200, |world| owner(world).contains(&1)) + closed;
    assert!((50..=90).contains(&closed), "{closed} ms");
    assert!((80..=130).contains(&taken), "{taken} ms");
    until(&mut world, 50, |world| owner(world) == [1]);
    assert_eq!(world.ledger.stood_down, [(0, Why::Superseded)], "contact or not");
}

#[test]
fn a_one_way_cut_towards_the_owner_stops_nobody() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Cut { link: None, towards: Some(0), cut: true });
    for _ in 0..1000 {
        world.run_for(MS);
        assert!(open(&world, 0));
    }
    assert_eq!(owner(&world), [0]);
    assert_eq!(world.ledger.owns.len(), 1);
}

#[test]
fn an_unechoed_owner_goes_on_if_the_other_reports_a_dead_uplink_and_closes_when_it_is_back() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Uplink(1, 0, false));
    world.run_for(50 * MS);
    world.fault(Fault::Cut { link: None, towards: Some(1), cut: true });
    for _ in 0..500 {
        world.run_for(MS);
        assert!(open(&world, 0));
    }
    world.fault(Fault::Uplink(1, 0, true));
    // The world checks that the two never pass the fence together.
    until(&mut world, 250, |world| owner(world) == [1]);
}

#[test]
fn full_partition_splits_and_heals_with_a_new_term_a_tail_and_counters() {
    a_split(Bug::None);
}

fn a_split(bug: Bug) {
    let mut world = pair_in_sync(bug);
    world.fault(Fault::Cut { link: None, towards: None, cut: true });
    world.run_for(1000 * MS);
    assert_eq!(owner(&world), [0, 1], "may split");
    assert!(open(&world, 0) && open(&world, 1), "losing contact alone never stops an owner");
    assert_eq!(world.ledger.quiet, 1, "the incumbent starts no IKE exchange either");
    let announced = world.ledger.announces;
    world.fault(Fault::Cut { link: None, towards: None, cut: false });
    world.run_for(1500 * MS);
    let (host, own) = last_own(&world);
    if (host, own.how, own.term) != (1, How::Heal, Term(5)) {
        world.fail("healing: the winner took no term above both");
    }
    assert_eq!(world.ledger.stood_down, [(0, Why::Superseded)]);
    assert_eq!(world.ledger.handovers, 1);
    assert!(world.ledger.announces > announced, "announces again");
    assert!(world.converged());
}

/// Rule 3 alone: nothing is heard after the pause, so only the listening delays the opening.
fn a_pause_in_a_partition(bug: Bug) {
    let mut world = pair_in_sync(bug);
    world.fault(Fault::PowerOff(1));
    world.run_for(300 * MS);
    world.fault(Fault::Pause(0, 500 * MS));
    world.run_for(501 * MS);
    for ms in 1..90 {
        if open(&world, 0) {
            world.fail(&format!("invariant 3: open {ms} ms after a pause, without listening"));
        }
        world.run_for(MS);
    }
    world.run_for(60 * MS);
    assert!(open(&world, 0));
}

#[test]
fn after_a_late_turn_the_fence_opens_only_when_it_has_listened() {
    a_pause_in_a_partition(Bug::None);
}

/// A lone survivor of a proven death is not fenced by a short stop, and is by one in which another can have come to own.
fn a_lone_owner_stops(bug: Bug) {
    let mut world = World::new(1, 1, bug);
    world.boot_wait = 10_000 * MS;
    for host in 0..2 {
        world.fault(Fault::Start { host, lose_terms: false });
    }
    world.run_for(1500 * MS);
    world.fault(Fault::Kill(1));
    world.run_for(3000 * MS);
    world.fault(Fault::Pause(0, 500 * MS));
    world.run_for(501 * MS);
    assert!(open(&world, 0), "a short stop closes nothing");
    world.run_for(3000 * MS);
    world.fault(Fault::Pause(0, 30_000 * MS));
    world.fault(Fault::Start { host: 1, lose_terms: false });
    until(&mut world, 15_000, |world| owner(world).contains(&1));
    // It would send as soon as it goes on.
    let stopped = world.hosts[0].pair.as_ref().unwrap();
    if world.local(0) < stopped.fence(EndpointId(0)) {
        world.fail("invariant 3: the fence of a stopped owner is open although another owns");
    }
}

#[test]
fn a_lone_owner_is_fenced_by_a_long_stop_alone() {
    a_lone_owner_stops(Bug::None);
}

// ---- the log

#[test]
fn a_slow_shadow_never_stalls_a_healthy_owner() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::SlowShadow(60_000 * MS));
    let ms = until(&mut world, 900, |world| {
        matches!(world.status(0, 0).unwrap().role, Role::Owner(Mode::Solo))
    });
    assert!((480..=700).contains(&ms), "{ms} ms");
    assert_eq!(world.status(1, 0).unwrap().role, Role::Shadow { synced: false }, "it was told");
    assert!(world.status(0, 0).unwrap().peer_uplink.is_some(), "contact lasts");
}

#[test]
fn a_record_lost_at_the_shadow_is_found_and_a_snapshot_forced() {
    let mut world = pair_in_sync(Bug::PutLost);
    world.run_for(3000 * MS);
    assert!(world.ledger.mismatches > 0);
    let warned = world
        .ledger
        .warnings
        .iter()
        .filter(|(host, w)| *host == 0 && matches!(w, Warning::DigestMismatch { .. }));
    assert_eq!(warned.count(), 1, "one line a minute");
}

#[test]
fn an_unsynced_shadow_takes_over_in_doubt() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::SlowShadow(60_000 * MS));
    world.run_for(900 * MS);
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    let (host, own) = last_own(&world);
    assert_eq!((host, own.synced, own.seq_jump), (1, false, (1 << 28) + (1 << 27)));
}

/// Right took over; what left had under way in the old term must not be acknowledged.
fn a_record_of_a_closed_log(bug: Bug) {
    let mut world = pair_in_sync(bug);
    let position = world.status(0, 0).unwrap().position;
    world.fault(Fault::Pause(0, 300 * MS));
    world.run_for(1000 * MS);
    assert_eq!(owner(&world), [1]);
    let record = Frame::Record(Record {
        id: crate::digest::name_id("endpoint0"),
        term: Term(2),
        position: Position(position.0 + 1),
        puts: Vec::new(),
        deletes: vec![1],
    });
    let (now, before) = (world.local(1), world.status(1, 0).unwrap());
    let pair = world.hosts[1].pair.as_mut().unwrap();
    pair.handle_frame(now, &codec::encode(&record));
    while let Some(transmit) = pair.poll_transmit() {
        if let Transmit::Frame(bytes) = transmit
            && matches!(codec::frame(&bytes), Ok(Frame::Ack { .. }))
        {
            world.fail("invariant 4: the old log was acknowledged after a takeover");
        }
    }
    assert_eq!(world.status(1, 0).unwrap(), before, "nothing else changed");
}

#[test]
fn taking_over_closes_the_old_log() {
    a_record_of_a_closed_log(Bug::None);
}

// ---- switchover

#[test]
fn a_switchover_hands_over_exactly_and_stays_in_sync() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Switchover(0));
    let ms = until(&mut world, 100, |world| owner(world) == [1]);
    assert!(ms <= 20, "{ms} ms");
    let (host, own) = last_own(&world);
    assert_eq!((host, own.term, own.seq_jump, own.obey_leases), (1, Term(3), 0, true));
    assert!(matches!(own.how, How::Grant(_)));
    assert_eq!(world.ledger.stood_down, [(0, Why::Granted)]);
    world.run_for(10 * MS);
    assert!(world.converged(), "in sync at once, without a snapshot");
    world.fault(Fault::Switchover(0));
    world.run_for(100 * MS);
    assert_eq!(owner(&world), [0]);
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    assert_eq!(owner(&world), [1]);
    world.workload = false;
    world.run_for(10 * MS);
    world.check_nothing_lost();
}

/// The stream carries the grant too slowly; heartbeats carry offer and refusal.
fn a_grant_that_comes_too_late(bug: Bug) {
    for seed in 0..20 {
        let mut world = World::new(seed, 1, bug);
        for host in 0..2 {
            world.fault(Fault::Start { host, lose_terms: false });
        }
        world.run_for(1500 * MS);
        world.fault(Fault::Stall(400 * MS));
        world.fault(Fault::Switchover(0));
        world.run_for(400 * MS);
        let granted = world.ledger.stood_down.contains(&(0, Why::Granted));
        if !granted && (owner(&world) != [0] || world.ledger.resumes != 1) {
            world.fail("neither granted nor refused");
        }
        world.run_for(1000 * MS);
        if !granted && owner(&world) != [0] {
            world.fail("a refused grant was taken");
        }
    }
}

#[test]
fn a_late_grant_is_refused_for_ever_and_the_owner_resumes() {
    a_grant_that_comes_too_late(Bug::None);
}

#[test]
fn contact_lost_in_the_middle_resumes_by_a_new_term() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Switchover(0));
    until(&mut world, 20, |world| world.hosts[0].gateway[0].hold);
    // The grant leaves within 5 ms; power is lost before the answer.
    world.fault(Fault::Stall(50 * MS));
    world.run_for(5 * MS);
    world.fault(Fault::PowerOff(1));
    world.run_for(200 * MS);
    let (host, own) = last_own(&world);
    assert_eq!((host, own.how), (0, How::Resume));
    assert!(own.term > Term(3), "above the offered one");
    assert!(open(&world, 0));
}

#[test]
fn a_dead_uplink_hands_over_once_in_ten_seconds() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Uplink(0, 0, false));
    world.run_for(200 * MS);
    assert_eq!(owner(&world), [1]);
    // The other's is dead as well: not strictly better.
    world.fault(Fault::Uplink(1, 0, false));
    world.run_for(500 * MS);
    assert_eq!(owner(&world), [1]);
    // Strictly better, but it failed a moment ago.
    world.fault(Fault::Uplink(0, 0, true));
    world.run_for(9000 * MS);
    assert_eq!(owner(&world), [1], "10 s have not passed");
    world.run_for(2000 * MS);
    assert_eq!(owner(&world), [0]);
    world.fault(Fault::Uplink(0, 0, false));
    world.fault(Fault::Uplink(1, 0, true));
    world.run_for(5000 * MS);
    assert_eq!(owner(&world), [0], "10 s have not passed");
    world.run_for(6000 * MS);
    assert_eq!(owner(&world), [1]);
}

#[test]
fn a_goodbye_hands_over_at_once() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Goodbye(0));
    let ms = until(&mut world, 50, |world| owner(world) == [1]);
    assert!(ms <= 5, "{ms} ms");
    assert_eq!(last_own(&world).1.seq_jump, 0);
}

// ---- terms, config

#[test]
fn a_lost_term_file_starts_1024_above_what_is_heard() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    world.fault(Fault::Start { host: 0, lose_terms: true });
    world.run_for(1500 * MS);
    world.fault(Fault::Kill(1));
    world.run_for(50 * MS);
    let (host, own) = last_own(&world);
    assert_eq!(host, 0);
    assert!(own.term > Term(1024) && own.synced, "{:?}", own.term);
}

#[test]
fn different_configs_keep_ownership_and_replicate_nothing() {
    let mut world = World::new(5, 1, Bug::None);
    world.tweak = |host, config| config.config_digest = host as u64;
    for host in 0..2 {
        world.fault(Fault::Start { host, lose_terms: false });
    }
    world.run_for(3000 * MS);
    assert_eq!(owner(&world), [0]);
    assert_eq!(world.status(1, 0).unwrap().role, Role::Empty);
    let wrong = |(_, w): &&(usize, Warning)| matches!(w, Warning::WrongDigest { .. });
    assert_eq!(world.ledger.warnings.iter().filter(wrong).count(), 2, "one line each");
    // It is no reason to leave a dead owner's endpoint alone.
    world.fault(Fault::Kill(0));
    world.run_for(50 * MS);
    assert_eq!(owner(&world), [1]);
}

/// Both start with this change to their configs; returns what they warned of.
fn refused(tweak: fn(usize, &mut Config)) -> (World, Vec<(usize, Warning)>) {
    // Left owns already; then right comes with something wrong, and leaves it alone.
    let mut world = World::new(6, 1, Bug::None);
    world.tweak = tweak;
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.run_for(1200 * MS);
    assert_eq!(owner(&world), [0]);
    world.fault(Fault::Start { host: 1, lose_terms: false });
    for _ in 0..6000 {
        world.run_for(MS);
        assert_eq!(owner(&world), [0]);
        assert!(open(&world, 0), "no endpoint is lost");
    }
    let warnings = world.ledger.warnings.clone();
    (world, warnings)
}

#[test]
fn equal_indices_refuse_the_link_and_every_acquisition() {
    let (world, warnings) = refused(|_, config| config.index = 0);
    assert_eq!(
        warnings,
        [(0, Warning::EqualIndex(0)), (1, Warning::EqualIndex(0))],
        "one line each"
    );
    assert!(
        world.ledger.hooks.iter().any(|(host, state, _)| (*host, *state) == (1, HookState::Fault))
    );
}

#[test]
fn equal_names_refuse_the_link_and_every_acquisition() {
    let (_, warnings) = refused(|_, config| {
        config.name = "same".into();
        config.peer_name = "other".into();
    });
    assert!(warnings.iter().all(|(_, w)| *w == Warning::EqualName("same".into())));
    assert_eq!(warnings.len(), 2);
}

#[test]
fn a_stranger_is_refused() {
    let (_, warnings) = refused(|host, config| {
        if host == 1 {
            config.name = "stranger".into();
        }
    });
    let (expected, heard) = ("right".to_owned(), "stranger".to_owned());
    assert!(warnings.contains(&(0, Warning::OtherName { heard, expected })));
}

#[test]
fn releases_without_a_common_format_are_refused() {
    let (_, warnings) = refused(|host, config| {
        if host == 1 {
            config.releases = Releases { own: 4, oldest: 3 };
        }
    });
    assert!(warnings.contains(&(0, Warning::OldRelease { ours: (1, 2), theirs: (3, 4) })));
    assert!(warnings.contains(&(1, Warning::OldRelease { ours: (3, 4), theirs: (1, 2) })));
}

#[test]
fn neighbouring_releases_settle_on_the_lower() {
    let mut world = World::new(7, 1, Bug::None);
    world.tweak = |host, config| {
        if host == 1 {
            config.releases = Releases { own: 3, oldest: 2 };
        }
    };
    for host in 0..2 {
        world.fault(Fault::Start { host, lose_terms: false });
    }
    world.run_for(1500 * MS);
    assert!(world.converged());
    for (host, peer) in [(0, 3), (1, 2)] {
        let status = world.hosts[host].pair.as_ref().unwrap().status(world.local(host));
        assert_eq!((status.release, status.peer_newest), (Some(2), Some(peer)));
    }
}

// Both at release 1; each in turn hands over, says goodbye and comes back as another build; then
// back again. All that is held at every moment is in the format settled then, at both.
#[test]
fn a_rolling_upgrade_and_the_way_back_rewrite_what_is_held() {
    let mut world = World::new(11, 1, Bug::None);
    for host in 0..2 {
        world.hosts[host].releases = Releases { own: 1, oldest: 1 };
        world.fault(Fault::Start { host, lose_terms: false });
    }
    world.run_for(1500 * MS);
    let settled = |world: &mut World, release: u32| {
        until(world, 3000, World::converged);
        world.run_for(500 * MS);
        for host in 0..2 {
            let pair = world.hosts[host].pair.as_ref().unwrap();
            assert_eq!(pair.status(world.local(host)).release, Some(release));
            let values: Vec<_> = pair.values(EndpointId(0)).collect();
            assert!(!values.is_empty());
            for (key, value) in values {
                if value.last() != Some(&(release as u8)) {
                    world.fail(&format!("invariant 5: key {key} is not in the settled format"));
                }
            }
        }
        if world.ledger.mismatches > 0 {
            world.fail("digests differed");
        }
    };
    settled(&mut world, 1);
    for (host, own, release) in [(0, 2, 1), (1, 2, 2), (0, 1, 1), (1, 1, 1), (1, 2, 1), (0, 2, 2)] {
        if owner(&world) == [host] {
            world.fault(Fault::Switchover(0));
            until(&mut world, 500, |world| owner(world) == [1 - host]);
            world.run_for(200 * MS);
        }
        world.fault(Fault::Goodbye(host));
        world.run_for(300 * MS);
        assert!(world.hosts[host].pair.is_none());
        world.hosts[host].releases = Releases { own, oldest: 1 };
        world.fault(Fault::Start { host, lose_terms: false });
        settled(&mut world, release);
    }
    world.workload = false;
    world.run_for(300 * MS);
    world.check_nothing_lost();
}

#[test]
fn announcements_follow_the_plan() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Kill(0));
    until(&mut world, 50, |world| owner(world) == [1]);
    let mut seen = Vec::new();
    let before = world.ledger.announces - 1;
    for ms in 0..6000 {
        while world.ledger.announces - before > seen.len() {
            seen.push(ms);
        }
        world.run_for(MS);
    }
    assert_eq!(seen.len(), 7);
    for (seen, planned) in seen.iter().zip(config::ANNOUNCE_MS) {
        assert!((planned..=planned + 3).contains(seen), "{seen} instead of {planned}");
    }
}

/// Scenarios that a deliberate bug must fail, where seeds alone would take long to find it.
pub(super) fn found(bug: Bug) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| match bug {
        Bug::UsurperForgotten => super::absence::a_takeover_that_nobody_tells_of(bug),
        Bug::FenceWithoutListening => a_pause_in_a_partition(bug),
        Bug::AloneTooLong => a_lone_owner_stops(bug),
        Bug::GrantAfterRefusal => a_grant_that_comes_too_late(bug),
        Bug::HealInOldTerm => a_split(bug),
        Bug::EmptyBeatsLiving => a_home_that_comes_back_empty(bug),
        Bug::OldLogAcked => a_record_of_a_closed_log(bug),
        _ => {}
    }))
    .err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_default())
}
