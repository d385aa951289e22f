//! The device between a driver and Unix sockets, both ours.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use super::connection::ROOM_BYTES;
use super::packet::{Credit, HEADER_BYTES, Operation, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::Driver;

const CID: u64 = 77;
const GUEST: Ports = Ports {
    host: 80,
    guest: 5000,
};
const AMPLE: Credit = Credit {
    room_bytes: 1 << 20,
    forwarded: 0,
};

/// Answers on port 80, and keeps the other ends.
#[derive(Debug, Default, Clone)]
struct Switchboard(Arc<Mutex<Vec<UnixStream>>>);

impl Dial for Switchboard {
    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        if port != GUEST.host {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(Duration::from_secs(10)))?;
        self.0.lock().expect("nobody panics here").push(ours);
        Ok(theirs)
    }
}

impl Switchboard {
    fn answered(&self) -> UnixStream {
        let mut sockets = self.0.lock().expect("nobody panics here");
        sockets.pop().expect("a connection")
    }
}

struct Bench {
    driver: Driver,
    switchboard: Switchboard,
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    counts: Arc<SocketCounts>,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).expect("a listener");
    let switchboard = Switchboard::default();
    let cid = GuestCid::new(77).expect("an address");
    let device = Vsock::new(cid, Some(listener), Box::new(switchboard.clone()));
    let device = device.expect("a device");
    let counts = device.counts();
    Bench {
        driver: Driver::live(device, 0),
        switchboard,
        _dir: dir,
        path,
        counts,
    }
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).expect("the device listens");
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a socket");
    client
}

/// What a guest would send.
fn from_guest(header: &Header) -> [u8; HEADER_BYTES] {
    let mut bytes = header.encode(CID);
    let (source, rest) = bytes.split_at_mut(8);
    source.swap_with_slice(&mut rest[..8]);
    bytes[16..20].copy_from_slice(&header.ports.guest.to_le_bytes());
    bytes[20..24].copy_from_slice(&header.ports.host.to_le_bytes());
    bytes
}

impl Bench {
    fn send(&mut self, ports: Ports, operation: Operation, data: &[u8]) {
        self.send_with(ports, operation, AMPLE, 0, data);
    }

    fn send_with(
        &mut self,
        ports: Ports,
        operation: Operation,
        credit: Credit,
        flags: u32,
        data: &[u8],
    ) {
        let header = Header {
            data_bytes: u32::try_from(data.len()).expect("a short one"),
            credit,
            flags,
            ..Header::new(ports, operation)
        };
        let header = from_guest(&header);
        let parts: [&[u8]; 2] = [&header, data];
        self.driver
            .offer(1, if data.is_empty() { &parts[..1] } else { &parts }, &[]);
        self.driver.notify(1);
        self.driver.wait_used(1);
        self.driver.forget_buffers();
    }

    /// The next packet for the guest, into a buffer of this size.
    fn receive_into(&mut self, bytes: u32) -> (Header, Vec<u8>) {
        let room = self.driver.offer(0, &[], &[bytes])[0];
        self.driver.notify(0);
        let (_, written) = self.driver.wait_used(0);
        let packet = self.driver.peek(room, written as usize);
        self.driver.forget_buffers();
        let (header, data) = packet
            .split_first_chunk::<HEADER_BYTES>()
            .expect("a header");
        // Turn it round to read it as the host does.
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let mut turned = *header;
        turned[..8].copy_from_slice(&header[8..16]);
        turned[8..16].copy_from_slice(&header[..8]);
        turned[16..20].copy_from_slice(&word(20).to_le_bytes());
        turned[20..24].copy_from_slice(&word(16).to_le_bytes());
        let packet::Parsed::Packet(header) = Header::parse(&turned, CID) else {
            panic!("{header:x?} is no packet")
        };
        (header, data.to_vec())
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_into(4096)
    }

    fn expect(&mut self, operation: Operation) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.operation, operation, "{header:?}");
        header
    }

    /// A connection that the guest began.
    fn open(&mut self, credit: Credit) -> UnixStream {
        self.send_with(GUEST, Operation::Request, credit, 0, &[]);
        let response = self.expect(Operation::Response);
        assert_eq!(response.ports, GUEST);
        assert_eq!(response.credit.room_bytes, ROOM_BYTES);
        self.switchboard.answered()
    }
}

