//! Reading `cargo build --message-format=json…`: one JSON object a line, of
//! which only the artefacts matter here.

use std::path::{Path, PathBuf};

use serde::Deserialize;

#[derive(Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    package_id: String,
    #[serde(default)]
    manifest_path: PathBuf,
    target: Option<Target>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
    #[serde(default)]
    fresh: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// A `.wasm` that cargo made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) package: String,
    pub(crate) manifest: PathBuf,
    pub(crate) target: String,
    pub(crate) path: PathBuf,
    pub(crate) fresh: bool,
}

/// All `.wasm` files of libraries and binaries, in the order they were made.
/// Lines that are no message (a build script's output) are skipped.
pub(crate) fn made(stdout: &str) -> Vec<Made> {
    stdout
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter_map(one)
        .collect()
}

fn one(message: Message) -> Option<Made> {
    if message.reason != "compiler-artifact" {
        return None;
    }
    let target = message.target?;
    if !target
        .kind
        .iter()
        .any(|kind| kind == "cdylib" || kind == "bin")
    {
        return None;
    }
    let wasm = |path: &PathBuf| {
        path.extension()
            .is_some_and(|extension| extension == "wasm")
    };
    let path = message.filenames.into_iter().find(wasm)?;
    Some(Made {
        package: package_name(&message.package_id, &message.manifest_path),
        manifest: message.manifest_path,
        target: target.name,
        path,
        fresh: message.fresh,
    })
}

/// A package id is `path+file:///a/b/name#1.0.0` or `…#name@1.0.0`
/// (The Cargo Book, Package ID Specifications).
fn package_name(id: &str, manifest: &Path) -> String {
    let (source, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    if let Some((name, _version)) = fragment.split_once('@') {
        return name.to_owned();
    }
    let last = source.rsplit('/').next().unwrap_or_default();
    if last.is_empty() {
        let folder = manifest
            .parent()
            .and_then(Path::file_name)
            .unwrap_or_default();
        return folder.to_string_lossy().into_owned();
    }
    last.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = r#"{"reason":"compiler-artifact","package_id":"path+file:///p/samples/hello#0.1.0","manifest_path":"/p/samples/hello/Cargo.toml","target":{"kind":["cdylib"],"crate_types":["cdylib"],"name":"hello","src_path":"/p/samples/hello/src/lib.rs"},"profile":{},"features":[],"filenames":["/p/t/wasm32-wasip2/release/hello.wasm"],"executable":null,"fresh":true}"#;
    const RLIB: &str = r#"{"reason":"compiler-artifact","package_id":"registry+https://r/#http@1.0.0","manifest_path":"/r/http/Cargo.toml","target":{"kind":["lib"],"name":"http"},"filenames":["/p/t/libhttp.rlib"],"fresh":true}"#;

    #[test]
    fn components_are_picked_out() {
        let finished = r#"{"reason":"build-finished","success":true}"#;
        let made = made(&format!("noise\n{RLIB}\n{LIBRARY}\n{finished}\n"));
        assert_eq!(
            made,
            [Made {
                package: "hello".into(),
                manifest: "/p/samples/hello/Cargo.toml".into(),
                target: "hello".into(),
                path: "/p/t/wasm32-wasip2/release/hello.wasm".into(),
                fresh: true,
            }]
        );
    }

    #[test]
    fn package_ids_in_all_their_forms() {
        let manifest = Path::new("/a/b/Cargo.toml");
        assert_eq!(
            package_name("path+file:///a/b#other@0.1.0", manifest),
            "other"
        );
        assert_eq!(package_name("path+file:///a/b#0.1.0", manifest), "b");
        assert_eq!(package_name("", manifest), "b");
    }
}
