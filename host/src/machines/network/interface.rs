//! The host's end of a wire: a tap that lives as long as somebody has it open.
//!
//! Nobody removes it: when its monitor ends, however that comes about, the kernel does, with its
//! address and its route.
//!
//! Address and state are set through rtnetlink (rtnetlink(7)). Two requests of some forty bytes are
//! written here: what a crate would bring along is a model of all of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use insula_vmm::virtio::net::{InterfaceName, Tap};
use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use super::addresses::{WIRE_PREFIX, Wire};

/// `linux/rtnetlink.h`, `linux/netlink.h`, `linux/if.h`, `linux/if_addr.h`.
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// `struct nlmsghdr`: length, type, flags, number, sender.
const HEADER_BYTES: usize = 16;

/// What the kernel is told of each interface; the directories are those of `ip-sysctl.rst`.
const SETTINGS: [(&str, &str); 7] = [
    ("ipv4/conf/NAME/forwarding", "1"),
    ("ipv4/conf/NAME/rp_filter", "1"),
    // Whoever asks for another address of the host's is not told that it has it.
    ("ipv4/conf/NAME/arp_ignore", "1"),
    ("ipv4/conf/NAME/proxy_arp", "0"),
    ("ipv4/conf/NAME/accept_redirects", "0"),
    ("ipv4/conf/NAME/send_redirects", "0"),
    ("ipv6/conf/NAME/disable_ipv6", "1"),
];

/// Makes the interface, with its address, up. It is there for as long as what is returned is open
/// somewhere.
pub(super) fn make(name: InterfaceName, wire: Wire) -> io::Result<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let tap = Tap::attach(tun, name)?.into_descriptor();
    let name = name.to_string();
    for (file, value) in SETTINGS {
        match write_setting(&file.replace("NAME", &name), value) {
            // A kernel without IPv6 has nothing to be turned off.
            Err(error) if file.starts_with("ipv6") && error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        // Zero, which is NETLINK_ROUTE.
        None,
    )?;
    let index = name_to_index(&socket, &name)?;
    ask(&socket, &new_address(index, wire))?;
    ask(&socket, &up(index))?;
    Ok(tap)
}

/// A setting below `/proc/sys/net`, in the network of the calling thread.
pub(super) fn write_setting(name: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/{name}"), value)
}

pub(super) fn read_setting(name: &str) -> io::Result<String> {
    let text = fs::read_to_string(format!("/proc/sys/net/{name}"))?;
    Ok(text.trim().to_owned())
}

fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    // One at a time, so that numbers are not needed; the kernel knows who we are.
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// The host's end of the wire, and with it the route to the other one.
fn new_address(index: u32, wire: Wire) -> Vec<u8> {
    // `struct ifaddrmsg`: family, prefix, flags, scope (everywhere), index.
    let family = AddressFamily::INET.as_raw().to_ne_bytes()[0];
    let mut body = vec![family, WIRE_PREFIX, 0, 0];
    body.extend(index.to_ne_bytes());
    for attribute in [IFA_LOCAL, IFA_ADDRESS] {
        // `struct rtattr`: length, type, then what it is.
        body.extend(8_u16.to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(wire.gateway().octets());
    }
    request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body)
}

fn up(index: u32) -> Vec<u8> {
    // `struct ifinfomsg`: family, pad, type, index, flags, which of them.
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    request(RTM_NEWLINK, 0, &body)
}

fn ask(socket: &OwnedFd, request: &[u8]) -> io::Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, request, SendFlags::empty(), &kernel)?;
    // The answer quotes the request.
    let mut answer = [0; 1024];
    let (_, length) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    outcome(answer.get(..length).unwrap_or_default())
}

/// `struct nlmsgerr` after the header: a negative error, or zero.
fn outcome(answer: &[u8]) -> io::Result<()> {
    let unclear = || io::Error::other("the kernel's answer is none");
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    let error = answer
        .get(HEADER_BYTES..)
        .and_then(|rest| rest.first_chunk());
    match (kind.map(u16::from_ne_bytes), error) {
        (Some(NLMSG_ERROR), Some(error)) => match i32::from_ne_bytes(*error) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        },
        _ => Err(unclear()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::addresses::Pool;
    use super::*;

    #[test]
    fn requests_are_as_long_as_they_say() {
        let wire = Pool::DEFAULT.wire(0).expect("a slot");
        for request in [new_address(5, wire), up(5)] {
            let length = u32::from_ne_bytes(*request.first_chunk().expect("a header"));
            assert_eq!(usize::try_from(length).expect("short"), request.len());
            assert!(request.len().is_multiple_of(4), "netlink(7): aligned");
        }
        assert_eq!(new_address(5, wire).len(), 16 + 8 + 2 * 8);
        assert_eq!(up(5).len(), 16 + 16);
    }

    #[test]
    fn answers_are_understood_or_refused() {
        let mut answer = request(NLMSG_ERROR, 0, &0_i32.to_ne_bytes());
        outcome(&answer).expect("done");
        answer[HEADER_BYTES..].copy_from_slice(&(-17_i32).to_ne_bytes());
        let error = outcome(&answer).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        outcome(&answer[..18]).expect_err("cut off");
        outcome(&[]).expect_err("nothing");
        outcome(&up(1)).expect_err("another message");
    }
}
