//! The place of the one prepared toolchain in the user's cache.
//!
//! ```text
//! <cache>/insula/wasm-toolchain/
//!   lock                 held (flock) while one process prepares
//!   debian-1-x86_64/     ready: appears by rename, is never changed afterwards
//!     record.json        what it is; written last
//!     bin/rustc          the compiler to give to cargo
//!   debian-1-x86_64.new/ being prepared; a leftover is deleted by the next holder of the lock
//! ```
//!
//! A reader takes no lock: the folder is there as a whole or not at all.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::debian;
use crate::process;
use crate::progress::Progress;

const QUERY_LIMIT: Duration = Duration::from_secs(60);

/// What a prepared toolchain says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// `rustc --version`.
    pub(crate) rustc_version: String,
    /// The files it was unpacked from, with their versions in the names.
    pub(crate) packages: Vec<String>,
}

/// A toolchain that is whole and runs.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    pub(crate) dir: PathBuf,
    pub(crate) rustc: PathBuf,
    pub(crate) rustc_version: String,
}

/// Where the toolchain is or will be.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    parent: PathBuf,
    name: String,
}

impl Slot {
    pub(crate) fn new(parent: &Path) -> Self {
        let name = format!("debian-{}-{}", debian::RECIPE, std::env::consts::ARCH);
        Self {
            parent: parent.to_path_buf(),
            name,
        }
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    /// The toolchain, if it is there and its compiler still runs (a new C
    /// library or another architecture behind the same home may stop it).
    pub(crate) fn ready(&self) -> Option<Prepared> {
        let dir = self.dir();
        let record = fs::read(dir.join("record.json")).ok()?;
        let record: Record = serde_json::from_slice(&record).ok()?;
        let rustc = dir.join("bin/rustc");
        let version = rustc_version(&rustc).ok()?;
        (version == record.rustc_version).then_some(Prepared {
            dir,
            rustc,
            rustc_version: version,
        })
    }

    /// Has `make` prepare the toolchain in a fresh folder, unless another
    /// process was faster. `make` leaves `bin/rustc` and returns the names of
    /// the packages.
    pub(crate) fn fill(
        &self,
        progress: &mut dyn Progress,
        make: impl FnOnce(&Path, &mut dyn Progress) -> Result<Vec<String>, String>,
    ) -> Result<Prepared, String> {
        fs::create_dir_all(&self.parent).map_err(|error| text(&self.parent, &error))?;
        let _lock = self.lock(progress)?;
        if let Some(prepared) = self.ready() {
            return Ok(prepared);
        }
        let fresh = self.parent.join(format!("{}.new", self.name));
        remove(&fresh)?;
        fs::create_dir(&fresh).map_err(|error| text(&fresh, &error))?;
        let made = make(&fresh, progress).and_then(|packages| self.adopt(&fresh, packages));
        if made.is_err() {
            let _ = fs::remove_dir_all(&fresh);
        }
        made
    }

    fn adopt(&self, fresh: &Path, packages: Vec<String>) -> Result<Prepared, String> {
        let rustc_version = rustc_version(&fresh.join("bin/rustc"))?;
        let record = Record {
            rustc_version,
            packages,
        };
        let json = serde_json::to_vec_pretty(&record).map_err(|error| error.to_string())?;
        fs::write(fresh.join("record.json"), json).map_err(|error| text(fresh, &error))?;
        let dir = self.dir();
        remove(&dir)?;
        fs::rename(fresh, &dir).map_err(|error| text(&dir, &error))?;
        let rustc = dir.join("bin/rustc");
        Ok(Prepared {
            dir,
            rustc,
            rustc_version: record.rustc_version,
        })
    }

    /// Freed when the file is closed, also by the death of the process.
    fn lock(&self, progress: &mut dyn Progress) -> Result<File, String> {
        let path = self.parent.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| text(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.step("Another process is preparing the wasm toolchain; waiting for it");
                file.lock().map_err(|error| text(&path, &error))?;
            }
            Err(TryLockError::Error(error)) => return Err(text(&path, &error)),
        }
        Ok(file)
    }
}

/// The first line of `rustc -vV`.
fn rustc_version(rustc: &Path) -> Result<String, String> {
    let finished = process::run_quiet(Command::new(rustc).arg("-vV"), QUERY_LIMIT)
        .map_err(|error| text(rustc, &error))?;
    if !finished.success() {
        return Err(format!("{}: {}", rustc.display(), finished.reason()));
    }
    Ok(finished
        .stdout
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned())
}

fn remove(dir: &Path) -> Result<(), String> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(text(dir, &error)),
        _ => Ok(()),
    }
}

pub(crate) fn text(path: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}", path.display())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::Silent;

    fn fake_rustc(dir: &Path) -> Result<Vec<String>, String> {
        fs::create_dir(dir.join("bin")).unwrap();
        let rustc = dir.join("bin/rustc");
        fs::write(&rustc, "#!/bin/sh\necho rustc 9.9.9\n").unwrap();
        fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755)).unwrap();
        Ok(vec!["rustc_9.9.9.deb".to_owned()])
    }

    #[test]
    fn filled_once_by_many_at_once() {
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(&cache.path().join("deep/er"));
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let prepared = slot
                        .fill(&mut Silent, |dir, _| {
                            made.fetch_add(1, Ordering::SeqCst);
                            fake_rustc(dir)
                        })
                        .unwrap();
                    assert_eq!(prepared.rustc_version, "rustc 9.9.9");
                });
            }
        });
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert!(slot.ready().is_some());
    }

    #[test]
    fn a_failure_leaves_nothing_and_may_be_tried_again() {
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(cache.path());
        let failed = slot.fill(&mut Silent, |dir, _| {
            fake_rustc(dir)?;
            Err("the network is gone".to_owned())
        });
        assert_eq!(failed.unwrap_err(), "the network is gone");
        assert!(slot.ready().is_none());
        assert!(!slot.dir().exists());
        slot.fill(&mut Silent, |dir, _| fake_rustc(dir)).unwrap();
        assert!(slot.ready().is_some());
    }

    #[test]
    fn a_compiler_that_no_longer_runs_is_replaced() {
        let cache = tempfile::tempdir().unwrap();
        let slot = Slot::new(cache.path());
        slot.fill(&mut Silent, |dir, _| fake_rustc(dir)).unwrap();
        fs::write(slot.dir().join("bin/rustc"), "#!/bin/sh\nexit 127\n").unwrap();
        assert!(slot.ready().is_none());
        slot.fill(&mut Silent, |dir, _| fake_rustc(dir)).unwrap();
        assert!(slot.ready().is_some());
    }
}
