//! Backup and restore: the intent, the components and what volumes hold in one tar file.
//!
//! ```text
//!  state.db          a copy of the database, as of one moment
//!  blobs/<hex>       every component that it refers to
//!  volumes/<hex>     what a volume holds (`storage::pack`), as of one moment
//!  manifest.json     last: how many there are; without it the file is not whole
//! ```
//!
//! Taken while the host runs: control holds back the removal of files from the copy of the
//! database to the last byte. Each volume is copied by data between two changes, later than the
//! database was, and sent from the copy: it is what a crash at that moment would have left. Two volumes
//! are not of the same moment. One that was deleted meanwhile is left out, and is empty when restored. Compiled artefacts are not in it (they are good for one engine and
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
use super::volumes::VolumeDirectory;
use super::{Blobs, DataDir, EngineName, Health, SqliteStore, Store, StoreError, Volume};
use crate::config::COMPONENT_MAX;
use crate::storage::{Packer, unpack as unpack_volume};

const DATABASE: &str = "state.db";
const MANIFEST: &str = "manifest.json";
const BLOBS: &str = "blobs/";
const VOLUMES: &str = "volumes/";
const FORMAT: u32 = 2;
/// Has no volumes.
const FORMAT_BEFORE: u32 = 1;
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
    #[serde(default)]
    volumes: usize,
}

/// What comes next of a backup.
#[derive(Debug)]
pub enum Piece {
    /// These bytes.
    Bytes(Bytes),
    /// What this volume holds: a copy is to be made, and told to [`Backup::copied`].
    Wanted(Volume),
    /// Nothing.
    End,
}

/// A backup on its way, piece by piece.
#[derive(Debug)]
pub struct Backup {
    database: Option<File>,
    components: Vec<Digest>,
    volumes: Vec<Volume>,
    sent_volumes: usize,
    total: usize,
    manifest_due: bool,
    ended: bool,
    /// The file that is being sent, and how much is left of it.
    current: Option<(Source, u64)>,
    /// Zeros that fill its last block.
    padding: usize,
}

impl Backup {
    /// A backup of a copy of the database, of these components and volumes.
    #[must_use]
    pub fn new(database: File, components: HashSet<Digest>, volumes: Vec<Volume>) -> Self {
        let mut components: Vec<_> = components.into_iter().collect();
        components.sort_unstable_by(|a, b| b.cmp(a));
        Self {
            database: Some(database),
            total: components.len(),
            components,
            volumes,
            sent_volumes: 0,
            manifest_due: true,
            ended: false,
            current: None,
            padding: 0,
        }
    }

    /// What comes next.
    ///
    /// # Errors
    /// Those of the file system; the backup is not whole then.
    pub fn next(&mut self, blobs: &Blobs) -> io::Result<Piece> {
        if let Some((mut source, left)) = self.current.take() {
            return self.read(&mut source, left).map(|(chunk, left)| {
                self.current = (left > 0).then_some((source, left));
                Piece::Bytes(chunk)
            });
        }
        if let Some(file) = self.database.take() {
            return self.begin_file(DATABASE, file).map(Piece::Bytes);
        }
        if let Some(digest) = self.components.pop() {
            let found = blobs.find(Kind::Component, &digest)?;
            let file = found.ok_or_else(|| io::Error::other(format!("{digest} is missing")))?;
            return self
                .begin_file(&format!("{BLOBS}{}", digest.hex()), file)
                .map(Piece::Bytes);
        }
        if let Some(volume) = self.volumes.pop() {
            return Ok(Piece::Wanted(volume));
        }
        if std::mem::take(&mut self.manifest_due) {
            let manifest = serde_json::to_vec_pretty(&Manifest {
                format: FORMAT,
                insula: env!("CARGO_PKG_VERSION").to_owned(),
                components: self.total,
                volumes: self.sent_volumes,
            })?;
            let mut bytes = header(MANIFEST, manifest.len() as u64)?;
            bytes.extend(&manifest);
            bytes.resize(bytes.len() + padding(manifest.len() as u64), 0);
            return Ok(Piece::Bytes(bytes.into()));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Ok(Piece::End);
        }
        Ok(Piece::Bytes(Bytes::from_static(&END)))
    }

