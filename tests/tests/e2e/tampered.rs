//! Compiled code that somebody has changed on the disk is never loaded: it is compiled again from
//! its component, or its service is not served.
//!
//! `INSULA_TEST_TAMPERED` asks for other than 1,000 artefacts.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use insula_tests::wait::holds;
use insula_tests::{Service, TestHost, until};

use crate::handmade;
use crate::kills::number_from;

/// Services of a host, half of each tenant's.
const SERVICES: usize = 40;
const ARTEFACTS: u64 = 1_000;
/// Bytes before the compiled code: magic, engine, component, seal.
const HEADER: usize = 8 + 16 + 32 + 32;

struct Target {
    service: Service,
    status: u16,
    artefact: PathBuf,
    sealed: Vec<u8>,
}

/// A host of so many services that each answer with a status of their own.
fn targets(host: &TestHost) -> Vec<Target> {
    let tenants = ["left", "right"].map(|name| host.tenant(name).create());
    let mut known = Vec::new();
    let mut made = Vec::new();
    for (index, status) in (400..).take(SERVICES).enumerate() {
        let service = tenants[index % 2].service(&format!("s{index}"));
        let service = service.deploy_bytes(handmade::constant(status));
        let artefacts = host.files("artefacts");
        let new = artefacts.iter().find(|path| !known.contains(*path));
        let artefact = new.expect("an artefact").clone();
        known = artefacts;
        let sealed = fs::read(&artefact).expect("an artefact");
        made.push(Target {
            service,
            status,
            artefact,
            sealed,
        });
    }
    made
}

/// Small and good enough for choosing bits.
struct Choice(u64);

impl Choice {
    fn below(&mut self, limit: usize) -> usize {
        // Knuth's MMIX generator; its high bits are the good ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % limit
    }
}

fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).expect("an artefact");
    fs::write(path, bytes).expect("a file");
}

/// One way to change an artefact, given those of others and of another host.
type Tamper = fn(&Target, &Target, &[u8], &mut Choice);

const TAMPERS: [(&str, Tamper); 13] = [
    ("a bit of the header", |own, _, _, choice| {
        let mut bytes = own.sealed.clone();
        bytes[choice.below(HEADER)] ^= 1 << choice.below(8);
        replace(&own.artefact, &bytes);
    }),
    ("a bit of the code", |own, _, _, choice| {
        let mut bytes = own.sealed.clone();
        let at = HEADER + choice.below(bytes.len() - HEADER);
        bytes[at] ^= 1 << choice.below(8);
        replace(&own.artefact, &bytes);
    }),
    ("a bit of the code, in place", |own, _, _, choice| {
        let mut bytes = own.sealed.clone();
        let at = HEADER + choice.below(bytes.len() - HEADER);
        bytes[at] ^= 1 << choice.below(8);
        fs::write(&own.artefact, bytes).expect("a file");
    }),
    ("64 random bytes", |own, _, _, choice| {
        let mut bytes = own.sealed.clone();
        let at = choice.below(bytes.len() - 64);
        for byte in &mut bytes[at..at + 64] {
            *byte ^= u8::try_from(1 + choice.below(255)).expect("small");
        }
        replace(&own.artefact, &bytes);
    }),
    ("another's", |own, other, _, _| {
        replace(&own.artefact, &other.sealed);
    }),
    ("another's code under the own header", |own, other, _, _| {
        let bytes = [&own.sealed[..HEADER], &other.sealed[HEADER..]].concat();
        replace(&own.artefact, &bytes);
    }),
    ("the same, sealed by another host", |own, _, foreign, _| {
        replace(&own.artefact, foreign);
    }),
    ("of another engine", |own, _, _, choice| {
        let mut bytes = own.sealed.clone();
        bytes[8 + choice.below(16)] ^= 1;
        replace(&own.artefact, &bytes);
    }),
    ("cut short", |own, _, _, choice| {
        let cut = choice.below(own.sealed.len());
        replace(&own.artefact, &own.sealed[..cut]);
    }),
    ("more after its end", |own, _, _, choice| {
        let more = vec![0; 1 + choice.below(64)];
        replace(&own.artefact, &[&own.sealed[..], &more].concat());
    }),
    ("a link to another's", |own, other, _, _| {
        fs::remove_file(&own.artefact).expect("an artefact");
        let name = other.artefact.file_name().expect("a name");
        symlink(name, &own.artefact).expect("a link");
    }),
    ("a link out of the directory", |own, _, _, _| {
        let outside = own.artefact.with_file_name("../../outside");
        fs::write(&outside, &own.sealed).expect("a file");
        fs::remove_file(&own.artefact).expect("an artefact");
        symlink("../../outside", &own.artefact).expect("a link");
    }),
    ("a pipe", |own, _, _, _| {
        fs::remove_file(&own.artefact).expect("an artefact");
        let made = std::process::Command::new("mkfifo")
            .arg(&own.artefact)
            .status();
        assert!(made.expect("mkfifo").success());
    }),
];

