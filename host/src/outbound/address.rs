//! Which addresses a guest may reach.
//!
//! Only what the Internet at large can reach as well: everything else is closed, whatever a
//! service's list says, unless the operator opened its network by name. The tables are those of
//! IANA's special-purpose address registries (RFC 6890 and successors), read as "global or not";
//! for IPv6 the other way round, since only 2000::/3 is given out as global unicast (RFC 4291, 2.4).
//!
//! An IPv6 address that stands for an IPv4 address is judged as that one: v4-mapped (RFC 4291,
//! 2.5.5.2) and NAT64's well-known prefix (RFC 6052, 2.1). What only used to do so is closed whole:
//! v4-compatible, 6to4 (RFC 7526), Teredo, and NAT64's local prefix (RFC 8215), behind which anything
//! may be.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Addresses with a common prefix, in CIDR notation (RFC 4632, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Network {
    base: IpAddr,
    prefix: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not an address, or no address and a length.
    #[error("{0:?} is not a network, which is written 10.1.0.0/16 or fd00::/8")]
    Malformed(String),
    /// The base has bits behind the prefix.
    #[error("{given} has bits behind its prefix; the network is {network}")]
    HostBits {
        /// As it was written.
        given: String,
        /// As it must have been meant.
        network: String,
    },
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Network {
    Network {
        base: IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        prefix,
    }
}

const fn v6(first: [u16; 4], prefix: u8) -> Network {
    let [a, b, c, d] = first;
    Network {
        base: IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0)),
        prefix,
    }
}

/// IPv4 that is not of the Internet.
const CLOSED_V4: [Network; 17] = [
    v4(0, 0, 0, 0, 8),          // this host, this network (RFC 791)
    v4(10, 0, 0, 0, 8),         // private (RFC 1918)
    v4(100, 64, 0, 0, 10),      // carrier-grade NAT (RFC 6598); metadata of one cloud
    v4(127, 0, 0, 0, 8),        // loopback (RFC 1122)
    v4(168, 63, 129, 16, 32),   // the platform's own services on one cloud
    v4(169, 254, 0, 0, 16),     // link-local (RFC 3927); metadata of most clouds
    v4(172, 16, 0, 0, 12),      // private (RFC 1918)
    v4(192, 0, 0, 0, 24),       // protocol assignments (RFC 6890); metadata of one cloud
    v4(192, 0, 2, 0, 24),       // documentation (RFC 5737)
    v4(192, 88, 99, 0, 24),     // 6to4 relays (RFC 7526)
    v4(192, 168, 0, 0, 16),     // private (RFC 1918)
    v4(198, 18, 0, 0, 15),      // benchmarks (RFC 2544)
    v4(198, 51, 100, 0, 24),    // documentation (RFC 5737)
    v4(203, 0, 113, 0, 24),     // documentation (RFC 5737)
    v4(224, 0, 0, 0, 4),        // multicast (RFC 5771)
    v4(240, 0, 0, 0, 4),        // reserved (RFC 1112)
    v4(255, 255, 255, 255, 32), // broadcast (RFC 919); in the row before, and named all the same
];

/// All of IPv6 that was given out as global unicast.
const GLOBAL_V6: Network = v6([0x2000, 0, 0, 0], 3);

/// What of it is not of the Internet.
const CLOSED_V6: [Network; 4] = [
    v6([0x2001, 0, 0, 0], 23), // protocol assignments (RFC 2928): Teredo, benchmarks, ORCHID
    v6([0x2001, 0xdb8, 0, 0], 32), // documentation (RFC 3849)
    v6([0x2002, 0, 0, 0], 16), // 6to4 (RFC 7526)
    v6([0x3fff, 0, 0, 0], 20), // documentation (RFC 9637)
];

/// NAT64's well-known prefix (RFC 6052, 2.1).
const NAT64: Network = v6([0x64, 0xff9b, 0, 0], 96);

/// What of IPv4 is not of the Internet.
pub(crate) fn closed_v4() -> impl Iterator<Item = Network> {
    CLOSED_V4.into_iter()
}

fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

impl Network {
    /// Its first address, and the length of its prefix.
    pub(crate) const fn parts(&self) -> (IpAddr, u8) {
        (self.base, self.prefix)
    }

