//! What the kernel lets pass between machines and the rest, as a table of nftables (nft(8)).
//!
//! ```text
//!  from a machine ─▶ source: its own addresses? ─▶ inward:  to this host? no
//!                                               ├▶ through: to a machine? to a closed network? no
//!                                               └▶ leaving: with the host's address
//!  to a machine ───▶ ports: a port that leads in? ─▶ through: that, or an answer
//! ```
//!
//! The table is written anew, whole, in one transaction, whenever a machine comes or goes; what is
//! connected stays so. What it says of an interface it says by its name, so that it stands before the
//! interface does.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use insula_types::MachineId;
use insula_types::machine::PortForward;

use super::addresses::{INTERFACES, Pool, Wire, prefix};
use crate::outbound::{Network, closed_v4};

/// Connections of one machine's that the host keeps in mind at once, so that one machine cannot fill
/// the table of all (`nf_conntrack_max`; a quarter of a million on a host with some gigabytes).
const FLOWS_MOST: u32 = 8_192;

/// One machine that is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Live {
    pub(super) wire: Wire,
    pub(super) ports: Vec<PortForward>,
}

/// Whether this machine forwarded packets before its first guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forwarding {
    /// It did, for its own reasons.
    Anyway,
    /// It did not, and still does so for nothing but guests.
    ForGuests,
}

/// A table of rules.
#[derive(Debug)]
pub(super) struct Rules<'r> {
    pub(super) tag: &'r str,
    pub(super) pool: Pool,
    /// Networks that the operator opened.
    pub(super) opened: &'r [Network],
    pub(super) forwarding: Forwarding,
    pub(super) live: &'r BTreeMap<MachineId, Live>,
}

/// The table's name.
pub(super) fn table(tag: &str) -> String {
    format!("insula_{tag}")
}

/// Its chain that is there with [`Forwarding::ForGuests`] only, and so tells the next host.
pub(super) const GUESTS_ONLY: &str = "guests_only";

/// A script that leaves nothing of the table.
pub(super) fn removed(tag: &str) -> String {
    let table = table(tag);
    // Added first, since what is not there cannot be deleted.
    format!("add table inet {table}\ndelete table inet {table}\n")
}

fn elements<T: fmt::Display>(of: impl Iterator<Item = T>) -> String {
    let all: Vec<String> = of.map(|one| one.to_string()).collect();
    if all.is_empty() {
        return String::new();
    }
    format!("elements = {{ {} }}", all.join(", "))
}

impl fmt::Display for Rules<'_> {
    /// A script for `nft -f`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tag, pool, .. } = self;
        let ours = format!("\"{}*\"", prefix(tag));
        f.write_str(&removed(tag))?;
        writeln!(f, "table inet {} {{", table(tag))?;
        self.sets(f)?;
        write!(
            f,
            "chain source {{ type filter hook prerouting priority raw; policy accept;
                iifname != {ours} accept
                iifname . ether saddr . ip saddr @machines accept
                drop
            }}
            chain inward {{ type filter hook input priority filter; policy accept;
                iifname != {ours} accept
                ct state established,related accept
                drop
            }}
            chain through {{ type filter hook forward priority filter; policy accept;
                iifname {ours} jump from_machine
                oifname {ours} jump to_machine
                {others}
            }}
            chain from_machine {{
                oifname \"{INTERFACES}*\" drop
                ct state established,related accept
                fib daddr type != unicast drop
                ct state new add @flows {{ ip saddr ct count over {FLOWS_MOST} }} drop
                ip daddr @opened accept
                ip daddr @closed drop
                accept
            }}
            chain to_machine {{
                ct state established,related accept
                ct status dnat accept
                drop
            }}
            chain ports_outside {{ type nat hook prerouting priority dstnat; policy accept;
                iifname {ours} accept
                fib daddr type local dnat ip to meta l4proto . th dport map @ports
            }}
            chain ports_here {{ type nat hook output priority -100; policy accept;
                ip daddr != 127.0.0.0/8 fib daddr type local dnat ip to meta l4proto . th dport map @ports
            }}
            chain leaving {{ type nat hook postrouting priority srcnat; policy accept;
                ip saddr {pool} oifname != {ours} masquerade
            }}
            ",
            others = match self.forwarding {
                Forwarding::Anyway => String::new(),
                Forwarding::ForGuests => format!("jump {GUESTS_ONLY}"),
            },
        )?;
        f.write_str("}\n")
    }
}

impl Rules<'_> {
    fn sets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machines = elements(self.live.values().map(|live| {
            let (wire, own) = (live.wire, prefix(self.tag));
            format!(
                "\"{own}{}\" . {} . {}",
                wire.slot,
                wire.mac(),
                wire.machine()
            )
        }));
        let ports = elements(self.live.values().flat_map(|live| {
            live.ports.iter().map(|port| {
                let (from, machine) = (port.protocol.as_str(), live.wire.machine());
                format!("{from} . {} : {machine} . {}", port.host, port.machine)
            })
        }));
        let v4 = |network: &&Network| matches!(network.parts(), (IpAddr::V4(_), _));
        let opened = elements(self.opened.iter().filter(v4));
        let closed = elements(closed_v4());
        write!(
            f,
            "set machines {{ type ifname . ether_addr . ipv4_addr; {machines}
            }}
            map ports {{ type inet_proto . inet_service : ipv4_addr . inet_service; {ports}
            }}
            set opened {{ type ipv4_addr; flags interval; auto-merge; {opened}
            }}
            set closed {{ type ipv4_addr; flags interval; auto-merge; {closed}
            }}
            set flows {{ type ipv4_addr; size {size}; flags dynamic;
            }}
            ",
            size = self.pool.slots(),
        )?;
        // A chain stands before what jumps to it.
        if self.forwarding == Forwarding::ForGuests {
            writeln!(
                f,
                "chain {GUESTS_ONLY} {{
                iifname != \"{INTERFACES}*\" oifname != \"{INTERFACES}*\" drop
            }}"
            )?;
        }
        Ok(())
    }
}