    /// A volume that was wanted is copied into this directory, which nobody changes until the next
    /// one is wanted. The next bytes.
    ///
    /// # Errors
    /// Those of the file system; the backup is not whole then.
    pub fn copied(&mut self, volume: &Volume, copy: &File) -> io::Result<Bytes> {
        let size_bytes = Packer::size(copy)?;
        let packer = Source::Volume(Box::new(Packer::new(copy)?));
        self.sent_volumes += 1;
        self.begin(
            &format!("{VOLUMES}{}", volume.directory),
            packer,
            size_bytes,
        )
    }

    fn begin_file(&mut self, name: &str, file: File) -> io::Result<Bytes> {
        let size_bytes = file.metadata()?.len();
        self.begin(name, Source::File(file), size_bytes)
    }

    fn begin(&mut self, name: &str, source: Source, size_bytes: u64) -> io::Result<Bytes> {
        self.padding = padding(size_bytes);
        self.current = (size_bytes > 0).then_some((source, size_bytes));
        Ok(header(name, size_bytes)?.into())
    }

    fn read(&mut self, source: &mut Source, left: u64) -> io::Result<(Bytes, u64)> {
        let size = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let mut chunk = vec![0; size];
        match source {
            Source::File(file) => file.read_exact(&mut chunk)?,
            Source::Volume(packer) => packer.read_exact(&mut chunk)?,
        }
        let left = left - size as u64;
        if left == 0 {
            chunk.resize(chunk.len() + std::mem::take(&mut self.padding), 0);
        }
        Ok((chunk.into(), left))
    }
}

/// Where the bytes of an entry come from.
#[derive(Debug)]
enum Source {
    File(File),
    Volume(Box<Packer>),
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
    /// Volumes that came with what they hold.
    pub volumes: usize,
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
    // Nothing is compiled here.
    let engine = EngineName::try_from("0".to_owned()).map_err(io::Error::other)?;
    let mut blobs = Blobs::open(&data, engine, Health::default())?;
    let unpacked = unpack(backup, &data, &mut blobs)?;
    check(&data, &unpacked)?;
    let dir = data.dir()?;
    dir.rename(RESTORED, &dir, DATABASE)?;
    sync_dir(&dir)?;
    Ok(Restored {
        components: unpacked.components.len(),
        volumes: unpacked.volumes.len(),
    })
}

/// The database's name until everything was checked.
const RESTORED: &str = "restored.db";

fn content(what: impl std::fmt::Display) -> RestoreError {
    RestoreError::Content(what.to_string())
}

/// What came beside the database.
#[derive(Debug, Default)]
struct Unpacked {
    components: BTreeSet<Digest>,
    volumes: BTreeSet<String>,
}

/// Writes what is in the archive.
fn unpack(backup: impl Read, data: &DataDir, blobs: &mut Blobs) -> Result<Unpacked, RestoreError> {
    let mut unpacked = Unpacked::default();
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
            unpacked.components.insert(digest);
        } else if let Some(name) = name.strip_prefix(VOLUMES) {
            let directory: VolumeDirectory = name.parse().map_err(content)?;
            if !unpacked.volumes.insert(name.to_owned()) {
                return Err(content(format_args!("the volume {name} came twice")));
            }
            let made = blobs.make_volume(&directory)?;
            unpack_volume(&mut entry, &made).map_err(content)?;
        } else {
            return Err(content(format_args!("{name:?} has no place in it")));
        }
    }
    let manifest = manifest.ok_or_else(|| content("it ends early"))?;
    if ![FORMAT, FORMAT_BEFORE].contains(&manifest.format) {
        return Err(content(format_args!(
            "it has format {}, this insula reads {FORMAT}",
            manifest.format
        )));
    }
    let came = (unpacked.components.len(), unpacked.volumes.len());
    if !database || (manifest.components, manifest.volumes) != came {
        return Err(content("something is missing"));
    }
    Ok(unpacked)
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

