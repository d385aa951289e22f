//! Files by content: uploaded components and their compiled artefacts.
//!
//! Write protocol: a temporary name → content → fsync ([`Unplaced::sync`]) → rename → fsync of
//! the directory ([`Blobs::place`]); then a transaction of the [`Store`](super::Store) refers to
//! it. A crash before that transaction leaves a file that nothing refers to; the start removes it
//! ([`Blobs::collect_garbage`]). *Invariant:* whoever places and commits, and whoever removes,
//! holds control's mutation lock, so that nothing is removed between its rename and its commit.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};

use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use insula_types::Digest;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::Health;
use super::dir::{DataDir, TemporaryDir, private, subdir, sync_dir};

/// The part of the data directory that holds blobs.
#[derive(Debug)]
pub struct Blobs {
    blobs: Dir,
    artefacts: Dir,
    pub(super) volumes: Dir,
    temporary: Dir,
    /// That of this host.
    engine: EngineName,
    /// That of a host which is to take over from this one.
    successor: Option<EngineName>,
    next_temporary: u64,
    health: Health,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A component as it was uploaded.
    Component,
    /// A compiled and sealed artefact for this host's engine and CPU.
    Artefact,
    /// One for this engine.
    ArtefactFor(&'a EngineName),
}

/// Names an engine, its configuration and the CPU that artefacts are good for: some hexadecimal
/// digits. Part of a file's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineName(String);

/// It is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an engine is named by 1 to 64 lower-case hexadecimal digits")]
pub struct NoEngineName;

impl EngineName {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for EngineName {
    type Error = NoEngineName;

    fn try_from(text: String) -> Result<Self, NoEngineName> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if (1..=64).contains(&text.len()) && text.bytes().all(digit) {
            Ok(Self(text))
        } else {
            Err(NoEngineName)
        }
    }
}

impl From<EngineName> for String {
    fn from(name: EngineName) -> Self {
        name.0
    }
}

/// A file that is not in its place yet; removed when dropped before.
#[derive(Debug)]
pub struct Unplaced {
    name: String,
    directory: Dir,
    file: File,
    hash: sha2::Sha256,
    size_bytes: u64,
    health: Health,
}

impl Unplaced {
    /// Appends to the file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.size_bytes += bytes.len() as u64;
        Ok(())
    }

    /// What was written so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::new(self.hash.clone().finalize().into())
    }

    /// How much was written so far.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The file for another process to read, which cannot write to it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn reader(&self) -> io::Result<File> {
        Ok(self.directory.open(&self.name)?.into_std())
    }

    /// The file for another process to write. What it writes is not hashed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Makes the content durable.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync(&self) -> io::Result<()> {
        self.health.after_sync(self.file.sync_all())
    }
}

impl Drop for Unplaced {
    fn drop(&mut self) {
        // Gone already when it was placed; anything else is removed at the next start.
        let _ = self.directory.remove_file(&self.name);
    }
}

