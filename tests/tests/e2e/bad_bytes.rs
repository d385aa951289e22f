//! Bytes that are no component: a 4xx problem that says what was wrong, nothing stored, and a
//! host that is unharmed.

use std::path::PathBuf;
use std::time::Duration;

use insula_tests::wait::holds;
use insula_tests::{Service, TestHost, guests, until};
use serde_json::json;

/// A host, a service that has nothing yet, and the files of another one that answers.
struct Target {
    host: TestHost,
    bad: Service,
    hello: Service,
    files: Vec<PathBuf>,
}

fn stored(host: &TestHost) -> Vec<PathBuf> {
    ["blobs", "artefacts", "tmp"]
        .iter()
        .flat_map(|folder| host.files(folder))
        .collect()
}

impl Target {
    fn start() -> Self {
        let host = TestHost::start();
        let bad = host.tenant("a").create().service("bad").create();
        let hello = host.tenant("b").create().deploy("hello");
        assert_eq!(hello.get("/").send().status, 200);
        let files = stored(&host);
        Self {
            host,
            bad,
            hello,
            files,
        }
    }

    /// Uploads and expects a refusal; gives its code and its words.
    fn refuses(&self, name: &str, bytes: Vec<u8>) -> (String, String) {
        let answer = self.bad.upload(bytes);
        let status = answer.status;
        assert!(
            (400..500).contains(&status),
            "{name}: {status} {}",
            answer.text()
        );
        let (code, words) = (answer.problem(), answer.problem_words());
        assert!(
            words.len() < 4_096,
            "{name}: {} bytes of words",
            words.len()
        );
        self.holds_nothing(name);
        (code, words)
    }

    fn holds_nothing(&self, name: &str) {
        let versions = self
            .host
            .admin()
            .get(&format!("{}/versions", self.bad.path()));
        assert_eq!(versions["items"], json!([]), "{name}");
        assert_eq!(stored(&self.host), self.files, "{name}");
    }

    fn is_well(&self) {
        assert_eq!(self.hello.get("/").send().status, 200);
        let said = self.host.said();
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn what_is_no_component_is_told_what_it_is() {
    let target = Target::start();
    let wat = |text: &str| wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"));
    let mut gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03".to_vec();
    gzip.extend(guests::bytes("hello"));
    let mut damaged = guests::bytes("hello");
    let middle = damaged.len() / 2;
    for byte in &mut damaged[middle..middle + 64] {
        *byte = !*byte;
    }
    let mut trailing = guests::bytes("hello");
    trailing.extend([0xff; 100]);
    let huge_memory = "(component (core module (memory 65536)))";
    let many_memories = format!("(component (core module {}))", "(memory 1)".repeat(100));
    let runs = r#"(component
        (core module $m (func (export "run") (result i32) i32.const 0))
        (core instance $i (instantiate $m))
        (func $run (result (result)) (canon lift (core func $i "run")))
        (instance $run (export "run" (func $run)))
        (export "wasi:cli/run@0.2.0" (instance $run)))"#;
    let imports = r#"(component
        (import "evil:backdoor/shell@1.0.0" (instance $i (export "exec" (func (param "c" string)))))
        (core module $m (func (export "run") (result i32) i32.const 0))
        (core instance $i (instantiate $m))
        (func $run (result (result)) (canon lift (core func $i "run")))
        (instance $run (export "run" (func $run)))
        (export "wasi:http/incoming-handler@0.2.0" (instance $run)))"#;
    let cases: Vec<(&str, Vec<u8>, &[&str], &str)> = vec![
        ("nothing", Vec::new(), &["invalid_component"], "empty"),
        (
            "text",
            b"Hello, I am a component!\n".to_vec(),
            &["invalid_component"],
            "not a WebAssembly",
        ),
        (
            "its text format",
            b"(component)".to_vec(),
            &["invalid_component"],
            "wasm-tools parse",
        ),
        ("gzip", gzip, &["invalid_component"], "gzip"),
        (
            "an ELF file",
            b"\x7fELF\x02\x01\x01\0".to_vec(),
            &["invalid_component"],
            "not a WebAssembly",
        ),
        (
            "the magic alone",
            b"\0asm".to_vec(),
            &["invalid_component"],
            "malformed",
        ),
        (
            "a core module",
            wat("(module)"),
            &["invalid_component"],
            "core module",
        ),
        (
            "damage in the middle",
            damaged,
            &["invalid_component", "too_complex"],
            "",
        ),
        ("more after the end", trailing, &["invalid_component"], ""),
        (
            "an empty component",
            wat("(component)"),
            &["wrong_world"],
            "incoming-handler",
        ),
        ("a command", wat(runs), &["wrong_world"], "wasi:cli/run"),
        (
            "a foreign import",
            wat(imports),
            &["unsupported_import", "wrong_world"],
            "",
        ),
        (
            "4 GiB of memory",
            wat(huge_memory),
            &["too_complex"],
            "memory",
        ),
        (
            "a hundred memories",
            wat(&many_memories),
            &["invalid_component", "too_complex", "wrong_world"],
            "",
        ),
    ];
    for (name, bytes, codes, word) in cases {
        let (code, words) = target.refuses(name, bytes);
        assert!(codes.contains(&code.as_str()), "{name}: {code}: {words}");
        assert!(
            words.to_lowercase().contains(&word.to_lowercase()),
            "{name}: {code}: {words}"
        );
    }
    target.is_well();
}

