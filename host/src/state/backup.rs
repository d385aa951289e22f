//! Backup and restore: the intent and the components in one tar file.
//!
//! ```text
//!  state.db          a copy of the database, as of one moment
//!  blobs/<hex>       every component that it refers to
//!  manifest.json     last: how many there are; without it the file is not whole
//! ```
//!
//! Taken while the host runs: control holds back the removal of files from the copy of the
//! database to the last byte. Compiled artefacts are not in it (they are good for one engine and
//! one kind of CPU, and are made again from the components), nor is any secret: tokens are in the
//! database as hashes.
//!
//! A restore goes into an empty directory and believes nothing: names, sizes, the digest of every
//! component, the database's own integrity, and that it refers to nothing that did not come. The
//! database takes its name last, so that what was interrupted cannot be mistaken for a host.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use insula_types::Digest;
use serde::{Deserialize, Serialize};

use super::blobs::Kind;
use super::dir::{DataDirError, sync_dir};
use super::sqlite::OpenError;
use super::{Blobs, DataDir, Health, SqliteStore, Store, StoreError};
use crate::config::COMPONENT_MAX;

const DATABASE: &str = "state.db";
const MANIFEST: &str = "manifest.json";
const BLOBS: &str = "blobs/";
const FORMAT: u32 = 1;
/// Largest manifest.
const MANIFEST_MAX_BYTES: u64 = 64 << 10;
/// What is read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// The unit of a tar file (POSIX.1-1988, ustar).
const BLOCK: u64 = 512;
/// Two blocks of zeros end an archive.
const END: [u8; 1024] = [0; 1024];

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    insula: String,
    components: usize,
}

/// A backup on its way, piece by piece.
#[derive(Debug)]
pub struct Backup {
    database: Option<File>,
    components: Vec<Digest>,
    total: usize,
    manifest_due: bool,
    ended: bool,
    /// The file that is being sent, and how much is left of it.
    current: Option<(File, u64)>,
    /// Zeros that fill its last block.
    padding: usize,
}

impl Backup {
    /// A backup of a copy of the database and of these components.
    #[must_use]
    pub fn new(database: File, components: HashSet<Digest>) -> Self {
        let mut components: Vec<_> = components.into_iter().collect();
        components.sort_unstable_by(|a, b| b.cmp(a));
        Self {
            database: Some(database),
            total: components.len(),
            components,
            manifest_due: true,
            ended: false,
            current: None,
            padding: 0,
        }
    }

    /// The next bytes; `None` after the last.
    ///
    /// # Errors
    /// Those of the file system; the backup is not whole then.
    pub fn next(&mut self, blobs: &Blobs) -> io::Result<Option<Bytes>> {
        if let Some((mut file, left)) = self.current.take() {
            return self.read(&mut file, left).map(|(chunk, left)| {
                self.current = (left > 0).then_some((file, left));
                Some(chunk)
            });
        }
        if let Some(file) = self.database.take() {
            return self.begin(DATABASE, file).map(Some);
        }
        if let Some(digest) = self.components.pop() {
            let found = blobs.find(Kind::Component, &digest)?;
            let file = found.ok_or_else(|| io::Error::other(format!("{digest} is missing")))?;
            return self
                .begin(&format!("{BLOBS}{}", digest.hex()), file)
                .map(Some);
        }
        if std::mem::take(&mut self.manifest_due) {
            let manifest = serde_json::to_vec_pretty(&Manifest {
                format: FORMAT,
                insula: env!("CARGO_PKG_VERSION").to_owned(),
                components: self.total,
            })?;
            let mut bytes = header(MANIFEST, manifest.len() as u64)?;
            bytes.extend(&manifest);
            bytes.resize(bytes.len() + padding(manifest.len() as u64), 0);
            return Ok(Some(bytes.into()));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Ok(None);
        }
        Ok(Some(Bytes::from_static(&END)))
    }

    fn begin(&mut self, name: &str, file: File) -> io::Result<Bytes> {
        let size_bytes = file.metadata()?.len();
        self.padding = padding(size_bytes);
        self.current = (size_bytes > 0).then_some((file, size_bytes));
        Ok(header(name, size_bytes)?.into())
    }

    fn read(&mut self, file: &mut File, left: u64) -> io::Result<(Bytes, u64)> {
        let size = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let mut chunk = vec![0; size];
        file.read_exact(&mut chunk)?;
        let left = left - size as u64;
        if left == 0 {
            chunk.resize(chunk.len() + std::mem::take(&mut self.padding), 0);
        }
        Ok((chunk.into(), left))
    }
}

