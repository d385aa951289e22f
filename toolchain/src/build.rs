//! Building a project with a toolchain that was found.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::BuildError;
use crate::find::Toolchain;
use crate::messages::{self, Made};
use crate::process::{self, Event};
use crate::progress::Progress;
use crate::{Source, TARGET};

/// A guest that takes longer than this to compile is stuck.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// Variables that a calling cargo, or a user's settings for native builds, may
/// have left behind, and that would break or bend a guest's build. A guest's own
/// flags belong into its `.cargo/config.toml` or
/// `CARGO_TARGET_WASM32_WASIP2_RUSTFLAGS`.
pub(crate) const FOREIGN_VARIABLES: [&str; 4] = [
    "RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_RUSTFLAGS",
    "RUSTC_WORKSPACE_WRAPPER",
];

/// Which of cargo's profiles to build with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Profile {
    /// What is deployed.
    #[default]
    Release,
    /// Quicker to build, slower and bigger.
    Dev,
    /// One of the project's own.
    Named(String),
}

/// How to build. The default is a plain `cargo build --release`.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// The profile.
    pub profile: Profile,
    /// `--locked`: the lock file must be there and fit.
    pub locked: bool,
    /// `--offline`: nothing is downloaded.
    pub offline: bool,
    /// `--package`: one of a workspace's packages.
    pub package: Option<String>,
    /// `--target-dir`: where cargo puts what it makes; the project's own choice
    /// when absent.
    pub target_dir: Option<PathBuf>,
    /// `--features`.
    pub features: Vec<String>,
}

/// A component that was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artefact {
    /// The `.wasm` file.
    pub path: PathBuf,
    /// The cargo package that it came from.
    pub package: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whether it was there already and nothing had to be compiled.
    pub fresh: bool,
}

impl Toolchain {
    /// Builds the one component of the package in `project_dir`, or of
    /// [`BuildOptions::package`].
    ///
    /// # Errors
    /// When cargo fails (its words are in the error), or when what it made is
    /// not exactly one component.
    pub fn build(
        &self,
        project_dir: &Path,
        options: &BuildOptions,
        progress: &mut dyn Progress,
    ) -> Result<Artefact, BuildError> {
        let mut made = self.cargo_build(project_dir, options, &[], progress)?;
        // A package's dependencies in the same workspace may make components too.
        let manifest = project_dir.canonicalize().map(|dir| dir.join("Cargo.toml"));
        if let (Ok(manifest), None) = (manifest, &options.package)
            && made.iter().any(|one| one.manifest == manifest)
        {
            made.retain(|one| one.manifest == manifest);
        }
        if let Some(package) = &options.package {
            made.retain(|one| one.package == *package);
        }
        if made.len() > 1 {
            let names = made.into_iter().map(|one| one.target).collect();
            return Err(BuildError::Ambiguous {
                project: project_dir.to_path_buf(),
                names,
            });
        }
        match made.pop() {
            Some(one) => artefact(one),
            None => Err(BuildError::NoComponent(project_dir.to_path_buf())),
        }
    }

