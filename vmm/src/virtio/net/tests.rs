//! The device over a pair of sockets: each datagram is a packet, header first.

use std::num::NonZeroU64;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use super::*;
use crate::rate_limiter::Rate;
use crate::virtio::testing::Driver;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const MERGES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The device, and the wire's other end.
fn net() -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a socket");
    let identity = Identity {
        mac: MacAddress::new(MAC).expect("an address"),
        ipv4: vec![[10, 0, 0, 2].into()],
        ipv6: Vec::new(),
    };
    let net = Net::new(Tap::from_socket(theirs), identity, Mtu::default());
    (net, ours)
}

/// The device is live.
fn live(features: u64) -> (Driver, UnixDatagram, Arc<NetCounts>) {
    let (net, ours) = net();
    let counts = net.counts();
    (Driver::live(net, features), ours, counts)
}

/// An IPv4 frame from this source.
fn frame(source: [u8; 4], payload: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(source);
    frame.extend([10, 0, 0, 1]);
    frame.extend((0..payload).map(|at| u8::try_from(at % 251).expect("below 251")));
    frame
}

fn receive_one(wire: &UnixDatagram) -> Vec<u8> {
    let mut packet = vec![0; PACKET_BYTES + 1];
    let length = wire.recv(&mut packet).expect("a packet in time");
    packet.truncate(length);
    packet
}

