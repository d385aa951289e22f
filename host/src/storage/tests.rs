//! The books against the file system.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use insula_types::Bytes;
use insula_types::volume::VolumeSpec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const KIB: u64 = 1 << 10;

fn quota(size: u64, inodes: u64) -> VolumeSpec {
    let size = Bytes::new(size).unwrap();
    VolumeSpec {
        size,
        inodes,
        ..VolumeSpec::default()
    }
}

fn volume_of(dir: &Path, tenant: &Arc<TenantStorage>, quota: VolumeSpec) -> Arc<Volume> {
    let root = File::open(dir).unwrap();
    Arc::new(Volume::new(
        VolumeId::new(1),
        root,
        Arc::clone(tenant),
        quota,
    ))
}

fn volume(quota: VolumeSpec) -> (Arc<Volume>, Arc<TenantStorage>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let tenant = Arc::<TenantStorage>::default();
    (volume_of(dir.path(), &tenant, quota), tenant, dir)
}

/// Opens a file, and makes it where it is not; as the engine does it.
fn open(volume: &Arc<Volume>, path: &Path) -> Result<(File, Handle), ChangeError> {
    let change = volume.change()?;
    if !path.exists() {
        change.take(Usage::inode(0))?;
    }
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path)?;
    let handle = change.opened(file.metadata()?.ino(), &file)?;
    Ok((file, handle))
}

fn write(open: &(File, Handle), bytes: &[u8], offset: u64) -> Result<usize, ChangeError> {
    let (file, handle) = open;
    let change = handle.volume().change()?;
    let wanted = file.metadata()?.len().max(offset + bytes.len() as u64);
    change.resize(handle, file, wanted, || file.write_at(bytes, offset))
}

fn cut(open: &(File, Handle), size: u64) -> Result<(), ChangeError> {
    let (file, handle) = open;
    let change = handle.volume().change()?;
    change.resize(handle, file, size, || file.set_len(size))
}

fn remove(volume: &Arc<Volume>, path: &Path) {
    let change = volume.change().unwrap();
    let Ok(metadata) = fs::metadata(path) else {
        return;
    };
    fs::remove_file(path).unwrap();
    change.removed(metadata.ino(), metadata.len());
}

#[test]
fn a_full_volume_takes_nothing_more_and_what_goes_makes_room() {
    let (volume, tenant, dir) = volume(quota(64 * KIB, 3));
    let a = open(&volume, &dir.path().join("a")).unwrap();
    assert_eq!(
        volume.used(),
        Usage {
            bytes: KIB,
            inodes: 1
        }
    );
    assert_eq!(write(&a, b"x", 0).unwrap(), 1);
    assert_eq!(volume.used().bytes, 5 * KIB);
    assert_eq!(write(&a, b"y", 4095).unwrap(), 1);
    assert_eq!(volume.used().bytes, 5 * KIB, "within the block");
    // 1 KiB for the inode, 60 in blocks: one block more is beyond 64.
    cut(&a, 60 * KIB).unwrap();
    let full = cut(&a, 60 * KIB + 1).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Bytes)), "{full}");
    let full = write(&a, b"z", 1 << 61).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Bytes)), "{full}");
    assert_eq!(a.0.metadata().unwrap().len(), 60 * KIB, "nothing was done");
    cut(&a, 0).unwrap();
    for name in ["b", "c"] {
        open(&volume, &dir.path().join(name)).unwrap();
    }
    let full = open(&volume, &dir.path().join("d")).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Inodes)), "{full}");
    remove(&volume, &dir.path().join("b"));
    open(&volume, &dir.path().join("d")).unwrap();
    assert_eq!(tenant.used_bytes(), volume.used().bytes);
    drop(a);
    drop(volume);
    assert_eq!(tenant.used_bytes(), 0);
}

#[test]
fn a_file_without_a_name_is_paid_for_until_it_is_closed() {
    let (volume, _, dir) = volume(quota(1 << 20, 10));
    let path = dir.path().join("a");
    let first = open(&volume, &path).unwrap();
    let second = open(&volume, &path).unwrap();
    write(&first, &[1; 8192], 0).unwrap();
    remove(&volume, &path);
    assert_eq!(volume.used(), Usage::inode(8192));
    write(&second, &[1; 8192], 8192).unwrap();
    drop(first);
    assert_eq!(volume.used(), Usage::inode(16384));
    drop(second);
    assert_eq!(volume.used(), Usage::default());
}

