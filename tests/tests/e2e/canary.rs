//! Two tenants take turns in the one instance that a host has: whatever one leaves in its memory,
//! its table, its globals and on its stack, the other does not find.
//!
//! A guest of a request looks first, then leaves 16-byte marks everywhere. What it must find is
//! not merely no mark but nothing at all: zeros and nulls. Of files and of keys, each must find its own
//! and no other's.
//!
//! `INSULA_TEST_CANARIES` asks for other than 10,000 turns, or 500 of those that write to a disk.

use insula_tests::{Connection, Service, TestHost};
use serde_json::json;

use crate::handmade;
use crate::kills::number_from;

const TURNS: u64 = 10_000;
/// Each waits for the disk twice.
const KEEPING_TURNS: u64 = 500;
/// More than the engine keeps resident of a memory and clears by itself (2 MiB): the rest goes
/// back to the kernel, which is another path.
const PAGES: u32 = 36;
const CLEAN: u16 = 200;

/// Where a guest looks, and leaves marks.
const PLACES: [(&str, u16); 4] = [
    ("memory", 510),
    ("table", 511),
    ("globals", 512),
    ("stack", 513),
];

/// A guest that does `first` and then `then`, each of which is `look` or `leave` of a place.
fn guest(mark: [u64; 2], steps: &str) -> Vec<u8> {
    let [low, high] = mark;
    let bytes = PAGES * 65_536;
    let look = PLACES.map(|(place, status)| {
        format!("(if (call $look-{place}) (then (return (i32.const {status}))))")
    });
    let leave = PLACES.map(|(place, _)| format!("(call $leave-{place})"));
    let mut steps = steps
        .replace("look", &look.concat())
        .replace("leave-all", &leave.concat());
    for (place, _) in PLACES {
        steps = steps.replace(&format!("leave {place}"), &format!("(call $leave-{place})"));
    }
    let parts = format!(
        r#"
    (table $table 64 funcref)
    (global $low (mut i64) (i64.const 0))
    (global $high (mut i64) (i64.const 0))
    (elem declare func $leave-globals)
    (func $look-memory (result i32) (local $at i32) (local $all i64)
      (loop $more
        (local.set $all (i64.or (local.get $all) (i64.load (local.get $at))))
        (local.set $at (i32.add (local.get $at) (i32.const 8)))
        (br_if $more (i32.lt_u (local.get $at) (i32.const {bytes}))))
      (i64.ne (local.get $all) (i64.const 0)))
    (func $leave-memory (local $at i32)
      (loop $more
        (i64.store (local.get $at) (i64.const {low}))
        (i64.store offset=8 (local.get $at) (i64.const {high}))
        (local.set $at (i32.add (local.get $at) (i32.const 64)))
        (br_if $more (i32.lt_u (local.get $at) (i32.const {bytes})))))
    (func $look-table (result i32) (local $at i32) (local $found i32)
      (loop $more
        (local.set $found (i32.or (local.get $found)
          (i32.eqz (ref.is_null (table.get $table (local.get $at))))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $more (i32.lt_u (local.get $at) (i32.const 64))))
      (local.get $found))
    (func $leave-table
      (table.fill $table (i32.const 0) (ref.func $leave-globals) (i32.const 64)))
    (func $look-globals (result i32)
      (i64.ne (i64.or (global.get $low) (global.get $high)) (i64.const 0)))
    (func $leave-globals
      (global.set $low (i64.const {low})) (global.set $high (i64.const {high})))
    (func $look-stack (result i32)
      (call $deep (i32.const 100) (i64.const 0) (i64.const 0)))
    (func $leave-stack
      (drop (call $deep (i32.const 100) (i64.const {low}) (i64.const {high}))))
    ;; Locals are zero when a function begins; then they are what is left on the stack.
    (func $deep (param $left i32) (param $low i64) (param $high i64) (result i32)
      (local $a i64) (local $b i64) (local $found i32)
      (local.set $found (i64.ne (i64.or (local.get $a) (local.get $b)) (i64.const 0)))
      (local.set $a (local.get $low))
      (local.set $b (local.get $high))
      (if (local.get $left) (then
        (local.set $found (i32.or (local.get $found)
          (call $deep (i32.sub (local.get $left) (i32.const 1))
            (local.get $low) (local.get $high))))))
      (i32.or (local.get $found)
        (i32.or (i64.ne (local.get $a) (local.get $low))
          (i64.ne (local.get $b) (local.get $high)))))
    (func $status (result i32) {steps} (i32.const {CLEAN}))"#
    );
    handmade::answering(PAGES, &parts)
}

fn one_instance() -> TestHost {
    TestHost::plan().arg("--instances", 1).start()
}

fn ask(connection: &mut Connection, service: &Service) -> u16 {
    let answer = connection.exchange(&service.get("/"));
    answer.expect("an answer").status
}

#[test]
fn what_one_tenant_leaves_the_other_does_not_find() {
    let host = one_instance();
    let marks = [
        [0x6c61_6e61_7279_2d61, 0x1122_3344_5566_7788],
        [0x6c61_6e61_7279_2d62, 0x8877_6655_4433_2211],
    ];
    let services = [("left", marks[0]), ("right", marks[1])].map(|(tenant, mark)| {
        let service = host.tenant(tenant).create().service("canary");
        service.deploy_bytes(guest(mark, "look leave-all"))
    });
    let mut connections = [services[0].connect(), services[1].connect()];
    let turns = number_from("INSULA_TEST_CANARIES").unwrap_or(TURNS);
    for turn in 0..turns {
        for (service, connection) in services.iter().zip(&mut connections) {
            let status = ask(connection, service);
            let place = PLACES.iter().find(|(_, found)| *found == status);
            assert_eq!(
                status,
                CLEAN,
                "turn {turn}: {:?}",
                place.map(|(name, _)| name)
            );
        }
    }
    eprintln!("{turns} turns, nothing seen");
}

#[test]
fn what_one_tenant_keeps_the_other_does_not_find() {
    let host = one_instance();
    let services = ["left", "right"].map(|tenant| {
        let owner = host.tenant(tenant).create();
        let path = |name: &str| format!("/v1/tenants/{tenant}/volumes/{name}");
        let size = "4MiB";
        host.admin().put(&path("data"), &json!({"size": size}));
        let store = json!({"size": size, "kind": "store"});
        host.admin().put(&path("keys"), &store);
        // One that is there, and that its service may not open.
        host.admin().put(&path("other"), &store);
        let service = owner.service("canary").spec(json!({
            "volumes": [{"name": "data", "path": "/data"}],
            "stores": [{"name": "keys"}],
            "env": {"MARK": format!("mark-of-{tenant}")},
        }));
        service.deploy("canary")
    });
    let mut connections = [services[0].connect(), services[1].connect()];
    let turns = number_from("INSULA_TEST_CANARIES").unwrap_or(KEEPING_TURNS);
    for turn in 0..turns {
        for (service, connection) in services.iter().zip(&mut connections) {
            let answer = connection.exchange(&service.get(&format!("/?turn={turn}")));
            let answer = answer.expect("an answer");
            assert_eq!(answer.status, CLEAN, "turn {turn}: {}", answer.text());
        }
    }
    eprintln!("{turns} turns, nothing seen");
}

#[test]
fn a_guest_that_looks_where_marks_are_finds_them() {
    let host = one_instance();
    let tenant = host.tenant("own").create();
    // The stack is not among them: a guest cannot look at what it left there.
    for (place, found) in &PLACES[..3] {
        let component = guest([1, 2], &format!("leave {place} look"));
        let service = tenant.service(place).deploy_bytes(component);
        assert_eq!(service.get("/").send().status, *found, "{place}");
    }
}
