//! Components that are made to cost a compiler much: each is refused, or compiled within 30 seconds
//! of CPU and 1 GiB of the child's memory, while the host grows by no more than 32 MiB.
//!
//! `INSULA_TEST_BOMBS=all` asks for all those that are ended by their limits, which takes minutes;
//! one is tried without it.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use insula_tests::http::Broken;
use insula_tests::wait::holds;
use insula_tests::{Answer, Service, TestHost, proc, until};

use crate::handmade::{self, leb, module, section, vector};

/// 30 s of the child, and what the host itself has to do meanwhile.
const CPU_MAX: f64 = 31.0;
const CHILD_MEMORY_MAX: u64 = 1 << 30;
const HOST_GROWTH_MAX: u64 = 32 << 20;
/// A machine that has other work takes longer than the CPU time of it.
const PATIENCE: Duration = Duration::from_secs(120);
/// More than the host keeps in its heap by chance is not measured.
const MIB: u64 = 1 << 20;

// Section numbers of the core binary format (WebAssembly 3.0, 5.5.2).
const CUSTOM: u8 = 0;
const TYPE: u8 = 1;
const IMPORT: u8 = 2;
const FUNCTION: u8 = 3;
const TABLE: u8 = 4;
const MEMORY: u8 = 5;
const EXPORT: u8 = 7;
const START: u8 = 8;
const ELEMENT: u8 = 9;
const CODE: u8 = 10;
const DATA: u8 = 11;
const END: u8 = 0x0b;