fn padding(size_bytes: u64) -> usize {
    let rest = (BLOCK - size_bytes % BLOCK) % BLOCK;
    usize::try_from(rest).unwrap_or(0)
}

fn header(name: &str, size_bytes: u64) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_size(size_bytes);
    header.set_mode(0o600);
    header.set_cksum();
    Ok(header.as_bytes().to_vec())
}

/// Why a backup was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is something there already.
    #[error("{0} is not empty; a backup is restored into an empty or a new directory")]
    NotEmpty(std::path::PathBuf),
    /// The directory cannot be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The file or the directory cannot be read or written.
    #[error("cannot read the backup or write the data directory: {0}")]
    Io(#[from] io::Error),
    /// Something else than a backup.
    #[error("this is not a whole backup of insula: {0}")]
    Content(String),
    /// The database in it does not open.
    #[error(transparent)]
    Database(#[from] OpenError),
    /// The database in it cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Components.
    pub components: usize,
}

/// Makes a data directory from a backup. After an error the directory holds no host.
///
/// # Errors
/// [`RestoreError`].
pub fn restore(backup: impl Read, path: &Path) -> Result<Restored, RestoreError> {
    if DataDir::holds_anything(path)? {
        return Err(RestoreError::NotEmpty(path.to_owned()));
    }
    let data = DataDir::open(path)?;
    let mut blobs = Blobs::open(&data, "restored", Health::default())?;
    let unpacked = unpack(backup, &data, &mut blobs)?;
    check(&data, &unpacked)?;
    let dir = data.dir()?;
    dir.rename(RESTORED, &dir, DATABASE)?;
    sync_dir(&dir)?;
    Ok(Restored {
        components: unpacked.len(),
    })
}

/// The database's name until everything was checked.
const RESTORED: &str = "restored.db";

fn content(what: impl std::fmt::Display) -> RestoreError {
    RestoreError::Content(what.to_string())
}

/// Writes what is in the archive; gives the components.
fn unpack(
    backup: impl Read,
    data: &DataDir,
    blobs: &mut Blobs,
) -> Result<BTreeSet<Digest>, RestoreError> {
    let mut components = BTreeSet::new();
    let mut manifest = None;
    let mut database = false;
    let mut archive = tar::Archive::new(backup);
    for entry in archive.entries().map_err(content)? {
        let mut entry = entry.map_err(content)?;
        let name = String::from_utf8(entry.path_bytes().into_owned()).map_err(content)?;
        let plain = entry.header().entry_type().is_file();
        if manifest.is_some() || !plain {
            return Err(content(format_args!("{name:?} has no place in it")));
        }
        if name == DATABASE && !database {
            let mut file = data.create(RESTORED)?;
            io::copy(&mut entry, &mut file)?;
            file.sync_all()?;
            database = true;
        } else if name == MANIFEST && entry.size() <= MANIFEST_MAX_BYTES {
            let mut text = Vec::new();
            entry.read_to_end(&mut text)?;
            let read: Manifest = serde_json::from_slice(&text).map_err(content)?;
            manifest = Some(read);
        } else if let Some(hex) = name.strip_prefix(BLOBS) {
            let digest = format!("sha256:{hex}").parse().map_err(content)?;
            if entry.size() > COMPONENT_MAX.get() {
                return Err(content(format_args!("{digest} is too large")));
            }
            component(&mut entry, &digest, blobs)?;
            components.insert(digest);
        } else {
            return Err(content(format_args!("{name:?} has no place in it")));
        }
    }
    let manifest = manifest.ok_or_else(|| content("it ends early"))?;
    if manifest.format != FORMAT {
        return Err(content(format_args!(
            "it has format {}, this insula reads {FORMAT}",
            manifest.format
        )));
    }
    if !database || manifest.components != components.len() {
        return Err(content("something is missing"));
    }
    Ok(components)
}

fn component(
    entry: &mut impl Read,
    digest: &Digest,
    blobs: &mut Blobs,
) -> Result<(), RestoreError> {
    let mut file = blobs.create()?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match entry.read(&mut chunk)? {
            0 => break,
            read => file.write(&chunk[..read])?,
        }
    }
    if file.digest() != *digest {
        return Err(content(format_args!("{digest} was changed")));
    }
    file.sync()?;
    blobs.place(Kind::Component, digest, file)?;
    Ok(())
}

