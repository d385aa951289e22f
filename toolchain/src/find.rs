//! The search: which way to `wasm32-wasip2` is open on this machine.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::{Prepared, Slot};
use crate::error::{Attempt, ToolchainError};
use crate::process::{self, Event};
use crate::progress::Progress;
use crate::settings::Settings;
use crate::{TARGET, debian};

/// A rustc that only prints something about itself answers at once; more than
/// this is a hung proxy.
const QUERY_LIMIT: Duration = Duration::from_secs(60);
/// A target is about 30 MB to download. On a machine whose downloads are
/// swallowed rather than refused, this is what the attempt costs.
const RUSTUP_LIMIT: Duration = Duration::from_secs(180);

/// Where a toolchain came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The active toolchain had the target already.
    Own,
    /// `rustup target add` has just added it.
    Rustup,
    /// Unpacked Debian packages and a std built from them, in this folder.
    Unpacked(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("the active toolchain"),
            Self::Rustup => f.write_str("rustup"),
            Self::Unpacked(dir) => write!(f, "unpacked packages in {}", dir.display()),
        }
    }
}

/// A way to build guests, found and ready.
#[derive(Debug, Clone)]
pub struct Toolchain {
    pub(crate) source: Source,
    pub(crate) rustc_version: String,
    pub(crate) cargo: OsString,
    /// What cargo's environment has to say so that it takes this way.
    pub(crate) env: Vec<(OsString, OsString)>,
}

impl Toolchain {
    /// Finds a way for the current folder, and prepares one if need be. May
    /// take a minute or two the first time on a machine; `progress` says why.
    ///
    /// # Errors
    /// When there is no Rust, or none of the ways is open: the error lists what
    /// was tried and what to install.
    pub fn find(progress: &mut dyn Progress) -> Result<Self, ToolchainError> {
        let here = env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
        Self::find_with(&Settings::from_env(&here), progress)
    }

    /// As [`Toolchain::find`], with settings of one's own.
    ///
    /// # Errors
    /// As [`Toolchain::find`].
    pub fn find_with(
        settings: &Settings,
        progress: &mut dyn Progress,
    ) -> Result<Self, ToolchainError> {
        let active = Active::query(settings)?;
        if has_target(&active.sysroot) {
            return Ok(Self::of_active(settings, &active, Source::Own));
        }
        let linker = Linker::find(&active);
        let slot = settings.cache_dir.as_deref().map(Slot::new);
        if let (Some(slot), Some(linker)) = (&slot, &linker)
            && let Some(prepared) = slot.ready()
        {
            return Ok(Self::of_prepared(settings, prepared, linker));
        }
        let mut attempts = vec![Attempt {
            way: format!("the active toolchain ({})", active.version),
            reason: format!("it has no {TARGET} target"),
        }];
        match rustup_target_add(settings, &active, progress) {
            Ok(()) => return Ok(Self::of_active(settings, &active, Source::Rustup)),
            Err(reason) => {
                progress.step(&format!("  not possible: {reason}"));
                attempts.push(Attempt {
                    way: format!("rustup target add {TARGET}"),
                    reason,
                });
            }
        }
        match unpack(settings, slot, linker.as_ref(), progress) {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => attempts.push(Attempt {
                way: debian::WAY.to_owned(),
                reason,
            }),
        }
        Err(ToolchainError::NoWay {
            attempts,
            advice: advice(),
        })
    }

    /// Where it came from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What its `rustc --version` says.
    pub fn rustc_version(&self) -> &str {
        &self.rustc_version
    }

    fn of_active(settings: &Settings, active: &Active, source: Source) -> Self {
        Self {
            source,
            rustc_version: active.version.clone(),
            cargo: settings.cargo.clone(),
            env: Vec::new(),
        }
    }

    fn of_prepared(settings: &Settings, prepared: Prepared, linker: &Linker) -> Self {
        let mut env = linker.env();
        env.push(("RUSTC".into(), prepared.rustc.into()));
        Self {
            source: Source::Unpacked(prepared.dir),
            rustc_version: prepared.rustc_version,
            cargo: settings.cargo.clone(),
            env,
        }
    }
}

fn unpack(
    settings: &Settings,
    slot: Option<Slot>,
    linker: Option<&Linker>,
    progress: &mut dyn Progress,
) -> Result<Toolchain, String> {
    debian::available()?;
    let linker = linker.ok_or(
        "the active toolchain has no wasm-component-ld, the linker for components \
         (Rust from rustup has it since 1.82)",
    )?;
    let slot = slot.ok_or(
        "no folder to keep it in: neither INSULA_CACHE_DIR, XDG_CACHE_HOME nor HOME is set",
    )?;
    let prepared = slot.fill(progress, |dir, progress| {
        debian::prepare(dir, &settings.cargo, &linker.env(), progress)
    })?;
    Ok(Toolchain::of_prepared(settings, prepared, linker))
}

pub(crate) fn advice() -> String {
    format!(
        "To mend it: install Rust with rustup (https://rustup.rs) and run \
         `rustup target add {TARGET}`; or, on Debian with network access, let this program \
         unpack the packages rustc-web, libstd-rust-web-dev, rust-web-src and wasi-libc by \
         itself (as root it also runs apt-get update)."
    )
}

