//! Who was stopped for a while does not know what became of the other: scenes that the whole
//! product's simulation found. Reconnects come at multiples of 200 ms after the world's beginning,
//! and what is sent to a stopped instance is lost by a cut, as on a suspended machine.

use super::drawn::{last_own, open, owner, pair_in_sync, until};
use super::world::{Fault, MS, Us, World};
use crate::*;

const CUT: Fault = Fault::Cut { link: None, towards: None, cut: true };
const HEAL: Fault = Fault::Cut { link: None, towards: None, cut: false };

/// The machine is suspended: nothing reaches it, and it comes back 10 ms after a reconnect that
/// it missed.
fn suspend(world: &mut World, host: usize, us: Us) {
    let end = world.now + us;
    let end = end.next_multiple_of(200 * MS) + 10 * MS;
    world.fault_at(end, HEAL);
    world.fault(CUT);
    world.fault(Fault::Pause(host, end - world.now));
}

#[test]
fn time_away_is_not_waited() {
    for start in (0..1000).step_by(100) {
        let mut world = World::new(11, 1, Bug::None);
        world.fault(Fault::Start { host: 1, lose_terms: false });
        world.run_for(start * MS);
        suspend(&mut world, 1, 3000 * MS);
        world.fault(Fault::Start { host: 0, lose_terms: false });
        world.run_for(1500 * MS);
        assert_eq!(owner(&world), [0], "it has waited");
        for _ in 0..4000 {
            world.run_for(MS);
            assert_eq!(owner(&world), [0], "stopped after {start} ms of waiting");
        }
        assert!(world.converged());
    }
}

#[test]
fn a_shadow_that_was_away_for_boot_wait_does_not_overtake_a_new_process() {
    let mut world = pair_in_sync(Bug::None);
    suspend(&mut world, 1, 3000 * MS);
    world.run_for(90 * MS);
    world.fault(Fault::Kill(0));
    world.run_for(100 * MS);
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.run_for(1500 * MS);
    assert_eq!(owner(&world), [0], "it has waited");
    for _ in 0..4000 {
        world.run_for(MS);
        assert_eq!(owner(&world), [0]);
    }
    assert!(world.converged());
}

#[test]
fn a_shadow_that_was_away_for_boot_wait_owns_when_nobody_else_does() {
    let mut world = pair_in_sync(Bug::None);
    suspend(&mut world, 1, 3000 * MS);
    world.run_for(90 * MS);
    world.fault(Fault::PowerOff(0));
    world.run_for(3000 * MS + 100 * MS);
    let ms = until(&mut world, 2000, |world| owner(world) == [1]);
    assert!((600..1300).contains(&ms), "a boot wait after its return: {ms} ms");
    let (_, own) = last_own(&world);
    assert!(!own.synced, "the other may have gone on alone");
}

#[test]
fn a_shadow_stopped_for_less_takes_over_as_soon_as_it_has_listened() {
    let mut world = pair_in_sync(Bug::None);
    suspend(&mut world, 1, 300 * MS);
    world.fault(Fault::PowerOff(0));
    until(&mut world, 600, |world| !world.hosts[1].paused);
    let ms = until(&mut world, 300, |world| owner(world) == [1]);
    assert!((80..=130).contains(&ms), "{ms} ms");
}

#[test]
fn an_owner_that_was_away_for_boot_wait_listens_for_a_new_process() {
    let mut world = pair_in_sync(Bug::None);
    suspend(&mut world, 0, 4000 * MS);
    world.run_for(300 * MS);
    assert_eq!(owner(&world), [0, 1]);
    world.fault(Fault::Kill(1));
    world.run_for(200 * MS);
    world.fault(Fault::Start { host: 1, lose_terms: false });
    until(&mut world, 1500, |world| open(world, 1));
    for _ in 0..4500 {
        world.run_for(MS);
        assert!(!(open(&world, 0) && open(&world, 1)), "two senders");
    }
    assert_eq!(owner(&world).len(), 1);
}

#[test]
fn a_proof_from_before_a_pause_opens_no_fence_after_it() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Kill(0));
    world.run_for(100 * MS);
    let (_, own) = last_own(&world);
    assert_eq!((owner(&world), own.how), (vec![1], How::ProvenDeath));
    suspend(&mut world, 1, 3000 * MS);
    world.fault(Fault::Start { host: 0, lose_terms: false });
    until(&mut world, 1500, |world| open(world, 0));
    for _ in 0..4500 {
        world.run_for(MS);
        assert!(!(open(&world, 0) && open(&world, 1)), "two senders");
    }
    assert_eq!(owner(&world).len(), 1);
}

/// The owner hears nothing but is heard, and stops at any moment between two heartbeats. Its clock
/// is slow and the other's is fast.
#[test]
fn out_of_contact_the_fence_counts_from_what_the_other_may_have_heard() {
    for moment in 0..40 {
        let mut world = World::new(12, 1, Bug::None);
        (world.hosts[0].rate, world.hosts[1].rate) = (900, 1100);
        for host in 0..2 {
            world.fault(Fault::Start { host, lose_terms: false });
        }
        world.run_for(1500 * MS);
        world.fault(Fault::Cut { link: None, towards: Some(0), cut: true });
        world.run_for(500 * MS + moment * MS);
        assert!(open(&world, 0));
        world.fault(Fault::Pause(0, 1000 * MS));
        until(&mut world, 200, |world| owner(world).contains(&1));
        let pair = world.hosts[0].pair.as_ref().unwrap();
        assert!(world.local(0) >= pair.fence(EndpointId(0)), "still open, moment {moment}");
    }
}

