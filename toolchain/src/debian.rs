//! The Debian way: six packages downloaded and unpacked, not installed, into
//! one folder, and std for the target built from them once.
//!
//! ```text
//! <dir>/packages/*.deb      downloaded, deleted at the end
//! <dir>/root/usr/…          unpacked; becomes a sysroot
//! <dir>/seed/               an empty crate whose build makes cargo build std; deleted
//! <dir>/bin/rustc           a wrapper that lets rustc find its LLVM
//! ```
//!
//! The std that `-Zbuild-std` makes is copied into the sysroot, beside the C
//! library's start files, so that every later build is an ordinary
//! `cargo build --target wasm32-wasip2` that needs no unstable flag and builds
//! no std again.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::TARGET;
use crate::cache::text;
use crate::find::in_path;
use crate::process::{self, Event, Finished};
use crate::progress::Progress;

/// Raised when what is made here changes, so that older caches are left alone.
pub(crate) const RECIPE: u32 = 1;
/// The name of this way in messages.
pub(crate) const WAY: &str = "unpacking Debian's Rust packages";

/// Querying the package index, unpacking one package.
const LOCAL_LIMIT: Duration = Duration::from_secs(300);
/// About 140 MB.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(900);
/// Std takes about 30 s on two cores.
const BUILD_LIMIT: Duration = Duration::from_secs(1800);

/// Whether this machine has the tools for it.
pub(crate) fn available() -> Result<(), String> {
    if !cfg!(target_os = "linux") {
        return Err("not a Debian-like system".to_owned());
    }
    for tool in ["apt-get", "apt-cache", "dpkg-deb", "tar"] {
        if in_path(tool).is_none() {
            return Err(format!("not a Debian-like system: there is no {tool}"));
        }
    }
    Ok(())
}

/// Prepares the toolchain in the empty folder `dir`. Returns the packages.
pub(crate) fn prepare(
    dir: &Path,
    cargo: &OsStr,
    linker_env: &[(OsString, OsString)],
    progress: &mut dyn Progress,
) -> Result<Vec<String>, String> {
    progress.step(
        "Preparing a wasm toolchain from Debian packages, without installing them (once, about a minute)",
    );
    let packages = resolve(progress)?;
    let files = download(&dir.join("packages"), &packages, progress)?;
    let root = dir.join("root");
    for file in &files {
        let name = file_name(file);
        progress.step(&format!("  unpacking {name}"));
        unpack(file, &root, progress)?;
    }
    let lib = root.join("usr/lib/rustlib").join(TARGET).join("lib");
    copy_start_files(
        &root.join("usr/lib/wasm32-wasi"),
        &lib.join("self-contained"),
    )?;
    let rustc = write_wrapper(dir, &root)?;
    build_std(dir, cargo, &rustc, linker_env, &lib, progress)?;
    progress.step("  cleaning up");
    // The last two are the sources of std: a link, and what it leads to.
    for done in [
        "packages",
        "seed",
        "root/usr/lib/rustlib/src",
        "root/usr/src",
    ] {
        remove(&dir.join(done))?;
    }
    Ok(files.iter().map(|file| file_name(file)).collect())
}

/// The names of the six packages. Two of them carry a version in their name:
/// they are what the others depend on.
fn resolve(progress: &mut dyn Progress) -> Result<Vec<String>, String> {
    match resolve_now() {
        Ok(names) => Ok(names),
        Err(reason) => {
            progress.step("  apt-get update");
            let updated = run(
                Command::new("apt-get").args(["-q", "update"]),
                DOWNLOAD_LIMIT,
                "apt-get update",
                progress,
            );
            match updated {
                Ok(_) => resolve_now(),
                Err(update) => Err(format!(
                    "{reason}; apt-get update: {update} (run it as root, then try again)"
                )),
            }
        }
    }
}