/// A bomb: its name, and its bytes.
pub(crate) type Bomb = (&'static str, Vec<u8>);

fn no_parameters() -> Vec<u8> {
    section(TYPE, &vector(1, &[0x60, 0, 0]))
}

/// A function's body without locals.
fn body(code: &[u8]) -> Vec<u8> {
    let inside = [&[0], code, &[END]].concat();
    [leb(inside.len()), inside].concat()
}

/// A component around a module of so many times the same function.
fn functions(count: usize, code: &[u8]) -> Vec<u8> {
    handmade::around(&module(&[
        no_parameters(),
        section(FUNCTION, &vector(count, &[0])),
        section(MEMORY, &vector(1, &[0, 1])),
        section(CODE, &vector(count, &body(code))),
    ]))
}

fn locals(count: usize) -> Vec<u8> {
    const V128: u8 = 0x7b;
    let inside = [&[1][..], &leb(count), &[V128, END]].concat();
    let code = [vec![1], leb(inside.len()), inside].concat();
    handmade::around(&module(&[
        no_parameters(),
        section(FUNCTION, &vector(1, &[0])),
        section(CODE, &code),
    ]))
}

/// A function with one `br_table` of so many targets.
fn br_table(targets: usize) -> Vec<u8> {
    let code = [
        &[0x02, 0x40, 0x41, 0, 0x0e][..],
        &vector(targets, &[0]),
        &[0, END],
    ]
    .concat();
    functions(1, &code)
}

/// `i32.load` of address 0, dropped: the compiler finds that one is enough.
const LOAD: [u8; 6] = [0x41, 0, 0x28, 2, 0, 0x1a];
/// `i32.store` of 0 at address 0: each stays.
const STORE: [u8; 7] = [0x41, 0, 0x41, 0, 0x36, 2, 0];

fn exports(count: usize, name_bytes: usize) -> Vec<u8> {
    let mut list = leb(count);
    for number in 0..count {
        let name = format!("{number}{}", "x".repeat(name_bytes));
        list.extend(leb(name.len()));
        list.extend_from_slice(name.as_bytes());
        list.extend([0, 0]);
    }
    handmade::around(&module(&[
        no_parameters(),
        section(FUNCTION, &vector(1, &[0])),
        section(EXPORT, &list),
        section(CODE, &vector(1, &body(&[]))),
    ]))
}

fn memory_of(limits: &[u8]) -> Vec<u8> {
    handmade::around(&module(&[section(MEMORY, &vector(1, limits))]))
}

fn table_of(limits: &[u8]) -> Vec<u8> {
    let table = [&[0x70], limits].concat();
    handmade::around(&module(&[section(TABLE, &vector(1, &table))]))
}

fn data_segments(count: usize) -> Vec<u8> {
    handmade::around(&module(&[
        section(MEMORY, &vector(1, &[0, 1])),
        section(DATA, &vector(count, &[0, 0x41, 0, END, 1, b'x'])),
    ]))
}

fn element_segments(count: usize) -> Vec<u8> {
    handmade::around(&module(&[
        no_parameters(),
        section(FUNCTION, &vector(1, &[0])),
        section(TABLE, &vector(1, &[0x70, 0, 1])),
        section(ELEMENT, &vector(count, &[0, 0x41, 0, END, 1, 0])),
        section(CODE, &vector(1, &body(&[]))),
    ]))
}

/// In the text format, for what is easier to say there.
fn text(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"))
}

/// Large bodies, many of everything in a module.
fn core_bombs() -> Vec<Bomb> {
    let deep = [[0x02, 0x40].repeat(10_000), [END].repeat(10_000)].concat();
    let arms = [0x41, 0, 0x04, 0x40, 0x01, 0x05].repeat(10_000);
    let arms = [arms, [END].repeat(10_000)].concat();
    let start_import = [&[1, 1, b'a', 1, b'b', 0, 0][..]].concat();
    vec![
        (
            "one body of 7.65 MB",
            functions(1, &[0x01].repeat(7_654_000)),
        ),
        (
            "bodies of 1 MB, full of stores",
            functions(20, &STORE.repeat(149_000)),
        ),
        ("50,000 locals of v128", locals(50_000)),
        ("5,000 locals of v128", locals(5_000)),
        ("a million empty functions", functions(1_000_000, &[])),
        ("60,000 empty functions", functions(60_000, &[])),
        ("a million types", {
            let types = section(TYPE, &vector(1_000_000, &[0x60, 0, 0]));
            handmade::around(&module(&[types]))
        }),
        ("600 exports of 100 kB", exports(600, 100_000)),
        ("100,000 exports", exports(100_000, 6)),
        ("a br_table of 65,519", br_table(65_519)),
        ("a br_table of 65,520", br_table(65_520)),
        ("a br_table of 65,521", br_table(65_521)),
        ("a br_table of 7 million", br_table(7_000_000)),
        ("100,000 data segments", data_segments(100_000)),
        ("32,769 data segments", data_segments(32_769)),
        ("10,000 data segments", data_segments(10_000)),
        ("100,000 element segments", element_segments(100_000)),
        ("10,000 blocks in one another", functions(1, &deep)),
        ("10,000 arms of an if", functions(1, &arms)),
        (
            "20 loads a million times",
            functions(20, &LOAD.repeat(1_000_000)),
        ),
        ("a custom section of 60 MB", {
            let custom = [&[1, b'x'][..], &vec![0; 60 << 20]].concat();
            handmade::around(&module(&[section(CUSTOM, &custom)]))
        }),
        ("an imported start function", {
            handmade::around(&module(&[
                no_parameters(),
                section(IMPORT, &start_import),
                section(START, &[0]),
            ]))
        }),
        (
            "a memory of 4 GiB",
            memory_of(&[&[0][..], &leb(65_536)].concat()),
        ),
        (
            "a 64-bit memory of 2^48 pages",
            memory_of(&[&[4][..], &leb(1 << 48)].concat()),
        ),
        (
            "a table of 10 million",
            table_of(&[&[0][..], &leb(10_000_000)].concat()),
        ),
        (
            "a 64-bit table of 2^63",
            table_of(&[&[4][..], &leb(1 << 63)].concat()),
        ),
        ("a hundred memories", {
            handmade::around(&module(&[section(MEMORY, &vector(100, &[0, 1]))]))
        }),
        ("a section twice", {
            handmade::around(&module(&[no_parameters(), no_parameters()]))
        }),
        ("a length in too many bytes", {
            let long = [
                &[TYPE, 0x84, 0x80, 0x80, 0x80, 0x80, 0x00][..],
                &[1, 0x60, 0, 0],
            ];
            handmade::around(&[b"\0asm\x01\0\0\0", &long.concat()[..]].concat())
        }),
    ]
}

/// Types and definitions of the component model.
fn component_bombs() -> Vec<Bomb> {
    let nested = |count: usize| text(&format!("(component {})", "(component)".repeat(count)));
    let inside = "(component ".repeat(90) + &")".repeat(90);
    let fields: Vec<String> = (0..10_000)
        .map(|n| format!("(field \"f{n}\" u8)"))
        .collect();
    let flags: Vec<String> = (0..1_000).map(|n| format!("\"f{n}\"")).collect();
    let deep_type = {
        let types = (1..100).map(|n| format!("(type $t{n} (list $t{}))", n - 1));
        let types: String = types.collect();
        text(&format!("(component (type $t0 (list u8)) {types})"))
    };
    // Each is a tuple of two of the one before: 2^30 leaves.
    let doubling = {
        let types = (1..30).map(|n| format!("(type $t{n} (tuple $t{m} $t{m}))", m = n - 1));
        let types: String = types.collect();
        text(&format!("(component (type $t0 (tuple u8 u8)) {types})"))
    };
    let aliases = {
        let one = "(alias core export $i \"f\" (core func))";
        let all = one.repeat(200_000);
        text(&format!(
            "(component (core module $m (func (export \"f\")))
               (core instance $i (instantiate $m)) {all})"
        ))
    };
    let instances = {
        let all = "(core instance (instantiate $m))".repeat(99_000);
        text(&format!("(component (core module $m) {all})"))
    };
    // A list of fixed length is 0x67, its element and its length (Binary.md, defvaltype).
    let fixed = {
        let list = [&[1, 0x67, 0x7d][..], &leb(1 << 30)].concat();
        [&b"\0asm\x0d\0\x01\0"[..], &section(7, &list)].concat()
    };
    vec![
        ("1,000 components", nested(1_000)),
        ("components in one another", text(&inside)),
        ("a record of 10,000 fields", {
            text(&format!("(component (type (record {})))", fields.join(" ")))
        }),
        (
            "1,000 flags",
            text(&format!("(component (type (flags {})))", flags.join(" "))),
        ),
        ("a type of depth 100", deep_type),
        ("a type of 2^30 leaves", doubling),
        ("200,000 aliases", aliases),
        ("99,000 instances", instances),
        ("a list of 2^30 elements", fixed),
    ]
}

