//! A batch of records that is applied in parts comes to what it comes to in one; and starting many, a look at few.

use super::*;
use crate::{Application, RecordError};

type Records = Vec<(IkeSpi, zeroize::Zeroizing<Vec<u8>>)>;

const MANY: u16 = 5;

/// Several connections between the two, all up.
fn many() -> World {
    let mut w = World::tuned(|n, c| {
        let one = |k: u16| {
            let id = |n: usize| format!("gw{n}-{k}.example").parse::<Identity>().unwrap();
            let net = |n: usize| ts(&format!("10.{}.{k}.0/24", n + 1));
            let mut conn = connection(n);
            conn.name = format!("c{k}");
            conn.id = ConnectionId(k);
            (conn.local_id, conn.remote_id) = (id(n), id(1 - n));
            (conn.children[0].local_ts, conn.children[0].remote_ts) = (net(n), net(1 - n));
            conn
        };
        c.connections = (0..MANY).map(one).collect();
    });
    for k in 0..MANY {
        assert!(w.with_side(A, |ike, cx| ike.initiate(cx, ConnectionId(k))));
        w.settle();
    }
    assert_eq!(w.sides[A].plane.sas.len(), usize::from(MANY));
    w
}

/// What becomes of a shadow and of its workers by a batch in parts of `most`.
fn apply(
    shadow: &mut Endpoint,
    plane: &mut Plane,
    now: Duration,
    (puts, deletes): &(Records, Vec<IkeSpi>),
    most: usize,
) -> usize {
    let mut application = Application::new(puts.clone(), deletes.clone());
    let (mut parts, mut installed) = (0, false);
    loop {
        let part = shadow.apply_part(now, &mut application, most).unwrap();
        // A group of this test has one or two changes, and each at most three consequences.
        assert!(part.ops.len() <= most.saturating_add(1).saturating_mul(3), "{}", part.ops.len());
        let (removals, others): (Vec<_>, Vec<_>) =
            part.ops.into_iter().partition(|op| matches!(op, ChildOp::Remove { .. }));
        // A place in the workers' tables is free before another takes it.
        assert!(removals.is_empty() || !installed, "removed after something was installed");
        installed |= others.iter().any(|op| matches!(op, ChildOp::Install(_)));
        plane.apply(removals);
        plane.apply(others);
        parts += 1;
        if part.done {
            return parts;
        }
    }
}

fn state(shadow: &Endpoint, plane: &Plane, now: Duration) -> (Vec<(IkeSpi, Vec<u8>)>, String) {
    let records = shadow.snapshot(now).into_iter().map(|(key, bytes)| (key, bytes.to_vec()));
    let spis: Vec<_> = plane.sas.keys().collect();
    (records.collect(), format!("{spis:?} {:?}", plane.sends))
}

#[test]
fn parts_come_to_the_same_as_the_whole() {
    let mut w = many();
    let first: (Records, Vec<IkeSpi>) = (w.sides[A].ike.snapshot(w.now), Vec::new());
    // Children move to new IKE SAs, are replaced, and end.
    let ikes: Vec<IkeSpi> = w.sides[A].ike.status(w.now).ike_sas.iter().map(|sa| sa.spi).collect();
    let children: Vec<EspSpi> = w.sides[A].plane.sas.keys().copied().collect();
    w.rekey(A, Target::Ike(ikes[0]));
    w.settle();
    w.rekey(A, Target::Child(children[1]));
    w.settle();
    w.terminate(A, Target::Connection(ConnectionId(2)));
    w.settle();
    w.run(Duration::from_secs(20));
    let second = w.sides[A].ike.snapshot(w.now);
    let stays = |key: &IkeSpi| second.iter().any(|(other, _)| other == key);
    let deletes: Vec<IkeSpi> =
        first.0.iter().map(|(key, _)| *key).filter(|key| !stays(key)).collect();
    let second = (second, deletes);
    assert!(second.1.len() >= 2, "the rekeyed one and the ended one are gone");

    let fresh = || Endpoint::new(duplicate(w.sides[A].ike.config()));
    let run = |most: usize| {
        let (mut shadow, mut plane) = (fresh(), Plane::default());
        let parts = apply(&mut shadow, &mut plane, w.now, &first, most);
        let between = state(&shadow, &plane, w.now);
        apply(&mut shadow, &mut plane, w.now, &second, most);
        (parts, between, state(&shadow, &plane, w.now))
    };
    let (_, between, end) = run(usize::MAX);
    assert_eq!(
        end.0,
        w.sides[A]
            .ike
            .snapshot(w.now)
            .into_iter()
            .map(|(k, b)| (k, b.to_vec()))
            .collect::<Vec<_>>()
    );
    for most in 1..8 {
        let (parts, partly, whole) = run(most);
        assert!(parts > usize::from(MANY) / most, "{parts} parts of {most}");
        assert_eq!(partly, between, "parts of {most}");
        assert_eq!(whole, end, "parts of {most}");
    }
}

