//! Every hostile sample, a thousand times: the right ending, a host that is still there, and its
//! memory back to the level before.
//!
//! The limits are small so that a thousand tries are quick, and such that each sample has one
//! ending only.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use insula_tests::http::Request;
use insula_tests::load::Load;
use insula_tests::{Service, Tenant, TestHost, guests, load};
use serde_json::{Value, json};

use crate::{endless, samples};

const TRIES: u64 = 1_000;
/// Before the level is taken that must hold: what a try needs is kept for the next.
const FIRST_TRIES: u64 = 100;
/// How far above the level before the host's memory may stay.
const MEMORY_SLACK_MIB: u64 = 16;
/// So often a thousand, where the level rises by more than that: what is kept once is no leak.
const ROUNDS_MAX: u32 = 3;

/// Who attacks.
#[derive(Clone, Copy)]
pub(crate) enum Guest {
    Sample(&'static str),
    /// For what no language's compiler lets a guest do: what it does, and its component.
    Handmade(&'static str, fn() -> Vec<u8>),
}

impl Guest {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sample(name) | Self::Handmade(name, _) => name,
        }
    }

    pub(crate) fn component(self) -> Vec<u8> {
        match self {
            Self::Sample(name) => guests::bytes(name),
            Self::Handmade(_, component) => component(),
        }
    }
}

/// One way to attack.
pub(crate) struct Case {
    pub(crate) guest: Guest,
    pub(crate) path: &'static str,
    pub(crate) limits: fn() -> Value,
    /// How every try ends.
    pub(crate) outcome: &'static str,
    sees: Sees,
    /// Of its service, beside the limits.
    spec: fn() -> Value,
    /// Bytes that are sent with each.
    body: usize,
    /// Tries at once.
    at_once: usize,
}

impl Case {
    /// Its service, with what that needs.
    pub(crate) fn deploy(&self, host: &TestHost, tenant: &Tenant, name: &str) -> Service {
        let spec = (self.spec)();
        for volume in spec["volumes"].as_array().into_iter().flatten() {
            let name = volume["name"].as_str().expect("a name");
            let path = format!("/v1/tenants/{}/volumes/{name}", tenant.name());
            host.admin().put(&path, &json!({"size": "1MiB"}));
        }
        let service = tenant.service(name).spec(spec);
        let service = service.limits((self.limits)());
        service.deploy_bytes(self.guest.component())
    }

    /// Not while its guest goes on.
    pub(crate) const fn is_answered_at_the_end(&self) -> bool {
        !matches!(self.sees, Sees::Answer | Sees::AnswerOrProblem(_))
    }

    pub(crate) fn request(&self, service: &Service) -> Request {
        match self.body {
            0 => service.get(self.path),
            // Who does not read it does not keep the connection, and a client may learn that late.
            length => {
                let request = service.post(self.path, vec![0; length]);
                request.header("connection", "close")
            }
        }
    }
}

/// What a client gets of it.
enum Sees {
    /// A good answer: the attack ends well, or comes after it, and costs its tenant what it costs.
    Answer,
    /// A problem with this status, and the outcome as its code.
    Problem(u16),
    /// An answer that begins well and is cut off.
    CutOff,
    /// One or the other, by how much of the answer was there when its guest ended.
    ProblemOrCutOff(u16),
    /// A good answer, or a problem where its guest had ended before any of it was sent.
    AnswerOrProblem(u16),
}

/// Makes a test of each case, and a table of all.
macro_rules! cases {
    ($($name:ident = $case:expr;)*) => {
        pub(crate) const CASES: &[Case] = &[$($case),*];
        $(#[test]
        fn $name() {
            attack(&$case);
        })*
    };
}

const fn problem(
    sample: &'static str,
    path: &'static str,
    limits: fn() -> Value,
    outcome: &'static str,
    status: u16,
) -> Case {
    Case {
        guest: Guest::Sample(sample),
        path,
        limits,
        outcome,
        sees: Sees::Problem(status),
        spec: || json!({}),
        body: 0,
        at_once: 2,
    }
}

