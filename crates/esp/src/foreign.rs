//! Another worker's SA, as far as whoever reads its packets must know it. No
//! keys, no counters: sealing, opening, numbers, leases and windows are its
//! owner's alone, so that no key is used in two places.

use crypto::aead::AeadAlg;
use wire::id::{ConnectionId, EndpointId, EspSpi};
use wire::ts::TrafficSelector;

use crate::command::Sa;
use crate::policy::Tunnel;
use crate::table::Placed;

#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) endpoint: EndpointId,
    connection: ConnectionId,
    pub(crate) spi_in: EspSpi,
    spi_out: EspSpi,
    alg: AeadAlg,
    pub(crate) local_ts: Vec<TrafficSelector>,
    pub(crate) remote_ts: Vec<TrafficSelector>,
    /// Whether it is in outbound use.
    pub(crate) used: bool,
}

impl Placed for Foreign {
    fn spi_in(&self) -> EspSpi {
        self.spi_in
    }
}

impl Foreign {
    /// Its keys, should there be any, are wiped here.
    pub(crate) fn new(sa: Sa) -> Self {
        Self {
            endpoint: sa.endpoint,
            connection: sa.connection,
            spi_in: sa.spi_in,
            spi_out: sa.spi_out,
            alg: sa.alg,
            local_ts: sa.local_ts,
            remote_ts: sa.remote_ts,
            used: false,
        }
    }

    /// Whether `sa` has the same endpoint, SPIs and algorithm. Where only the keys differ, its owner knows that it is
    /// another one, and judges what is handed there anew.
    pub(crate) fn is_same(&self, sa: &Sa) -> bool {
        (self.endpoint, self.spi_in, self.spi_out, self.alg)
            == (sa.endpoint, sa.spi_in, sa.spi_out, sa.alg)
    }

    /// Takes what may change while an SA lives.
    pub(crate) fn update(&mut self, sa: Sa) {
        self.connection = sa.connection;
        self.local_ts = sa.local_ts;
        self.remote_ts = sa.remote_ts;
    }

    pub(crate) fn tunnel(&self) -> Tunnel {
        Tunnel { endpoint: self.endpoint, connection: self.connection, spi_in: self.spi_in }
    }
}