/// So many times the same pieces in one function: what opens, what is inside, what closes.
fn nested(count: usize, opens: &[u8], inside: &[u8], closes: &[u8]) -> Vec<u8> {
    let code = [&opens.repeat(count)[..], inside, &closes.repeat(count)].concat();
    functions(1, &code)
}

/// 2,000 loops in one another over 5,000 variables: every loop has a value of each.
fn variables() -> Vec<u8> {
    const I64: u8 = 0x7e;
    let get = |index: usize| [&[0x20][..], &leb(index)].concat();
    let mut code = [0x03, 0x40].repeat(2_000);
    for index in 0..5_000 {
        // local.get, + 1, local.set of another.
        let to = leb(index * 3 % 5_000);
        code.extend([&get(index)[..], &[0x42, 1, 0x7c, 0x21], &to].concat());
    }
    for index in 0..2_000 {
        // local.get, i32.wrap_i64, br_if 0, end.
        code.extend([&get(index)[..], &[0xa7, 0x0d, 0, END]].concat());
    }
    let inside = [&[1][..], &leb(5_000), &[I64], &code, &[END]].concat();
    let code = [vec![1], leb(inside.len()), inside].concat();
    handmade::around(&module(&[
        no_parameters(),
        section(FUNCTION, &vector(1, &[0])),
        section(CODE, &code),
    ]))
}