/// Which of them ends a guest.
const FUEL: fn() -> Value = || json!({"fuel": "2M"});
const TIME: fn() -> Value = || json!({"fuel": "1T", "timeout": "20ms"});

/// A directory to open.
const VOLUME: fn() -> Value =
    || json!({"volumes": [{"name": "data", "path": "/data", "mode": "rw"}]});

/// A handmade one that never ends by itself.
const fn endless(
    what: &'static str,
    component: fn() -> Vec<u8>,
    limits: fn() -> Value,
    outcome: &'static str,
    status: u16,
) -> Case {
    Case {
        guest: Guest::Handmade(what, component),
        ..problem("", "/", limits, outcome, status)
    }
}

cases! {
    a_loop_in_the_handler_runs_out_of_fuel =
        problem("spin", "/", || json!({"fuel": "2M"}), "out_of_fuel", 504);
    a_loop_in_the_handler_times_out =
        problem("spin", "/", || json!({"fuel": "1T", "timeout": "20ms"}), "timeout", 504);
    a_loop_in_an_initialiser_runs_out_of_fuel =
        problem("start-loop", "/", || json!({"fuel": "2M"}), "out_of_fuel", 504);
    a_loop_in_an_initialiser_times_out =
        problem("start-loop", "/", || json!({"fuel": "1T", "timeout": "20ms"}), "timeout", 504);
    a_memory_bomb_runs_out_of_memory =
        problem("memory-bomb", "/", || json!({"memory": "8MiB"}), "out_of_memory", 502);
    a_bulk_fill_beyond_the_limit_runs_out_of_memory =
        problem("fill", "/", || json!({"memory": "16MiB"}), "out_of_memory", 502);
    a_bulk_fill_without_end_times_out =
        problem("fill", "/?mib=4", || json!({"fuel": "1T", "timeout": "20ms"}), "timeout", 504);
    a_deep_recursion_traps = problem("recursion", "/", || json!({}), "trap", 502);
    an_abort_traps = problem("trap", "/", || json!({}), "trap", 502);
    a_panic_traps = problem("echo", "/panic", || json!({}), "trap", 502);
    a_guest_that_waits_forever_times_out = Case {
        at_once: 64,
        ..problem("mute", "/", || json!({"timeout": "50ms"}), "timeout", 504)
    };
    a_guest_that_sleeps_times_out = Case {
        at_once: 64,
        ..problem("echo", "/sleep?ms=60000", || json!({"timeout": "50ms"}), "timeout", 504)
    };
    no_response_is_a_bad_response =
        problem("no-response", "/", || json!({}), "bad_response", 502);
    a_body_shorter_than_its_length_is_a_bad_response = Case {
        sees: Sees::ProblemOrCutOff(502),
        ..problem("short-body", "/", || json!({}), "bad_response", 0)
    };
    a_flood_of_headers_traps =
        problem("header-flood", "/", || json!({}), "trap", 502);
    a_body_without_end_runs_out_of_fuel = Case {
        sees: Sees::CutOff,
        ..problem("endless-body", "/", || json!({"fuel": "400k"}), "out_of_fuel", 0)
    };
    a_storm_of_page_faults_is_served_and_charged = Case {
        sees: Sees::Answer,
        ..problem("fault-storm", "/?mib=16", || json!({}), "ok", 200)
    };
    a_storm_of_page_faults_beyond_the_limit_runs_out_of_memory =
        problem("fault-storm", "/", || json!({"memory": "16MiB"}), "out_of_memory", 502);
    a_storm_of_host_calls_runs_out_of_fuel =
        problem("host-calls", "/?bytes=64", || json!({"fuel": "300k"}), "out_of_fuel", 504);
    a_storm_of_host_calls_times_out =
        problem("host-calls", "/?bytes=64", || json!({"fuel": "1T", "timeout": "20ms"}), "timeout", 504);
    a_flood_of_logs_runs_out_of_fuel =
        problem("log-flood", "/", || json!({"fuel": "1M"}), "out_of_fuel", 504);
    a_flood_of_logs_times_out =
        problem("log-flood", "/", || json!({"fuel": "1T", "timeout": "20ms"}), "timeout", 504);
    a_slow_body_without_end_times_out = Case {
        sees: Sees::CutOff,
        at_once: 64,
        ..problem("slow-body", "/", || json!({"timeout": "250ms"}), "timeout", 0)
    };
    a_sleep_in_an_initialiser_times_out = Case {
        at_once: 64,
        ..problem("start-sleep", "/", || json!({"timeout": "50ms"}), "timeout", 504)
    };
    resources_without_end_trap = problem("hoard", "/resources", || json!({}), "trap", 502);
    pollables_without_end_trap = problem("hoard", "/pollables", || json!({}), "trap", 502);
    streams_without_end_trap = problem("hoard", "/streams", || json!({}), "trap", 502);
    answers_without_end_trap = problem("hoard", "/outgoing", || json!({}), "trap", 502);
    fields_without_end_trap = problem("hoard", "/append", || json!({}), "trap", 502);
    a_list_of_16_mib_traps = problem("hoard", "/list", || json!({}), "trap", 502);
    a_million_at_once_to_wait_for_trap = problem("hoard", "/poll", || json!({}), "trap", 502);
    random_bytes_of_4_gib_trap = problem("hoard", "/random", || json!({}), "trap", 502);
    directories_without_end_trap = Case {
        spec: VOLUME,
        ..problem("hoard", "/directories", || json!({}), "trap", 502)
    };
    volumes_without_end_trap = Case {
        spec: VOLUME,
        ..problem("hoard", "/preopens", || json!({}), "trap", 502)
    };
    an_environment_again_and_again_runs_out_of_memory = Case {
        spec: || json!({"env": {"E": "x".repeat(60_000)}}),
        ..problem("hoard", "/environment", || json!({"memory": "8MiB"}), "out_of_memory", 502)
    };
    arguments_again_and_again_run_out_of_fuel =
        problem("hoard", "/arguments", FUEL, "out_of_fuel", 504);
    an_input_that_never_comes_runs_out_of_fuel =
        problem("hoard", "/stdin", FUEL, "out_of_fuel", 504);
    a_message_of_a_mebibyte_traps = problem("hoard", "/message", || json!({}), "trap", 502);
    a_body_that_is_never_finished_ends_with_its_guest = Case {
        sees: Sees::Answer,
        ..problem("hoard", "/unfinished", || json!({}), "ok", 200)
    };
    a_body_that_is_never_read_is_thrown_away = Case {
        body: 1 << 20,
        sees: Sees::Answer,
        ..problem("hoard", "/unread", || json!({}), "ok", 200)
    };
    a_loop_in_a_start_function_runs_out_of_fuel =
        endless("a loop at the start", endless::start, FUEL, "out_of_fuel", 504);
    a_loop_in_a_start_function_times_out =
        endless("a loop at the start", endless::start, TIME, "timeout", 504);
    a_recursion_in_a_start_function_traps =
        endless("recursion at the start", endless::start_recursion, TIME, "trap", 502);
    tail_calls_without_end_run_out_of_fuel =
        endless("tail calls", endless::tail_calls, FUEL, "out_of_fuel", 504);
    tail_calls_without_end_time_out =
        endless("tail calls", endless::tail_calls, TIME, "timeout", 504);
    growth_of_a_table_that_is_refused_and_goes_on_runs_out_of_fuel =
        endless("table.grow", endless::table_grow, FUEL, "out_of_fuel", 504);
    growth_of_a_table_that_is_refused_and_goes_on_times_out =
        endless("table.grow", endless::table_grow, TIME, "timeout", 504);
    growth_of_two_memories_that_is_refused_and_goes_on_times_out =
        endless("memory.grow twice", endless::two_memories, TIME, "timeout", 504);
    room_for_a_text_that_is_never_made_runs_out_of_fuel =
        endless("realloc", endless::realloc, FUEL, "out_of_fuel", 504);
    room_for_a_text_that_is_never_made_times_out =
        endless("realloc", endless::realloc, TIME, "timeout", 504);
    a_loop_after_the_return_runs_out_of_fuel = Case {
        sees: Sees::AnswerOrProblem(504),
        ..endless("post-return", endless::post_return, FUEL, "out_of_fuel", 0)
    };
    a_loop_after_the_return_times_out = Case {
        sees: Sees::AnswerOrProblem(504),
        ..endless("post-return", endless::post_return, TIME, "timeout", 0)
    };
    a_loop_in_a_destructor_runs_out_of_fuel =
        endless("a destructor", endless::destructor, FUEL, "out_of_fuel", 504);
    a_loop_in_a_destructor_times_out =
        endless("a destructor", endless::destructor, TIME, "timeout", 504);
    handles_without_end_trap = endless("handles", endless::handles, TIME, "trap", 502);
}