fn is_ready(host: &TestHost) {
    until(Duration::from_secs(60), "all is compiled", || {
        let ready = host.admin_as(None).request("GET", "/readyz").send();
        holds(ready.status == 200, ready.text())
    });
}

/// All services answer as they did when they were deployed.
fn all_answer(host: &TestHost, targets: &[Target], what: &str) {
    is_ready(host);
    for target in targets {
        let answer = target.service.get("/").send();
        assert_eq!(answer.status, target.status, "{what}: {answer:?}");
    }
}

const NOT_SERVED: &str = "a service is not served yet";

#[test]
fn an_artefact_that_was_changed_is_compiled_again() {
    let other = TestHost::start();
    let foreign: Vec<Vec<u8>> = targets(&other)
        .into_iter()
        .map(|target| target.sealed)
        .collect();
    drop(other);
    let host = TestHost::start();
    let mut targets = targets(&host);
    let seed = number_from("INSULA_TEST_SEED").unwrap_or_else(|| u64::from(host.pid()));
    eprintln!("INSULA_TEST_SEED={seed}");
    let mut choice = Choice(seed);
    let wanted = number_from("INSULA_TEST_TAMPERED").unwrap_or(ARTEFACTS);
    let (mut tampered, mut round) = (0, 0);
    while tampered < wanted {
        host.kill();
        let before = host.said().matches(NOT_SERVED).count();
        let mut names = Vec::new();
        for index in 0..SERVICES {
            let (name, tamper) = TAMPERS[(index + round) % TAMPERS.len()];
            let another = &targets[(index + 1 + choice.below(SERVICES - 1)) % SERVICES];
            tamper(&targets[index], another, &foreign[index], &mut choice);
            names.push(name);
        }
        tampered += SERVICES as u64;
        round += 1;
        host.start_again();
        all_answer(&host, &targets, "tampered");
        let said = host.said();
        let refused = said.matches(NOT_SERVED).count() - before;
        assert_eq!(refused, SERVICES, "of {names:?}:\n{said}");
        assert!(!said.contains("panicked"), "{said}");
        for target in &mut targets {
            let kind = fs::symlink_metadata(&target.artefact).expect("an artefact");
            assert!(kind.is_file(), "{:?}", target.artefact);
            target.sealed = fs::read(&target.artefact).expect("an artefact");
        }
    }
    eprintln!("{tampered} artefacts, none loaded");
    host.restart();
    let said = host.said();
    all_answer(&host, &targets, "at the end");
    let after = host.said();
    let new = after.strip_prefix(&said).unwrap_or(&after);
    assert!(
        !new.contains(NOT_SERVED),
        "those made again are good:\n{new}"
    );
}

#[test]
fn an_artefact_that_changes_while_it_is_read_or_served_does_no_harm() {
    let host = TestHost::start();
    let targets = Arc::new(targets(&host));
    let stop = Arc::new(AtomicBool::new(false));
    let changing = {
        let (targets, stop) = (Arc::clone(&targets), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut choice = Choice(7);
            while !stop.load(Ordering::Relaxed) {
                let target = &targets[choice.below(SERVICES)];
                let mut bytes = target.sealed.clone();
                let at = HEADER + choice.below(bytes.len() - HEADER);
                bytes[at] ^= 1;
                // It may be being made again, under its name, in this moment.
                let _ = fs::write(&target.artefact, &bytes);
                let _ = fs::write(&target.artefact, &target.sealed);
            }
        })
    };
    for _ in 0..10 {
        host.crash_and_restart();
        is_ready(&host);
        for target in targets.iter() {
            let answer = target.service.get("/").send();
            // It was changed again when it had been compiled again: the host says that, then.
            let served = answer.status == target.status && answer.body.is_empty();
            assert!(served || !answer.problem().is_empty(), "{answer:?}");
        }
    }
    stop.store(true, Ordering::Relaxed);
    changing.join().expect("the one who changes");
    host.crash_and_restart();
    all_answer(&host, &targets, "in the end");
    let said = host.said();
    assert!(!said.contains("panicked"), "{said}");
}
