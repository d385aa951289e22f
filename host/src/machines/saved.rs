//! A machine's last snapshot: what it was when it was saved, sealed.
//!
//! ```text
//! <data>/machines/<id>/saved/state          processors and devices, in the monitor's form
//!                            memory         the guest's memory, sparse
//!                            disk-<n>       the overlays, as they were then
//!                            seal           HMAC-SHA-256 (32 bytes), then the manifest in JSON
//! ```
//!
//! The manifest has the size and the hash of each file, and the [`Shape`] of the machine, and the MAC
//! covers it under a key that only this data directory holds: nothing that was changed, or that
//! another host saved, reaches the monitor's parser or a guest's memory.
//!
//! **Failure paths.** A snapshot grows in `saving/`, and takes its name when it is whole: until then
//! the one before is there. What a host that died left in `saving/` is removed by the next snapshot.
//! Whoever goes on from a snapshot holds its files open, so that the next one may replace it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use insula_types::machine::DiskMode;
use insula_types::{Bytes, Digest, TenantId};
use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::place::Place;
use crate::state::machines::Machine;

const VERSION: u32 = 1;
const STATE: &str = "state";
const MEMORY: &str = "memory";
const SEAL: &str = "seal";
const MAC_BYTES: usize = 32;
/// A manifest of a dozen disks has some kilobytes.
const SEAL_MAX_BYTES: u64 = 64 << 10;
const CHUNK_BYTES: usize = 1 << 20;

/// The key of the snapshots of one data directory.
#[derive(Clone)]
pub(crate) struct SnapshotKey([u8; 32]);

impl SnapshotKey {
    pub(crate) const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    fn mac(&self, manifest: &[u8]) -> Hmac<Sha256> {
        // RFC 2104, 2: a key shorter than the hash's block of 64 bytes is padded with zeros.
        let mut block = [0; 64];
        block[..32].copy_from_slice(&self.0);
        let mut mac = <Hmac<Sha256> as KeyInit>::new(&block.into());
        mac.update(manifest);
        mac
    }
}

impl std::fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SnapshotKey(..)")
    }
}

/// What a machine must be like to go on from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Shape {
    tenant: u64,
    vcpus: u8,
    memory: Bytes,
    disks: Vec<(Digest, DiskMode, Option<Bytes>)>,
    #[serde(default)]
    net: bool,
}

impl Shape {
    pub(crate) fn of(machine: &Machine) -> Self {
        let disks = machine.images.disks.iter().zip(&machine.spec.disks);
        Self {
            tenant: TenantId::get(machine.tenant),
            vcpus: machine.spec.vcpus,
            memory: machine.spec.memory,
            disks: disks
                .map(|(digest, disk)| (*digest, disk.mode, disk.size))
                .collect(),
            net: machine.spec.net.is_some(),
        }
    }

    /// The overlays that such a machine has.
    fn overlays(&self) -> impl Iterator<Item = String> {
        let disks = self.disks.iter().enumerate();
        let writable = disks.filter(|(_, (_, mode, _))| *mode == DiskMode::Rw);
        writable.map(|(number, _)| overlay(number))
    }
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    shape: Shape,
    files: BTreeMap<String, Sealed>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    bytes: u64,
    sha256: Digest,
}

