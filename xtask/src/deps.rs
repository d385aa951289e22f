//! Which crate may use which, and which crate's name may stand where: the table of the design.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::repository::Repository;

/// What a package of ours may depend on, of ours.
enum May {
    Only(&'static [&'static str]),
    Anything,
}

/// Edges run downward only; siblings do not know each other.
const TABLE: [(&str, May); 13] = [
    ("insula-types", May::Only(&[])),
    ("insula-scheduler", May::Only(&["insula-types"])),
    ("insula-metrics", May::Only(&["insula-types"])),
    ("insula-vmm", May::Only(&["insula-types"])),
    (
        "insula-host",
        May::Only(&[
            "insula-types",
            "insula-scheduler",
            "insula-metrics",
            "insula-vmm",
        ]),
    ),
    ("insula-toolchain", May::Only(&[])),
    (
        "insula",
        May::Only(&["insula-host", "insula-types", "insula-toolchain"]),
    ),
    ("insula-sdk-macros", May::Only(&[])),
    ("insula-sdk", May::Only(&["insula-sdk-macros"])),
    ("insula-tests", May::Anything),
    ("insula-bench", May::Anything),
    ("xtask", May::Only(&["insula-toolchain"])),
    // Fuzz targets and the like hang below the crate that they belong to.
    ("insula-fuzz", May::Anything),
];

/// A crate of others that may be named in few places only.
struct Fenced {
    /// The roots of its paths in source.
    roots: &'static [&'static str],
    /// Where they may stand, relative to the repository.
    homes: &'static [&'static str],
}

const FENCED: [Fenced; 5] = [
    Fenced {
        roots: &["wasmtime", "wasmtime_wasi", "wasmtime_wasi_http"],
        homes: &["host/src/engine"],
    },
    Fenced {
        roots: &["hyper", "hyper_util"],
        homes: &[
            "host/src/ingress",
            "host/src/control",
            "host/src/outbound",
            "cli/src/client.rs",
            "cli/src/client",
        ],
    },
    Fenced {
        roots: &["redb"],
        homes: &["host/src/storage/stores"],
    },
    Fenced {
        roots: &["rusqlite"],
        homes: &["host/src/state"],
    },
    Fenced {
        roots: &["rustls", "tokio_rustls", "rustls_native_certs"],
        homes: &[
            "host/src/tls.rs",
            "host/src/outbound/tls.rs",
            "host/src/process/inquest.rs",
            "cli/src/tls.rs",
        ],
    },
];

/// Tests and measurements may look behind every door; and this program names what it looks for.
const UNFENCED: [&str; 3] = ["tests", "bench", "xtask"];

/// Where the state's and the tenants' files are touched: through an opened directory only.
const NO_AMBIENT_FILES: [&str; 2] = ["host/src/state", "host/src/storage"];

/// Opens that directory: the only place there that knows a path of the system.
const AMBIENT_HOME: &str = "host/src/state/dir.rs";

/// Compiled for tests only.
const TEST_MODULE: &str = "host/src/state/specification";

