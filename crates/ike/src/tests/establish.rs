//! IKE_SA_INIT and IKE_AUTH between two of us.

use super::*;

// A                                   B
// INIT, SA KE Ni N N ──►
//                 ◄── INIT, SA KE Nr N N
// AUTH, IDi IDr AUTH SA TSi TSr ──►
//                 ◄── AUTH, IDr AUTH SA TSi TSr
#[test]
fn a_tunnel_comes_up_in_four_messages() {
    let mut w = World::new();
    w.initiate(A);
    w.settle();
    assert_eq!(w.sent.len(), 4);
    w.assert_tidy();
    // RFC 7296 §2.23: a claimed NAT moves everything after IKE_SA_INIT to 4500.
    let ports: Vec<u16> = w.sent.iter().map(|(_, t)| t.from.port()).collect();
    assert_eq!(ports, [500, 500, 4500, 4500]);
    assert!(w.sides[A].plane.sender("net").unwrap().udp_encap);
}

#[test]
fn every_combination_of_algorithms() {
    for aead in ["aes256gcm16", "aes128gcm16", "chacha20poly1305"] {
        for prf in ["prfsha256", "prfsha384", "prfsha512"] {
            for group in ["x25519", "ecp256", "ecp384"] {
                let mut w = World::tuned(|_, c| {
                    let c = &mut c.connections[0];
                    c.ike_proposals =
                        proposal::parse_ike(&[format!("{aead}-{prf}-{group}")]).unwrap();
                    c.children[0].esp_proposals =
                        proposal::parse_esp(&[format!("{aead}-{group}")]).unwrap();
                });
                w.initiate(A);
                w.settle();
                w.assert_tidy();
                let suite = w.sides[B].ike.status(w.now).ike_sas[0].suite.clone().unwrap();
                assert_eq!(suite, format!("{aead}-{prf}-{group}"));
                // And once more with the keys of a rekeyed IKE SA and PFS.
                w.rekey(A, Target::Ike(w.ike(A)));
                w.settle();
                w.rekey(B, Target::Child(w.child(B)));
                w.settle();
                w.run(Duration::from_secs(6));
                w.assert_tidy();
            }
        }
    }
}
