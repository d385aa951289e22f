//! The device over its registers, and overlays against a model.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::super::testing::{Driver, memory};
use super::*;
use crate::memory::vectors::Segment;
use crate::rate_limiter::Rate;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// Not whole sectors, nor whole blocks of an overlay.
const DISK_BYTES: u64 = 5 * (16 << 10) + 3 * 512 + 100;

fn image(bytes: u64) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    let content: Vec<u8> = (0..bytes)
        .map(|at| u8::try_from(at % 251).expect("small"))
        .collect();
    file.write_all(&content).expect("written");
    file
}

fn raw(access: Access) -> Block {
    let disk = RawDisk::new(image(DISK_BYTES), access).expect("a disk");
    Block::new(Box::new(disk), "serial-1".parse().expect("a serial"))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

/// One request, and what came back: status, bytes written, and the data.
fn ask(driver: &mut Driver, readable: &[&[u8]], writable: &[u32]) -> (u8, u32, Vec<u8>) {
    let mut room = writable.to_vec();
    room.push(1);
    driver.forget_buffers();
    let places = driver.offer(0, readable, &room);
    driver.notify(0);
    let (_, written) = driver.wait_used(0);
    let mut data = Vec::new();
    for (at, bytes) in places.iter().zip(writable) {
        data.extend(driver.peek(*at, *bytes as usize));
    }
    let status = driver.peek(*places.last().expect("the status"), 1)[0];
    (status, written, data)
}

#[test]
fn what_is_written_is_read() {
    let mut driver = Driver::live(raw(Access::ReadWrite), FLUSH);
    let mut capacity = [0; 8];
    driver.transport.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), DISK_BYTES / 512);
    let block = [0x5a; 1024];
    let (status, ..) = ask(
        &mut driver,
        &[&header(1, 3), &block[..100], &block[100..]],
        &[],
    );
    assert_eq!(status, STATUS_OK);
    assert_eq!(
        ask(&mut driver, &[&header(4, 0)], &[]),
        (STATUS_OK, 1, vec![])
    );
    let (status, written, data) = ask(&mut driver, &[&header(0, 2)], &[700, 1348]);
    assert_eq!((status, written), (STATUS_OK, 2049));
    assert_eq!(data[512..1536], block);
    assert_eq!(data[0], u8::try_from(1024 % 251).expect("small"));
    let (status, _, serial) = ask(&mut driver, &[&header(8, 0)], &[20]);
    assert_eq!((status, &serial[..9]), (STATUS_OK, &b"serial-1\0"[..]));
}

#[test]
fn requests_beyond_the_disk_are_errors_and_nothing_else() {
    let mut driver = Driver::live(raw(Access::ReadWrite), FLUSH);
    let last = DISK_BYTES / 512;
    for sector in [last, last + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
        let (status, ..) = ask(&mut driver, &[&header(0, sector)], &[512]);
        assert_eq!(status, STATUS_IO_ERROR, "read at {sector}");
        let (status, ..) = ask(&mut driver, &[&header(1, sector), &[0; 512]], &[]);
        assert_eq!(status, STATUS_IO_ERROR, "write at {sector}");
    }
    // Half sectors, half headers, unknown types.
    assert_eq!(
        ask(&mut driver, &[&header(0, 0)], &[100]).0,
        STATUS_IO_ERROR
    );
    assert_eq!(
        ask(&mut driver, &[&header(0, 0)[..7]], &[512]).0,
        STATUS_IO_ERROR
    );
    assert_eq!(
        ask(&mut driver, &[&header(77, 0)], &[512]).0,
        STATUS_UNSUPPORTED
    );
    let (status, ..) = ask(&mut driver, &[&header(0, last - 1)], &[512]);
    assert_eq!(status, STATUS_OK, "and the last sector is there");
    // Without room for a status there is no answer at all.
    driver.offer(0, &[&header(4, 0)], &[]);
    driver.notify(0);
    assert!(driver.wait_broken().contains("status"));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut driver = Driver::live(raw(Access::ReadOnly), FLUSH);
    let range = [0; 16];
    for request in [1, 11, 13] {
        let (status, ..) = ask(&mut driver, &[&header(request, 0), &range], &[]);
        assert_eq!(status, STATUS_IO_ERROR, "{request}");
    }
    assert_eq!(ask(&mut driver, &[&header(0, 0)], &[512]).2, {
        let mut first = [0; 512];
        image(512).read_exact_at(&mut first, 0).expect("read");
        first
    });
}