/// Within all caps, and not compiled within the time and memory that a host has for it.
pub(crate) fn endless_bombs() -> Vec<Bomb> {
    let mut bombs = vec![("60 kB of loops over variables", variables())];
    if std::env::var_os("INSULA_TEST_BOMBS").is_some_and(|which| which == "all") {
        let arm = [0x41, 0, 0x04, 0x40, 0x01, 0x05];
        let whole = [&arm[..], &[0x01, END]].concat();
        bombs.extend([
            (
                "1 MB of ifs in one another",
                nested(149_000, &arm, &[], &[END]),
            ),
            (
                "1 MB of ifs one after another",
                nested(130_000, &whole, &[], &[]),
            ),
            ("60 MB of stores", functions(58, &STORE.repeat(149_000))),
        ]);
    }
    bombs
}

/// Honest in everything but size: they have a handler, so that whatever is compiled is kept.
fn served_bombs() -> Vec<Bomb> {
    let store = "(i32.store (i32.const 0) (i32.const 0))";
    let large = format!("(func {})", store.repeat(100_000));
    let status = "(func $status (result i32) i32.const 200)";
    let parts = format!("{status} {}", large.repeat(8));
    let many = format!(
        "{status} {}",
        "(func (drop (i32.load (i32.const 0))))".repeat(50_000)
    );
    vec![
        (
            "a handler, and 8 functions of 700 kB",
            handmade::answering(1, &parts),
        ),
        (
            "a handler, and 50,000 functions",
            handmade::answering(1, &many),
        ),
    ]
}

/// What the children of a host took at most, looked at all the time.
#[derive(Default)]
struct Children {
    stop: AtomicBool,
}

impl Children {
    /// The data process is no compiler.
    fn watch(&self, [pid, data]: [u32; 2]) -> u64 {
        let mut peak = 0;
        while !self.stop.load(Ordering::Relaxed) {
            for child in proc::children_of(pid)
                .into_iter()
                .filter(|pid| *pid != data)
            {
                peak = peak.max(status_kib(child, "VmHWM") * 1024);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        peak
    }
}

/// The first word of a field of `/proc/PID/status`.
fn status_word(pid: u32, field: &str) -> Option<String> {
    let value = proc::status(pid, field)?;
    value.split_whitespace().next().map(str::to_owned)
}

fn status_kib(pid: u32, field: &str) -> u64 {
    let number = status_word(pid, field).and_then(|word| word.parse().ok());
    number.unwrap_or(0)
}

/// Uploads a bomb; says what it cost.
fn explode(host: &TestHost, service: &Service, (name, bytes): Bomb) -> (u16, u64) {
    let pids = host.pids();
    // The host's peak begins anew (proc(5), clear_refs).
    for pid in pids {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("proc(5)");
    }
    let (cpu, rss) = (host.cpu_seconds(), host.rss_bytes());
    let children = Children::default();
    let size = bytes.len();
    let path = format!("{}/versions", service.path());
    let upload = host.admin().upload(&path, bytes).patience(PATIENCE);
    let (answer, peak) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| children.watch(pids));
        let answer = upload.send();
        children.stop.store(true, Ordering::Relaxed);
        (answer, watching.join().expect("a watcher"))
    });
    let cpu = host.cpu_seconds() - cpu;
    let peaks = pids.map(|pid| status_kib(pid, "VmHWM") * 1024);
    let grown = peaks.iter().sum::<u64>().saturating_sub(rss);
    let code = if answer.status < 300 {
        String::new()
    } else {
        answer.problem()
    };
    eprintln!(
        "{name} ({} kB): {} {code}, {cpu:.2} s of CPU, child {} MiB, host + {} MiB",
        size / 1_000,
        answer.status,
        peak / MIB,
        grown / MIB
    );
    let status = answer.status;
    let refused = (400..500).contains(&status);
    assert!(refused || status == 201, "{name}: {answer:?}");
    assert!(answer.body.len() < 8_192, "{name}: {answer:?}");
    assert!(cpu < CPU_MAX, "{name}: {cpu} s");
    assert!(peak < CHILD_MEMORY_MAX, "{name}: {} MiB", peak / MIB);
    assert!(grown <= HOST_GROWTH_MAX, "{name}: {} MiB", grown / MIB);
    (status, peak)
}

