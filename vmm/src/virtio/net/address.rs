//! Who a machine may say that it is, and whether a frame says so.
//!
//! A frame is let out only if every address by which its receiver would know the sender is the
//! machine's own: the Ethernet source, the IP source, and what ARP and neighbour discovery claim.
//! What is neither ARP nor IP, or hides its kind (VLAN tags, routing headers, headers longer than
//! [`HEAD_BYTES`]), is not let out at all.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// What is looked at of a frame, from its destination address on.
pub(super) const HEAD_BYTES: usize = 192;
/// Destination, source and type (IEEE 802.3, 3.1.1).
pub(super) const ETHERNET_BYTES: usize = 14;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_IPV6: u16 = 0x86dd;

/// Length of an IPv6 header (RFC 8200, 3).
const IPV6_BYTES: usize = 40;
/// Next-header numbers (IANA, "Assigned Internet Protocol Numbers").
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers that are followed; more is a way to hide something.
const EXTENSIONS_MAX: usize = 4;

/// ICMPv6 types (RFC 4861, 4; RFC 3810, 5.2).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_REPORT_V2: u8 = 143;
/// Options with a link-layer address (RFC 4861, 4.6.1).
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// An Ethernet address of one machine: neither a group's nor zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

/// Not such an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no MAC address of a machine, as 02:00:00:12:34:56 is")]
pub struct MacAddressError {
    /// What was given.
    pub given: String,
}

impl MacAddress {
    /// # Errors
    /// A group address, or zero.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacAddressError> {
        let address = Self(bytes);
        if bytes == [0; 6] || bytes[0] & 1 != 0 {
            return Err(MacAddressError {
                given: address.to_string(),
            });
        }
        Ok(address)
    }

    /// As on the wire.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// The address that a machine gives itself on its link (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&[0xfe, 0x80]);
        bytes[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
        Ipv6Addr::from(bytes)
    }
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let given = || text.chars().take(40).collect();
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().unwrap_or_default();
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let parsed = u8::from_str_radix(part, 16);
            match parsed {
                Ok(parsed) if digits => *byte = parsed,
                _ => return Err(MacAddressError { given: given() }),
            }
        }
        if parts.next().is_some() {
            return Err(MacAddressError { given: given() });
        }
        Self::new(bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a machine may call itself. Beside these it has its [link-local](MacAddress::link_local)
/// address, and none at all while it asks for one (DHCP, duplicate detection).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// On the link.
    pub mac: MacAddress,
    /// On the internet.
    pub ipv4: Vec<Ipv4Addr>,
    /// On the internet.
    pub ipv6: Vec<Ipv6Addr>,
}

/// Why a frame is not let out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Shorter than what it says that it is.
    Short,
    /// A kind of frame that machines do not send.
    Kind,
    /// An address that is not the machine's.
    Source,
}

impl Identity {
    /// Whether a frame that starts with `head` may go out. `head` is all of the frame, or its
    /// first [`HEAD_BYTES`].
    pub(super) fn check(&self, head: &[u8]) -> Result<(), Refusal> {
        let source = array::<6>(head, 6)?;
        if source != self.mac.0 {
            return Err(Refusal::Source);
        }
        let packet = head.get(ETHERNET_BYTES..).ok_or(Refusal::Short)?;
        match u16::from_be_bytes(array(head, 12)?) {
            TYPE_ARP => self.check_arp(packet),
            TYPE_IPV4 => self.check_ipv4(packet),
            TYPE_IPV6 => self.check_ipv6(packet),
            _ => Err(Refusal::Kind),
        }
    }

    /// RFC 826, for Ethernet and IPv4.
    fn check_arp(&self, packet: &[u8]) -> Result<(), Refusal> {
        if array(packet, 0)? != [0, 1, 8, 0, 6, 4] {
            return Err(Refusal::Kind);
        }
        let sender = Ipv4Addr::from(array::<4>(packet, 14)?);
        // RFC 5227, 2.1.1: a probe has no sender.
        let own = sender.is_unspecified() || self.ipv4.contains(&sender);
        if array(packet, 8)? == self.mac.0 && own {
            Ok(())
        } else {
            Err(Refusal::Source)
        }
    }

    fn check_ipv4(&self, packet: &[u8]) -> Result<(), Refusal> {
        let [first] = array(packet, 0)?;
        let header = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header < 20 {
            return Err(Refusal::Kind);
        }
        let source = Ipv4Addr::from(array::<4>(packet, 12)?);
        if self.ipv4.contains(&source) {
            return Ok(());
        }
        // RFC 2131, 4.1: a client without an address, from port 68 to port 67.
        let [protocol] = array(packet, 9)?;
        let asks =
            source.is_unspecified() && protocol == UDP && array(packet, header)? == [0, 68, 0, 67];
        if asks { Ok(()) } else { Err(Refusal::Source) }
    }