#[test]
fn the_driver_finds_address_link_and_mtu() {
    let (driver, _wire, _) = live(0);
    let mut space = [0; 12];
    driver.transport.read(0x100, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(space[6..], [1, 0, 1, 0, 0xdc, 5]);
}

#[test]
fn frames_go_out_as_they_are() {
    let (mut driver, wire, counts) = live(1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4);
    let small = frame([10, 0, 0, 2], 6);
    driver.offer(1, &[&HEADER, &small], &[]);
    driver.notify(1);
    assert_eq!(receive_one(&wire), [&HEADER[..], &small].concat());
    // 64 KiB for the host to cut, in pieces as a driver has them, header and frame in one.
    let large = frame([10, 0, 0, 2], 65_536 - 20);
    let segmented = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let first = [&segmented[..], &large[..100]].concat();
    driver.offer(1, &[&first, &large[100..5000], &large[5000..]], &[]);
    driver.notify(1);
    assert_eq!(receive_one(&wire), [&segmented[..], &large].concat());
    driver.wait_used(1);
    driver.wait_used(1);
    let totals = counts.read();
    assert_eq!((totals.sent_packets, totals.refused), (2, 0));
    assert_eq!(totals.sent_bytes, (small.len() + large.len()) as u64);
}

#[test]
fn what_is_another_machines_stays_inside() {
    let (mut driver, wire, counts) = live(0);
    let mut other_mac = frame([10, 0, 0, 2], 0);
    other_mac[11] = 8;
    let unasked_segmentation = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let good = frame([10, 0, 0, 2], 0);
    let too_long = frame([10, 0, 0, 2], FRAME_BYTES);
    let refused: [[&[u8]; 2]; 5] = [
        [&HEADER, &frame([10, 0, 0, 3], 0)],
        [&HEADER, &other_mac],
        [&HEADER, &[]],
        [&unasked_segmentation, &good],
        [&HEADER, &too_long],
    ];
    for packet in &refused {
        driver.offer(1, packet, &[]);
    }
    driver.offer(1, &[&HEADER, &good], &[]);
    driver.notify(1);
    assert_eq!(receive_one(&wire), [&HEADER[..], &good].concat());
    for _ in 0..=refused.len() {
        driver.wait_used(1);
    }
    let totals = counts.read();
    assert_eq!((totals.sent_packets, totals.refused), (1, 5));
}

#[test]
fn a_packet_without_a_header_stops_the_device() {
    let (mut driver, _wire, _) = live(0);
    driver.offer(1, &[&[0; HEADER_BYTES - 1]], &[]);
    driver.notify(1);
    assert!(driver.wait_broken().contains("without its header"));
}

#[test]
fn frames_come_in_and_wait_for_buffers() {
    let (mut driver, wire, counts) = live(MERGES);
    let packets: Vec<Vec<u8>> = (0..20).map(|n| frame([10, 0, 0, 9], n * 30)).collect();
    for packet in &packets {
        let packet = [&HEADER[..], packet].concat();
        wire.send(&packet).expect("sent");
        let room = driver.offer(0, &[], &[1600])[0];
        driver.notify(0);
        let (_, bytes) = driver.wait_used(0);
        let mut seen = driver.peek(room, bytes as usize);
        assert_eq!(seen[10..12], [1, 0], "one buffer");
        seen[10] = 0;
        assert_eq!(seen, packet);
    }
    assert_eq!(counts.read().received_packets, 20);
    assert_eq!(counts.read().lost, 0);
}

#[test]
fn a_long_frame_is_spread_over_buffers() {
    let (mut driver, wire, _) = live(MERGES);
    let packet = [&HEADER[..], &frame([10, 0, 0, 9], 60_000)].concat();
    wire.send(&packet).expect("sent");
    let mut rooms = Vec::new();
    // Not enough at first: none of them is taken.
    for _ in 0..15 {
        rooms.push(driver.offer(0, &[], &[4096])[0]);
        driver.notify(0);
    }
    driver.wait_until("nothing", |driver| driver.take_used(0).is_none());
    for _ in 0..5 {
        rooms.push(driver.offer(0, &[], &[4096])[0]);
    }
    driver.notify(0);
    let buffers = packet.len().div_ceil(4096);
    let mut seen = Vec::new();
    for room in &rooms[..buffers] {
        let (_, bytes) = driver.wait_used(0);
        seen.extend(driver.peek(*room, bytes as usize));
    }
    assert_eq!(usize::from(seen[10]), buffers);
    seen[10] = 0;
    assert!(seen == packet, "the packet arrived as it was");
    assert_eq!(driver.take_used(0), None);
}

#[test]
fn without_merging_a_frame_that_is_too_long_is_lost() {
    let (mut driver, wire, counts) = live(0);
    driver.offer(0, &[], &[100]);
    wire.send(&[&HEADER[..], &frame([10, 0, 0, 9], 500)].concat())
        .expect("sent");
    let short = [&HEADER[..], &frame([10, 0, 0, 9], 0)].concat();
    wire.send(&short).expect("sent");
    let (_, bytes) = driver.wait_used(0);
    assert_eq!(bytes as usize, short.len());
    assert_eq!(counts.read().lost, 1);
}

#[test]
fn a_wire_that_takes_no_more_keeps_the_queue_waiting() {
    let (mut driver, wire, counts) = live(0);
    let packet = frame([10, 0, 0, 2], 1000);
    // More than a pair of sockets holds.
    for _ in 0..30 {
        driver.offer(1, &[&HEADER, &packet], &[]);
        driver.notify(1);
    }
    driver.wait_until("the first", |driver| driver.take_used(1).is_some());
    for _ in 0..30 {
        assert_eq!(receive_one(&wire).len(), HEADER_BYTES + packet.len());
    }
    for _ in 1..30 {
        driver.wait_used(1);
    }
    assert_eq!(counts.read().sent_packets, 30);
}

#[test]
fn what_the_wire_refuses_is_lost() {
    let (mut driver, wire, counts) = live(0);
    drop(wire);
    driver.offer(1, &[&HEADER, &frame([10, 0, 0, 2], 0)], &[]);
    driver.notify(1);
    driver.wait_used(1);
    assert_eq!(counts.read().lost, 1);
}

#[test]
fn a_buffer_without_room_for_the_header_stops_the_device() {
    let (mut driver, wire, _) = live(MERGES);
    driver.offer(0, &[], &[11]);
    wire.send(&[&HEADER[..], &frame([10, 0, 0, 9], 0)].concat())
        .expect("sent");
    assert!(driver.wait_broken().contains("without room"));
}

#[test]
fn a_reset_forgets_the_packet_that_waited() {
    let (mut driver, wire, _) = live(MERGES);
    wire.send(&[&HEADER[..], &frame([10, 0, 0, 9], 0)].concat())
        .expect("sent");
    driver.reset();
    driver.set_up(MERGES);
    let second = [&HEADER[..], &frame([10, 0, 0, 9], 77)].concat();
    let room = driver.offer(0, &[], &[2000])[0];
    driver.notify(0);
    wire.send(&second).expect("sent");
    // The first may have been read before the reset or not.
    let (_, mut bytes) = driver.wait_used(0);
    if bytes as usize != second.len() {
        driver.offer(0, &[], &[2000]);
        driver.notify(0);
        bytes = driver.wait_used(0).1;
    } else {
        assert_eq!(driver.peek(room, bytes as usize)[12..], second[12..]);
    }
    assert_eq!(bytes as usize, second.len());
}

#[test]
fn the_least_mtu() {
    Mtu::new(1279).expect_err("less than IPv6 needs");
    assert_eq!(Mtu::new(1280).expect("an MTU").get(), 1280);
}

#[test]
fn each_direction_waits_for_its_own_tokens() {
    // A hundred frames a second, one at once, in; out only bytes are limited, and enough.
    let rate = |per_second, burst| Rate {
        per_second: NonZeroU64::new(per_second).expect("not zero"),
        burst: NonZeroU64::new(burst).expect("not zero"),
    };
    let receive = RateLimits {
        bytes: None,
        operations: Some(rate(100, 1)),
    };
    let send = RateLimits {
        bytes: Some(rate(50_000, 500)),
        operations: None,
    };
    let (net, wire) = net();
    let net = net.with_limits(receive, send).expect("timers");
    let mut driver = Driver::live(net, MERGES);
    let start = Instant::now();
    let inward = [&HEADER[..], &frame([10, 0, 0, 9], 0)].concat();
    for _ in 0..4 {
        wire.send(&inward).expect("sent");
        driver.offer(0, &[], &[200]);
    }
    for _ in 0..4 {
        // 500 bytes each, ten milliseconds' worth.
        driver.offer(1, &[&HEADER, &frame([10, 0, 0, 2], 500 - 34)], &[]);
    }
    driver.notify(0);
    driver.notify(1);
    for _ in 0..4 {
        driver.notify(0);
        driver.wait_used(0);
    }
    assert!(start.elapsed() >= Duration::from_millis(30));
    for _ in 0..4 {
        driver.notify(1);
        driver.wait_used(1);
        receive_one(&wire);
    }
    assert!(start.elapsed() >= Duration::from_millis(30));
}