fn read(socket: &mut UnixStream, bytes: usize) -> Vec<u8> {
    let mut seen = vec![0; bytes];
    socket.read_exact(&mut seen).expect("bytes in time");
    seen
}

#[test]
fn a_client_reaches_a_port_of_the_guest() {
    let mut bench = bench();
    let mut client = client(&bench.path);
    // In pieces, and with data before there is an answer.
    client.write_all(b"CONN").expect("written");
    client.write_all(b"ECT 52\nearly").expect("written");
    let request = bench.expect(Operation::Request);
    assert_eq!(request.ports.guest, 52);
    assert!(request.ports.host >= FIRST_CLIENT_PORT);
    let ports = request.ports;
    bench.send(ports, Operation::Response, &[]);
    let ok = format!("OK {}\n", ports.host);
    assert_eq!(read(&mut client, ok.len()), ok.as_bytes());
    let (header, data) = bench.receive();
    assert_eq!((header.operation, header.ports), (Operation::Data, ports));
    assert_eq!(data, b"early");
    bench.send(ports, Operation::Data, b"answer");
    assert_eq!(read(&mut client, 6), b"answer");
    client.write_all(b"more").expect("written");
    let (header, data) = bench.receive();
    assert_eq!((header.data_bytes, header.credit.forwarded), (4, 6));
    assert_eq!(data, b"more");
    assert_eq!(bench.counts.read(), [1, 0, 9, 6]);
}

#[test]
fn a_client_that_asks_for_nothing_sensible_is_turned_away() {
    let bench = bench();
    for line in [
        "CONNECT\n",
        "CONNECT x\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT 4294967296\n",
    ] {
        let mut client = client(&bench.path);
        client.write_all(line.as_bytes()).expect("written");
        assert_eq!(client.read(&mut [0]).expect("closed"), 0, "{line}");
    }
    let mut client = client(&bench.path);
    client.write_all(&[b'1'; 64]).expect("written");
    // What it said is not all read when its socket is closed.
    let closed = client.read(&mut [0]);
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
}

#[test]
fn a_guest_that_refuses_closes_the_client() {
    let mut bench = bench();
    let mut client = client(&bench.path);
    client.write_all(b"CONNECT 52\n").expect("written");
    let request = bench.expect(Operation::Request);
    bench.send(request.ports, Operation::Reset, &[]);
    assert_eq!(client.read(&mut [0]).expect("closed"), 0);
}

#[test]
fn the_guest_reaches_whoever_listens() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    bench.send(GUEST, Operation::Data, b"hello");
    assert_eq!(read(&mut host, 5), b"hello");
    host.write_all(&[7; 5000]).expect("written");
    let (_, first) = bench.receive();
    let (header, second) = bench.receive();
    assert_eq!((first.len(), second.len()), (4096 - 44, 5000 - 4096 + 44));
    assert_eq!(header.credit.forwarded, 5);
    let nobody = Ports { host: 81, guest: 1 };
    bench.send(nobody, Operation::Request, &[]);
    assert_eq!(bench.expect(Operation::Reset).ports, nobody);
}

#[test]
fn a_socket_beside_the_path_is_dialled() {
    let dir = tempfile::tempdir().expect("a folder");
    let prefix = dir.path().join("v.sock");
    let listener = UnixListener::bind(dir.path().join("v.sock_80")).expect("a listener");
    let dialer = BesidePath::new(prefix).expect("a short path");
    let mut socket = dialer.dial(80).expect("it listens");
    let (mut accepted, _) = listener.accept().expect("a connection");
    accepted.write_all(b"x").expect("written");
    assert_eq!(read(&mut socket, 1), b"x");
    dialer.dial(81).expect_err("nobody listens");
    BesidePath::new("x".repeat(100).into()).expect_err("no room for a port");
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut bench = bench();
    let mut host = bench.open(Credit {
        room_bytes: 100,
        forwarded: 0,
    });
    host.write_all(&[1; 250]).expect("written");
    assert_eq!(bench.receive().1.len(), 100);
    // It is asked once, and then there is silence.
    bench.expect(Operation::CreditRequest);
    let room = bench.driver.offer(0, &[], &[4096])[0];
    bench.driver.notify(0);
    bench.send_with(
        GUEST,
        Operation::CreditUpdate,
        Credit {
            room_bytes: 100,
            forwarded: 30,
        },
        0,
        &[],
    );
    assert_eq!(bench.driver.wait_used(0).1, 44 + 30);
    assert_eq!(bench.driver.peek(room + 44, 1), [1]);
    // One that says to have passed on what it never got has room for nothing.
    let lie = Credit {
        room_bytes: 100,
        forwarded: 5000,
    };
    bench.send_with(GUEST, Operation::CreditUpdate, lie, 0, &[]);
    bench.send_with(GUEST, Operation::CreditRequest, lie, 0, &[]);
    bench.expect(Operation::CreditUpdate);
    bench.expect(Operation::CreditRequest);
    bench.driver.offer(0, &[], &[4096]);
    bench.driver.notify(0);
    bench.driver.transport.hold().expect("it lives");
    assert_eq!(bench.driver.take_used(0), None);
}