    fn check_ipv6(&self, packet: &[u8]) -> Result<(), Refusal> {
        if array::<1>(packet, 0)?[0] >> 4 != 6 {
            return Err(Refusal::Kind);
        }
        // What lies beyond its payload the receiver does not see either.
        let payload = usize::from(u16::from_be_bytes(array(packet, 4)?));
        let packet = packet.get(..IPV6_BYTES + payload).unwrap_or(packet);
        let source = Ipv6Addr::from(array::<16>(packet, 8)?);
        let none = source.is_unspecified();
        if !none && !self.is_own(source) {
            return Err(Refusal::Source);
        }
        let [mut next] = array(packet, 6)?;
        let mut at = IPV6_BYTES;
        for _ in 0..EXTENSIONS_MAX {
            match next {
                HOP_BY_HOP | DESTINATION_OPTIONS => {
                    let [following, length] = array(packet, at)?;
                    next = following;
                    at += 8 * (usize::from(length) + 1);
                }
                ROUTING => return Err(Refusal::Kind),
                ICMPV6 => {
                    let message = packet.get(at..).ok_or(Refusal::Short)?;
                    return self.check_icmpv6(message, none);
                }
                _ if none => return Err(Refusal::Source),
                // Neighbour discovery is not taken from fragments (RFC 6980).
                _ => return Ok(()),
            }
        }
        Err(Refusal::Kind)
    }

