//! The samples, built by `cargo xtask guests`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::tools;

/// The root of the repository.
///
/// # Panics
/// When this crate is not where it was built.
#[must_use]
pub fn repository() -> &'static Path {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.expect("tests/ lies in the repository")
}

/// Where cargo puts what it builds: the test binary lies in `<target>/<profile>/deps`.
fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a test has a path");
    let deps = exe.parent().and_then(Path::parent);
    deps.expect("a test lies in <target>/<profile>/deps")
        .to_owned()
}

/// The host's binary: `INSULA_TEST_BIN`, or what lies beside this test.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn insula() -> PathBuf {
    let named = std::env::var_os("INSULA_TEST_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| profile_dir().join("insula"));
    assert!(
        path.is_file(),
        "{} is not there: build it with `cargo build --release --bin insula`",
        path.display()
    );
    path
}

/// A copy of the host's binary that is of another engine: where the engine's version stands in it,
/// there is another one. Answers that version.
///
/// # Panics
/// When it cannot be made.
pub fn another_engine(version: &str, copy: &Path) -> String {
    let mut program = fs::read(insula()).expect("a program");
    let (version, mut places) = (version.as_bytes(), 0);
    let (last, rest) = version.split_last().expect("a version");
    let other = [rest, &[if *last == b'9' { b'1' } else { b'9' }]].concat();
    let mut at = 0;
    while let Some(next) = program[at..].iter().position(|byte| *byte == version[0]) {
        at += next;
        if program[at..].starts_with(version) {
            program[at..][..version.len()].copy_from_slice(&other);
            places += 1;
        }
        at += 1;
    }
    assert!(places > 0, "the program has no version of an engine in it");
    tools::executable(copy, program);
    String::from_utf8(other).expect("digits")
}

/// Where a sample's component lies.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn path(name: &str) -> PathBuf {
    let dir = std::env::var_os("INSULA_TEST_GUESTS").map(PathBuf::from);
    let target = || {
        profile_dir()
            .parent()
            .expect("a target directory")
            .to_owned()
    };
    let path = dir
        .unwrap_or_else(|| target().join("guests"))
        .join(format!("{name}.wasm"));
    assert!(
        path.is_file(),
        "{} is not there: build the guests with `cargo xtask guests`",
        path.display()
    );
    path
}

/// A sample's component.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn bytes(name: &str) -> Vec<u8> {
    let path = path(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
