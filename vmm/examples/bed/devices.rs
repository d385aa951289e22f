//! Network, sockets and balloon, as Debian's own drivers use them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use insula_types::Bytes;
use insula_vmm::Hypervisor;
use insula_vmm::exit::ExitReason;
use insula_vmm::memory::MemorySize;
use insula_vmm::virtio::balloon::{Balloon, BalloonHandle};
use insula_vmm::virtio::net::{Identity, InterfaceName, Mtu, Net, NetCounts, NetTotals, Tap};
use insula_vmm::virtio::vsock::{BesidePath, GuestCid, Vsock};

use crate::cases::raw;
use crate::console::PATIENCE;
use crate::guest::{Guest, MEMORY};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// An address that the guest must not have.
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
const MAC: &str = "02:00:00:0a:09:02";
const PORT: u16 = 8080;
/// What is fetched, and sent back.
const FILE_BYTES: usize = 3_000_000;
/// Fewer than a wire with packets of 1,500 bytes would need for it, and for the answers to it.
const FEW_PACKETS: u64 = 2_000;
/// TCP chooses how much it sends at once by how fast it gets on, and in emulation it often gets on so
/// slowly that it sends no more than a wire's packet. So often it is tried.
const ROUNDS: u8 = 8;
const SOCKET: &str = "/tmp/v.sock";

fn busybox(command: &str) {
    let mut words = command.split(' ');
    let done = Command::new("/bin/busybox").args(&mut words).status();
    assert!(done.expect("busybox").success(), "{command}");
}

fn net() -> Net {
    let name: InterfaceName = "bed0".parse().expect("a name");
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("the module is loaded");
    let tap = Tap::attach(tun, name).expect("a tap");
    busybox(&format!("ip addr add {HOST}/24 dev bed0"));
    busybox("ip link set bed0 up");
    let identity = Identity {
        mac: MAC.parse().expect("an address"),
        ipv4: vec![GUEST],
        ipv6: Vec::new(),
    };
    Net::new(tap, identity, Mtu::default())
}

fn pattern() -> Vec<u8> {
    let bytes = (0..FILE_BYTES).map(|at| u8::try_from(at * 7 % 251).expect("below 251"));
    bytes.collect()
}

/// Gives the file to who asks with GET, and takes it from who sends it raw, in this order.
fn serve(listener: &TcpListener) {
    let (mut fetching, _) = listener.accept().expect("the guest fetches");
    let mut request = [0; 4096];
    let read = fetching.read(&mut request).expect("a request");
    assert!(
        request[..read].starts_with(b"GET /file HTTP/1.1"),
        "{request:?}"
    );
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {FILE_BYTES}\r\n\r\n");
    fetching.write_all(head.as_bytes()).expect("sent");
    fetching.write_all(&pattern()).expect("sent");
    drop(fetching);
    let (mut sending, _): (TcpStream, _) = listener.accept().expect("the guest sends");
    let mut all = Vec::new();
    sending.read_to_end(&mut all).expect("received");
    assert!(all == pattern(), "{} bytes came back", all.len());
}

pub(crate) fn devices(hypervisor: &Hypervisor) -> String {
    let net = net();
    let packets = net.counts();
    let _ = std::fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET).expect("a listener");
    let dial = BesidePath::new(SOCKET.into()).expect("a short path");
    let cid = GuestCid::new(42).expect("a guest's");
    let vsock = Vsock::new(cid, Some(listener), Box::new(dial)).expect("a device");
    let balloon = Balloon::new(MemorySize::new(MEMORY).expect("a size")).expect("a device");
    let handle = balloon.handle();
    let more = vec![
        Box::new(net) as _,
        Box::new(vsock) as _,
        Box::new(balloon) as _,
    ];
    let mut guest = Guest::boot_with(hypervisor, "vmlinuz", 2, raw(), more);
    let network = network(&mut guest, &packets);
    sockets(&mut guest);
    let memory = memory(&mut guest, &handle);
    generation(&mut guest);
    for (device, failures, why) in guest.machine.statistics().device_failures {
        assert_eq!((failures, &why), (0, &None), "{device}");
    }
    assert_eq!(guest.end_by("sync; poweroff -f"), ExitReason::Poweroff);
    format!("{network}; {memory}")
}

fn network(guest: &mut Guest, packets: &Arc<NetCounts>) -> String {
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), MAC);
    guest.run(&format!(
        "ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"
    ));
    let host = TcpListener::bind((HOST, PORT)).expect("an address");
    let mut rounds = (0..ROUNDS).map(|_| there_and_back(guest, packets, &host));
    let seen = rounds.find(|(_, round)| {
        round.received_packets < FEW_PACKETS && round.sent_packets < FEW_PACKETS
    });
    let (time, round) = seen.expect("a round with segments larger than a wire's packets");
    spoof(guest, packets);
    format!(
        "3 MB fetched and sent back in {:.1} s, {round:?}",
        time.as_secs_f64()
    )
}