// Another lineage takes the place of what a shadow holds: everything goes and everything comes, a part at a time.
#[test]
fn a_snapshot_in_place_of_another_comes_in_parts_as_well() {
    let old = many();
    let mut new = many();
    for k in 0..MANY {
        new.terminate(A, Target::Connection(ConnectionId(k)));
        new.settle();
    }
    new.run(Duration::from_secs(20));
    for k in 0..MANY {
        assert!(new.with_side(A, |ike, cx| ike.initiate(cx, ConnectionId(k))));
        new.settle();
    }
    let first = (old.sides[A].ike.snapshot(old.now), Vec::new());
    let puts = new.sides[A].ike.snapshot(new.now);
    let stays = |key: &IkeSpi| puts.iter().any(|(other, _)| other == key);
    let gone: Vec<IkeSpi> = first.0.iter().map(|(key, _)| *key).filter(|k| !stays(k)).collect();
    assert_eq!(gone.len(), usize::from(MANY));
    let (mut shadow, mut plane) =
        (Endpoint::new(duplicate(new.sides[A].ike.config())), Plane::default());
    apply(&mut shadow, &mut plane, new.now, &first, 2);
    let parts = apply(&mut shadow, &mut plane, new.now, &(puts, gone), 1);
    assert!(parts > usize::from(MANY) * 2, "{parts} parts");
    let spis = |plane: &Plane| plane.sas.keys().copied().collect::<Vec<_>>();
    assert_eq!(spis(&plane), spis(&new.sides[A].plane));
}

#[test]
fn one_bad_record_and_nothing_of_the_batch_is_applied() {
    let w = many();
    let good = w.sides[A].ike.snapshot(w.now);
    for bad in 0..good.len() {
        let mut puts = good.clone();
        puts[bad].1.truncate(20);
        let mut shadow = Endpoint::new(duplicate(w.sides[A].ike.config()));
        let mut application = Application::new(puts, Vec::new());
        let error = loop {
            match shadow.apply_part(w.now, &mut application, 2) {
                Ok(part) => assert!(part.ops.is_empty() && !part.done),
                Err(error) => break error,
            }
        };
        assert_eq!(error, RecordError::Malformed);
        assert!(shadow.snapshot(w.now).is_empty());
    }
}

// peers.md 12: all of them, and never more than the limit at once.
#[test]
fn many_to_one_peer_come_up_a_few_at_a_time() {
    let mut w = World::tuned(|n, c| {
        c.connections = (0..40)
            .map(|k: u16| {
                let id = |n: usize| format!("gw{n}-{k}.example").parse::<Identity>().unwrap();
                let mut conn = connection(n);
                conn.name = format!("c{k}");
                conn.id = ConnectionId(k);
                (conn.local_id, conn.remote_id) = (id(n), id(1 - n));
                conn.children[0].start = if n == A { Start::Initiate } else { Start::Respond };
                conn
            })
            .collect();
    });
    let mut most = 0;
    for _ in 0..2000 {
        w.run(Duration::from_millis(5));
        let status = w.sides[A].ike.status(w.now);
        most = most.max(status.ike_sas.iter().filter(|sa| sa.state == "connecting").count());
    }
    assert_eq!(most, Limits::default().initiations_per_peer);
    assert_eq!(w.sides[A].plane.sas.len(), 40);
    let progress: Vec<_> = w.sides[A].ike.progress().collect();
    assert_eq!(progress.len(), 40);
    assert!(progress.iter().all(|p| p.state == Some("established") && p.children == 1));
}