fn explode_all(bombs: Vec<Bomb>, expected: &[(u16, usize)]) {
    let host = TestHost::start();
    let hello = host.tenant("well").create().deploy("hello");
    let service = host.tenant("left").create().service("bad").create();
    let (mut statuses, mut seen) = (BTreeMap::<u16, usize>::new(), 0);
    for bomb in bombs {
        let (status, peak) = explode(&host, &service, bomb);
        *statuses.entry(status).or_default() += 1;
        seen = seen.max(peak);
        assert_eq!(hello.get("/").send().status, 200);
    }
    assert!(seen > 0, "no compiler was seen at work");
    for (status, at_least) in expected {
        let is = statuses.get(status).copied().unwrap_or(0);
        assert!(is >= *at_least, "{statuses:?}");
    }
    assert!(host.files("tmp").is_empty(), "{:?}", host.files("tmp"));
    let said = host.said();
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn modules_that_are_bombs_cost_little() {
    explode_all(core_bombs(), &[(422, 25)]);
}

#[test]
fn a_compilation_without_end_is_ended() {
    explode_all(endless_bombs(), &[(422, 1)]);
}

#[test]
fn components_that_are_bombs_cost_little() {
    explode_all(component_bombs(), &[(422, 8)]);
}

#[test]
fn a_service_with_much_code_costs_the_host_little() {
    explode_all(served_bombs(), &[(201, 1)]);
}

#[test]
fn an_upload_that_is_packed_a_thousandfold_is_refused_unread() {
    let host = TestHost::start();
    let service = host.tenant("left").create().service("bad").create();
    let path = format!("{}/versions", service.path());
    let packed = b"\x1f\x8b\x08\0\0\0\0\0\0\x03".repeat(100);
    let upload = host.admin().upload(&path, packed);
    let answer = upload.header("content-encoding", "gzip").send();
    let told = (answer.status, answer.problem());
    assert_eq!(told, (415, "unsupported_media_type".to_owned()));
}

/// A compiler that has shut itself in, and reads or compiles.
fn compiler_of([control, data]: [u32; 2]) -> u32 {
    until(Duration::from_secs(10), "a compiler reads", || {
        let mut children = proc::children_of(control).into_iter();
        let filtered = |pid: &u32| status_word(*pid, "Seccomp").as_deref() == Some("2");
        let compiler = children.find(|pid| *pid != data && filtered(pid));
        compiler.ok_or_else(|| "none".to_owned())
    })
}

/// Uploads what is compiled without end, and shows the compiler meanwhile; what the uploader heard.
fn beside_a_compiler(host: &TestHost, look: impl FnOnce(u32)) -> Result<Answer, Broken> {
    let service = host.tenant("left").create().service("bad").create();
    let path = format!("{}/versions", service.path());
    let (_, bytes) = endless_bombs().remove(0);
    std::thread::scope(|scope| {
        let upload = host.admin().upload(&path, bytes).patience(PATIENCE);
        let uploading = scope.spawn(|| upload.try_send());
        look(compiler_of(host.pids()));
        uploading.join().expect("an upload")
    })
}

#[test]
fn a_compiler_is_shut_in() {
    let host = TestHost::start();
    let answer = beside_a_compiler(&host, |compiler| {
        let word = |field| status_word(compiler, field).expect("it compiles");
        assert_eq!(word("NoNewPrivs"), "1");
        // Without root it has the user of control, who may look at nothing of it.
        if status_word(host.pid(), "Uid").as_deref() == Some("0") {
            assert_ne!(word("Uid"), "0");
            assert_ne!(word("Gid"), "0");
            assert_eq!(word("CapEff"), "0000000000000000");
            let open = fs::read_dir(format!("/proc/{compiler}/fd")).expect("proc(5)");
            assert_eq!(open.count(), 3, "input, output, errors");
        } else {
            eprintln!("skipped: an own user, since this is not root");
        }
    });
    assert_eq!(answer.expect("an answer").status, 422);
}

#[test]
fn a_compiler_ends_with_its_host() {
    let host = TestHost::start();
    let answer = beside_a_compiler(&host, |compiler| {
        host.kill();
        until(Duration::from_secs(2), "the compiler is gone", || {
            holds(!proc::runs(compiler), "it runs")
        });
    });
    assert!(answer.is_err());
}