#[test]
fn a_shadow_that_was_away_does_not_believe_itself_in_sync() {
    let mut world = pair_in_sync(Bug::None);
    suspend(&mut world, 1, 500 * MS);
    world.run_for(300 * MS);
    assert!(matches!(world.status(0, 0).unwrap().role, Role::Owner(Mode::Solo)));
    world.fault(Fault::Kill(0));
    until(&mut world, 500, |world| !world.hosts[1].paused);
    // The first news is the hello of a new process.
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.fault(Fault::Uplink(1, 0, false));
    until(&mut world, 600, |world| owner(world) == [1]);
    let (_, own) = last_own(&world);
    assert_eq!((own.synced, own.seq_jump), (false, (1 << 28) + (1 << 27)));
}

/// The same, by a network that was away.
#[test]
fn a_hello_does_not_make_an_old_word_true_again() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Uplink(1, 0, false));
    world.fault(CUT);
    world.run_for(600 * MS);
    assert!(matches!(world.status(0, 0).unwrap().role, Role::Owner(Mode::Solo)));
    world.fault(Fault::Kill(0));
    world.fault(Fault::Start { host: 0, lose_terms: false });
    world.fault(HEAL);
    until(&mut world, 600, |world| owner(world) == [1]);
    let (_, own) = last_own(&world);
    assert!(!own.synced, "{own:?}");
}

#[test]
fn two_takeovers_in_doubt_start_at_different_numbers() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::SlowShadow(60_000 * MS));
    world.run_for(900 * MS);
    world.fault(Fault::SlowShadow(0));
    world.fault(Fault::Pause(0, 600 * MS));
    until(&mut world, 200, |world| owner(world).contains(&1));
    world.run_for(100 * MS);
    world.fault(Fault::Kill(1));
    until(&mut world, 1500, |world| owner(world) == [0] && world.ledger.owns.len() == 3);
    let jumps: Vec<_> = world.ledger.owns[1..].iter().map(|(h, o)| (*h, o.seq_jump)).collect();
    assert_eq!(jumps, [(1, config::JUMP_UNSYNCED[1]), (0, config::JUMP_UNSYNCED[0])]);
}

/// The owner is suspended, the other takes over, sends and dies; the owner comes back and hears nothing of it. Whoever
/// then takes over from it by silence would start where the dead one did.
pub(super) fn a_takeover_that_nobody_tells_of(bug: Bug) {
    for restarts in [true, false] {
        let mut world = pair_in_sync(bug);
        suspend(&mut world, 0, 900 * MS);
        world.run_for(750 * MS);
        let (host, own) = last_own(&world);
        assert_eq!((host, own.how, own.seq_jump), (1, How::Silence, config::JUMP_SILENCE));
        world.fault(Fault::Kill(1));
        if restarts {
            world.run_for(50 * MS);
            world.fault(Fault::Start { host: 1, lose_terms: false });
        }
        until(&mut world, 2000, |world| open(world, 0));
        if restarts {
            until(&mut world, 2000, World::converged);
            world.fault(Fault::Pause(0, 1000 * MS));
            until(&mut world, 300, |world| owner(world).contains(&1));
            world.run_for(300 * MS);
        }
        let (_, own) = world.ledger.owns.iter().rfind(|(host, _)| *host == 0).unwrap();
        let expected = (How::Doubt, false, config::JUMP_UNSYNCED[0]);
        assert_eq!((own.how.clone(), own.synced, own.seq_jump), expected);
    }
}

#[test]
fn an_owner_that_was_away_goes_on_in_doubt_when_the_other_died_meanwhile() {
    a_takeover_that_nobody_tells_of(Bug::None);
}

/// Away, but the other lives and has not taken over: nothing is in doubt.
#[test]
fn an_owner_that_was_away_for_a_moment_keeps_its_term() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(Fault::Pause(0, 65 * MS));
    world.run_for(300 * MS);
    world.fault(Fault::Kill(1));
    world.run_for(300 * MS);
    world.fault(Fault::Start { host: 1, lose_terms: false });
    until(&mut world, 3000, World::converged);
    assert_eq!((owner(&world), world.ledger.owns.len()), (vec![0], 1));
}

/// The standby was away for less than dead_after, and its first heartbeats echo only old ones.
#[test]
fn a_standby_that_was_away_for_a_moment_closes_nothing() {
    for moment in 0..80 {
        let mut world = pair_in_sync(Bug::None);
        world.run_for((moment % 8) * 5 * MS);
        let away = 45 + moment / 2;
        world.fault(CUT);
        world.fault(Fault::Pause(1, away * MS));
        world.fault_at(world.now + away * MS, HEAL);
        for ms in 0..300 {
            world.run_for(MS);
            assert!(open(&world, 0), "closed {ms} ms after the standby stopped for {away} ms");
        }
        assert_eq!(owner(&world), [0]);
    }
}

/// Right, beyond a cut, owns an empty lineage under a much higher term; then they meet, and it
/// stands down at the hello, before it has said in any heartbeat that it owns.
#[test]
fn the_winner_of_another_lineage_takes_a_term_above_the_losers() {
    let mut world = pair_in_sync(Bug::None);
    world.fault(CUT);
    world.fault(Fault::Kill(1));
    world.hosts[1].disk[0] = Some(Term(5001));
    world.fault(Fault::Start { host: 1, lose_terms: false });
    world.workload = false;
    world.run_for(2000 * MS);
    let (host, own) = last_own(&world);
    assert_eq!((host, own.how, owner(&world)), (1, How::Boot, vec![0, 1]));
    world.fault(HEAL);
    until(&mut world, 3000, World::converged);
    assert_eq!(owner(&world), [0], "an empty one never wins");
    assert!(world.status(0, 0).unwrap().term > own.term, "it won in its old term");
}