    /// Builds all components of the workspace in `workspace_dir` in one run.
    ///
    /// # Errors
    /// As [`Toolchain::build`].
    pub fn build_workspace(
        &self,
        workspace_dir: &Path,
        options: &BuildOptions,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Artefact>, BuildError> {
        let made = self.cargo_build(workspace_dir, options, &["--workspace"], progress)?;
        if made.is_empty() {
            return Err(BuildError::NoComponent(workspace_dir.to_path_buf()));
        }
        let mut artefacts: Vec<Artefact> =
            made.into_iter().map(artefact).collect::<Result<_, _>>()?;
        artefacts.sort_by(|a, b| a.package.cmp(&b.package));
        Ok(artefacts)
    }

    /// The cargo command that builds for the target with this toolchain, without
    /// arguments: for those who want `cargo clippy` or `cargo test` instead.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        for name in FOREIGN_VARIABLES {
            command.env_remove(name);
        }
        command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        if matches!(self.source, Source::Unpacked(_)) {
            // A wrapper set for the native compiler (clippy-driver, sccache) does
            // not know the other one.
            command.env_remove("RUSTC_WRAPPER");
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    fn cargo_build(
        &self,
        dir: &Path,
        options: &BuildOptions,
        extra: &[&str],
        progress: &mut dyn Progress,
    ) -> Result<Vec<Made>, BuildError> {
        if !dir.join("Cargo.toml").is_file() {
            return Err(BuildError::NoManifest(dir.to_path_buf()));
        }
        progress.step(&format!(
            "Building {} for {TARGET} ({})",
            dir.display(),
            self.rustc_version
        ));
        let mut command = self.cargo();
        command
            .current_dir(dir)
            .args(arguments(options, progress.colour()))
            .args(extra);
        let mut doing = String::from("cargo build");
        let finished = process::run(&mut command, BUILD_LIMIT, |event| match event {
            Event::Line(line) => {
                progress.output(line);
                if let Some((_, rest)) = line.split_once("Compiling ") {
                    doing = format!("compiling {rest}");
                }
            }
            Event::Tick(elapsed) => progress.tick(&doing, elapsed),
        })
        .map_err(BuildError::Start)?;
        if !finished.success() {
            let status = finished.ending_text();
            return Err(BuildError::Cargo {
                status,
                stderr: finished.stderr,
            });
        }
        Ok(messages::made(&finished.stdout))
    }
}

fn arguments(options: &BuildOptions, colour: bool) -> Vec<String> {
    let mut arguments = vec![
        "build".to_owned(),
        format!("--target={TARGET}"),
        "--message-format=json-render-diagnostics".to_owned(),
        format!("--color={}", if colour { "always" } else { "never" }),
    ];
    match &options.profile {
        Profile::Release => arguments.push("--release".to_owned()),
        Profile::Dev => {}
        Profile::Named(name) => arguments.push(format!("--profile={name}")),
    }
    if options.locked {
        arguments.push("--locked".to_owned());
    }
    if options.offline {
        arguments.push("--offline".to_owned());
    }
    if let Some(package) = &options.package {
        arguments.push(format!("--package={package}"));
    }
    if let Some(dir) = &options.target_dir {
        arguments.extend(["--target-dir".to_owned(), dir.display().to_string()]);
    }
    if !options.features.is_empty() {
        arguments.push(format!("--features={}", options.features.join(",")));
    }
    arguments
}

fn artefact(made: Made) -> Result<Artefact, BuildError> {
    match check(&made.path) {
        Ok(Ok(size_bytes)) => Ok(Artefact {
            path: made.path,
            package: made.package,
            size_bytes,
            fresh: made.fresh,
        }),
        Ok(Err(reason)) => Err(BuildError::NotAComponent {
            path: made.path,
            reason: reason.to_owned(),
        }),
        Err(error) => Err(BuildError::NotAComponent {
            path: made.path,
            reason: error.to_string(),
        }),
    }
}

/// The size, or what the file is instead of a component. Layer and version are
/// in the first eight bytes (component-model, `Binary.md`, "Component Definitions").
fn check(path: &Path) -> io::Result<Result<u64, &'static str>> {
    let mut file = File::open(path)?;
    let mut preamble = [0; 8];
    let size = file.metadata()?.len();
    if size < 8 {
        return Ok(Err("it is too short to be WebAssembly"));
    }
    file.read_exact(&mut preamble)?;
    Ok(match preamble {
        [0, b'a', b's', b'm', _, 0, 1, 0] => Ok(size),
        [0, b'a', b's', b'm', 1, 0, 0, 0] => Err("it is a core module"),
        _ => Err("it does not begin as WebAssembly does"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_pass_through() {
        let options = BuildOptions {
            profile: Profile::Named("tiny".into()),
            locked: true,
            offline: true,
            package: Some("hello".into()),
            target_dir: Some("/t".into()),
            features: vec!["a".into(), "b".into()],
        };
        let all = arguments(&options, false).join(" ");
        assert_eq!(
            all,
            "build --target=wasm32-wasip2 --message-format=json-render-diagnostics --color=never \
             --profile=tiny --locked --offline --package=hello --target-dir /t --features=a,b"
        );
    }

    #[test]
    fn only_components_pass() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.wasm");
        for (bytes, expected) in [
            (b"\0asm\x0d\0\x01\0".as_slice(), Ok(8)),
            (b"\0asm\x01\0\0\0", Err("it is a core module")),
            (b"\0asm", Err("it is too short to be WebAssembly")),
            (b"#!/bin/sh\n", Err("it does not begin as WebAssembly does")),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(check(&path).unwrap(), expected);
        }
    }
}
