//! One socket a worker on one address and port: the kernel gives each the ESP packets of its SAs, by the SPI, and all
//! else to the first (SO_REUSEPORT with SO_ATTACH_REUSEPORT_CBPF, Linux 4.5).
//!
//! As in `shared.rs` the kernel looks at the first datagram of a run only. What comes to the wrong socket all the same
//! is for its owner to pass on.

use std::io;
use std::net::SocketAddr;

use super::{BatchSocket, Options};
use crate::filter::{attach, by_worker, line};

/// The sockets, bound.
#[derive(Debug)]
pub struct Group {
    /// By worker.
    pub sockets: Vec<BatchSocket>,
    /// Why the kernel does not sort, if it does not: then all datagrams of one sender go to one of the sockets.
    pub unsorted: Option<io::Error>,
}

impl Group {
    /// Opens so many, `local` as in [`BatchSocket::bind`]. A single one shares its port with nobody.
    /// Errors: as there.
    pub fn bind(local: SocketAddr, options: Options, workers: u8) -> io::Result<Self> {
        if workers <= 1 {
            let only = BatchSocket::bind(local, options)?;
            return Ok(Self { sockets: vec![only], unsorted: None });
        }
        // The order of binding is that of the places in the group, which the program names. Another process' sockets of
        // ours in it would shift them: nothing would be lost by that, only handed on.
        let sockets: Vec<_> = (0..workers)
            .map(|_| BatchSocket::bind(local, Options { shared: true, ..options }))
            .collect::<io::Result<_>>()?;
        let unsorted = sockets.first().and_then(|first| sort(first, workers).err());
        Ok(Self { sockets, unsorted })
    }
}

/// Attaches the program to the group. What it loads from lies behind the UDP header.
fn sort(group: &BatchSocket, workers: u8) -> io::Result<()> {
    let [shift, mask, modulo] = by_worker(workers);
    let mut program = [
        line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        shift,
        mask,
        modulo,
        line(libc::BPF_RET | libc::BPF_A, 0, 0, 0),
    ];
    attach(group, libc::SO_ATTACH_REUSEPORT_CBPF, &mut program)
}