fn check(data: &DataDir, components: &BTreeSet<Digest>) -> Result<(), RestoreError> {
    let mut store = SqliteStore::open_file(data, RESTORED, Health::default())?;
    store.check().map_err(content)?;
    let wanted = store.digests()?;
    match wanted.iter().find(|digest| !components.contains(digest)) {
        Some(missing) => Err(content(format_args!("{missing} is missing"))),
        None => Ok(()),
    }
}

/// Writes a whole backup; for tests.
#[cfg(test)]
pub(crate) fn write_all(
    mut backup: Backup,
    blobs: &Blobs,
    mut into: impl io::Write,
) -> io::Result<()> {
    while let Some(chunk) = backup.next(blobs)? {
        into.write_all(&chunk)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{NewVersion, Precondition, Timestamp};

    fn component(blobs: &mut Blobs, content: &[u8]) -> Digest {
        let mut file = blobs.create().unwrap();
        file.write(content).unwrap();
        file.sync().unwrap();
        let digest = file.digest();
        blobs.place(Kind::Component, &digest, file).unwrap();
        digest
    }

    /// A host with one service and two versions, and its backup.
    fn backup(path: &Path) -> (Vec<u8>, Vec<Digest>) {
        let data = DataDir::open(path).unwrap();
        let mut blobs = Blobs::open(&data, "c", Health::default()).unwrap();
        let mut store = SqliteStore::open(&data, Health::default()).unwrap();
        let now = Timestamp::from_millis(1);
        let (tenant, name) = ("a".parse().unwrap(), "web".parse().unwrap());
        let none = Precondition::None;
        store
            .put_tenant(&tenant, &Default::default(), none, 0, now)
            .unwrap();
        let put = store.put_service(&tenant, &name, &Default::default(), none, now);
        let service = put.unwrap().record().id;
        let contents: [&[u8]; 2] = [b"one", &[7; CHUNK_BYTES + 5]];
        let digests: Vec<_> = contents.iter().map(|c| component(&mut blobs, c)).collect();
        for digest in &digests {
            let upload = NewVersion {
                digest: *digest,
                size: insula_types::Bytes::new(3).unwrap(),
                compile_ms: 0,
            };
            store.add_version(service, &upload, true, now).unwrap();
        }
        let copy = store.copy(&blobs.directory().unwrap()).unwrap();
        let mut tar = Vec::new();
        write_all(
            Backup::new(copy, store.digests().unwrap()),
            &blobs,
            &mut tar,
        )
        .unwrap();
        (tar, digests)
    }

    #[test]
    fn what_was_backed_up_comes_back() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (tar, digests) = backup(from.path());
        let path = to.path().join("new");
        assert_eq!(
            restore(&tar[..], &path).unwrap(),
            Restored { components: 2 }
        );
        let data = DataDir::open(&path).unwrap();
        let mut store = SqliteStore::open(&data, Health::default()).unwrap();
        let service = store
            .service(&"a".parse().unwrap(), &"web".parse().unwrap())
            .unwrap();
        assert_eq!(
            service
                .traffic
                .settled()
                .map(insula_types::VersionNumber::get),
            Some(2)
        );
        let blobs = Blobs::open(&data, "c", Health::default()).unwrap();
        for digest in &digests {
            assert!(blobs.find(Kind::Component, digest).unwrap().is_some());
        }
        drop((store, blobs, data));
        let again = restore(&tar[..], &path).unwrap_err();
        assert!(matches!(again, RestoreError::NotEmpty(_)), "{again}");
    }

    #[test]
    fn what_is_not_whole_or_was_changed_makes_no_host() {
        let from = tempfile::tempdir().unwrap();
        let (tar, _) = backup(from.path());
        let refused = |tar: &[u8], what: &str| {
            let to = tempfile::tempdir().unwrap();
            let path = to.path().join("new");
            let result = restore(tar, &path);
            assert!(result.is_err(), "{what} was restored");
            assert!(!path.join(DATABASE).exists(), "{what}");
        };
        for cut in [
            0,
            100,
            512,
            tar.len() / 2,
            tar.len() - 1_100,
            tar.len() - 2_000,
        ] {
            refused(&tar[..cut], "a part");
        }
        let header = tar.windows(6).position(|part| part == b"blobs/").unwrap();
        // The database, which comes first, may hold the word as well.
        let mut after = tar[header..].windows(3);
        let position = header + after.position(|part| part == b"one").unwrap();
        let mut changed = tar.clone();
        changed[position] ^= 1;
        refused(&changed, "another component");
        let mut name = tar.clone();
        name[header..header + 6].copy_from_slice(b"../../");
        refused(&name, "another name");
        refused(&vec![0; 4_096], "nothing");
    }
}