#[test]
fn a_component_cut_off_anywhere_is_refused() {
    let target = Target::start();
    let whole = guests::bytes("hello");
    for percent in 0..100 {
        let name = format!("{percent} % of a component");
        let cut = whole[..whole.len() * percent / 100].to_vec();
        let (code, words) = target.refuses(&name, cut);
        let codes = ["invalid_component", "wrong_world", "too_complex"];
        assert!(codes.contains(&code.as_str()), "{name}: {code}: {words}");
    }
    // The very last byte counts.
    let _ = target.refuses("all but one byte", whole[..whole.len() - 1].to_vec());
    let upload = target.bad.upload(whole);
    assert_eq!(upload.status, 201, "{}", upload.text());
    assert_eq!(
        upload.json()["version"],
        1,
        "refused uploads have no number"
    );
    target.is_well();
}

#[test]
fn a_hundred_mebibytes_of_zeros_are_refused_and_cost_no_memory() {
    let target = Target::start();
    let before = target.host.rss_bytes();
    let zeros = vec![0; 100 << 20];
    let (code, _) = target.refuses("zeros, declared", zeros.clone());
    assert_eq!(code, "too_large");
    let path = format!("{}/versions", target.bad.path());
    let chunked = target
        .host
        .admin()
        .request("POST", &path)
        .header("content-type", "application/wasm")
        .chunks(zeros.chunks(64 << 10))
        .try_send();
    // The host may close before the client has said all.
    if let Ok(answer) = chunked {
        assert_eq!(
            (answer.status, answer.problem().as_str()),
            (413, "too_large")
        );
    }
    target.holds_nothing("zeros, in chunks");
    // What is just within the bound is read, and is no component either.
    let (code, _) = target.refuses("60 MiB of zeros", vec![0; 60 << 20]);
    assert_eq!(code, "invalid_component");
    let grown = target.host.rss_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "{} MiB more", grown >> 20);
    target.is_well();
}

#[test]
fn compile_bombs_are_refused_within_limits() {
    let target = Target::start();
    let module = |inside: &str| {
        let text = format!("(component (core module {inside}))");
        wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
    };
    let locals = format!("(func (local {}))", "v128 ".repeat(50_000));
    let functions = "(func)".repeat(70_000);
    let types = "(type (func))".repeat(20_000);
    let data = format!("(memory 1) {}", "(data (i32.const 0) \"x\")".repeat(20_000));
    let deep = format!(
        "(func {} {})",
        "block ".repeat(10_000),
        "end ".repeat(10_000)
    );
    let table = "(table 10000001 funcref)".to_owned();
    let branches = format!(
        "(func block (br_table {} (i32.const 0)) end)",
        "0 ".repeat(600_000)
    );
    for (name, inside) in [
        ("50,000 locals", &locals),
        ("70,000 functions", &functions),
        ("20,000 types", &types),
        ("20,000 data segments", &data),
        ("10,000 nested blocks", &deep),
        ("a table of 10 M", &table),
        ("a br_table of 600,000", &branches),
    ] {
        let (code, words) = target.refuses(name, module(inside));
        // Without a handler none of them is a service; what matters is that none costs much.
        let codes = [
            "too_complex",
            "wrong_world",
            "compile_limit",
            "invalid_component",
        ];
        assert!(codes.contains(&code.as_str()), "{name}: {code}: {words}");
        target.is_well();
    }
}

#[test]
fn an_upload_that_breaks_off_leaves_nothing() {
    let target = Target::start();
    let component = guests::bytes("hello");
    let path = format!("{}/versions", target.bad.path());
    let cuts = [0, 1, component.len() / 2, component.len() - 1];
    for cut in cuts {
        let request = target.host.admin().upload(&path, component.clone());
        let mut connection = request.connect().expect("a connection");
        let head = request.head_bytes();
        connection
            .raw(&[&head[..], &component[..cut]].concat())
            .expect("sent");
        drop(connection);
    }
    until(Duration::from_secs(20), "all have ended", || {
        let said = target.host.said();
        let ended = said.matches("result=\"body_incomplete\"").count();
        holds(ended == cuts.len(), format!("{ended} of {}", cuts.len()))
    });
    target.holds_nothing("broken off");
    let upload = target.bad.upload(component);
    assert_eq!(upload.status, 201, "{}", upload.text());
    target.is_well();
}
