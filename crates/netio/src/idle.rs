//! How deep the host's idle processors may sleep: a request to the kernel's power management that lives as long as its
//! descriptor (Documentation/power/pm_qos_interface.rst, `/dev/cpu_dma_latency`).

use std::fs::File;
use std::io::{self, Write};

/// What the kernel takes for no request, in microseconds (PM_QOS_CPU_LATENCY_DEFAULT_VALUE).
const NO_REQUEST: i32 = 2_000_000_000;

/// The request; no request at first. It ends with the process, however that ends.
#[derive(Debug)]
pub struct IdleStates(File);

impl IdleStates {
    /// Errors: EACCES or EPERM without root; ENOENT where the kernel has no power management.
    pub fn open() -> io::Result<Self> {
        let mut states = Self(File::options().write(true).open("/dev/cpu_dma_latency")?);
        states.keep_awake(false)?;
        Ok(states)
    }

    /// On: idle processors poll for work and do not halt, so that a thread runs at once when it is woken there. They use
    /// power as if they were busy.
    pub fn keep_awake(&mut self, on: bool) -> io::Result<()> {
        let micros = if on { 0 } else { NO_REQUEST };
        self.0.write_all(&i32::to_ne_bytes(micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What all requests together come to, in microseconds.
    fn in_force() -> i32 {
        let mut bytes = [0; 4];
        io::Read::read_exact(&mut File::open("/dev/cpu_dma_latency").unwrap(), &mut bytes).unwrap();
        i32::from_ne_bytes(bytes)
    }

    #[test]
    fn the_request_lasts_until_it_is_taken_back_or_its_holder_is_gone() {
        // Others on this host may have requests of their own.
        let before = in_force();
        let mut states = IdleStates::open().unwrap();
        assert_eq!(in_force(), before);
        states.keep_awake(true).unwrap();
        assert_eq!(in_force(), 0);
        states.keep_awake(false).unwrap();
        assert_eq!(in_force(), before);
        states.keep_awake(true).unwrap();
        drop(states);
        assert_eq!(in_force(), before);
    }
}