fn resolve_now() -> Result<Vec<String>, String> {
    let std_library = dependency("libstd-rust-web-dev", "libstd-rust-web-")?;
    let llvm = dependency(&std_library, "libllvm")?;
    let fixed = [
        "rustc-web",
        "libstd-rust-web-dev",
        "rust-web-src",
        "wasi-libc",
    ];
    let mut names: Vec<String> = fixed.map(str::to_owned).into();
    names.extend([std_library, llvm]);
    Ok(names)
}

/// The one dependency of `package` whose name begins with `prefix`.
fn dependency(package: &str, prefix: &str) -> Result<String, String> {
    let finished = process::run_quiet(
        Command::new("apt-cache").args(["depends", package]),
        LOCAL_LIMIT,
    )
    .map_err(|error| error.to_string())?;
    if !finished.success() {
        return Err(format!("the package {package} is not known to apt"));
    }
    depends(&finished.stdout, prefix)
        .ok_or_else(|| format!("{package} does not depend on a {prefix}* package"))
}

fn depends(listing: &str, prefix: &str) -> Option<String> {
    listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

fn download(
    to: &Path,
    packages: &[String],
    progress: &mut dyn Progress,
) -> Result<Vec<PathBuf>, String> {
    progress.step(&format!("  downloading {}", packages.join(" ")));
    fs::create_dir(to).map_err(|error| text(to, &error))?;
    let mut command = Command::new("apt-get");
    // As root, apt would otherwise warn that its own user cannot write here.
    command
        .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .args(packages);
    run(
        command.current_dir(to),
        DOWNLOAD_LIMIT,
        "downloading",
        progress,
    )?;
    let entries = fs::read_dir(to).map_err(|error| text(to, &error))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .collect();
    files.sort();
    if files.len() != packages.len() {
        return Err(format!(
            "apt-get downloaded {} of {}",
            files.len(),
            packages.len()
        ));
    }
    Ok(files)
}

/// Unpacks a package without what is not needed: of the compiler's sources, only
/// the library's are, a sixth of them.
fn unpack(package: &Path, root: &Path, progress: &mut dyn Progress) -> Result<(), String> {
    const SCRIPT: &str = "mkdir -p \"$2\" && dpkg-deb --fsys-tarfile \"$1\" | \
        tar -x -C \"$2\" --anchored --wildcards --no-wildcards-match-slash \
        --exclude='./usr/share/doc' --exclude='./usr/src/*/src' --exclude='./usr/src/*/compiler'";
    let what = format!("unpacking {}", file_name(package));
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh"]).arg(package).arg(root);
    run(&mut command, LOCAL_LIMIT, &what, progress)?;
    Ok(())
}

/// rustc looks for the C library's start files and archive beside its std.
fn copy_start_files(from: &Path, to: &Path) -> Result<(), String> {
    fs::create_dir_all(to).map_err(|error| text(to, &error))?;
    let entries = fs::read_dir(from).map_err(|error| text(from, &error))?;
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name == "libc.a" || (name.starts_with("crt1") && name.ends_with(".o")) {
            fs::copy(entry.path(), to.join(&*name)).map_err(|error| text(&entry.path(), &error))?;
        }
    }
    Ok(())
}

/// Writes `bin/rustc`, which finds everything relative to itself: the folder is
/// renamed after this.
fn write_wrapper(dir: &Path, root: &Path) -> Result<PathBuf, String> {
    let libraries = fs::read_dir(root.join("usr/lib"))
        .map_err(|error| text(root, &error))?
        .filter_map(Result::ok)
        .find(|entry| holds_driver(&entry.path()))
        .ok_or("the packages hold no librustc_driver")?
        .file_name();
    let script = format!(
        "#!/bin/sh\n\
         # Written by insula: rustc with the LLVM that was unpacked beside it.\n\
         here=$(dirname \"$0\")/../root/usr\n\
         LD_LIBRARY_PATH=\"$here/lib/{}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\" exec \"$here/bin/rustc\" \"$@\"\n",
        libraries.to_string_lossy()
    );
    let bin = dir.join("bin");
    let path = bin.join("rustc");
    fs::create_dir(&bin)
        .and_then(|()| fs::write(&path, script))
        .and_then(|()| make_executable(&path))
        .map_err(|error| text(&path, &error))?;
    Ok(path)
}

