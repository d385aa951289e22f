//! The data directory: opened once, locked, and from then on reached only through its handle.
//!
//! ```text
//! <data>/            0700
//!   lock             held with flock(2) for as long as the host runs
//!   state.db         SQLite (with -wal and -shm beside it)
//!   admin.token      0600, the first token, for the CLI on this machine
//!   artefact.key     0600, authenticates compiled artefacts
//!   snapshots.key    0600, authenticates machines' snapshots
//!   blobs/<2 hex>/<hex>        uploaded components by SHA-256
//!   artefacts/<hex>-<compat>   compiled ones
//!   volumes/<hex>/             what tenants keep
//!   tmp/             unfinished files; emptied at every start
//!   handover         where the next host asks this one for all of it
//!   empty/           0500, the root of the data process
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt, OpenOptions, OpenOptionsExt};
use rustix::fs::{FlockOperation, Mode, OFlags};

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// It cannot be made or opened.
    #[error("the data directory {path} cannot be {action}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Another host holds the lock.
    #[error(
        "the data directory {0} is in use by another insula host; stop that one, or give this \
         one a directory of its own with --data"
    )]
    Locked(PathBuf),
}

/// The data directory and its lock.
#[derive(Debug)]
pub struct DataDir {
    dir: Dir,
    /// The lock lives as long as this descriptor.
    _lock: File,
}

impl DataDir {
    /// Opens the directory (0700; created with its parents when missing) and locks it.
    ///
    /// # Errors
    /// [`DataDirError`].
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        let failed = |action| {
            move |source| DataDirError::Open {
                path: path.to_owned(),
                action,
                source,
            }
        };
        // The only ambient path of all: what is below is reached through the handle.
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        builder.create(path).map_err(failed("created"))?;
        let dir = Dir::open_ambient_dir(path, ambient_authority()).map_err(failed("opened"))?;
        let lock = dir
            .open_with("lock", private().create(true))
            .map_err(failed("locked"))?
            .into_std();
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(DataDirError::Locked(path.to_owned()));
            }
            Err(errno) => return Err(failed("locked")(errno.into())),
        }
        Ok(Self { dir, _lock: lock })
    }

    /// Whether there is anything below a path; not where it does not exist.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn holds_anything(path: &Path) -> io::Result<bool> {
        match std::fs::read_dir(path) {
            Ok(mut entries) => Ok(entries.next().is_some()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A handle of the directory itself.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn dir(&self) -> io::Result<Dir> {
        self.dir.try_clone()
    }

    /// A directory below, made (0700) when missing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn subdir(&self, name: &str) -> io::Result<Dir> {
        subdir(&self.dir, name)
    }

    /// Where SQLite finds a file of this directory: by the held descriptor, not by the path that
    /// the operator gave. (SQLite resolves the link once, when it opens the file.)
    #[must_use]
    pub fn database_path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    /// The directory of machines, made (0700) when missing, by a path that other processes can
    /// follow: a monitor's root is below it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn machines_path(&self) -> io::Result<PathBuf> {
        self.subdir("machines")?;
        std::fs::canonicalize(self.database_path("machines"))
    }

    /// Makes an empty file (0600) unless it is there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn touch(&self, name: &str) -> io::Result<()> {
        self.dir.open_with(name, private().create(true)).map(drop)
    }

    /// A new file (0600) for writing.
    ///
    /// # Errors
    /// Those of the file system; when it is there already.
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let file = self.dir.open_with(name, private().create_new(true))?;
        Ok(file.into_std())
    }

    /// The content of a small file; `None` when there is none.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match self.dir.read(name) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The key in the file of this name, made (0600) when missing.
    ///
    /// # Errors
    /// Those of the file system and of the source of randomness; the file is no key.
    pub fn key(&self, name: &str) -> io::Result<[u8; 32]> {
        if let Some(key) = self.read(name)? {
            return key.try_into().map_err(|_| {
                io::Error::other(format!(
                    "{name} is not 32 bytes; once it is deleted a new one is made, and nothing that \
                     it sealed is read any more"
                ))
            });
        }
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        self.write_secret(name, &key)?;
        Ok(key)
    }

    /// Writes a small secret file (0600) so that after a crash there is the old one or the new.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_secret(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let temporary = format!("{name}.new");
        let mut file = self
            .dir
            .open_with(&temporary, private().create(true).truncate(true))?;
        file.write_all(content)?;
        file.sync_all()?;
        self.dir.rename(&temporary, &self.dir, name)?;
        sync_dir(&self.dir)
    }
}

/// Where unfinished files are; emptied at every start.
#[derive(Debug)]
pub struct TemporaryDir(pub(super) Dir);

impl TemporaryDir {
    /// Makes an empty file (0600) in place of what has its name; gives a path by which others find
    /// it, as [`DataDir::database_path`] does.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn make(&self, name: &str) -> io::Result<PathBuf> {
        self.0
            .open_with(name, private().create(true).truncate(true))?;
        let directory = self.0.as_raw_fd();
        Ok(PathBuf::from(format!("/proc/self/fd/{directory}/{name}")))
    }

    /// Opens a file for reading and takes its name away.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn take(&self, name: &str) -> io::Result<File> {
        let file = self.0.open(name)?.into_std();
        self.0.remove_file(name)?;
        Ok(file)
    }
}

/// Options for a file that only its owner reads and writes.
pub(super) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// A directory below `dir`, made (0700) when missing.
pub(super) fn subdir(dir: &Dir, name: &str) -> io::Result<Dir> {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    match dir.create_dir_with(name, &builder) {
        Ok(()) => sync_dir(dir)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    dir.open_dir(name)
}

/// Makes renames and unlinks in a directory durable. The handle that cap-std holds may be one
/// that cannot be synced (`O_PATH`), so that it is opened once more, through itself.
pub(super) fn sync_dir(dir: &Dir) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let readable: OwnedFd = rustix::fs::openat(dir, ".", flags, Mode::empty())?;
    Ok(rustix::fs::fsync(readable)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn opened_once_and_private() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        let data = DataDir::open(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let again = DataDir::open(&path).unwrap_err();
        assert!(matches!(again, DataDirError::Locked(_)), "{again}");
        assert!(
            again.to_string().contains("--data"),
            "names the way out: {again}"
        );
        data.write_secret("admin.token", b"x").unwrap();
        let mode = path
            .join("admin.token")
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(data);
        assert_eq!(
            DataDir::open(&path)
                .unwrap()
                .read("admin.token")
                .unwrap()
                .unwrap(),
            b"x"
        );
    }
}
