//! Which addresses a machine has.
//!
//! ```text
//!  the pool, 10.199.0.0/16 ─▶ slot 0:  .0 network  .1 the host's end  .2 the machine  .3 broadcast
//!                             slot 1:  .4          .5                 .6              .7
//! ```
//!
//! Four addresses for two ends, since not every guest knows that a wire with two ends needs no more
//! (RFC 3021). The Ethernet address is made of the address: it never leaves the wire.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

use insula_vmm::virtio::net::{InterfaceName, InterfaceNameError};
use serde::{Deserialize, Serialize};

use crate::outbound::Network;

/// A wire's own prefix.
pub(super) const WIRE_PREFIX: u8 = 30;
/// With more slots than these their numbers would not fit into an interface's name.
const POOL_PREFIX_LEAST: u8 = 14;
/// Room for two machines.
const POOL_PREFIX_MOST: u8 = 29;
/// Every interface of every host's begins so.
pub(super) const INTERFACES: &str = "ins";

/// The addresses that a host gives to its machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    base: u32,
    prefix: u8,
}

/// A text that is no pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is no pool of addresses, which is an IPv4 network such as 10.199.0.0/16, \
     /{POOL_PREFIX_LEAST} to /{POOL_PREFIX_MOST}"
)]
pub struct PoolError {
    given: String,
}

impl Pool {
    /// Private addresses (RFC 1918) that few networks use.
    pub const DEFAULT: Self = Self {
        base: u32::from_be_bytes([10, 199, 0, 0]),
        prefix: 16,
    };

    /// How many machines it has addresses for.
    pub(super) const fn slots(self) -> u32 {
        1 << (WIRE_PREFIX - self.prefix)
    }

    /// The wire of a slot; none beyond the last.
    pub(super) fn wire(self, slot: u32) -> Option<Wire> {
        (slot < self.slots()).then(|| Wire {
            slot,
            base: self.base + slot * 4,
        })
    }

    pub(super) fn contains(self, address: Ipv4Addr) -> bool {
        (address.to_bits() ^ self.base) >> (32 - self.prefix) == 0
    }
}

impl FromStr for Pool {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let refused = || PoolError {
            given: text.chars().take(40).collect(),
        };
        let network: Network = text.parse().map_err(|_| refused())?;
        let (IpAddr::V4(base), prefix) = network.parts() else {
            return Err(refused());
        };
        if !(POOL_PREFIX_LEAST..=POOL_PREFIX_MOST).contains(&prefix) {
            return Err(refused());
        }
        let base = base.to_bits();
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.base), self.prefix)
    }
}

/// The two ends of one machine's wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wire {
    pub(super) slot: u32,
    base: u32,
}

impl Wire {
    /// The host's end.
    pub(crate) fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base + 1)
    }

    /// The machine's.
    pub(crate) fn machine(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base + 2)
    }

    /// The machine's, on the link: administered locally (IEEE 802, 8.4).
    pub(crate) fn mac(self) -> String {
        let [a, b, c, d] = self.machine().octets();
        format!("02:49:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }

    /// The interface of the host's end; `tag` tells this host's from another one's.
    pub(super) fn interface(self, tag: &str) -> Result<InterfaceName, InterfaceNameError> {
        format!("{}{}", prefix(tag), self.slot).parse()
    }

    /// What a kernel, or the initial ramdisk of a distribution, is told of it (kernel,
    /// `Documentation/admin-guide/nfs/nfsroot.rst`): address, gateway, mask, name, no DHCP.
    pub(crate) fn kernel_argument(self, name: &str) -> String {
        let mask = Ipv4Addr::from_bits(u32::MAX << (32 - WIRE_PREFIX));
        let (address, gateway) = (self.machine(), self.gateway());
        format!("ip={address}::{gateway}:{mask}:{name}::off")
    }
}

/// How the interfaces of one host's machines begin.
pub(super) fn prefix(tag: &str) -> String {
    format!("{INTERFACES}{tag}-")
}

/// The ports of the host's that may lead to machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: NonZeroU16,
    last: NonZeroU16,
}

/// A text that is no range of ports.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no range of ports such as 20000-29999")]
pub struct PortRangeError {
    given: String,
}

impl PortRange {
    /// Below those that Linux gives to connections by itself (`ip_local_port_range`), above those
    /// that services have by custom.
    pub const DEFAULT: Self = match (NonZeroU16::new(20_000), NonZeroU16::new(29_999)) {
        (Some(first), Some(last)) => Self { first, last },
        _ => panic!("neither is zero"),
    };

    pub(crate) fn contains(self, port: NonZeroU16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl FromStr for PortRange {
    type Err = PortRangeError;

    fn from_str(text: &str) -> Result<Self, PortRangeError> {
        let range = text.split_once('-').and_then(|(first, last)| {
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            (first <= last).then_some(Self { first, last })
        });
        range.ok_or_else(|| PortRangeError {
            given: text.chars().take(40).collect(),
        })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// What stands in a machine's directory: its slot, for good, and the ports of its last start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lease {
    pub(super) slot: u32,
    pub(super) ports: Vec<insula_types::machine::PortForward>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wires_share_no_address() {
        let pool: Pool = "10.199.8.0/24".parse().expect("a pool");
        assert_eq!(pool.slots(), 64);
        let mut all = std::collections::HashSet::new();
        for slot in 0..64 {
            let wire = pool.wire(slot).expect("a slot");
            for end in [wire.gateway(), wire.machine()] {
                assert!(pool.contains(end) && all.insert(end), "{end}");
                // Neither the network's nor the broadcast address.
                assert!(![0, 3].contains(&(end.to_bits() & 3)), "{end}");
            }
        }
        assert_eq!(pool.wire(64), None);
        assert!(!pool.contains(Ipv4Addr::new(10, 199, 9, 0)));
    }

    #[test]
    fn the_last_wire_of_the_largest_pool_has_a_name() {
        let pool: Pool = "10.196.0.0/14".parse().expect("a pool");
        let wire = pool.wire(pool.slots() - 1).expect("the last");
        let name = wire.interface("0f3b9").expect("it fits").to_string();
        assert_eq!(name, "ins0f3b9-65535");
        assert_eq!(wire.machine(), Ipv4Addr::new(10, 199, 255, 254));
        assert_eq!(wire.mac(), "02:49:0a:c7:ff:fe");
    }

    #[test]
    fn a_kernel_is_told_of_its_wire() {
        let wire = Pool::DEFAULT.wire(1).expect("a slot");
        let told = wire.kernel_argument("db");
        assert_eq!(told, "ip=10.199.0.6::10.199.0.5:255.255.255.252:db::off");
    }

    #[test]
    fn what_is_no_pool_is_refused() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/8",
            "10.0.0.0/30",
            "10.0.0.1/16",
            "fd00::/16",
        ] {
            assert!(bad.parse::<Pool>().is_err(), "{bad:?}");
        }
        assert_eq!(Pool::DEFAULT.to_string().parse(), Ok(Pool::DEFAULT));
    }

    #[test]
    fn ranges_of_ports() {
        let range: PortRange = "20-30".parse().expect("a range");
        let has = |port| range.contains(NonZeroU16::new(port).expect("a port"));
        assert!(has(20) && has(30) && !has(19) && !has(31));
        for bad in ["", "20", "30-20", "0-5", "1-70000", "a-b"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad:?}");
        }
        assert_eq!(
            PortRange::DEFAULT.to_string().parse(),
            Ok(PortRange::DEFAULT)
        );
    }
}