fn attack(case: &Case) {
    let host = TestHost::start();
    let victim = host.tenant("victim").create().deploy("hello");
    let tenant = host.tenant("hostile").create();
    let service = case.deploy(&host, &tenant, "hostile");
    // A pool that has served so many at once keeps what it needs for it.
    let warm = load::times(200, case.at_once, &victim.get("/"));
    assert_eq!(warm.status(200), 200, "{warm:?}");
    let request = case.request(&service);
    let _ = load::times(FIRST_TRIES, case.at_once, &request);
    let _ = host.when_ended("hostile", FIRST_TRIES);
    let mut tried = FIRST_TRIES;
    let mut before = Held::of(&host);
    for round in 1.. {
        let load = load::times(TRIES, case.at_once, &request);
        look(case, &load);
        tried += TRIES;
        let metrics = host.when_ended("hostile", tried);
        let expected = BTreeMap::from([(case.outcome.to_owned(), tried)]);
        assert_eq!(metrics.outcomes("hostile"), expected);
        assert!(
            metrics.cpu_seconds("hostile") > 0.0,
            "what ends badly is charged too"
        );
        let hostile = [("tenant", "hostile")];
        assert_eq!(metrics.sum("insula_instances", &hostile), 0.0);
        assert_eq!(metrics.sum("insula_memory_bytes", &hostile), 0.0);

        let (after, is_within) = Held::settled(&host, &before, case.at_once);
        eprintln!(
            "{}: {before:?}, then {after:?}; {:?}",
            case.guest.name(),
            load.quantile(0.5)
        );
        if is_within {
            break;
        }
        // More of its places were in use at once than before; they are kept, once.
        assert!(round < ROUNDS_MAX, "it grows with every thousand");
        before = after;
    }
    assert_eq!(victim.get("/").send().status, 200);
    let said = host.said();
    assert!(
        !said.contains("panicked") && !said.contains("ERROR"),
        "{said}"
    );
}