#[test]
fn the_tenants_limit_is_over_all_its_volumes() {
    let (one, tenant, _dir) = volume(quota(1 << 20, 10));
    let other_dir = tempfile::tempdir().unwrap();
    let other = volume_of(other_dir.path(), &tenant, quota(1 << 20, 10));
    tenant.set_limit(Some(Bytes::new(20 * KIB).unwrap()));
    let a = open(&one, &_dir.path().join("a")).unwrap();
    let b = open(&other, &other_dir.path().join("b")).unwrap();
    cut(&a, 12 * KIB).unwrap();
    let full = cut(&b, 8 * KIB).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Tenant)), "{full}");
    cut(&a, 8 * KIB).unwrap();
    cut(&b, 8 * KIB).unwrap();
    assert_eq!(tenant.used_bytes(), 18 * KIB);
}

#[test]
fn what_another_process_wrote_is_in_the_books_after_another_count() {
    let (old, _, dir) = volume(quota(1 << 20, 64));
    let tenant = Arc::<TenantStorage>::default();
    let new = volume_of(dir.path(), &tenant, quota(1 << 20, 64));
    let gone = open(&new, &dir.path().join("gone")).unwrap();
    cut(&gone, 8 * KIB).unwrap();
    remove(&new, &dir.path().join("gone"));
    let before = new.used();
    let theirs = open(&old, &dir.path().join("theirs")).unwrap();
    cut(&theirs, 100 * KIB).unwrap();
    assert_eq!(new.used(), before, "they do not know of one another");
    new.recount().unwrap();
    let mut all = before;
    all += Usage::inode(100 * KIB);
    assert_eq!(new.used(), all, "with what is open and has no name");
    assert_eq!(tenant.used_bytes(), all.bytes);
    drop(gone);
    assert_eq!(new.used(), Usage::inode(100 * KIB));
    assert_eq!(tenant.used_bytes(), new.used().bytes);
}

#[test]
fn writers_at_once_do_not_get_more_than_there_is() {
    let (volume, tenant, dir) = volume(quota(1 << 20, 64));
    // A file takes room as well: all are there before the first of them fills what is left.
    let opened = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for writer in 0..8u64 {
            let (volume, dir, opened) = (&volume, dir.path(), &opened);
            scope.spawn(move || {
                // All write to one file, and each to one of its own.
                let shared = open(volume, &dir.join("shared")).unwrap();
                let own = open(volume, &dir.join(format!("own-{writer}"))).unwrap();
                opened.wait();
                for round in 0..40 {
                    let at = (round * 8 + writer) * 4 * KIB;
                    let _ = write(&shared, &[1; 4096], at);
                    let _ = write(&own, &[2; 4096], round * 4 * KIB);
                    assert!(volume.used().bytes <= 1 << 20);
                    if round % 7 == writer % 7 {
                        let _ = cut(&own, 0);
                    }
                }
            });
        }
    });
    assert_eq!(
        volume.used(),
        copy::usage(File::open(dir.path()).unwrap()).unwrap()
    );
    assert_eq!(tenant.used_bytes(), volume.used().bytes);
}

/// A path of so many directories is longer than the kernel takes.
#[test]
fn a_tree_of_any_depth_is_counted_copied_and_removed() {
    const DEPTH: u64 = 3_000;
    let dir = tempfile::tempdir().unwrap();
    let mut here = walk::open_again(File::open(dir.path()).unwrap()).unwrap();
    for _ in 0..DEPTH {
        rustix::fs::mkdirat(&here, c"deep", rustix::fs::Mode::RWXU).unwrap();
        here = walk::open_below(&here, c"deep").unwrap();
    }
    rustix::fs::symlinkat(c"/etc/passwd", &here, c"link").unwrap();
    let tenant = Arc::<TenantStorage>::default();
    let volume = volume_of(dir.path(), &tenant, quota(1 << 30, 1 << 16));
    drop(volume.change().unwrap());
    assert_eq!(volume.used().inodes, DEPTH + 1);
    assert_eq!(volume.used().bytes, (DEPTH + 1) * 5 * KIB);
    let to = tempfile::tempdir().unwrap();
    volume
        .copy_to(&File::open(to.path()).unwrap(), quota(1 << 30, 1 << 16))
        .unwrap();
    for root in [&dir, &to] {
        let root = File::open(root.path()).unwrap();
        assert_eq!(copy::usage(&root).unwrap(), volume.used());
        clear(&root).unwrap();
        assert_eq!(copy::usage(&root).unwrap(), Usage::default());
    }
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_copy_is_what_was_there_and_needs_room() {
    let (volume, tenant, dir) = volume(quota(1 << 20, 10));
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("d/a"), vec![7; 100_000]).unwrap();
    std::os::unix::fs::symlink("d/a", dir.path().join("s")).unwrap();
    let to = tempfile::tempdir().unwrap();
    let root = File::open(to.path()).unwrap();
    let full = volume.copy_to(&root, quota(50_000, 10)).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Bytes)), "{full}");
    tenant.set_limit(Some(Bytes::new(200_000).unwrap()));
    let full = volume.copy_to(&root, quota(1 << 20, 10)).unwrap_err();
    assert!(matches!(full, ChangeError::Full(Full::Tenant)), "{full}");
    tenant.set_limit(None);
    volume.copy_to(&root, quota(1 << 20, 10)).unwrap();
    assert_eq!(fs::read(to.path().join("s")).unwrap(), vec![7; 100_000]);
    assert_eq!(
        fs::read_link(to.path().join("s")).unwrap(),
        Path::new("d/a")
    );
    assert_eq!(tenant.used_bytes(), volume.used().bytes);
}

