//! What an operator said and what failed outlives a takeover, in the format that has room
//! for it.

use super::*;

fn hold(w: &mut World, n: usize) {
    w.with_side(n, |ike, cx| {
        ike.terminate(cx, Target::Connection(ConnectionId(0)));
    });
    w.settle();
}

/// A side that brings its connection up by itself.
fn eager() -> World {
    let start = |n| {
        let mut config = config(n);
        config.connections[0].children[0].start = Start::Initiate;
        config
    };
    let mut w = World::with(start(A), start(A), config(B), config(B));
    w.initiate(A);
    w.settle();
    w.assert_tidy();
    w
}

fn speak(w: &mut World, n: usize, format: u8) {
    w.sides[n].ike.set_format(format);
    w.sides[n].shadow.set_format(format);
}

// A connection that was taken down stays down under the next owner, and the one after
// that; in format 1 the takeover forgets it.
#[test]
fn taken_down_stays_down_over_takeovers() {
    for (format, stays) in [(2, true), (1, false)] {
        let mut w = eager();
        speak(&mut w, A, format);
        hold(&mut w, A);
        assert!(w.sides[A].plane.sas.is_empty());
        for _ in 0..2 {
            w.take_over(A, Doubt::None);
            w.run(Duration::from_secs(120));
            assert_eq!(w.sides[A].ike.is_held("c"), stays);
            assert_eq!(w.sides[A].plane.sas.is_empty(), stays, "format {format}");
        }
        // Its record goes with the wish.
        w.initiate(A);
        w.settle();
        w.assert_tunnel();
        assert!(!w.sides[A].shadow.is_held("c"));
        w.take_over(A, Doubt::None);
        assert!(!w.sides[A].ike.is_held("c"));
        assert_eq!(w.sides[A].ike.snapshot(w.now).len(), 1, "the IKE SA alone");
    }
}

// What last failed is told by the next owner, with its age; in format 1 it is forgotten.
#[test]
fn what_failed_is_told_after_a_takeover() {
    for (format, kept) in [(2, true), (1, false)] {
        let mut other = config(A);
        other.connections[0].psk = Secret::from_slice(b"another secret");
        let mut w = World::with(duplicate(&other), other, config(B), config(B));
        speak(&mut w, A, format);
        w.initiate(A);
        w.settle();
        let told = w.failure(A);
        assert!(told.contains("authentication failed"), "{told}");
        let said = |w: &World| {
            let last = w.sides[A].ike.last_failure("c", w.now);
            last.map(|(text, age)| (text.to_owned(), age.as_secs()))
        };
        assert_eq!(said(&w), Some((told.clone(), 0)));
        w.now += Duration::from_secs(7);
        w.take_over(A, Doubt::None);
        assert_eq!(said(&w), kept.then(|| (told.clone(), 7)), "format {format}");
        // Its new shadow, which began with a snapshot, knows it too.
        let shadow = w.sides[A].shadow.last_failure("c", w.now).map(|(text, _)| text.to_owned());
        assert_eq!(shadow, kept.then_some(told));
    }
}

// The format may change at any time; the next snapshot has all in the new one, ages as of then.
#[test]
fn a_snapshot_is_whole_in_the_format_of_its_time() {
    let mut w = World::established();
    hold(&mut w, B);
    w.with_side(B, |ike, cx| ike.initiate(cx, ConnectionId(0)));
    w.settle();
    w.run(Duration::from_secs(100));
    let reader = |formats: u8, w: &World| {
        let mut reader = Endpoint::new(config(B));
        reader.hold_format(formats);
        reader.apply(w.now, &w.sides[B].ike.snapshot(w.now), &[]).map(|_| reader)
    };
    for (format, held) in [(1, 1), (2, 2), (1, 1), (2, 2)] {
        w.sides[B].ike.set_format(format);
        assert!(w.snapshot(B).iter().all(|(_, bytes)| bytes[0] == format));
        let reader = reader(held, &w).unwrap();
        let (there, here) = (reader.status(w.now), w.sides[B].ike.status(w.now));
        assert_eq!(format!("{there:?}"), format!("{here:?}"));
        assert!(there.ike_sas[0].age >= Duration::from_secs(100));
    }
    assert!(matches!(reader(1, &w), Err(crate::RecordError::Format(2))));
}

// An instance that stops on its own closes everything, and that is nobody's wish: whoever owns the
// endpoint next brings it up.
#[test]
fn an_instance_that_leaves_holds_nothing_down() {
    let mut w = eager();
    w.with_side(A, |ike, cx| ike.leave(cx));
    w.settle();
    w.run(Duration::from_secs(120));
    assert!(w.sides[A].plane.sas.is_empty(), "and it began nothing");
    assert!(!w.sides[A].ike.is_held("c"));
    w.take_over(A, Doubt::None);
    w.run(Duration::from_secs(120));
    w.assert_tunnel();
}
