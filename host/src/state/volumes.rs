//! The directories of volumes.
//!
//! A directory has a name that nothing else ever had; a record of the [`Store`](super::Store) refers
//! to it, or the next start removes it. It is made and durable before its record is committed, and
//! removed after its record is gone.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};

use super::Blobs;
use super::dir::{subdir, sync_dir};
use crate::storage::clear;

/// The name of a volume's directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VolumeDirectory(String);

/// Not the name of a volume's directory.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not the name of a volume's directory")]
pub struct VolumeDirectoryError(String);

impl VolumeDirectory {
    /// A name that nothing has.
    ///
    /// # Errors
    /// When the kernel gives no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(format!("{:032x}", u128::from_le_bytes(bytes))))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for VolumeDirectory {
    type Err = VolumeDirectoryError;

    fn from_str(text: &str) -> Result<Self, VolumeDirectoryError> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 32 && text.bytes().all(hex) {
            Ok(Self(text.to_owned()))
        } else {
            Err(VolumeDirectoryError(text.chars().take(80).collect()))
        }
    }
}

impl Blobs {
    /// Makes an empty directory for a volume, durably, and opens it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make_volume(&self, directory: &VolumeDirectory) -> io::Result<File> {
        subdir(&self.volumes, directory.as_str())?;
        self.open_volume(directory)
    }

    /// Opens the directory of a volume; an empty one where it is gone (a backup has none).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open_volume(&self, directory: &VolumeDirectory) -> io::Result<File> {
        let below = subdir(&self.volumes, directory.as_str())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened: OwnedFd = rustix::fs::openat(&below, ".", flags, Mode::empty())?;
        Ok(opened.into())
    }

    /// Removes the directory of a volume with all that is in it.
    ///
    /// # Errors
    /// Those of the file system; what is left is removed at the next start.
    pub fn remove_volume(&self, directory: &str) -> io::Result<()> {
        match self.volumes.open_dir(directory) {
            Ok(below) => clear(&below)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        self.volumes.remove_dir(directory)?;
        sync_dir(&self.volumes)
    }

    /// Removes what no record refers to; says how many directories that were.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn collect_volumes(&self, referenced: &HashSet<String>) -> io::Result<usize> {
        let mut removed = 0;
        for entry in self.volumes.entries()? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !referenced.contains(&name) {
                self.remove_volume(&name)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Whether the kernel resolves paths as volumes need it.
    #[must_use]
    pub fn can_hold_volumes(&self) -> bool {
        crate::storage::has_openat2(&self.volumes)
    }
}
