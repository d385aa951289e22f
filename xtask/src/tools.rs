//! Programs of others that tests use: Prometheus and its `promtool`, componentize-py, an OpenAPI
//! validator, Schemathesis. Fetched into `target/tools` when they are not there; nothing is installed
//! system-wide but what Python lacks to make a virtual environment and what sets up machines' networks,
//! and that only as root.
//! What cannot be had is a reason that the tests which need it print as they skip.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::checks::answers;
use crate::repository::Repository;
use crate::say;

/// Something, or why it is not there.
type Found = Result<PathBuf, String>;

/// Where the programs are.
#[derive(Debug)]
pub(crate) struct Tools {
    promtool: Found,
    prometheus: Found,
    /// A Python environment with [`PYTHON_PACKAGES`].
    venv: Found,
}

const PYTHON_PACKAGES: [&str; 4] = [
    "componentize-py",
    "openapi-spec-validator",
    "grafana-foundation-sdk",
    "schemathesis>=4,<5",
];

impl Tools {
    /// Tells the tests, in their environment: `INSULA_TEST_X` where it is, or
    /// `INSULA_TEST_NO_X` why it is not.
    pub(crate) fn tell(&self, tests: &mut Command) {
        let all = [
            ("PROMTOOL", &self.promtool),
            ("PROMETHEUS", &self.prometheus),
            ("VENV", &self.venv),
        ];
        for (name, found) in all {
            match found {
                Ok(path) => tests.env(format!("INSULA_TEST_{name}"), path),
                Err(why) => {
                    say(&format!(
                        "   skipped: tests that need {}: {why}",
                        name.to_lowercase()
                    ));
                    tests.env(format!("INSULA_TEST_NO_{name}"), why)
                }
            };
        }
    }
}

/// Finds the programs, and fetches those that are not there. Running it again changes nothing.
pub(crate) fn ensure(repository: &Repository) -> Tools {
    ensure_network_programs();
    let dir = repository.target.join("tools");
    let unpacked = dir.join("prometheus");
    let fetched = match (in_path("promtool"), in_path("prometheus")) {
        (Some(_), Some(_)) => Ok(()),
        _ => fetch_prometheus(&unpacked),
    };
    let program = |name: &str| {
        let beside = unpacked.join("usr/bin").join(name);
        let there = in_path(name).or_else(|| beside.is_file().then_some(beside));
        there.ok_or_else(|| match &fetched {
            Err(why) => why.clone(),
            Ok(()) => format!("the package holds no {name}"),
        })
    };
    Tools {
        promtool: program("promtool"),
        prometheus: program("prometheus"),
        venv: fetch_venv(&dir.join("venv")),
    }
}

/// What machines' networks need of the system. Where it cannot be had, their tests say so and skip.
fn ensure_network_programs() {
    for (program, package) in [("nft", "nftables"), ("ip", "iproute2")] {
        if in_path(program).is_some() || !is_root() || in_path("apt-get").is_none() {
            continue;
        }
        if let Err(why) = install(package) {
            say(&format!("   {program} could not be installed: {why}"));
        }
    }
}

/// Unpacks Debian's package, which brings both programs and needs nothing but the C library.
fn fetch_prometheus(dir: &Path) -> Result<(), String> {
    if dir.join("usr/bin/prometheus").is_file() {
        return Ok(());
    }
    if in_path("apt-get").is_none() || in_path("dpkg").is_none() {
        return Err("prometheus is not installed, and this is no Debian to fetch it from".into());
    }
    let new = dir.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new).map_err(|error| format!("{}: {error}", new.display()))?;
    say("   fetching Debian's prometheus into target/tools");
    let download = || {
        run(Command::new("apt-get")
            .args(["download", "prometheus"])
            .current_dir(&new))
    };
    if let Err(first) = download() {
        if !is_root() {
            return Err(format!("apt-get download prometheus: {first}"));
        }
        say("   apt-get update");
        run(Command::new("apt-get").arg("update"))?;
        download().map_err(|error| format!("apt-get download prometheus: {error}"))?;
    }
    let entries = fs::read_dir(&new).map_err(|error| error.to_string())?;
    let package = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or("apt-get downloaded no package")?;
    run(Command::new("dpkg").arg("-x").arg(&package).arg(&new))?;
    fs::rename(&new, dir).map_err(|error| format!("{}: {error}", dir.display()))
}

fn fetch_venv(dir: &Path) -> Found {
    let python = dir.join("bin/python");
    let complete = || {
        let code = "import componentize_py, openapi_spec_validator, grafana_foundation_sdk, \
            schemathesis";
        answers(Command::new(&python).args(["-c", code]))
    };
    if complete() {
        return Ok(dir.to_owned());
    }
    let Some(system) = in_path("python3") else {
        return Err("python3 is not installed".to_owned());
    };
    say(&format!(
        "   fetching {} into target/tools/venv",
        PYTHON_PACKAGES.join(", ")
    ));
    let make = || {
        run(Command::new(&system)
            .args(["-m", "venv", "--clear"])
            .arg(dir))
    };
    if let Err(first) = make() {
        // Debian keeps the module apart from Python.
        if !is_root() || in_path("apt-get").is_none() {
            return Err(format!("python3 -m venv: {first}"));
        }
        install("python3-venv")?;
        make().map_err(|error| format!("python3 -m venv: {error}"))?;
    }
    let mut pip = Command::new(&python);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]);
    run(pip.args(PYTHON_PACKAGES)).map_err(|error| format!("pip install: {error}"))?;
    if complete() {
        Ok(dir.to_owned())
    } else {
        Err("pip was content, and the packages are not there".to_owned())
    }
}

/// Installs a Debian package. Only for root.
pub(crate) fn install(package: &str) -> Result<(), String> {
    say(&format!("   apt-get install {package}"));
    let install = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        // Whoever else installs something now is waited for.
        command.args(["-o", "DPkg::Lock::Timeout=120", "install", "--yes"]);
        run(command.args(["--no-install-recommends", package]))
    };
    install().or_else(|_| {
        run(Command::new("apt-get").arg("update"))?;
        install()
    })
}

pub(crate) fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(OsStr::new(program)))
        .find(|path| path.is_file())
}

/// Runs quietly; the last words of a failure are its reason.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().to_string_lossy()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = words.lines().rev().find(|line| !line.trim().is_empty());
    Err(last.unwrap_or("it gave no reason").trim().to_owned())
}