#[test]
fn the_guest_learns_of_room_and_gets_no_more_than_there_is() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    // The socket takes some, then we do, then it is too much.
    let mut sent = 0;
    let reset = loop {
        assert!(sent < 1 << 20, "there is a bound");
        bench.send(GUEST, Operation::Data, &[3; 16 << 10]);
        sent += 16 << 10;
        let room = bench.driver.offer(0, &[], &[4096])[0];
        bench.driver.notify(0);
        // Whatever comes now: an update, or the reset.
        bench.send(GUEST, Operation::CreditRequest, &[]);
        let (_, written) = bench.driver.wait_used(0);
        assert_eq!(written, 44);
        let operation = bench.driver.peek(room + 30, 1)[0];
        if operation == 3 {
            break sent;
        }
        assert_eq!(operation, 6);
    };
    assert!(reset > 64 << 10);
    // What was taken before arrives no more: the connection is gone.
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("closed");
    assert!(all.len() < reset);
}

#[test]
fn room_that_comes_free_is_told() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    for _ in 0..2 {
        bench.send(GUEST, Operation::Data, &[3; 8 << 10]);
    }
    let update = bench.expect(Operation::CreditUpdate);
    assert_eq!(update.credit.forwarded, 16 << 10);
    assert_eq!(read(&mut host, 16 << 10), [3; 16 << 10]);
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    bench.send(GUEST, Operation::Data, b"last");
    bench.send_with(GUEST, Operation::Shutdown, AMPLE, SHUTDOWN_SEND, &[]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).expect("ended");
    assert_eq!(all, b"last");
    // The other direction still works.
    host.write_all(b"answer").expect("written");
    assert_eq!(bench.receive().1, b"answer");
    drop(host);
    let shutdown = bench.expect(Operation::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    bench.send_with(GUEST, Operation::Shutdown, AMPLE, both, &[]);
    bench.expect(Operation::Reset);
    // And it is gone: nothing is known of it.
    bench.send(GUEST, Operation::Data, b"x");
    bench.expect(Operation::Reset);
}

#[test]
fn data_after_the_end_is_refused() {
    let mut bench = bench();
    let _host = bench.open(AMPLE);
    bench.send_with(GUEST, Operation::Shutdown, AMPLE, SHUTDOWN_SEND, &[]);
    bench.send(GUEST, Operation::Data, b"x");
    bench.expect(Operation::Reset);
}

#[test]
fn what_belongs_to_nothing_is_reset() {
    let mut bench = bench();
    let none = Ports { host: 9, guest: 9 };
    for operation in [
        Operation::Response,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ] {
        bench.send(none, operation, &[]);
        assert_eq!(bench.expect(Operation::Reset).ports, none);
    }
    // A reset is not answered; neither is what comes from someone else.
    bench.send(none, Operation::Reset, &[]);
    let mut stray = from_guest(&Header::new(none, Operation::Data));
    stray[0] = 99;
    bench.driver.offer(1, &[&stray], &[]);
    // Of a type or an operation that we do not know.
    for (at, value) in [(28, 2), (30, 99)] {
        let mut odd = from_guest(&Header::new(none, Operation::Data));
        odd[at] = value;
        bench.driver.offer(1, &[&odd], &[]);
    }
    bench.driver.notify(1);
    bench.expect(Operation::Reset);
    bench.expect(Operation::Reset);
    assert_eq!(bench.driver.take_used(0), None);
    // A response to an open connection, a request for one that is there.
    let _first = bench.open(AMPLE);
    bench.send(GUEST, Operation::Response, &[]);
    bench.expect(Operation::Reset);
    let first = bench.open(AMPLE);
    let _second = bench.open(AMPLE);
    drop(first);
}