/// Fetches the file and sends it back; how long that took, and with what.
fn there_and_back(
    guest: &mut Guest,
    packets: &Arc<NetCounts>,
    host: &TcpListener,
) -> (Duration, NetTotals) {
    let before = packets.read();
    let start = Instant::now();
    thread::scope(|scope| {
        let server = scope.spawn(|| serve(host));
        guest.run(&format!("wget -q -O /fetched http://{HOST}:{PORT}/file"));
        guest.run(&format!("nc {HOST} {PORT} < /fetched"));
        server.join().expect("all of it arrived");
    });
    let time = start.elapsed();
    let after = packets.read();
    let round = NetTotals {
        received_packets: after.received_packets - before.received_packets,
        received_bytes: after.received_bytes - before.received_bytes,
        sent_packets: after.sent_packets - before.sent_packets,
        sent_bytes: after.sent_bytes - before.sent_bytes,
        ..after
    };
    assert!(
        round.received_bytes > 3_000_000 && round.sent_bytes > 3_000_000,
        "{round:?}"
    );
    assert_eq!(round.refused, 0, "{round:?}");
    (time, round)
}

/// Another machine's address gets nothing out: not its packets, and not its name to ARP.
fn spoof(guest: &mut Guest, packets: &Arc<NetCounts>) {
    guest.run(&format!("ping -q -c 1 -W 5 -I {GUEST} {HOST}"));
    guest.run(&format!("ip addr add {STRANGER}/24 dev eth0"));
    let mut lies = packets.read().refused;
    for lie in [
        format!("ping -q -c 1 -W 1 -I {STRANGER} {HOST}"),
        format!("arping -q -c 1 -w 1 -I eth0 -s {STRANGER} {HOST}"),
    ] {
        assert_ne!(guest.try_run(&lie).0, 0, "{lie}");
        let refused = packets.read().refused;
        assert!(refused > lies, "{lie}: {refused} after {lies}");
        lies = refused;
    }
    guest.run(&format!("ip addr del {STRANGER}/24 dev eth0"));
    guest.run(&format!("ping -q -c 1 -W 5 -I {GUEST} {HOST}"));
}

fn sockets(guest: &mut Guest) {
    let start = guest.screen.len();
    guest.run("/bin/bed answer 52 2 & true");
    guest.screen.wait(start, "listener", |text| {
        text.contains("ready").then_some(())
    });
    for round in 0..2 {
        let mut client = UnixStream::connect(SOCKET).expect("the device listens");
        client.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let lines = format!("{}\n", "line ".repeat(30)).repeat(if round == 0 { 1 } else { 1000 });
        let mut sender = client.try_clone().expect("a descriptor");
        let question = lines.clone();
        let sending = thread::spawn(move || {
            write!(sender, "CONNECT 52\n{question}").expect("sent");
            sender
                .shutdown(std::net::Shutdown::Write)
                .expect("a socket");
        });
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer");
        sending.join().expect("sent");
        let (ok, answer) = answer.split_once('\n').expect("a line");
        assert!(ok.starts_with("OK "), "{ok}");
        assert!(answer == lines.to_uppercase(), "{} bytes", answer.len());
    }
    let listener = UnixListener::bind(format!("{SOCKET}_80")).expect("a listener");
    let host = thread::spawn(move || {
        let (mut asking, _) = listener.accept().expect("the guest asks");
        let mut question = [0; 5];
        asking.read_exact(&mut question).expect("a question");
        assert_eq!(&question, b"what\n");
        asking.write_all(b"this\n").expect("answered");
    });
    assert_eq!(guest.run("/bin/bed ask 80 what"), "this");
    host.join().expect("answered");
    assert_ne!(guest.try_run("/bin/bed ask 81 what 2> /dev/null").0, 0);
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waiting until {what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn memory(guest: &mut Guest, balloon: &BalloonHandle) -> String {
    // Reports come of themselves: what was used and is free now.
    let before = balloon.state().returned_bytes;
    guest.run("mount -t tmpfs tmp /tmp; head -c 48000000 /dev/zero > /tmp/x; rm /tmp/x");
    let enough = || balloon.state().returned_bytes > before + (32 << 20);
    until("free pages are reported", enough);
    let reported = balloon.state().returned_bytes - before;
    // 32 MiB are asked for, given, and taken back.
    balloon.set_target(8192).expect("less than there is");
    until("the balloon is full", || {
        balloon.state().actual_pages == 8192
    });
    let reports = balloon.state().reports;
    balloon.ask_for_statistics();
    until("statistics", || balloon.state().reports > reports);
    let statistics = balloon.state().statistics;
    let total = statistics.total_bytes.expect("Linux tells");
    assert!(
        (64 << 20..Bytes::mib(192).get()).contains(&total),
        "{total}"
    );
    balloon.set_target(0).expect("less than there is");
    until("the balloon is empty", || balloon.state().actual_pages == 0);
    assert_eq!(balloon.state().lies, 0);
    format!("{} MiB reported free", reported >> 20)
}

/// The firmware's event device hears of a new generation. Debian's kernel has no driver for what
/// it then tells; the interrupt is what can be seen.
fn generation(guest: &mut Guest) {
    let count = "awk '/ACPI:Ged/ { for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) s += $i } END { print s + 0 }' /proc/interrupts";
    let before: u64 = guest.run(count).parse().expect("a number");
    guest.machine.renew_generation().expect("entropy");
    until("the guest hears of it", || {
        guest.run(count).parse() == Ok(before + 1)
    });
}
