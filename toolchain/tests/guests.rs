//! Builds guests of `samples/` with the toolchain that is there, and looks into
//! what comes out. Says so and does nothing on a machine that is not ready:
//! preparing one belongs to `cargo xtask`, not to a test.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};

use insula_toolchain::{
    Artefact, BuildError, BuildOptions, LineProgress, Probe, Readiness, Settings, Silent, Toolchain,
};
use wasmparser::{Operator, Parser, Payload};

/// The size that the smallest guest may have.
const HELLO_LIMIT_BYTES: u64 = 160 * 1024;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The toolchain, if nothing has to be installed for it.
fn ready() -> Option<Toolchain> {
    let settings = Settings::from_env(&repository());
    let probe = Probe::look(&settings);
    if !matches!(probe.readiness, Readiness::Ready(_)) {
        let _ = writeln!(
            stderr(),
            "skipped: no wasm toolchain yet ({})",
            probe.readiness
        );
        return None;
    }
    Some(Toolchain::find_with(&settings, &mut Silent).unwrap())
}

fn build(toolchain: &Toolchain, sample: &str) -> Artefact {
    let dir = repository().join("samples").join(sample);
    let options = BuildOptions {
        locked: true,
        ..BuildOptions::default()
    };
    toolchain
        .build(&dir, &options, &mut LineProgress::new(stderr()))
        .unwrap()
}

/// The packages (`wasi:http`) from which a component imports.
fn imported_packages(component: &[u8]) -> BTreeSet<String> {
    let mut depth = 0_u32;
    let mut packages = BTreeSet::new();
    for payload in Parser::new(0).parse_all(component) {
        match payload.unwrap() {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    let name = import.unwrap().name.name;
                    packages.insert(name.split('/').next().unwrap_or(name).to_owned());
                }
            }
            _ => {}
        }
    }
    packages
}

fn has_operator(component: &[u8], wanted: impl Fn(&Operator<'_>) -> bool) -> bool {
    Parser::new(0)
        .parse_all(component)
        .any(|payload| match payload.unwrap() {
            Payload::CodeSectionEntry(body) => body
                .get_operators_reader()
                .unwrap()
                .into_iter()
                .any(|operator| wanted(&operator.unwrap())),
            _ => false,
        })
}

#[test]
fn hello_is_small_and_imports_only_wasi() {
    let Some(toolchain) = ready() else { return };
    let hello = build(&toolchain, "hello");
    assert_eq!(hello.package, "hello");
    assert!(
        hello.size_bytes <= HELLO_LIMIT_BYTES,
        "{} bytes",
        hello.size_bytes
    );
    let packages = imported_packages(&fs::read(&hello.path).unwrap());
    assert!(!packages.is_empty());
    assert!(
        packages.iter().all(|package| package.starts_with("wasi:")),
        "{packages:?}"
    );
}

#[test]
fn only_who_asks_for_usage_imports_it() {
    let Some(toolchain) = ready() else { return };
    let packages = imported_packages(&fs::read(build(&toolchain, "echo").path).unwrap());
    assert!(packages.contains("insula:guest"), "{packages:?}");
}

#[test]
fn fill_really_fills_in_one_instruction() {
    let Some(toolchain) = ready() else { return };
    let component = fs::read(build(&toolchain, "hostile/fill").path).unwrap();
    assert!(has_operator(&component, |operator| matches!(
        operator,
        Operator::MemoryFill { .. }
    )));
}

#[test]
fn a_project_that_does_not_compile_says_why() {
    let Some(toolchain) = ready() else { return };
    let project = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(project.path().join(name), text).unwrap();
    fs::create_dir(project.path().join("src")).unwrap();
    write(
        "Cargo.toml",
        "[package]\nname = \"broken\"\nedition = \"2024\"\n[workspace]\n",
    );
    write("src/lib.rs", "pub fn broken() -> u8 { \"text\" }\n");
    let build = || toolchain.build(project.path(), &BuildOptions::default(), &mut Silent);
    let error = build().unwrap_err();
    assert!(
        error.to_string().contains("expected `u8`, found `&str`"),
        "{error}"
    );

    write("src/lib.rs", "");
    assert!(matches!(build(), Err(BuildError::NoComponent(_))));

    let nowhere = project.path().join("src");
    let error = toolchain
        .build(&nowhere, &BuildOptions::default(), &mut Silent)
        .unwrap_err();
    assert!(matches!(error, BuildError::NoManifest(_)));
}