#[test]
fn neither_side_takes_all_connections() {
    let mut bench = bench();
    let ports = |guest| Ports { host: 80, guest };
    let most = u32::try_from(CONNECTIONS_MAX).expect("few");
    for guest in 0..most {
        bench.send(ports(guest), Operation::Request, &[]);
        bench.expect(Operation::Response);
    }
    bench.send(ports(most), Operation::Request, &[]);
    bench.expect(Operation::Reset);
    // Ports of clients are not the guest's to connect to.
    let client_port = Ports {
        host: FIRST_CLIENT_PORT,
        guest: 1,
    };
    bench.send(client_port, Operation::Request, &[]);
    bench.expect(Operation::Reset);
    // Clients still come in; of those that do not get through the oldest give way.
    let mut clients: Vec<UnixStream> = (0..PENDING_MAX).map(|_| client(&bench.path)).collect();
    clients[0].write_all(b"CONNECT 7\n").expect("written");
    bench.expect(Operation::Request);
    let mut newer = client(&bench.path);
    assert_eq!(clients[0].read(&mut [0]).expect("closed"), 0);
    newer.write_all(b"CONNECT 8\n").expect("written");
    assert_eq!(bench.expect(Operation::Reset).ports.guest, 7);
    assert_eq!(bench.expect(Operation::Request).ports.guest, 8);
}

#[test]
fn a_driver_that_takes_no_answers_is_not_read_any_more() {
    let mut bench = bench();
    let packet = from_guest(&Header::new(Ports { host: 9, guest: 9 }, Operation::Data));
    let mut used = 0;
    while used < REPLIES_MAX {
        for _ in 0..32 {
            bench.driver.offer(1, &[&packet], &[]);
        }
        bench.driver.notify(1);
        for _ in 0..32 {
            bench.driver.wait_used(1);
            used += 1;
        }
        bench.driver.forget_buffers();
    }
    for _ in 0..32 {
        bench.driver.offer(1, &[&packet], &[]);
    }
    bench.driver.notify(1);
    // Between two turns of the device.
    bench.driver.transport.hold().expect("it lives");
    bench.driver.transport.release().expect("it lives");
    assert_eq!(bench.driver.take_used(1), None);
    // As soon as it takes some, the rest goes on.
    for _ in 0..32 {
        bench.expect(Operation::Reset);
    }
    for _ in 0..32 {
        bench.driver.wait_used(1);
    }
}

#[test]
fn lies_about_length_stop_the_device() {
    let short: [&[u8]; 1] = [&[0; HEADER_BYTES - 1]];
    let mut long = from_guest(&Header::new(GUEST, Operation::Data));
    long[24..28].copy_from_slice(&8_u32.to_le_bytes());
    let long: [&[u8]; 2] = [&long, &[0; 7]];
    for lie in [&short[..], &long] {
        let mut bench = bench();
        bench.driver.offer(1, lie, &[]);
        bench.driver.notify(1);
        bench.driver.wait_broken();
    }
    let mut bench = bench();
    bench.send(Ports { host: 9, guest: 9 }, Operation::Data, &[]);
    bench.driver.offer(0, &[], &[44]);
    bench.driver.notify(0);
    assert!(bench.driver.wait_broken().contains("without room"));
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    let event = bench.driver.offer(2, &[], &[8])[0];
    bench.driver.poke(event, &[9; 8]);
    bench.driver.transport.hold().expect("it lives");
    let state = bench.driver.transport.save().expect("it lives");
    bench.driver.set(0x70, 0);
    assert_eq!(host.read(&mut [0]).expect("closed"), 0);
    bench
        .driver
        .transport
        .restore(&state)
        .expect("its own state");
    bench.driver.transport.release().expect("it lives");
    assert_eq!(bench.driver.wait_used(2), (0, 4));
    assert_eq!(bench.driver.peek(event, 4), TRANSPORT_RESET);
    // Its queues go on where they were.
    let _host = bench.open(AMPLE);
}

#[test]
fn a_reset_of_the_device_closes_all() {
    let mut bench = bench();
    let mut host = bench.open(AMPLE);
    bench.driver.reset();
    assert_eq!(host.read(&mut [0]).expect("closed"), 0);
}

#[test]
fn addresses_with_a_meaning_are_no_guests() {
    for cid in [0, 1, 2, u32::MAX] {
        GuestCid::new(cid).expect_err("reserved");
    }
    GuestCid::new(3).expect("a guest's");
}