    /// Whether an address is of it. A v4-mapped address is none of an IPv4 network.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let ((base, width), (address, other)) = (bits(self.base), bits(address));
        let behind = u32::from(width - self.prefix);
        // All 128 bits are behind an empty prefix: everything of the same family is of it.
        width == other && (base ^ address).checked_shr(behind).unwrap_or(0) == 0
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let malformed = || NetworkError::Malformed(text.chars().take(80).collect());
        let (base, prefix) = text.split_once('/').ok_or_else(malformed)?;
        let base: IpAddr = base.parse().map_err(|_| malformed())?;
        let (number, width) = bits(base);
        let prefix = prefix.parse::<u8>().ok().filter(|prefix| *prefix <= width);
        let prefix = prefix.ok_or_else(malformed)?;
        let behind = u32::from(width - prefix);
        let kept = number.checked_shr(behind).unwrap_or(0);
        let kept = kept.checked_shl(behind).unwrap_or(0);
        if kept == number {
            return Ok(Self { base, prefix });
        }
        let base = match base {
            IpAddr::V4(_) => Ipv4Addr::from_bits(u32::try_from(kept).unwrap_or(0)).into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(kept).into(),
        };
        Err(NetworkError::HostBits {
            given: text.chars().take(80).collect(),
            network: Self { base, prefix }.to_string(),
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl TryFrom<String> for Network {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl From<Network> for String {
    fn from(network: Network) -> Self {
        network.to_string()
    }
}

/// The address of which an address is another way of writing.
fn meant(address: IpAddr) -> IpAddr {
    let IpAddr::V6(six) = address else {
        return address;
    };
    if let Some(four) = six.to_ipv4_mapped() {
        return four.into();
    }
    if NAT64.contains(address) {
        let [.., a, b, c, d] = six.octets();
        return Ipv4Addr::new(a, b, c, d).into();
    }
    address
}

/// Which addresses guests of this host may reach.
#[derive(Debug, Clone, Default)]
pub struct AddressPolicy {
    opened: Vec<Network>,
}

impl AddressPolicy {
    /// The Internet, and what the operator has opened beside it.
    #[must_use]
    pub const fn new(opened: Vec<Network>) -> Self {
        Self { opened }
    }

    /// Whether a guest may reach this address.
    #[must_use]
    pub fn allows(&self, address: IpAddr) -> bool {
        self.is_opened(address) || is_of_the_internet(meant(address))
    }

    /// Whether the operator named it.
    #[must_use]
    pub fn is_opened(&self, address: IpAddr) -> bool {
        let address = meant(address);
        self.opened.iter().any(|network| network.contains(address))
    }
}

fn is_of_the_internet(address: IpAddr) -> bool {
    let in_one_of = |closed: &[Network]| closed.iter().any(|network| network.contains(address));
    match address {
        IpAddr::V4(_) => !in_one_of(&CLOSED_V4),
        IpAddr::V6(_) => GLOBAL_V6.contains(address) && !in_one_of(&CLOSED_V6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn closed_unless_opened() {
        let policy = AddressPolicy::default();
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.100.100.200",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "168.63.129.16",
            "169.254.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "192.168.255.255",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "64:ff9b:1::7f00:1",
            "100::1",
            "1fff::1",
            "2001::1",
            "2001:0:4136:e378:8000:63bf:3fff:fdd2",
            "2001:1::1",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:1ff:ffff::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
        ] {
            assert!(!policy.allows(ip(address)), "{address}");
        }
    }

    #[test]
    fn the_internet_is_open() {
        let policy = AddressPolicy::default();
        for address in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "168.63.129.15",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2001:200::1",
            "2606:4700:4700::1111",
            "2a00:1450:4001::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
        ] {
            assert!(policy.allows(ip(address)), "{address}");
        }
    }

    #[test]
    fn what_the_operator_opened() {
        let opened = ["127.0.0.0/8", "fd12::/16"].map(|text| text.parse().unwrap());
        let policy = AddressPolicy::new(opened.to_vec());
        for address in ["127.0.0.1", "::ffff:127.0.0.1", "fd12::1", "8.8.8.8"] {
            assert!(policy.allows(ip(address)), "{address}");
        }
        for address in ["10.0.0.1", "::1", "fd13::1", "169.254.169.254"] {
            assert!(!policy.allows(ip(address)), "{address}");
        }
        assert!(policy.is_opened(ip("127.0.0.1")) && !policy.is_opened(ip("8.8.8.8")));
        let all = AddressPolicy::new(vec!["0.0.0.0/0".parse().unwrap()]);
        assert!(all.allows(ip("10.0.0.1")) && !all.allows(ip("::1")));
    }

    #[test]
    fn networks() {
        for good in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "::/0",
            "fd00::/8",
            "127.0.0.1/32",
        ] {
            assert_eq!(good.parse::<Network>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "x/8",
            "10.0.0.0/-1",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad:?}");
        }
        let error = "10.1.2.3/8".parse::<Network>().unwrap_err();
        assert!(error.to_string().ends_with("10.0.0.0/8"), "{error}");
    }
}