/// Why nothing goes on from a snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SavedError {
    /// None was made.
    #[error("the machine has no snapshot")]
    Nothing,
    /// Changed, or of another host.
    #[error("the snapshot was changed, or is another host's: {0}")]
    Broken(&'static str),
    /// Of another machine.
    #[error("processors, memory and disks must be those of the machine that was saved")]
    Shape,
    /// The file system's.
    #[error("the snapshot's files: {0}")]
    File(#[from] io::Error),
}

/// A snapshot that is being made.
#[derive(Debug)]
pub(crate) struct Saving {
    path: PathBuf,
    place: PathBuf,
}

impl Saving {
    /// Makes room for it.
    pub(crate) fn begin(place: &Place) -> io::Result<Self> {
        let path = place.path().join("saving");
        forget(&path)?;
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        let place = place.path().to_owned();
        Ok(Self { path, place })
    }

    /// Where the monitor writes state and memory.
    pub(crate) fn files(&self) -> io::Result<(File, File)> {
        Ok((new(&self.path.join(STATE))?, new(&self.path.join(MEMORY))?))
    }

    /// Copies the overlays of a machine that is paused and has made them durable.
    pub(crate) fn copy_disks(&self, shape: &Shape) -> io::Result<()> {
        for name in shape.overlays() {
            let from = File::open(self.place.join(&name))?;
            copy(&from, &new(&self.path.join(&name))?)?;
        }
        Ok(())
    }

    /// Seals what is there, and puts it in the place of the snapshot before.
    pub(crate) fn seal(self, key: &SnapshotKey, shape: Shape) -> io::Result<()> {
        let mut files = BTreeMap::new();
        for name in names(&shape) {
            let sealed = Sealed::of(&File::open(self.path.join(&name))?)?;
            files.insert(name, sealed);
        }
        let version = VERSION;
        let manifest = serde_json::to_vec(&Manifest {
            version,
            shape,
            files,
        })?;
        let mut bytes = key.mac(&manifest).finalize().into_bytes().to_vec();
        bytes.extend(manifest);
        let seal = new(&self.path.join(SEAL))?;
        seal.write_all_at(&bytes, 0)?;
        seal.sync_all()?;
        File::open(&self.path)?.sync_all()?;
        let saved = saved(&self.place);
        forget(&saved)?;
        fs::rename(&self.path, saved)?;
        File::open(&self.place)?.sync_all()
    }
}

/// A snapshot that is whole: its files, open.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) state: File,
    pub(crate) memory: File,
    disks: Vec<(String, File)>,
}

impl Saved {
    /// Opens a machine's last snapshot for a machine of this shape, and checks every byte of it.
    pub(crate) fn open(
        place: &Place,
        key: &SnapshotKey,
        shape: &Shape,
    ) -> Result<Self, SavedError> {
        let path = saved(place.path());
        let seal = match File::open(path.join(SEAL)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SavedError::Nothing);
            }
            other => other?,
        };
        let mut bytes = Vec::new();
        seal.take(SEAL_MAX_BYTES).read_to_end(&mut bytes)?;
        let (mac, json) = bytes
            .split_at_checked(MAC_BYTES)
            .ok_or(SavedError::Broken("its seal is too short"))?;
        key.mac(json)
            .verify_slice(mac)
            .map_err(|_| SavedError::Broken("its seal"))?;
        let manifest: Manifest =
            serde_json::from_slice(json).map_err(|_| SavedError::Broken("its manifest"))?;
        if manifest.version != VERSION || manifest.shape != *shape {
            return Err(SavedError::Shape);
        }
        let open = |name: &str| {
            let file = File::open(path.join(name))?;
            match manifest.files.get(name) {
                Some(sealed) if *sealed == Sealed::of(&file)? => Ok(file),
                _ => Err(SavedError::Broken("one of its files")),
            }
        };
        let overlays = shape.overlays().map(|name| {
            let file = open(&name)?;
            Ok::<_, SavedError>((name, file))
        });
        Ok(Self {
            state: open(STATE)?,
            memory: open(MEMORY)?,
            disks: overlays.collect::<Result<_, _>>()?,
        })
    }

    /// Gives a machine that does not run the disks of the snapshot.
    pub(crate) fn put_disks(&self, place: &Place) -> io::Result<()> {
        place.make()?;
        for (name, file) in &self.disks {
            let (new_name, path) = (format!("{name}.new"), place.path());
            forget(&path.join(&new_name))?;
            copy(file, &new(&path.join(&new_name))?)?;
            fs::rename(path.join(&new_name), path.join(name))?;
        }
        Ok(())
    }
}

impl Sealed {
    fn of(file: &File) -> io::Result<Self> {
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match file.read_at(&mut chunk, bytes)? {
                0 => break,
                length => {
                    hash.update(&chunk[..length]);
                    bytes += length as u64;
                }
            }
        }
        let sha256 = Digest::new(hash.finalize().into());
        Ok(Self { bytes, sha256 })
    }
}

fn names(shape: &Shape) -> Vec<String> {
    let mut names = vec![STATE.to_owned(), MEMORY.to_owned()];
    names.extend(shape.overlays());
    names
}

pub(super) fn overlay(number: usize) -> String {
    format!("disk-{number}")
}

/// Where a machine's last snapshot is.
pub(super) fn saved(place: &Path) -> PathBuf {
    place.join("saved")
}

fn new(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).open(path)
}