#[test]
fn discards_and_zeroes() {
    let mut driver = Driver::live(raw(Access::ReadWrite), FLUSH);
    let range = |sector: u64, sectors: u32, flags: u32| {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        range
    };
    let two = [range(1, 2, 1), range(5, 1, 0)].concat();
    assert_eq!(ask(&mut driver, &[&header(13, 0), &two], &[]).0, STATUS_OK);
    let (_, _, data) = ask(&mut driver, &[&header(0, 0)], &[7 * 512]);
    let zero: Vec<bool> = data
        .chunks(512)
        .map(|sector| sector.iter().all(|byte| *byte == 0))
        .collect();
    assert_eq!(zero, [false, true, true, false, false, true, false]);
    assert_eq!(
        ask(&mut driver, &[&header(11, 0), &range(0, 8, 0)], &[]).0,
        STATUS_OK
    );
    for (request, bad, status) in [
        (11, range(0, 8, 1), STATUS_UNSUPPORTED),
        (13, range(0, 8, 2), STATUS_UNSUPPORTED),
        (13, range(0, ZEROES_SECTORS + 1, 0), STATUS_IO_ERROR),
        (11, range(DISK_BYTES / 512, 1, 0), STATUS_IO_ERROR),
        (11, range(u64::MAX, 1, 0), STATUS_IO_ERROR),
        (11, vec![0; 15], STATUS_IO_ERROR),
        (11, vec![0; 17 * 16], STATUS_IO_ERROR),
    ] {
        assert_eq!(
            ask(&mut driver, &[&header(request, 0), &bad], &[]).0,
            status,
            "{request} {bad:?}"
        );
    }
}

#[test]
fn serial_numbers_are_short_and_printable() {
    for bad in ["a b", "ä", "123456789012345678901"] {
        assert!(bad.parse::<SerialNumber>().is_err(), "{bad}");
    }
    assert!("12345678901234567890".parse::<SerialNumber>().is_ok());
}

fn overlay(base: &File, file: &File) -> Overlay {
    let clone = |file: &File| file.try_clone().expect("a descriptor");
    let size = Some(DISK_BYTES + 40_000);
    Overlay::open(clone(base), BaseId([7; 32]), clone(file), size).expect("an overlay")
}

#[test]
fn an_overlay_is_not_put_on_another_base() {
    let base = image(DISK_BYTES);
    let file = tempfile::tempfile().expect("a file");
    drop(overlay(&base, &file));
    let open = |id, size| {
        let base = base.try_clone().expect("a descriptor");
        Overlay::open(
            base,
            BaseId([id; 32]),
            file.try_clone().expect("a descriptor"),
            size,
        )
    };
    assert!(matches!(
        open(8, Some(DISK_BYTES + 40_000)),
        Err(OverlayError::OtherBase)
    ));
    assert!(matches!(open(7, None), Err(OverlayError::OtherBase)));
    assert!(matches!(
        open(7, Some(DISK_BYTES - 1)),
        Err(OverlayError::Size { .. })
    ));
    file.write_all_at(b"X", 0).expect("written");
    assert!(matches!(
        open(7, Some(DISK_BYTES + 40_000)),
        Err(OverlayError::Format)
    ));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sectors = (DISK_BYTES + 40_000) / 512;
    let range = (0..sectors, 1..100_u64)
        .prop_map(move |(start, length)| (start, length.min(sectors - start)));
    prop::collection::vec(
        prop_oneof![
            4 => (range.clone(), 1..=255_u8).prop_map(|((at, length), byte)| Step::Write(at, length, byte)),
            2 => range.clone().prop_map(|(at, length)| Step::Zero(at, length)),
            1 => range.prop_map(|(at, length)| Step::Discard(at, length)),
            1 => Just(Step::Flush),
            1 => Just(Step::Reopen),
        ],
        1..40,
    )
}

/// What the disk holds, read in one piece.
fn content(memory: &crate::memory::GuestMemory, disk: &mut Overlay) -> Vec<u8> {
    let bytes = disk.bytes() / 512 * 512;
    let segment = Segment {
        address: GuestAddress(0x10_0000),
        bytes: u32::try_from(bytes).expect("small"),
    };
    disk.read(memory, &[segment], 0).expect("read");
    let mut content = vec![0; segment.bytes as usize];
    memory
        .read_slice(&mut content, segment.address)
        .expect("memory");
    content
}

