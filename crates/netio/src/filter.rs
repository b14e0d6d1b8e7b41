//! Classic BPF: small programs that sort datagrams between our sockets in the kernel.
//!
//! [`by_worker`] computes an SA's worker from its SPI, as `wire::id::SpiLayout::worker_of` does:
//!
//! ```text
//!   A = SPI      (0 where IKE has its marker, so IKE is worker 0's)
//!   A = (A >> 16 & 0xf) % workers
//! ```
//! A program that loads from behind the end of a packet ends with 0: what is too short for an SPI is worker 0's on
//! UDP (keepalives), and nobody's as protocol 50.

use std::io;
use std::os::fd::AsFd;

use wire::id::SpiLayout;

use crate::sys::set_option_of;

/// One instruction.
pub(crate) type Line = libc::sock_filter;

/// Takes the whole packet.
pub(crate) const ALL_OF_IT: u32 = u32::MAX;

/// An instruction; `jt` and `jf` are how many to pass over.
pub(crate) fn line(code: u32, jt: u8, jf: u8, k: u32) -> Line {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// The end: this value.
pub(crate) fn ret(k: u32) -> Line {
    line(libc::BPF_RET | libc::BPF_K, 0, 0, k)
}

/// From the SPI in A to its worker in A.
pub(crate) fn by_worker(workers: u8) -> [Line; 3] {
    let alu = |operation, k| line(libc::BPF_ALU | operation | libc::BPF_K, 0, 0, k);
    [
        alu(libc::BPF_RSH, SpiLayout::WORKER_SHIFT),
        alu(libc::BPF_AND, SpiLayout::MAX_WORKER.into()),
        alu(libc::BPF_MOD, workers.max(1).into()),
    ]
}

/// Attaches a program by this option.
pub(crate) fn attach(
    socket: &impl AsFd,
    option: libc::c_int,
    program: &mut [Line],
) -> io::Result<()> {
    // The kernel copies the program during the call, through the pointer.
    let whole = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    set_option_of(socket, libc::SOL_SOCKET, option, &whole)
}