/// Removes a file, or a directory of files.
fn forget(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Copies what a file holds, and leaves its holes holes; shares the bytes where the file system can.
fn copy(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return to.sync_all();
    }
    let end = from.metadata()?.len();
    to.set_len(end)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(from, SeekFrom::Hole(data))?;
        let mut place = data;
        while place < at {
            let most = usize::try_from(at - place).unwrap_or(CHUNK_BYTES);
            let part = &mut chunk[..most.min(CHUNK_BYTES)];
            from.read_exact_at(part, place)?;
            to.write_all_at(part, place)?;
            place += part.len() as u64;
        }
    }
    to.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use insula_types::MachineId;

    use super::*;
    use crate::machines::place::Places;

    const KEY: SnapshotKey = SnapshotKey::from_bytes([7; 32]);

    fn shape() -> Shape {
        Shape {
            tenant: 3,
            vcpus: 2,
            memory: Bytes::mib(16),
            disks: vec![
                (Digest::new([1; 32]), DiskMode::Ro, None),
                (Digest::new([2; 32]), DiskMode::Rw, None),
            ],
            net: true,
        }
    }

    /// A machine with a snapshot.
    fn saved_machine() -> (tempfile::TempDir, Place) {
        let base = tempfile::tempdir().expect("a directory");
        let place = Places::open(base.path())
            .expect("it is there")
            .of(MachineId::new(1));
        place.make().expect("room");
        fs::write(place.path().join("disk-1"), b"what it wrote").expect("room");
        let saving = Saving::begin(&place).expect("room");
        let (state, memory) = saving.files().expect("room");
        state.write_all_at(b"registers", 0).expect("room");
        memory.write_all_at(b"memory", 8 << 20).expect("room");
        saving.copy_disks(&shape()).expect("room");
        saving.seal(&KEY, shape()).expect("room");
        (base, place)
    }

    #[test]
    fn what_was_saved_comes_back() {
        let (_base, place) = saved_machine();
        fs::write(place.path().join("disk-1"), b"something else").expect("room");
        let saved = Saved::open(&place, &KEY, &shape()).expect("whole");
        saved.put_disks(&place).expect("room");
        let disk = fs::read(place.path().join("disk-1")).expect("it is there");
        assert_eq!(disk, b"what it wrote");
        assert_eq!(saved.memory.metadata().expect("open").len(), (8 << 20) + 6);
    }

    #[test]
    fn nothing_that_was_changed_is_opened() {
        let refused = |place: &Place, key: &SnapshotKey, shape: &Shape| {
            Saved::open(place, key, shape)
                .expect_err("refused")
                .to_string()
        };
        for file in ["state", "memory", "disk-1", "seal"] {
            let (_base, place) = saved_machine();
            let path = saved(place.path()).join(file);
            let opened = File::options()
                .read(true)
                .write(true)
                .open(&path)
                .expect("there");
            let mut byte = [0];
            opened.read_exact_at(&mut byte, 0).expect("not empty");
            opened.write_all_at(&[byte[0] ^ 1], 0).expect("room");
            let why = refused(&place, &KEY, &shape());
            assert!(why.contains("was changed"), "{file}: {why}");
        }
        let (_base, place) = saved_machine();
        let other = SnapshotKey::from_bytes([8; 32]);
        assert!(refused(&place, &other, &shape()).contains("another host's"));
        let larger = Shape {
            memory: Bytes::mib(32),
            ..shape()
        };
        assert!(refused(&place, &KEY, &larger).contains("must be those"));
        let (_base, place) = saved_machine();
        fs::remove_dir_all(saved(place.path())).expect("it is there");
        assert!(refused(&place, &KEY, &shape()).contains("no snapshot"));
    }

    #[test]
    fn holes_stay_holes() {
        let directory = tempfile::tempdir().expect("a directory");
        let from = new(&directory.path().join("from")).expect("room");
        from.set_len(64 << 20).expect("room");
        from.write_all_at(b"far out", 32 << 20).expect("room");
        let to = new(&directory.path().join("to")).expect("room");
        copy(&from, &to).expect("room");
        let metadata = to.metadata().expect("open");
        assert_eq!(metadata.len(), 64 << 20);
        assert!(metadata.blocks() * 512 < 4 << 20, "{}", metadata.blocks());
        assert_eq!(
            Sealed::of(&to).expect("read"),
            Sealed::of(&from).expect("read")
        );
    }
}
