//! The digest by which two instances see that they were told the same.
//!
//! A canonical byte string, each field led by its length, hashed with SHA-256. The spelling of every field is
//! part of the format: neighbouring releases must agree on it, or a rolling upgrade would refuse its own
//! neighbour. So nothing here uses `Debug`, and new settings are added only where they are not default.

use core::fmt::Display;

use crypto::hash::sha256;
use crypto::prf::{PrfAlg, prf};
use ike::config::{Encap, Start};

use super::{HomeComing, OnFailure, Parts};

/// Names the format.
const FORMAT: &str = "tandem config 1";

#[derive(Default)]
struct Canonical(Vec<u8>);

impl Canonical {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend((bytes.len() as u64).to_be_bytes());
        self.0.extend(bytes);
    }

    fn text(&mut self, value: impl Display) {
        self.bytes(value.to_string().as_bytes());
    }

    /// A list is led by its length, so that neighbouring lists cannot be confused.
    fn list<T: Display>(&mut self, values: impl ExactSizeIterator<Item = T>) {
        self.text(values.len());
        values.for_each(|value| self.text(value));
    }
}

/// The digest of parts that are already sorted.
pub(super) fn of(parts: &Parts) -> [u8; 32] {
    let mut out = Canonical::default();
    out.text(FORMAT);
    if let Some(pair) = &parts.pair {
        let t = &pair.timers;
        for time in [t.heartbeat, t.dead_after, t.fence_after, t.boot_wait] {
            out.text(time.as_millis());
        }
    }
    out.text(parts.instances.len());
    for instance in &parts.instances {
        out.text(&instance.name);
        out.text(instance.index);
        out.list(instance.links.iter());
    }
    out.text(parts.endpoints.len());
    for endpoint in &parts.endpoints {
        out.text(&endpoint.name);
        out.text(&endpoint.home);
        out.text(endpoint.wan.address);
        out.list(endpoint.lan.iter().flat_map(|lan| &lan.addresses).collect::<Vec<_>>().iter());
        out.text(match endpoint.on_failure {
            OnFailure::Adopt => "adopt",
            OnFailure::Withdraw => "withdraw",
        });
        // Only what differs from the default, so that a release which knows these keys agrees with one that does not.
        let home_coming = endpoint.home_coming;
        if endpoint.weight != 1 {
            out.text(format_args!("weight {}", endpoint.weight));
        }
        if home_coming != HomeComing::default() {
            let HomeComing { preempt, hold_down } = home_coming;
            out.text(format_args!("home {preempt} {}", hold_down.as_millis()));
        }
    }
    out.text(parts.connections.len());
    for connection in &parts.connections {
        let ike = &connection.ike;
        out.text(&ike.name);
        let mut endpoints = connection.endpoints.clone();
        endpoints.sort();
        endpoints.dedup();
        out.list(endpoints.iter());
        out.text(&connection.remotes);
        for id in [&ike.local_id, &ike.remote_id] {
            out.text(id.kind().0);
            out.bytes(id.data());
        }
        if let Some(pair) = &parts.pair {
            // Keyed, so that whoever sees the digest cannot try words against it.
            out.bytes(
                prf(PrfAlg::HmacSha256, pair.digest_key.expose(), &[ike.psk.expose()]).expose(),
            );
        }
        out.list(ike.ike_proposals.iter());
        out.text(match ike.encap {
            Encap::Auto => "auto",
            Encap::Always => "always",
            Encap::Never => "never",
        });
        let t = &ike.timers;
        for time in [t.ike_rekey, t.child_rekey, t.dpd, t.keepalive] {
            out.text(time.as_millis());
        }
        out.text(ike.children.len());
        for child in &ike.children {
            out.text(&child.name);
            out.list(child.local_ts.iter());
            out.list(child.remote_ts.iter());
            out.list(child.esp_proposals.iter());
            out.text(match child.start {
                Start::Initiate => "initiate",
                Start::Trap => "trap",
                Start::Respond => "respond",
            });
        }
    }
    sha256(&[&out.0])
}