impl Blobs {
    /// Opens the directories and empties that of temporary files.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(data: &DataDir, engine: EngineName, health: Health) -> io::Result<Self> {
        let temporary = data.subdir("tmp")?;
        for entry in temporary.entries()? {
            temporary.remove_file(entry?.file_name())?;
        }
        Ok(Self {
            blobs: data.subdir("blobs")?,
            artefacts: data.subdir("artefacts")?,
            volumes: data.subdir("volumes")?,
            temporary,
            engine,
            successor: None,
            next_temporary: 0,
            health,
        })
    }

    /// What is compiled for this engine stays, too, until this is called for another one.
    pub fn keep_for(&mut self, successor: EngineName) {
        self.successor = Some(successor);
    }

    /// A handle of the directory of unfinished files.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn directory(&self) -> io::Result<TemporaryDir> {
        Ok(TemporaryDir(self.temporary.try_clone()?))
    }

    /// An empty file under a temporary name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&mut self) -> io::Result<Unplaced> {
        self.health.check().map_err(io::Error::other)?;
        self.next_temporary += 1;
        let name = format!("{:08x}", self.next_temporary);
        let file = self
            .temporary
            .open_with(&name, private().create_new(true))?
            .into_std();
        Ok(Unplaced {
            name,
            directory: self.temporary.try_clone()?,
            file,
            hash: sha2::Sha256::new(),
            size_bytes: 0,
            health: self.health.clone(),
        })
    }

    fn place_of(&self, kind: Kind<'_>, digest: &Digest) -> io::Result<(Dir, String)> {
        let hex = digest.hex();
        let engine = match kind {
            Kind::Component => return Ok((subdir(&self.blobs, &hex[..2])?, hex)),
            Kind::Artefact => &self.engine,
            Kind::ArtefactFor(engine) => engine,
        };
        Ok((
            self.artefacts.try_clone()?,
            format!("{hex}-{}", engine.as_str()),
        ))
    }

    /// Moves a synced file to its place and makes that durable. A file that is there already
    /// (same digest, hence same content) is replaced.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn place(&self, kind: Kind<'_>, digest: &Digest, file: Unplaced) -> io::Result<()> {
        let (directory, name) = self.place_of(kind, digest)?;
        file.directory.rename(&file.name, &directory, &name)?;
        self.health.after_sync(sync_dir(&directory))
    }

    /// Opens a file for reading; `None` when there is none. What is there and is no file of ours (a
    /// link, a pipe whose opening would wait for a writer) counts as none, and is replaced when one
    /// is placed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn find(&self, kind: Kind<'_>, digest: &Digest) -> io::Result<Option<File>> {
        const SURE: OFlags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK);
        let (directory, name) = self.place_of(kind, digest)?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(SURE.bits().cast_signed());
        match directory.open_with(&name, &options) {
            Ok(file) if file.metadata()?.is_file() => Ok(Some(file.into_std())),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // A link, or a socket.
            Err(error) if no_file(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the component and artefact of a digest that nothing refers to. Not after the state
    /// was stopped: a transaction whose commit failed then may be there after a restart, and refer
    /// to them.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        self.health.check().map_err(io::Error::other)?;
        for kind in [Kind::Component, Kind::Artefact] {
            let (directory, name) = self.place_of(kind, digest)?;
            match directory.remove_file(&name) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes every file that is not of `referenced`, and artefacts made for an engine or CPU that
    /// is neither this host's nor its successor's. Answers how many went. Not after the state was
    /// stopped, as [`Blobs::remove`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn collect_garbage(&self, referenced: &HashSet<Digest>) -> io::Result<usize> {
        self.health.check().map_err(io::Error::other)?;
        let mut removed = 0;
        let kept = |hex: &str| {
            format!("sha256:{hex}")
                .parse()
                .is_ok_and(|digest| referenced.contains(&digest))
        };
        for group in self.blobs.entries()? {
            let group = group?.open_dir()?;
            for entry in group.entries()? {
                let name = entry?.file_name();
                if !name.to_str().is_some_and(kept) {
                    group.remove_file(name)?;
                    removed += 1;
                }
            }
        }
        for entry in self.artefacts.entries()? {
            let name = entry?.file_name();
            let wanted = name
                .to_str()
                .and_then(|name| name.split_once('-'))
                .is_some_and(|(hex, engine)| self.compiles_for(engine) && kept(hex));
            if !wanted {
                self.artefacts.remove_file(name)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn compiles_for(&self, engine: &str) -> bool {
        let mut ours = [Some(&self.engine), self.successor.as_ref()]
            .into_iter()
            .flatten();
        ours.any(|one| one.as_str() == engine)
    }
}

fn no_file(error: &io::Error) -> bool {
    [Errno::LOOP, Errno::NXIO]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn engine(name: &str) -> EngineName {
        EngineName::try_from(name.to_owned()).unwrap()
    }

    fn blobs(data: &DataDir) -> Blobs {
        Blobs::open(data, engine("c0ffee"), Health::default()).unwrap()
    }

    fn put(blobs: &mut Blobs, kind: Kind<'_>, content: &[u8]) -> Digest {
        let mut file = blobs.create().unwrap();
        file.write(content).unwrap();
        file.sync().unwrap();
        let digest = file.digest();
        blobs.place(kind, &digest, file).unwrap();
        digest
    }

    #[test]
    fn a_blob_is_found_only_after_it_was_placed() {
        let path = tempfile::tempdir().unwrap();
        let data = DataDir::open(path.path()).unwrap();
        let mut blobs = blobs(&data);
        let mut file = blobs.create().unwrap();
        file.write(b"half").unwrap();
        assert!(
            blobs
                .find(Kind::Component, &file.digest())
                .unwrap()
                .is_none()
        );
        drop(file);
        assert_eq!(
            path.path().join("tmp").read_dir().unwrap().count(),
            0,
            "dropped, so removed"
        );

        let digest = put(&mut blobs, Kind::Component, b"whole");
        let mut found = String::new();
        let mut file = blobs.find(Kind::Component, &digest).unwrap().unwrap();
        file.read_to_string(&mut found).unwrap();
        assert_eq!(found, "whole");
        let hex = digest.hex();
        assert!(
            path.path()
                .join("blobs")
                .join(&hex[..2])
                .join(&hex)
                .is_file()
        );
    }

    #[test]
    fn nothing_is_removed_after_the_state_was_stopped() {
        let path = tempfile::tempdir().unwrap();
        let data = DataDir::open(path.path()).unwrap();
        let health = Health::default();
        let mut blobs = Blobs::open(&data, engine("c0ffee"), health.clone()).unwrap();
        let digest = put(&mut blobs, Kind::Component, b"in a commit that failed");
        health.stop("fsync");
        assert!(blobs.remove(&digest).is_err());
        assert!(blobs.collect_garbage(&HashSet::new()).is_err());
        assert!(blobs.find(Kind::Component, &digest).unwrap().is_some());
    }

    #[test]
    fn a_link_and_a_pipe_in_its_place_are_no_blob() {
        let path = tempfile::tempdir().unwrap();
        let data = DataDir::open(path.path()).unwrap();
        let mut blobs = blobs(&data);
        let other = put(&mut blobs, Kind::Component, b"other");
        let digest = put(&mut blobs, Kind::Component, b"own");
        let place = |digest: &Digest| {
            let hex = digest.hex();
            path.path().join("blobs").join(&hex[..2]).join(&hex)
        };
        let own = place(&digest);
        std::fs::remove_file(&own).unwrap();
        std::os::unix::fs::symlink(place(&other), &own).unwrap();
        assert!(blobs.find(Kind::Component, &digest).unwrap().is_none());
        std::fs::remove_file(&own).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&own).status();
        assert!(made.unwrap().success());
        assert!(blobs.find(Kind::Component, &digest).unwrap().is_none());
        put(&mut blobs, Kind::Component, b"own");
        assert!(blobs.find(Kind::Component, &digest).unwrap().is_some());
    }

    #[test]
    fn an_engine_has_a_name_that_is_no_path() {
        for name in ["", "..", "a/b", "C0FFEE", "0 ", &"a".repeat(65)] {
            assert_eq!(EngineName::try_from(name.to_owned()), Err(NoEngineName));
        }
        assert_eq!(engine("c0ffee").as_str(), "c0ffee");
    }

    #[test]
    fn garbage_is_what_nothing_refers_to() {
        let path = tempfile::tempdir().unwrap();
        let data = DataDir::open(path.path()).unwrap();
        let mut first = blobs(&data);
        let kept = put(&mut first, Kind::Component, b"kept");
        let lost = put(&mut first, Kind::Component, b"lost");
        let artefact = put(&mut first, Kind::Artefact, b"kept");
        put(&mut first, Kind::Artefact, b"lost");
        std::mem::forget(first.create().unwrap()); // as a crash leaves it
        let stale = path
            .path()
            .join("artefacts")
            .join(format!("{}-0ld", kept.hex()));
        std::fs::write(&stale, "made by another engine").unwrap();

        let mut second = blobs(&data);
        let next = engine("0e1");
        second.keep_for(next.clone());
        let prepared = put(&mut second, Kind::ArtefactFor(&next), b"kept");
        put(&mut second, Kind::ArtefactFor(&next), b"lost");
        assert_eq!(path.path().join("tmp").read_dir().unwrap().count(), 0);
        assert_eq!(second.collect_garbage(&HashSet::from([kept])).unwrap(), 4);
        let found = second.find(Kind::ArtefactFor(&next), &prepared).unwrap();
        assert!(found.is_some(), "for the host that is to take over");
        assert!(second.find(Kind::Component, &kept).unwrap().is_some());
        assert!(second.find(Kind::Artefact, &artefact).unwrap().is_some());
        assert!(second.find(Kind::Component, &lost).unwrap().is_none());
        second.remove(&kept).unwrap();
        assert!(second.find(Kind::Component, &kept).unwrap().is_none());
        second.remove(&kept).unwrap();
    }
}