fn apply(memory: &crate::memory::GuestMemory, disk: &mut Overlay, model: &mut [u8], step: &Step) {
    let bytes = |at: u64, length: u64| at * 512..(at + length) * 512;
    let of = |range: &std::ops::Range<u64>| {
        usize::try_from(range.start).expect("small")..usize::try_from(range.end).expect("small")
    };
    match *step {
        Step::Write(at, length, byte) => {
            let range = bytes(at, length);
            let segment = Segment {
                address: GuestAddress(0x20_0000),
                bytes: u32::try_from(length * 512).expect("small"),
            };
            memory
                .write_slice(&vec![byte; segment.bytes as usize], segment.address)
                .expect("memory");
            disk.write(memory, &[segment], range.start)
                .expect("written");
            model[of(&range)].fill(byte);
        }
        Step::Zero(at, length) => {
            let range = bytes(at, length);
            disk.zero(range.clone()).expect("zeroed");
            model[of(&range)].fill(0);
        }
        Step::Discard(at, length) => {
            let range = bytes(at, length);
            disk.discard(range.clone()).expect("discarded");
            // Anything may be read there from now on; elsewhere nothing has changed.
            let now = content(memory, disk);
            model[of(&range)].copy_from_slice(&now[of(&range)]);
        }
        Step::Flush => disk.flush().expect("flushed"),
        Step::Reopen => {}
    }
}

fn fresh_model() -> Vec<u8> {
    let mut model = Vec::new();
    let base = image(DISK_BYTES);
    std::io::Seek::rewind(&mut &base).expect("seek");
    (&base).read_to_end(&mut model).expect("read");
    let size = usize::try_from((DISK_BYTES + 40_000) / 512 * 512).expect("small");
    model.resize(size, 0);
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_overlay_is_a_disk(steps in steps()) {
        let (memory, base) = (memory(), image(DISK_BYTES));
        let file = tempfile::tempfile().expect("a file");
        let mut model = fresh_model();
        let mut disk = overlay(&base, &file);
        for step in &steps {
            if matches!(step, Step::Reopen) {
                drop(disk);
                disk = overlay(&base, &file);
            }
            apply(&memory, &mut disk, &mut model, step);
            prop_assert!(content(&memory, &mut disk) == model, "after {:?}", step);
        }
        let mut unchanged = Vec::new();
        std::io::Seek::rewind(&mut &base).expect("seek");
        (&base).read_to_end(&mut unchanged).expect("read");
        prop_assert!(unchanged == model_base());
    }

    /// A monitor that dies: every sector is what it was at the last flush, or what was written
    /// since.
    #[test]
    fn a_crash_loses_no_more_than_what_was_not_flushed(before in steps(), after in steps()) {
        let (memory, base) = (memory(), image(DISK_BYTES));
        let file = tempfile::tempfile().expect("a file");
        let mut model = fresh_model();
        let mut disk = overlay(&base, &file);
        for step in &before {
            apply(&memory, &mut disk, &mut model, step);
        }
        disk.flush().expect("flushed");
        let flushed = model.clone();
        let mut versions = vec![flushed];
        for step in after.iter().filter(|step| !matches!(step, Step::Flush | Step::Discard(..))) {
            apply(&memory, &mut disk, &mut model, step);
            versions.push(model.clone());
        }
        std::mem::forget(disk);
        let found = content(&memory, &mut overlay(&base, &file));
        for (sector, now) in found.chunks(512).enumerate() {
            let at = sector * 512;
            let known = versions.iter().any(|version| &version[at..at + 512] == now);
            prop_assert!(known, "sector {sector} is neither old nor new");
        }
    }
}

fn model_base() -> Vec<u8> {
    fresh_model()[..]
        .iter()
        .copied()
        .take(usize::try_from(DISK_BYTES).expect("small"))
        .collect()
}

/// A thousand operations a second, one at once: ten take at least nine milliseconds, and stay in
/// the queue until then.
#[test]
fn requests_wait_for_tokens() {
    let rate = |per_second, burst| Rate {
        per_second: NonZeroU64::new(per_second).expect("not zero"),
        burst: NonZeroU64::new(burst).expect("not zero"),
    };
    let operations = RateLimits {
        bytes: None,
        operations: Some(rate(1000, 1)),
    };
    // Four KiB at once, and a MiB in a second.
    let bytes = RateLimits {
        bytes: Some(rate(1 << 20, 4096)),
        operations: None,
    };
    for (limits, least) in [(operations, 9), (bytes, 35)] {
        let block = raw(Access::ReadWrite).with_limits(limits);
        let mut driver = Driver::live(block.expect("a timer"), FLUSH);
        let start = Instant::now();
        for _ in 0..10 {
            driver.offer(0, &[&header(1, 0), &[7; 4096]], &[1]);
        }
        driver.notify(0);
        for _ in 0..10 {
            // Notifying again does not help.
            driver.notify(0);
            driver.wait_used(0);
        }
        assert!(start.elapsed() >= Duration::from_millis(least));
        // A reset in the middle of a wait leaves a device that works.
        driver.offer(0, &[&header(1, 0), &[7; 4096]], &[1]);
        driver.notify(0);
        driver.reset();
        driver.set_up(0);
        driver.offer(0, &[&header(4, 0)], &[1]);
        driver.notify(0);
        driver.wait_used(0);
    }
}