fn holds_driver(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|entries| {
        entries.filter_map(Result::ok).any(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("librustc_driver-")
        })
    })
}

#[cfg(unix)]
fn make_executable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> std::io::Result<()> {
    Ok(())
}

fn build_std(
    dir: &Path,
    cargo: &OsStr,
    rustc: &Path,
    linker_env: &[(OsString, OsString)],
    lib: &Path,
    progress: &mut dyn Progress,
) -> Result<(), String> {
    let seed = dir.join("seed");
    write_seed(&seed).map_err(|error| text(&seed, &error))?;
    progress.step(&format!("  building std for {TARGET}"));
    let flags = [
        // Keeps both machine code and bitcode, so that a guest may use LTO or not.
        "-Cembed-bitcode=yes".to_owned(),
        // So that the same guest has the same bytes wherever the cache is.
        format!(
            "--remap-path-prefix={}=/rustc",
            dir.join("root/usr/lib/rustlib/src/rust").display()
        ),
        format!("--remap-path-prefix={}=/insula", dir.display()),
    ];
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--release",
            "--target",
            TARGET,
            "-Zbuild-std=std,panic_abort",
        ])
        // No backtraces: a guest's panic aborts, and the host names the trap.
        .arg("-Zbuild-std-features=")
        .current_dir(&seed)
        .envs(linker_env.iter().map(|(name, value)| (name, value)))
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_TARGET_DIR", seed.join("target"));
    for name in crate::build::FOREIGN_VARIABLES {
        command.env_remove(name);
    }
    run(&mut command, BUILD_LIMIT, "building std", progress)?;
    let deps = seed.join("target").join(TARGET).join("release/deps");
    let entries = fs::read_dir(&deps).map_err(|error| text(&deps, &error))?;
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".rlib") && !name.starts_with("libseed-") {
            fs::copy(entry.path(), lib.join(&*name))
                .map_err(|error| text(&entry.path(), &error))?;
        }
    }
    Ok(())
}

fn write_seed(seed: &Path) -> std::io::Result<()> {
    fs::create_dir_all(seed.join("src"))?;
    fs::write(
        seed.join("Cargo.toml"),
        "[package]\nname = \"seed\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n\
         [workspace]\n\n[profile.release]\ncodegen-units = 1\n",
    )?;
    fs::write(seed.join("src/lib.rs"), "#![no_std]\n")
}

/// Runs a child, reports the last thing it said as it goes, and turns a failure
/// into a reason.
fn run(
    command: &mut Command,
    limit: Duration,
    what: &str,
    progress: &mut dyn Progress,
) -> Result<Finished, String> {
    let mut doing = what.to_owned();
    let finished = process::run(command, limit, |event| match event {
        Event::Line(line) => {
            if let Some(rest) = line.trim().strip_prefix("Compiling ") {
                let crate_name = rest.split(' ').next().unwrap_or(rest);
                doing = format!("{what}: {crate_name}");
            }
        }
        Event::Tick(elapsed) => progress.tick(&doing, elapsed),
    })
    .map_err(|error| format!("{what}: {error}"))?;
    if finished.success() {
        return Ok(finished);
    }
    let tail: Vec<&str> = finished.stderr.lines().rev().take(12).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    Err(format!(
        "{what} failed ({})\n{}",
        finished.ending_text(),
        tail.join("\n")
    ))
}

fn remove(path: &Path) -> Result<(), String> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(|error| text(path, &error))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versioned_names_come_from_the_dependencies() {
        let listing = "libstd-rust-web-dev\n  Depends: libstd-rust-web-1.96\n  \
                       Conflicts: <libstd-rust-mozilla-dev>\n    libstd-rust-web-9\n";
        assert_eq!(
            depends(listing, "libstd-rust-web-").unwrap(),
            "libstd-rust-web-1.96"
        );
        assert_eq!(depends(listing, "libllvm"), None);
    }
}
