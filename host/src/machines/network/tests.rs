//! Machines' networks in a network namespace that the test makes: what a guest sends is written into
//! its tap, and what would reach it is read there.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::machines::place::Places;

/// How long something that must come may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long is waited for what must not come; it takes microseconds when it does.
const SILENCE: Duration = Duration::from_millis(200);
/// `struct virtio_net_hdr_mrg_rxbuf`, which goes before every frame.
const HEADER: [u8; 12] = [0; 12];
const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
/// Somewhere on the Internet, and our own address there.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(8, 8, 0, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(8, 8, 0, 1);

/// Does it in a network of its own, where there is one to be had.
fn in_network(test: impl FnOnce() + Send) {
    if let Err(why) = probe() {
        eprintln!("skipped: {why}");
        return;
    }
    in_own_network(test).expect("the probe has just made one");
}

fn network() -> Network {
    let config = NetworkConfig {
        pool: Some(Pool::DEFAULT),
        ports: PortRange::DEFAULT,
        opened: Vec::new(),
    };
    Network::new(&config, "0f3b9c11")
}

fn places() -> (tempfile::TempDir, Places) {
    let dir = tempfile::tempdir().expect("a directory");
    let places = Places::open(dir.path()).expect("it is there");
    (dir, places)
}

fn id(number: u64) -> MachineId {
    MachineId::new(number)
}

fn net(ports: &str) -> MachineNet {
    serde_json::from_str(&format!(r#"{{"ports":[{ports}]}}"#)).expect("a network")
}

/// The far end of a tap.
struct Guest {
    tap: fs::File,
    mac: [u8; 6],
    address: Ipv4Addr,
    gateway: Ipv4Addr,
}

impl Guest {
    fn new(attached: Attached) -> Self {
        let [a, b, c, d] = attached.wire.machine().octets();
        Self {
            tap: attached.tap.into(),
            mac: [2, 0x49, a, b, c, d],
            address: attached.wire.machine(),
            gateway: attached.wire.gateway(),
        }
    }

    fn send(&mut self, kind: [u8; 2], to: [u8; 6], packet: &[u8]) {
        let frame = [&HEADER, &to[..], &self.mac, &kind, packet].concat();
        self.tap.write_all(&frame).expect("the tap is up");
    }

    /// The next IPv4 packet; questions for our address are answered on the way.
    fn receive(&mut self, within: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("short");
            let mut polled = [PollFd::new(&self.tap, PollFlags::IN)];
            if poll(&mut polled, Some(&timeout)).expect("polls") == 0 {
                return None;
            }
            let mut frame = vec![0; 4096];
            let length = self.tap.read(&mut frame).expect("a frame");
            let frame = frame.get(HEADER.len()..length).expect("a header");
            let packet = frame.get(14..).expect("an Ethernet header");
            if frame[12..14] == IPV4 {
                return Some(packet.to_vec());
            }
            if frame[12..14] == ARP && packet[7] == 1 && packet[24..28] == self.address.octets() {
                self.answer(packet);
            }
        }
    }

    /// ARP (RFC 826): whoever asked is told where we are.
    fn answer(&mut self, asked: &[u8]) {
        let mut packet = asked[..8].to_vec();
        packet[7] = 2;
        packet.extend(self.mac);
        packet.extend(self.address.octets());
        packet.extend(&asked[8..18]);
        let to = asked[8..14].try_into().expect("six bytes");
        self.send(ARP, to, &packet);
    }

    /// Where the host's end is, as it says itself.
    fn gateway_mac(&mut self) -> [u8; 6] {
        let found = self.ask_for(self.gateway, PATIENCE);
        found.expect("the gateway answers")
    }

    fn ask_for(&mut self, whom: Ipv4Addr, within: Duration) -> Option<[u8; 6]> {
        let mut question = vec![0, 1, 8, 0, 6, 4, 0, 1];
        question.extend(self.mac);
        question.extend(self.address.octets());
        question.extend([0; 6]);
        question.extend(whom.octets());
        self.send(ARP, [0xff; 6], &question);
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            let timeout = Timespec::try_from(SILENCE).expect("short");
            let mut polled = [PollFd::new(&self.tap, PollFlags::IN)];
            if poll(&mut polled, Some(&timeout)).expect("polls") == 0 {
                continue;
            }
            let mut frame = vec![0; 4096];
            let length = self.tap.read(&mut frame).expect("a frame");
            let frame = &frame[HEADER.len()..length];
            if frame[12..14] == ARP && frame[21] == 2 && frame[28..32] == whom.octets() {
                return frame[22..28].try_into().ok();
            }
        }
        None
    }

    fn say(&mut self, from: Ipv4Addr, to: (Ipv4Addr, u16), text: &[u8]) {
        let gateway = self.gateway_mac();
        let packet = udp((from, 4000), to, text);
        self.send(IPV4, gateway, &packet);
    }
}