/// The port of one machine that another one has already.
pub(super) fn taken(
    live: &BTreeMap<MachineId, Live>,
    machine: MachineId,
    ports: &[PortForward],
) -> Option<PortForward> {
    let others = live.iter().filter(|(id, _)| **id != machine);
    let theirs = others.flat_map(|(_, live)| &live.ports);
    let theirs: Vec<_> = theirs.map(|port| (port.protocol, port.host)).collect();
    let mut ours = ports.iter();
    ours.find(|port| theirs.contains(&(port.protocol, port.host)))
        .copied()
}

/// Refuses a pool to whose addresses another interface leads; `routes` is `/proc/net/route`.
pub(super) fn unused(pool: Pool, routes: &str, tag: &str) -> Result<(), String> {
    for line in routes.lines().skip(1) {
        let mut fields = line.split_whitespace();
        let (Some(interface), Some(to)) = (fields.next(), fields.next()) else {
            continue;
        };
        // In the order of its bytes on the wire, read as a number of this machine's.
        let Ok(number) = u32::from_str_radix(to, 16) else {
            continue;
        };
        let to = Ipv4Addr::from(number.to_ne_bytes());
        if pool.contains(to) && !interface.starts_with(&prefix(tag)) {
            return Err(interface.to_owned());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(ports: &str) -> BTreeMap<MachineId, Live> {
        let wire = Pool::DEFAULT.wire(1).expect("a slot");
        let ports = serde_json::from_str(ports).expect("ports");
        BTreeMap::from([(MachineId::new(7), Live { wire, ports })])
    }

    fn text(live: &BTreeMap<MachineId, Live>, forwarding: Forwarding) -> String {
        Rules {
            tag: "0f3b9",
            pool: Pool::DEFAULT,
            opened: &["10.1.0.0/16".parse().expect("a network")],
            forwarding,
            live,
        }
        .to_string()
    }

    #[test]
    fn a_machine_has_its_addresses_and_ports_in_the_table() {
        let live = live(r#"[{"host":20022,"machine":22},{"protocol":"udp","host":5,"machine":6}]"#);
        let text = text(&live, Forwarding::Anyway);
        for part in [
            "elements = { \"ins0f3b9-1\" . 02:49:0a:c7:00:06 . 10.199.0.6 }",
            "elements = { tcp . 20022 : 10.199.0.6 . 22, udp . 5 : 10.199.0.6 . 6 }",
            "elements = { 10.1.0.0/16 }",
            "169.254.0.0/16",
            "ip saddr 10.199.0.0/16 oifname != \"ins0f3b9-*\" masquerade",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains(GUESTS_ONLY), "{text}");
    }

    #[test]
    fn only_a_machine_that_did_not_forward_is_kept_from_it() {
        let text = text(&BTreeMap::new(), Forwarding::ForGuests);
        assert!(text.contains("jump guests_only"), "{text}");
        assert!(
            !text.contains("elements = {  }"),
            "nft takes no empty list: {text}"
        );
    }

    #[test]
    fn a_port_leads_to_one_machine() {
        let live = live(r#"[{"host":20022,"machine":22}]"#);
        let wanted = |text| serde_json::from_str::<Vec<PortForward>>(text).expect("ports");
        let same = wanted(r#"[{"host":1,"machine":1},{"host":20022,"machine":80}]"#);
        let other = MachineId::new(8);
        assert_eq!(taken(&live, other, &same), Some(same[1]));
        assert_eq!(taken(&live, MachineId::new(7), &same), None, "its own");
        let udp = wanted(r#"[{"protocol":"udp","host":20022,"machine":80}]"#);
        assert_eq!(taken(&live, other, &udp), None);
    }

    #[test]
    fn a_pool_that_another_interface_leads_to_is_seen() {
        let routes = |interface: &str, to: u32| {
            let to = to.to_be_bytes();
            let number = u32::from_ne_bytes(to);
            format!("Iface\tDestination\tGateway\n{interface}\t{number:08X}\t00000000\n")
        };
        let inside = u32::from_be_bytes([10, 199, 3, 0]);
        let outside = u32::from_be_bytes([10, 198, 3, 0]);
        let unused = |text: &str| unused(Pool::DEFAULT, text, "0f3b9");
        assert_eq!(unused(&routes("br0", inside)), Err("br0".to_owned()));
        assert_eq!(unused(&routes("br0", outside)), Ok(()));
        assert_eq!(unused(&routes("ins0f3b9-5", inside)), Ok(()));
        assert_eq!(unused(&routes("eth0", 0)), Ok(()), "the way out");
    }
}