    /// `none`: the packet has no source.
    fn check_icmpv6(&self, message: &[u8], none: bool) -> Result<(), Refusal> {
        let [kind] = array(message, 0)?;
        let options = match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err(Refusal::Kind),
            ROUTER_SOLICITATION => 8,
            NEIGHBOUR_SOLICITATION => 24,
            NEIGHBOUR_ADVERTISEMENT => {
                let target = Ipv6Addr::from(array::<16>(message, 8)?);
                if none || !self.is_own(target) {
                    return Err(Refusal::Source);
                }
                24
            }
            LISTENER_REPORT_V2 => return Ok(()),
            _ if none => return Err(Refusal::Source),
            _ => return Ok(()),
        };
        self.check_options(message.get(options..).ok_or(Refusal::Short)?)
    }

    /// Link-layer addresses that a neighbour would note (RFC 4861, 4.6).
    fn check_options(&self, mut options: &[u8]) -> Result<(), Refusal> {
        while !options.is_empty() {
            let [kind, length] = array(options, 0)?;
            let bytes = 8 * usize::from(length);
            if bytes == 0 {
                return Err(Refusal::Kind);
            }
            let named = matches!(kind, SOURCE_LINK_LAYER | TARGET_LINK_LAYER);
            if named && array(options, 2)? != self.mac.0 {
                return Err(Refusal::Source);
            }
            options = options.get(bytes..).ok_or(Refusal::Short)?;
        }
        Ok(())
    }

    fn is_own(&self, address: Ipv6Addr) -> bool {
        self.ipv6.contains(&address) || address == self.mac.link_local()
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Refusal> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or(Refusal::Short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 0, 0, 1, 2, 3];
    const OTHER: [u8; 6] = [2, 0, 0, 9, 9, 9];
    const IPV4: [u8; 4] = [10, 0, 0, 2];

    fn ipv6() -> Ipv6Addr {
        "fd00::2".parse().expect("an address")
    }

    fn identity() -> Identity {
        Identity {
            mac: MacAddress(MAC),
            ipv4: vec![Ipv4Addr::from(IPV4)],
            ipv6: vec![ipv6()],
        }
    }

    fn frame(source: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(source);
        frame.extend(kind.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn arp(mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
        packet.extend(mac);
        packet.extend(sender);
        packet.extend([0; 10]);
        packet
    }

    fn ipv4(source: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(source);
        packet.extend([10, 0, 0, 1]);
        packet.extend(payload);
        packet
    }

    fn packet6(source: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0];
        let length = u16::try_from(payload.len()).expect("a short one");
        packet.extend(length.to_be_bytes());
        packet.extend([next, 64]);
        packet.extend(source.octets());
        packet.extend(Ipv6Addr::LOCALHOST.octets());
        packet.extend(payload);
        packet
    }

    fn discovery(kind: u8, target: Ipv6Addr, option: u8, link: [u8; 6]) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.octets());
        message.extend([option, 1]);
        message.extend(link);
        message
    }

    #[test]
    fn a_machine_may_be_itself() {
        let own = identity();
        let link_local = own.mac.link_local();
        assert_eq!(link_local.to_string(), "fe80::ff:fe01:203");
        let none = Ipv6Addr::UNSPECIFIED;
        let hop_by_hop = [ICMPV6, 0, 5, 2, 0, 0, 1, 0, LISTENER_REPORT_V2, 0];
        let good = [
            (TYPE_ARP, arp(MAC, IPV4)),
            (TYPE_ARP, arp(MAC, [0; 4])),
            (TYPE_IPV4, ipv4(IPV4, 6, &[])),
            (TYPE_IPV4, ipv4([0; 4], UDP, &[0, 68, 0, 67])),
            (TYPE_IPV6, packet6(ipv6(), 6, &[])),
            (TYPE_IPV6, packet6(link_local, UDP, &[])),
            (TYPE_IPV6, packet6(none, HOP_BY_HOP, &hop_by_hop)),
            (
                TYPE_IPV6,
                packet6(none, ICMPV6, &discovery(135, ipv6(), 14, [0; 6])),
            ),
            (
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &discovery(136, ipv6(), 2, MAC)),
            ),
            (TYPE_IPV6, packet6(ipv6(), ICMPV6, &[128, 0])),
        ];
        for (kind, packet) in good {
            let frame = frame(MAC, kind, &packet);
            assert_eq!(own.check(&frame), Ok(()), "{frame:x?}");
        }
    }

    #[test]
    fn and_nobody_else() {
        let own = identity();
        let stranger: Ipv6Addr = "fd00::3".parse().expect("an address");
        let none = Ipv6Addr::UNSPECIFIED;
        let routing = [4, 0, 0, 0, 0, 0, 0, 0];
        let hidden = [DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0].repeat(8);
        let bad = [
            (OTHER, TYPE_IPV4, ipv4(IPV4, 6, &[]), Refusal::Source),
            (MAC, TYPE_ARP, arp(OTHER, IPV4), Refusal::Source),
            (MAC, TYPE_ARP, arp(MAC, [10, 0, 0, 3]), Refusal::Source),
            (MAC, TYPE_ARP, vec![0; 28], Refusal::Kind),
            (MAC, TYPE_IPV4, ipv4([10, 0, 0, 3], 6, &[]), Refusal::Source),
            (
                MAC,
                TYPE_IPV4,
                ipv4([0; 4], UDP, &[0, 67, 0, 68]),
                Refusal::Source,
            ),
            (
                MAC,
                TYPE_IPV4,
                ipv4([0; 4], 6, &[0, 68, 0, 67]),
                Refusal::Source,
            ),
            (MAC, TYPE_IPV4, vec![0x41; 40], Refusal::Kind),
            (MAC, TYPE_IPV4, vec![0x45; 10], Refusal::Short),
            (MAC, TYPE_IPV6, packet6(stranger, 6, &[]), Refusal::Source),
            (MAC, TYPE_IPV6, packet6(none, 6, &[]), Refusal::Source),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ROUTING, &routing),
                Refusal::Kind,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), DESTINATION_OPTIONS, &hidden),
                Refusal::Kind,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &[134; 16]),
                Refusal::Kind,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &[137; 16]),
                Refusal::Kind,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &discovery(136, stranger, 2, MAC)),
                Refusal::Source,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &discovery(136, ipv6(), 2, OTHER)),
                Refusal::Source,
            ),
            (
                MAC,
                TYPE_IPV6,
                packet6(ipv6(), ICMPV6, &discovery(135, stranger, 1, OTHER)),
                Refusal::Source,
            ),
            (MAC, 0x8100, ipv4(IPV4, 6, &[]), Refusal::Kind),
            (MAC, 0x88cc, vec![0; 40], Refusal::Kind),
            (MAC, TYPE_IPV6, vec![0x45; 60], Refusal::Kind),
        ];
        for (mac, kind, packet, why) in bad {
            let frame = frame(mac, kind, &packet);
            assert_eq!(own.check(&frame), Err(why), "{frame:x?}");
        }
        assert_eq!(own.check(&[]), Err(Refusal::Short));
    }

    #[test]
    fn addresses_are_read_and_written() {
        let address: MacAddress = "02:00:00:ab:CD:ef".parse().expect("an address");
        assert_eq!(address.to_string(), "02:00:00:ab:cd:ef");
        for bad in [
            "",
            "02:00:00:ab:cd",
            "02:00:00:ab:cd:ef:00",
            "03:00:00:ab:cd:ef",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            bad.parse::<MacAddress>().expect_err(bad);
        }
    }

    proptest! {
        /// Whatever the rest is, what goes out has the machine's address.
        #[test]
        fn any_bytes_are_judged(mut head in proptest::collection::vec(any::<u8>(), 0..HEAD_BYTES)) {
            if identity().check(&head).is_ok() {
                prop_assert_eq!(&head[6..12], &MAC);
            }
            // Deeper, past the source.
            if let Some(source) = head.get_mut(6..12) {
                source.copy_from_slice(&MAC);
                for kind in [TYPE_ARP, TYPE_IPV4, TYPE_IPV6] {
                    if let Some(place) = head.get_mut(12..14) {
                        place.copy_from_slice(&kind.to_be_bytes());
                    }
                    let _ = identity().check(&head);
                }
            }
        }
    }
}