/// All that is not as the table has it, a line each.
pub(crate) fn violations(repository: &Repository) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for package in &repository.packages {
        edges(package, &repository.packages, &mut found);
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let Some(dir) = Path::new(manifest).parent() else {
            continue;
        };
        for file in sources(dir)? {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let path = file.strip_prefix(&repository.root).unwrap_or(&file);
            words(path, &text, &mut found);
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn edges(package: &Value, ours: &[Value], found: &mut Vec<String>) {
    let name = package["name"].as_str().unwrap_or_default();
    let Some((_, may)) = TABLE.iter().find(|(known, _)| *known == name) else {
        found.push(format!("{name}: not in the table of xtask/src/deps.rs"));
        return;
    };
    let May::Only(allowed) = may else { return };
    let is_ours = |name: &str| ours.iter().any(|package| package["name"] == *name);
    let dependencies = package["dependencies"].as_array().into_iter().flatten();
    for dependency in dependencies.filter_map(|dependency| dependency["name"].as_str()) {
        if is_ours(dependency) && !allowed.contains(&dependency) {
            found.push(format!("{name} → {dependency}: no such edge in the table"));
        }
    }
}

fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                let nested = folder != dir && path.join("Cargo.toml").exists();
                if name != "target" && name != "template" && !name.starts_with('.') && !nested {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn words(path: &Path, text: &str, found: &mut Vec<String>) {
    if UNFENCED.iter().any(|dir| path.starts_with(dir)) {
        return;
    }
    let tests = text.find("\n#[cfg(test)]\nmod tests {");
    let untested = text[..tests.unwrap_or(text.len())].lines().count();
    let inside = NO_AMBIENT_FILES.iter().any(|dir| path.starts_with(dir))
        && path != Path::new(AMBIENT_HOME)
        && !path.ends_with("tests.rs")
        && !path.starts_with(TEST_MODULE);
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        let place = || format!("{}:{}", path.display(), number + 1);
        for fenced in &FENCED {
            let at_home = fenced.homes.iter().any(|home| path.starts_with(home));
            for root in fenced.roots {
                if !at_home && names(code, root) {
                    let homes = fenced.homes.join(", ");
                    found.push(format!("{}: {root} is named only in {homes}", place()));
                }
            }
        }
        if inside && number < untested && opens_paths(code) {
            found.push(format!(
                "{}: files are reached through an opened directory only",
                place()
            ));
        }
    }
}

/// Whether code reaches a file by a path of the system. The type of an open file alone does not.
fn opens_paths(code: &str) -> bool {
    let ambient = [
        "ambient_authority",
        "File::open(",
        "File::create",
        "File::options(",
    ];
    // A file that is open already opens nothing.
    let code = code.replace("cap_std::fs", "");
    let code = code.replace("std::fs::File", "File");
    code.contains("std::fs") || ambient.iter().any(|word| code.contains(word))
}

/// Whether code names a crate: `root::…`, `use root;`, `use root as …`.
fn names(code: &str, root: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    let used = code.trim_start().starts_with("use ") || code.contains("pub use ");
    code.match_indices(root).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + root.len()..]);
        // `::root` is the crate, `crate::root` is a module of ours.
        let before = before.strip_suffix("::").unwrap_or(before);
        let inner = before.ends_with(|c: char| part_of_name(c) || c == '"' || c == '.');
        let path = after.starts_with("::") || (used && after.starts_with([';', ' ']));
        path && !inner
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_is_named_by_a_path_and_not_by_a_word() {
        for code in [
            "use wasmtime::Engine;",
            "let e = wasmtime::Engine::new();",
            "use wasmtime;",
        ] {
            assert!(names(code, "wasmtime"), "{code}");
        }
        for code in [
            "let wasmtime = 1;",
            "version: \"wasmtime::x\"",
            "use wasmtime_wasi::p2;",
            "use crate::wasmtime::x;",
            "wasmtime_version()",
        ] {
            assert!(!names(code, "wasmtime"), "{code}");
        }
    }

    #[test]
    fn fences() {
        let look = |path: &str, text: &str| {
            let mut found = Vec::new();
            words(Path::new(path), text, &mut found);
            found.len()
        };
        assert_eq!(look("host/src/pool/mod.rs", "use wasmtime::Store;\n"), 1);
        assert_eq!(look("host/src/engine/mod.rs", "use wasmtime::Store;\n"), 0);
        assert_eq!(look("tests/src/a.rs", "use wasmtime::Store;\n"), 0);
        assert_eq!(look("host/src/pool/mod.rs", "// wasmtime::Store\n"), 0);
        assert_eq!(look("host/src/state/mod.rs", "std::fs::read(p)?;\n"), 1);
        assert_eq!(look("host/src/state/mod.rs", "File::open(p)?;\n"), 1);
        assert_eq!(look("host/src/state/mod.rs", "use std::fs::File;\n"), 0);
        assert_eq!(look("host/src/state/mod.rs", "use cap_std::fs::Dir;\n"), 0);
        assert_eq!(look(AMBIENT_HOME, "std::fs::read(p)?;\n"), 0);
        let tested = "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
        assert_eq!(look("host/src/state/mod.rs", tested), 0);
    }
}
