//! What an instance that comes back knows when it must take over again.

use std::time::Duration;

use esp::{Reason, Verdict};

use crate::world::Pair;

/// More tunnels at an endpoint than one part of a snapshot is about.
const MANY: usize = 300;

// ha.md, "What is replicated": inbound window tops. Those of idle SAs are said once, when the shadow comes back, and
// overtake the snapshot that brings their SAs.
#[test]
fn what_was_accepted_before_a_shadow_came_back_is_refused_by_it() {
    let mut pair = Pair::with_connections(MANY);
    pair.kill(1);
    pair.run(Duration::from_millis(300));
    let recorded = pair.packets();
    let verdicts = pair.receive(0, &recorded);
    let count = verdicts.iter().filter(|v| matches!(v, Verdict::Deliver { .. })).count();
    assert_eq!(count, MANY);
    pair.run(Duration::from_millis(50));
    pair.revive(1);
    pair.run(Duration::from_millis(500));
    assert_eq!(pair.owners(), ["left", "left"]);
    pair.kill(0);
    pair.run(Duration::from_millis(300));
    let verdicts = pair.receive(1, &recorded);
    let refused = |v: &&Verdict| matches!(v, Verdict::Drop(Reason::Replayed | Reason::TooOld));
    assert_eq!(verdicts.iter().filter(refused).count(), MANY, "{:?}", verdicts.first());
    let newer = pair.packets();
    let verdicts = pair.receive(1, &newer);
    assert!(verdicts.iter().all(|v| matches!(v, Verdict::Deliver { .. })));
}