/// UDP without a checksum (RFC 768) over IPv4 (RFC 791).
fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), text: &[u8]) -> Vec<u8> {
    let length = |more: usize| {
        u16::try_from(text.len() + more)
            .expect("short")
            .to_be_bytes()
    };
    let mut head = vec![0x45, 0];
    head.extend(length(28));
    head.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    head.extend(from.0.octets());
    head.extend(to.0.octets());
    let words = head
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = u16::try_from(!((sum & 0xffff) + (sum >> 16)) & 0xffff).expect("16 bits");
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    [&head, &ports[..], &length(8), &[0, 0], text].concat()
}

fn addresses(packet: &[u8]) -> (Ipv4Addr, Ipv4Addr, &[u8]) {
    let address = |at: usize| {
        let bytes: [u8; 4] = packet[at..at + 4].try_into().expect("four bytes");
        Ipv4Addr::from(bytes)
    };
    (address(12), address(16), &packet[28..])
}

/// The way out: an interface at whose other end everything is.
fn uplink() -> Guest {
    // Made like a machine's; its first address is ours, its second one everybody's.
    let pool: Pool = "8.8.0.0/16".parse().expect("a pool");
    let wire = pool.wire(0).expect("a slot");
    assert_eq!((wire.gateway(), wire.machine()), (OUTSIDE, ELSEWHERE));
    let tap = interface::make("uplink".parse().expect("a name"), wire).expect("an interface");
    Guest::new(Attached { tap, wire })
}

fn has_interface(name: &str) -> bool {
    Path::new("/proc/sys/net/ipv4/conf").join(name).exists()
}

#[test]
fn nothing_is_there_before_and_nothing_after() {
    in_network(|| {
        let network = network();
        let (_dir, places) = places();
        let nft = Nft::find().expect("the probe found it");
        let table = || {
            nft.has(&["table", "inet", "insula_0f3b9"])
                .expect("it runs")
        };
        let forwarding = || interface::read_setting(FORWARDING).expect("it is there");
        assert_eq!(forwarding(), "0", "a new network forwards nothing");
        let first = network
            .attach(id(1), &places.of(id(1)), &net(""))
            .expect("attached");
        let second = network
            .attach(id(2), &places.of(id(2)), &net(""))
            .expect("attached");
        assert!(table() && has_interface("ins0f3b9-0") && has_interface("ins0f3b9-1"));
        assert_eq!(forwarding(), "1");
        // As when a monitor is killed: its descriptor is closed.
        drop(first);
        assert!(!has_interface("ins0f3b9-0"), "the kernel removes it");
        network.detach(id(1));
        assert!(table() && forwarding() == "1", "the other one needs it");
        drop(second);
        network.detach(id(2));
        assert!(!table() && !has_interface("ins0f3b9-1"));
        assert_eq!(forwarding(), "0", "as it was");
    });
}