/// The toolchain that cargo would use.
#[derive(Debug, Clone)]
pub(crate) struct Active {
    pub(crate) sysroot: PathBuf,
    /// `rustc 1.95.0 (59807616e 2026-04-14)`.
    pub(crate) version: String,
    /// The host triple.
    pub(crate) host: String,
}

impl Active {
    pub(crate) fn query(settings: &Settings) -> Result<Self, ToolchainError> {
        let no_rust = |reason: String| ToolchainError::NoRust {
            program: settings.rustc.to_string_lossy().into_owned(),
            reason,
        };
        let ask = |arguments: &[&str]| {
            let mut command = Command::new(&settings.rustc);
            command.args(arguments).current_dir(&settings.project_dir);
            match process::run_quiet(&mut command, QUERY_LIMIT) {
                Ok(finished) if finished.success() => Ok(finished.stdout),
                Ok(finished) => Err(no_rust(finished.reason())),
                Err(error) => Err(no_rust(error.to_string())),
            }
        };
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?.trim());
        let verbose = ask(&["-vV"])?;
        let version = verbose.lines().next().unwrap_or_default().to_owned();
        let host = verbose
            .lines()
            .find_map(|line| line.strip_prefix("host: "))
            .ok_or_else(|| no_rust("rustc -vV names no host".to_owned()))?
            .to_owned();
        Ok(Self {
            sysroot,
            version,
            host,
        })
    }
}

/// Whether a sysroot has std for the target.
pub(crate) fn has_target(sysroot: &Path) -> bool {
    let lib = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    let Ok(entries) = fs::read_dir(lib) else {
        return false;
    };
    entries.filter_map(Result::ok).any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libstd-") && name.ends_with(".rlib")
    })
}

/// The linker for components, of the active toolchain: the unpacked packages
/// bring none.
#[derive(Debug, Clone)]
pub(crate) struct Linker {
    component_ld: PathBuf,
    /// Where `wasm-component-ld` finds `wasm-ld`.
    folders: Vec<PathBuf>,
}

impl Linker {
    pub(crate) fn find(active: &Active) -> Option<Self> {
        let bin = active
            .sysroot
            .join("lib/rustlib")
            .join(&active.host)
            .join("bin");
        let component_ld = bin.join("wasm-component-ld");
        if component_ld.is_file() && bin.join("gcc-ld/wasm-ld").is_file() {
            let folders = vec![bin.join("gcc-ld"), bin];
            return Some(Self {
                component_ld,
                folders,
            });
        }
        let component_ld = in_path("wasm-component-ld")?;
        in_path("wasm-ld")?;
        Some(Self {
            component_ld,
            folders: Vec::new(),
        })
    }

    /// What cargo's environment has to say so that this linker is used.
    fn env(&self) -> Vec<(OsString, OsString)> {
        let mut env = vec![(
            OsString::from("CARGO_TARGET_WASM32_WASIP2_LINKER"),
            self.component_ld.clone().into_os_string(),
        )];
        let old = env::var_os("PATH").unwrap_or_default();
        let paths = self.folders.iter().cloned().chain(env::split_paths(&old));
        if let Ok(path) = env::join_paths(paths) {
            env.push(("PATH".into(), path));
        }
        env
    }
}

/// The full path of a program, if there is one.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

fn rustup_target_add(
    settings: &Settings,
    active: &Active,
    progress: &mut dyn Progress,
) -> Result<(), String> {
    if in_path("rustup").is_none() {
        return Err("rustup is not installed".to_owned());
    }
    let step = format!("rustup target add {TARGET}");
    progress.step(&step);
    let mut command = Command::new("rustup");
    command
        .args(["target", "add", TARGET])
        .current_dir(&settings.project_dir);
    let finished = process::run(&mut command, RUSTUP_LIMIT, |event| {
        if let Event::Tick(elapsed) = event {
            progress.tick(&step, elapsed);
        }
    })
    .map_err(|error| error.to_string())?;
    if !finished.success() {
        return Err(finished.reason());
    }
    if !has_target(&active.sysroot) {
        return Err("rustup added the target to another toolchain than the active one".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysroot_has_the_target_when_it_has_its_std() {
        let root = tempfile::tempdir().unwrap();
        assert!(!has_target(root.path()));
        let lib = root.path().join("lib/rustlib/wasm32-wasip2/lib");
        fs::create_dir_all(lib.join("self-contained")).unwrap();
        assert!(!has_target(root.path()));
        fs::write(lib.join("libstd-0123.rlib"), "").unwrap();
        assert!(has_target(root.path()));
    }

    #[test]
    fn no_rust_says_how_to_get_it() {
        let mut settings = Settings::from_env(Path::new("."));
        settings.rustc = "no-such-rustc".into();
        let error = Toolchain::find_with(&settings, &mut crate::Silent).unwrap_err();
        assert!(error.to_string().contains("rustup.rs"), "{error}");
    }
}
