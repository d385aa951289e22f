//! `insula new`: a project that builds and answers on the first try.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::args::{NewArgs, Template};
use crate::output;

/// Files of a template: where they go, and what is in them. `{{name}}` stands for the project's
/// name, `{{sdk}}` for the source of the SDK, a value in TOML.
type Files = &'static [(&'static str, &'static str)];

const RUST: Files = &[
    (
        "Cargo.toml",
        include_str!("../template/rust/Cargo.toml.tmpl"),
    ),
    ("src/lib.rs", include_str!("../template/rust/src/lib.rs")),
    ("README.md", include_str!("../template/rust/README.md")),
    (".gitignore", include_str!("../template/rust/.gitignore")),
];

impl Template {
    const fn files(self) -> Files {
        match self {
            Self::Rust => RUST,
        }
    }
}

pub(crate) fn run(args: &NewArgs) -> Result<()> {
    let name = args.name.as_str();
    let sdk = sdk(args.sdk.as_deref())?;
    make(Path::new(name), name, &sdk, args.template.files())?;
    output::note(&format!("made {name}/"));
    output::line(&format!("cd {name} && insula up"))?;
    Ok(())
}

/// Where the checkout that this program was built from has the SDK, if it is still there.
fn checkout() -> Option<PathBuf> {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()?
        .join("guest-sdk");
    sdk.join("Cargo.toml").is_file().then_some(sdk)
}

/// The source of the SDK as a value in TOML.
fn sdk(given: Option<&Path>) -> Result<toml::Value> {
    let dir = match given {
        Some(dir) => {
            let dir = std::path::absolute(dir)?;
            if !dir.join("Cargo.toml").is_file() {
                bail!("--sdk: {} holds no package", dir.display());
            }
            Some(dir)
        }
        None => checkout(),
    };
    let Some(dir) = dir else {
        return Ok(toml::Value::String(env!("CARGO_PKG_VERSION").to_owned()));
    };
    let path = dir
        .to_str()
        .context("the SDK's path is not UTF-8, which Cargo needs")?;
    let mut table = toml::Table::new();
    table.insert("path".to_owned(), toml::Value::String(path.to_owned()));
    Ok(toml::Value::Table(table))
}

fn make(dir: &Path, name: &str, sdk: &toml::Value, files: Files) -> Result<()> {
    // Fails where anything of this name is there already: nothing is overwritten.
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            bail!("{} is there already; nothing was changed", dir.display())
        }
        done => done.with_context(|| dir.display().to_string())?,
    }
    let sdk = sdk.to_string();
    for (path, text) in files {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let text = text.replace("{{name}}", name).replace("{{sdk}}", &sdk);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let project = dir.path().join("shop");
        let sdk = toml::Value::String("0.1.0".to_owned());
        make(&project, "shop", &sdk, Template::Rust.files()).unwrap();
        let manifest = fs::read_to_string(project.join("Cargo.toml")).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        assert_eq!(manifest["package"]["name"].as_str(), Some("shop"));
        assert_eq!(
            manifest["dependencies"]["insula-sdk"].as_str(),
            Some("0.1.0")
        );
        let source = fs::read_to_string(project.join("src/lib.rs")).unwrap();
        assert!(!source.contains("{{"), "{source}");
        assert!(make(&project, "shop", &sdk, Template::Rust.files()).is_err());
    }

    #[test]
    fn a_path_to_the_sdk_survives_toml() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a \"b\" \\c");
        fs::create_dir(&odd).unwrap();
        fs::write(odd.join("Cargo.toml"), "").unwrap();
        let value = sdk(Some(&odd)).unwrap();
        let text = format!("sdk = {value}");
        let read: toml::Table = text.parse().unwrap();
        assert_eq!(read["sdk"]["path"].as_str(), odd.to_str());
        assert!(sdk(Some(&dir.path().join("none"))).is_err());
    }
}