fn check(data: &DataDir, unpacked: &Unpacked) -> Result<(), RestoreError> {
    let mut store = SqliteStore::open_file(data, RESTORED, Health::default())?;
    store.check().map_err(content)?;
    let wanted = store.digests()?;
    let missing = |digest: &&Digest| !unpacked.components.contains(digest);
    if let Some(missing) = wanted.iter().find(missing) {
        return Err(content(format_args!("{missing} is missing")));
    }
    let volumes = store.volume_directories()?;
    match unpacked
        .volumes
        .iter()
        .find(|name| !volumes.contains(*name))
    {
        Some(name) => Err(content(format_args!("nothing refers to the volume {name}"))),
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
    loop {
        match backup.next(blobs)? {
            Piece::Bytes(chunk) => into.write_all(&chunk)?,
            // Nobody changes it here.
            Piece::Wanted(volume) => {
                let copy = blobs.open_volume(&volume.directory)?;
                into.write_all(&backup.copied(&volume, &copy)?)?;
            }
            Piece::End => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{NewVersion, NewVolume, Precondition, Timestamp};

    fn component(blobs: &mut Blobs, content: &[u8]) -> Digest {
        let mut file = blobs.create().unwrap();
        file.write(content).unwrap();
        file.sync().unwrap();
        let digest = file.digest();
        blobs.place(Kind::Component, &digest, file).unwrap();
        digest
    }

    fn blobs(data: &DataDir) -> Blobs {
        let engine = EngineName::try_from("c".to_owned()).unwrap();
        Blobs::open(data, engine, Health::default()).unwrap()
    }

    /// A host with one service and two versions, and its backup.
    fn backup(path: &Path) -> (Vec<u8>, Vec<Digest>) {
        let data = DataDir::open(path).unwrap();
        let mut blobs = blobs(&data);
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
        let new = NewVolume {
            spec: Default::default(),
            directory: VolumeDirectory::random().unwrap(),
            read_only: false,
            origin: None,
        };
        let put = store.put_volume(&tenant, &"data".parse().unwrap(), &new, none, now);
        let volume = put.unwrap().record().clone();
        blobs.make_volume(&new.directory).unwrap();
        let inside = path.join("volumes").join(new.directory.as_str());
        std::fs::write(inside.join("kept"), "what a guest wrote").unwrap();
        let copy = store.copy(&blobs.directory().unwrap()).unwrap();
        let mut tar = Vec::new();
        write_all(
            Backup::new(copy, store.digests().unwrap(), vec![volume]),
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
            Restored {
                components: 2,
                volumes: 1
            }
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
        let blobs = blobs(&data);
        for digest in &digests {
            assert!(blobs.find(Kind::Component, digest).unwrap().is_some());
        }
        let volume = store
            .volume(&"a".parse().unwrap(), &"data".parse().unwrap())
            .unwrap();
        let inside = path.join("volumes").join(volume.directory.as_str());
        let kept = std::fs::read_to_string(inside.join("kept")).unwrap();
        assert_eq!(kept, "what a guest wrote");
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
        for word in [&b"kept"[..], b"volumes/"] {
            let mut other = tar.clone();
            let all: Vec<_> = tar.windows(word.len()).enumerate().collect();
            let last = all.iter().rev().find(|(_, part)| *part == word);
            other[last.unwrap().0 + 2] = b'/';
            refused(&other, "another volume");
        }
        let mut name = tar.clone();
        name[header..header + 6].copy_from_slice(b"../../");
        refused(&name, "another name");
        refused(&vec![0; 4_096], "nothing");
    }
}