/// Something done to one of a few files.
#[derive(Debug, Clone)]
enum Step {
    Open(u8),
    Close(u8),
    Write(u8, u16, u16),
    Cut(u8, u32),
    Remove(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let file = || 0..4u8;
    prop_oneof![
        3 => file().prop_map(Step::Open),
        1 => file().prop_map(Step::Close),
        4 => (file(), any::<u16>(), 0..20_000u16).prop_map(|(f, at, n)| Step::Write(f, at, n)),
        2 => (file(), 0..200_000u32).prop_map(|(f, size)| Step::Cut(f, size)),
        2 => file().prop_map(Step::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However files come, grow, shrink and go: the books say what a new count would.
    #[test]
    fn the_books_agree_with_a_new_count(steps in proptest::collection::vec(step(), 1..60)) {
        let (volume, tenant, dir) = volume(quota(150 * KIB, 4));
        let mut opened: HashMap<u8, Vec<(File, Handle)>> = HashMap::new();
        let path = |file: u8| dir.path().join(file.to_string());
        for step in steps {
            match step {
                Step::Open(file) => {
                    if let Ok(open) = open(&volume, &path(file)) {
                        opened.entry(file).or_default().push(open);
                    }
                }
                Step::Close(file) => drop(opened.entry(file).or_default().pop()),
                Step::Write(file, at, n) => {
                    if let Some(open) = opened.entry(file).or_default().last() {
                        let _ = write(open, &vec![1; usize::from(n)], at.into());
                    }
                }
                Step::Cut(file, size) => {
                    if let Some(open) = opened.entry(file).or_default().first() {
                        let _ = cut(open, size.into());
                    }
                }
                Step::Remove(file) => remove(&volume, &path(file)),
            }
            prop_assert!(volume.used().bytes <= 150 * KIB);
            prop_assert_eq!(tenant.used_bytes(), volume.used().bytes);
        }
        opened.clear();
        drop(volume.change().unwrap());
        let counted = copy::usage(File::open(dir.path()).unwrap()).unwrap();
        prop_assert_eq!(volume.used(), counted);
    }
}

#[test]
fn what_is_handed_over_is_another_users_and_has_nothing_above() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir_all(volume.join("deep/er")).unwrap();
    fs::write(volume.join("deep/file"), b"x").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", volume.join("deep/link")).unwrap();
    let outside = fs::metadata("/etc/passwd").unwrap().uid();
    let owner = std::num::NonZeroU32::new(4_242);
    let root = hand_over(File::open(&volume).unwrap(), owner).unwrap();
    for path in ["", "deep", "deep/er", "deep/file", "deep/link"] {
        let metadata = fs::symlink_metadata(volume.join(path)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (4_242, 4_242), "{path}");
    }
    assert_eq!(fs::metadata("/etc/passwd").unwrap().uid(), outside);
    if let Err(error) = can_shut_in(&root) {
        eprintln!("skipped: no mounts can be made here: {error}");
        return;
    }
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let up = rustix::fs::openat(&root, "../..", flags, rustix::fs::Mode::empty()).unwrap();
    let up = rustix::fs::fstat(up).unwrap();
    assert_eq!(
        up.st_ino,
        fs::metadata(&volume).unwrap().ino(),
        "it is at the top"
    );
    // It is the same directory, and not a copy of it.
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    rustix::fs::openat(&root, "new", flags, rustix::fs::Mode::RUSR).unwrap();
    assert!(volume.join("new").exists());
}