/// What a process can leak.
#[derive(Debug, Clone, Copy)]
struct Held {
    memory_mib: u64,
    files: usize,
    threads: usize,
    mappings: usize,
}

impl Held {
    fn of(host: &TestHost) -> Self {
        Self {
            memory_mib: host.rss_bytes() >> 20,
            files: host.open_files(),
            threads: host.threads(),
            mappings: host.mappings(),
        }
    }

    /// What is held in the end, and whether that is no more than before.
    fn settled(host: &TestHost, before: &Self, at_once: usize) -> (Self, bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let held = Self::of(host);
            let is_within = held.is_within(before, at_once);
            if is_within || Instant::now() > deadline {
                return (held, is_within);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A thousand tries that each left one would be seen at once. Slots of instances that were
    /// used for the first time, and heaps of threads, account for some mappings.
    fn is_within(&self, before: &Self, at_once: usize) -> bool {
        self.memory_mib <= before.memory_mib + MEMORY_SLACK_MIB
            && self.files <= before.files + 8
            && self.threads <= before.threads + 2
            && self.mappings <= before.mappings + 200 + 8 * at_once
    }
}

fn look(case: &Case, load: &Load) {
    let (problems, others) = match case.sees {
        Sees::Answer => (0, load.status(200)),
        Sees::AnswerOrProblem(status) => (load.status(status), load.status(200)),
        Sees::Problem(status) => (load.status(status), 0),
        Sees::CutOff => (0, load.status(0)),
        Sees::ProblemOrCutOff(status) => (load.status(status), load.status(0)),
    };
    assert_eq!(
        problems + others,
        TRIES,
        "{:?} {:?}",
        load.statuses,
        load.problems
    );
    let told = load.problems.get(case.outcome).copied();
    assert_eq!(told.unwrap_or(0), problems, "{:?}", load.problems);
}

/// The packages in a folder of samples.
fn packages(folder: &str) -> Vec<String> {
    let path = guests::repository().join(folder);
    let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut found: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{}", path.display());
    found
}

/// The samples that attack in a case.
fn tested() -> impl Iterator<Item = &'static str> {
    CASES.iter().filter_map(|case| match case.guest {
        Guest::Sample(name) => Some(name),
        Guest::Handmade(..) => None,
    })
}

#[test]
fn every_sample_has_a_test() {
    let hostile = packages("samples/hostile");
    for sample in &hostile {
        let is_tested = tested().any(|tested| tested == sample);
        assert!(
            is_tested,
            "samples/hostile/{sample} has no case in {}",
            file!()
        );
    }
    assert_eq!(
        packages("samples"),
        samples::TESTED,
        "the samples that samples.rs tests"
    );
    for tested in tested() {
        let known = hostile.iter().any(|sample| sample == tested);
        assert!(known || samples::TESTED.contains(&tested), "{tested}");
    }
}

/// Of a service's environment its guests get as much as its spec may have, and of arguments none.
#[test]
fn an_environment_of_64_mib_is_refused() {
    const MIB: usize = 1 << 20;
    let host = TestHost::start();
    let tenant = host.tenant("hostile").create();
    let service = tenant.deploy("hello");
    let before = host.rss_bytes();
    let many = |count: usize, bytes: usize| -> Value {
        let value = "x".repeat(bytes);
        (0..count)
            .map(|n| (format!("E{n}"), value.clone()))
            .collect()
    };
    for (what, spec) in [
        ("one variable of 64 MiB", json!({"env": many(1, 64 * MIB)})),
        ("64 variables of 1 MiB", json!({"env": many(64, MIB)})),
        ("a million empty ones", json!({"env": many(1_000_000, 0)})),
        (
            "one byte more than there may be",
            json!({"env": many(1, 64 << 10)}),
        ),
        (
            "one variable more than there may be",
            json!({"env": many(257, 1)}),
        ),
        ("arguments", json!({"args": ["x"]})),
    ] {
        for attempt in 0..4 {
            let admin = host.admin();
            let put = admin.request("PUT", &service.path());
            let put = put
                .header("content-type", "application/json")
                .body(spec.to_string());
            match put.try_send() {
                Ok(answer) => assert!(
                    (400..500).contains(&answer.status),
                    "{what}, {attempt}: {} {}",
                    answer.status,
                    answer.text()
                ),
                // Refused by its length: the rest of the body is not read.
                Err(broken) => assert!(spec.to_string().len() > MIB, "{what}: {broken:?}"),
            }
        }
    }
    let grown = host.rss_bytes().saturating_sub(before) >> 20;
    assert!(grown <= MEMORY_SLACK_MIB, "{grown} MiB more");
    assert_eq!(service.get("/").send().status, 200);
}

#[test]
fn a_problem_shows_nothing_of_the_hosts_insides() {
    let host = TestHost::start();
    let tenant = host.tenant("hostile").create();
    for sample in [
        "trap",
        "recursion",
        "no-response",
        "header-flood",
        "memory-bomb",
    ] {
        let service = tenant.deploy(sample);
        let answer = service.get("/").send();
        let code = answer.problem();
        let text = answer.text().to_lowercase();
        for inside in [
            "wasm",
            "host/src",
            ".rs:",
            "panicked",
            "backtrace",
            "0x",
            "hyper",
            "tokio",
        ] {
            assert!(
                !text.contains(inside),
                "{sample} ({code}) shows {inside}: {text}"
            );
        }
        let id = answer.header("x-request-id").expect("x-request-id");
        assert_eq!(answer.json()["request_id"], json!(id));
    }
}