#[test]
fn the_next_host_takes_over_what_runs_and_removes_the_rest() {
    in_network(|| {
        let (_dir, places) = places();
        let place = |number| places.of(id(number));
        let nft = Nft::find().expect("the probe found it");
        let before = network();
        let ports = net(r#"{"host":20022,"machine":22}"#);
        let running = before.attach(id(1), &place(1), &ports).expect("attached");
        let ended = before.attach(id(2), &place(2), &net("")).expect("attached");
        drop((before, ended));

        let next = network();
        for number in [1, 2] {
            next.know(id(number), &place(number));
            next.found(id(number), &place(number));
        }
        next.settle();
        assert!(next.wire(id(1)).is_some() && next.wire(id(2)).is_none());
        let wanted = net(r#"{"host":20022,"machine":80}"#);
        next.check(id(2), &wanted)
            .expect_err("it leads to the first machine");
        let again = next.attach(id(2), &place(2), &net("")).expect("attached");
        let again = again.expect("there are networks");
        assert_eq!(again.wire.slot, 1, "a machine keeps its address");
        drop((running, again));
        drop(next);

        // Nobody runs any more: what is left is for nobody.
        let last = network();
        last.know(id(1), &place(1));
        last.settle();
        assert!(
            !nft.has(&["table", "inet", "insula_0f3b9"])
                .expect("it runs")
        );
        let forwarding = interface::read_setting(FORWARDING).expect("it is there");
        assert_eq!(forwarding, "0", "the first host found it so");
    });
}

#[test]
fn a_machine_reaches_the_internet_and_nobody_else() {
    in_network(|| {
        let network = network();
        let (_dir, places) = places();
        let attach = |number| {
            let attached = network.attach(id(number), &places.of(id(number)), &net(""));
            Guest::new(attached.expect("attached").expect("there are networks"))
        };
        let (mut machine, mut other, mut outside) = (attach(1), attach(2), uplink());
        let here = UdpSocket::bind(("0.0.0.0", 8081)).expect("a port");
        here.set_read_timeout(Some(SILENCE)).expect("a socket");
        let from = machine.address;

        machine.say(from, (ELSEWHERE, 53), b"a question");
        let asked = outside.receive(PATIENCE).expect("it goes out");
        assert_eq!(addresses(&asked), (OUTSIDE, ELSEWHERE, &b"a question"[..]));
        let port = u16::from_be_bytes([asked[20], asked[21]]);
        outside.say(ELSEWHERE, (OUTSIDE, port), b"nobody else's answer");
        assert!(machine.receive(SILENCE).is_none(), "from another port");
        let gateway = outside.gateway_mac();
        let answer = udp((ELSEWHERE, 53), (OUTSIDE, port), b"an answer");
        outside.send(IPV4, gateway, &answer);
        let answered = machine.receive(PATIENCE).expect("it comes back");
        assert_eq!(addresses(&answered), (ELSEWHERE, from, &b"an answer"[..]));

        // Nobody else.
        for (whom, why) in [
            (machine.gateway, "the host, where the machine knows it"),
            (OUTSIDE, "the host, where everybody knows it"),
            (other.gateway, "the host, where another machine knows it"),
            (other.address, "another machine"),
            (
                Ipv4Addr::new(169, 254, 169, 254),
                "what knows the host's secrets",
            ),
            (Ipv4Addr::new(192, 168, 1, 1), "the operator's own network"),
        ] {
            machine.say(from, (whom, 8081), b"knock");
            assert!(here.recv(&mut [0; 16]).is_err(), "{why} at {whom}");
            assert!(other.receive(SILENCE).is_none(), "{why} at {whom}");
            assert!(outside.receive(SILENCE).is_none(), "{why} at {whom}");
        }
        // As nobody else.
        for whom in [other.address, Ipv4Addr::new(8, 8, 4, 4), machine.gateway] {
            machine.say(whom, (ELSEWHERE, 53), b"not me");
            assert!(outside.receive(SILENCE).is_none(), "as {whom}");
        }
        let own = machine.mac;
        let gateway = machine.gateway_mac();
        machine.mac = other.mac;
        machine.send(IPV4, gateway, &udp((from, 1), (ELSEWHERE, 53), b"not me"));
        machine.mac = own;
        assert!(
            outside.receive(SILENCE).is_none(),
            "with another's address on the link"
        );
        // It is not even told of the host's other addresses, nor does it find the other's wire.
        assert_eq!(machine.ask_for(OUTSIDE, SILENCE), None);
        assert_eq!(machine.ask_for(other.address, SILENCE), None);
    });
}

#[test]
fn ports_lead_in_and_nothing_else_does() {
    in_network(|| {
        let network = network();
        let (_dir, places) = places();
        let ports = net(r#"{"protocol":"udp","host":20053,"machine":53}"#);
        let attached = network
            .attach(id(1), &places.of(id(1)), &ports)
            .expect("attached");
        let mut machine = Guest::new(attached.expect("there are networks"));
        let mut outside = uplink();

        outside.say(ELSEWHERE, (OUTSIDE, 20_053), b"a question");
        let asked = machine.receive(PATIENCE).expect("it leads in");
        let address = machine.address;
        assert_eq!(addresses(&asked), (ELSEWHERE, address, &b"a question"[..]));
        assert_eq!(asked[22..24], 53_u16.to_be_bytes());
        let gateway = machine.gateway_mac();
        let answer = udp((address, 53), (ELSEWHERE, 4000), b"an answer");
        machine.send(IPV4, gateway, &answer);
        let answered = outside.receive(PATIENCE).expect("it goes back");
        assert_eq!(
            addresses(&answered),
            (OUTSIDE, ELSEWHERE, &b"an answer"[..])
        );

        outside.say(ELSEWHERE, (OUTSIDE, 20_054), b"knock");
        assert!(
            machine.receive(SILENCE).is_none(),
            "a port that leads nowhere"
        );
        outside.say(ELSEWHERE, (address, 53), b"knock");
        assert!(
            machine.receive(SILENCE).is_none(),
            "its own address, from outside"
        );
        // The host itself may, and is answered.
        let host = UdpSocket::bind((OUTSIDE, 0)).expect("a port");
        host.send_to(b"from here", (OUTSIDE, 20_053)).expect("sent");
        let asked = machine
            .receive(PATIENCE)
            .expect("it leads in from here as well");
        assert_eq!(addresses(&asked).2, b"from here");

        let outside_range = net(r#"{"host":22,"machine":22}"#);
        network
            .check(id(2), &outside_range)
            .expect_err("the operator's own");
        network.check(id(2), &ports).expect_err("taken");
        network.check(id(1), &ports).expect("its own");
    });
}

#[test]
fn packets_of_others_are_not_forwarded_for_machines_sake() {
    in_network(|| {
        let network = network();
        let (_dir, places) = places();
        let attached = network
            .attach(id(1), &places.of(id(1)), &net(""))
            .expect("attached");
        let mut outside = uplink();
        // Another network of this machine's, beside.
        let wire = "9.9.0.0/16"
            .parse::<Pool>()
            .expect("a pool")
            .wire(0)
            .expect("a slot");
        let tap = interface::make("beside".parse().expect("a name"), wire).expect("made");
        let mut beside = Guest::new(Attached { tap, wire });
        let from = beside.address;
        beside.say(from, (ELSEWHERE, 53), b"through");
        assert!(
            outside.receive(SILENCE).is_none(),
            "this machine forwarded nothing before"
        );
        drop(attached);
        network.detach(id(1));
    });
}

#[test]
fn a_pool_that_is_in_use_is_refused() {
    in_network(|| {
        let network = network();
        let (_dir, places) = places();
        let wire = Pool::DEFAULT.wire(7).expect("a slot");
        let tap = interface::make("uplink".parse().expect("a name"), wire).expect("made");
        let refused = network.attach(id(1), &places.of(id(1)), &net(""));
        let refused = refused
            .expect_err("it would lead to the wrong place")
            .to_string();
        assert!(refused.contains("uplink"), "{refused}");
        drop(tap);
        let attached = network.attach(id(1), &places.of(id(1)), &net(""));
        attached.expect("nobody else has it now");
    });
}
