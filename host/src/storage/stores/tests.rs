use std::sync::atomic::AtomicU64;

use insula_types::VolumeId;
use insula_types::quantity::Bytes;
use insula_types::volume::VolumeSpec;

use super::super::{Purse, TenantStorage};
use super::*;

const MIB: u64 = 1 << 20;

struct Rig {
    dir: tempfile::TempDir,
    tenant: Arc<TenantStorage>,
}

impl Rig {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            tenant: Arc::default(),
        }
    }

    fn volume(&self, size: u64) -> Arc<Volume> {
        let spec = VolumeSpec {
            size: Bytes::new(size).unwrap(),
            kind: VolumeKind::Store,
            ..VolumeSpec::default()
        };
        let root = File::open(self.dir.path()).unwrap();
        Arc::new(Volume::new(
            VolumeId::new(1),
            root,
            Arc::clone(&self.tenant),
            spec,
        ))
    }

    /// What the disk has of it, and what was counted.
    fn is_counted(&self, volume: &Arc<Volume>) {
        let on_disk = super::super::copy::usage(File::open(self.dir.path()).unwrap()).unwrap();
        assert_eq!(volume.used(), on_disk);
        assert_eq!(self.tenant.used_bytes(), on_disk.bytes);
    }
}

fn set(store: &Store, key: &str, value: &[u8]) -> Result<(), StoreFault> {
    store.write(&[Write::Set(key.to_owned(), value.to_owned())])
}

fn delete(store: &Store, key: &str) -> Result<(), StoreFault> {
    store.write(&[Write::Delete(key.to_owned())])
}

#[test]
fn keys_have_values_until_they_are_deleted() {
    let rig = Rig::new();
    let volume = rig.volume(16 * MIB);
    let store = Store::of(&volume).unwrap();
    assert_eq!(store.get("a").unwrap(), None);
    set(&store, "a", b"1").unwrap();
    set(&store, "", b"").unwrap();
    set(&store, "a", b"2").unwrap();
    assert_eq!(store.get("a").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(store.get("").unwrap().as_deref(), Some(&b""[..]));
    assert!(store.exists("a").unwrap() && !store.exists("b").unwrap());
    let many = store.get_many(&["b".to_owned(), "a".to_owned()]).unwrap();
    assert_eq!(many, [None, Some(b"2".to_vec())]);
    delete(&store, "a").unwrap();
    delete(&store, "a").unwrap();
    assert_eq!(store.get("a").unwrap(), None);
    assert_eq!(store.keys(0).unwrap().keys, [""]);
    rig.is_counted(&volume);
}

#[test]
fn what_is_too_large_is_refused_before_anything_is_done() {
    let rig = Rig::new();
    let store = Store::of(&rig.volume(64 * MIB)).unwrap();
    let long = "k".repeat(KEY_MAX_BYTES + 1);
    assert!(matches!(store.get(&long), Err(StoreFault::Key(1025))));
    assert!(matches!(set(&store, &long, b""), Err(StoreFault::Key(_))));
    assert!(matches!(store.increment(&long, 1), Err(StoreFault::Key(_))));
    let large = vec![7; VALUE_MAX_BYTES + 1];
    assert!(matches!(
        set(&store, "a", &large),
        Err(StoreFault::Value(_))
    ));
    set(&store, &long[1..], &large[1..]).unwrap();
    assert_eq!(store.get(&long[1..]).unwrap().unwrap().len(), 1 << 20);
    let many: Vec<_> = (0..=BATCH_MAX)
        .map(|n| Write::Delete(n.to_string()))
        .collect();
    assert!(matches!(store.write(&many), Err(StoreFault::Batch(1001))));
    let full = |n: u32| Write::Set(n.to_string(), vec![0; VALUE_MAX_BYTES]);
    let five: Vec<_> = (0..5).map(full).collect();
    assert!(matches!(store.write(&five), Err(StoreFault::BatchBytes(_))));
    assert_eq!(store.keys(0).unwrap().keys.len(), 1);
    // What was written one by one can be too large to be read at once.
    for write in five {
        store.write(&[write]).unwrap();
    }
    let keys: Vec<_> = (0..5).map(|n| n.to_string()).collect();
    assert!(matches!(
        store.get_many(&keys),
        Err(StoreFault::BatchBytes(_))
    ));
}

#[test]
fn a_batch_happens_as_a_whole() {
    let rig = Rig::new();
    let store = Store::of(&rig.volume(2 * MIB)).unwrap();
    set(&store, "old", b"1").unwrap();
    let piece = |n: u32| Write::Set(n.to_string(), vec![0; 900 << 10]);
    let refused = store.write(&[Write::Delete("old".to_owned()), piece(1), piece(2)]);
    assert!(matches!(refused, Err(StoreFault::Full(Full::Bytes))));
    assert_eq!(store.keys(0).unwrap().keys, ["old"]);
}

#[test]
fn listings_go_on_where_they_ended() {
    let rig = Rig::new();
    let store = Store::of(&rig.volume(64 * MIB)).unwrap();
    let all: Vec<String> = (0..2_500).map(|n| format!("k{n}")).collect();
    for part in all.chunks(BATCH_MAX) {
        let sets = part.iter().map(|key| Write::Set(key.clone(), vec![1]));
        store.write(&sets.collect::<Vec<_>>()).unwrap();
    }
    let first = store.keys(0).unwrap();
    assert_eq!(first.keys, all[..PAGE_MAX]);
    // Changes meanwhile neither hide other keys nor show them twice.
    delete(&store, "k0").unwrap();
    set(&store, "k1", b"again").unwrap();
    let second = store.keys(first.next.unwrap()).unwrap();
    let third = store.keys(second.next.unwrap()).unwrap();
    assert_eq!([second.keys, third.keys].concat(), all[PAGE_MAX..]);
    assert_eq!(third.next, None);
    assert_eq!(store.keys(u64::MAX).unwrap(), Page::default());
    // Long keys make short pages.
    let long = |n: u32| Write::Set(format!("{n:01024}"), Vec::new());
    store
        .write(&(0..600).map(long).collect::<Vec<_>>())
        .unwrap();
    let page = store.keys(2_500).unwrap();
    assert_eq!(page.keys.len(), 256);
    assert!(page.next.is_some());
}

#[test]
fn increments_of_many_threads_are_all_counted() {
    let rig = Rig::new();
    let store = Store::of(&rig.volume(16 * MIB)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    store.increment("n", 3).unwrap();
                    assert!(store.get("n").unwrap().is_some());
                }
            });
        }
    });
    assert_eq!(store.get("n").unwrap().as_deref(), Some(&b"600"[..]));
    set(&store, "n", u64::MAX.to_string().as_bytes()).unwrap();
    assert!(matches!(store.increment("n", 1), Err(StoreFault::Overflow)));
    for text in ["x", "", "-1", "+1", " 1", "18446744073709551616"] {
        set(&store, "n", text.as_bytes()).unwrap();
        let refused = store.increment("n", 1);
        assert!(matches!(refused, Err(StoreFault::NotANumber)), "{text:?}");
    }
}

/// Fills a store; says how many values of a size there was room for.
fn fill(store: &Store, bytes: usize) -> u32 {
    for number in 0.. {
        match set(store, &format!("fill{number}"), &vec![1; bytes]) {
            Ok(()) => {}
            Err(StoreFault::Full(Full::Bytes)) => return number,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("a store without end")
}

#[test]
fn a_full_store_says_so_and_has_room_again_when_keys_go() {
    let rig = Rig::new();
    let volume = rig.volume(4 * MIB);
    let store = Store::of(&volume).unwrap();
    let fitted = fill(&store, 10_000);
    // The engine gives them 16 KiB each, which is the worst that it does.
    assert!(fitted > 140, "{fitted}");
    eprintln!("{fitted} values of 10 kB in 4 MiB");
    assert!(volume.used().bytes <= 4 * MIB);
    rig.is_counted(&volume);
    for _ in 0..3 {
        let refused = set(&store, "more", &[1; 10_000]);
        assert!(matches!(refused, Err(StoreFault::Full(Full::Bytes))));
    }
    // Everything is still there, and what is full can be emptied.
    for number in 0..fitted {
        let key = format!("fill{number}");
        assert_eq!(
            store.get(&key).unwrap().map(|value| value.len()),
            Some(10_000)
        );
        delete(&store, &key).unwrap();
    }
    let again = fill(&store, 10_000);
    assert!(again >= fitted * 8 / 10, "{again} of {fitted}");
    rig.is_counted(&volume);
    // A larger quota is seen at once.
    volume.set_quota(VolumeSpec {
        size: Bytes::new(8 * MIB).unwrap(),
        kind: VolumeKind::Store,
        ..VolumeSpec::default()
    });
    set(&store, "more", &[1; 10_000]).unwrap();
    // So is the tenant's limit.
    rig.tenant.set_limit(Some(Bytes::new(MIB).unwrap()));
    let refused = fill_until_refused(&store);
    assert!(
        matches!(refused, StoreFault::Full(Full::Tenant)),
        "{refused}"
    );
    drop(store);
    drop(volume);
    assert_eq!(rig.tenant.used_bytes(), 0);
}

fn fill_until_refused(store: &Store) -> StoreFault {
    (0..)
        .find_map(|n| set(store, &format!("tenant{n}"), &[1; 50_000]).err())
        .unwrap()
}

#[test]
fn what_was_set_is_there_after_the_database_was_closed_or_was_not() {
    let rig = Rig::new();
    let volume = rig.volume(16 * MIB);
    set(&Store::of(&volume).unwrap(), "a", b"1").unwrap();
    volume.close_store();
    let store = Store::of(&volume).unwrap();
    assert_eq!(store.get("a").unwrap().as_deref(), Some(&b"1"[..]));
    set(&store, "b", &[5; 300_000]).unwrap();
    // A copy is what a crash would leave: taken while the database is open.
    let to = tempfile::tempdir().unwrap();
    let spec = VolumeSpec::default();
    volume
        .copy_to(&File::open(to.path()).unwrap(), spec)
        .unwrap();
    set(&store, "after", b"").unwrap();
    let copy = Rig {
        dir: to,
        tenant: Arc::default(),
    };
    let copied = copy.volume(16 * MIB);
    let store = Store::of(&copied).unwrap();
    assert_eq!(store.keys(0).unwrap().keys, ["a", "b"]);
    assert_eq!(store.get("b").unwrap().unwrap(), vec![5; 300_000]);
    set(&store, "c", b"").unwrap();
    copy.is_counted(&copied);
}

#[test]
fn what_a_crash_left_of_a_database_that_was_being_made_is_made_anew() {
    let rig = Rig::new();
    let volume = rig.volume(16 * MIB);
    set(&Store::of(&volume).unwrap(), "a", b"1").unwrap();
    volume.close_store();
    let mut whole = std::fs::read(rig.dir.path().join(FILE)).unwrap();
    // The database's own mark comes behind our block, and is written last.
    whole[4_096..4_105].fill(0);
    for left in [0, 8, 16, 4_096, 4_097, 4_105, 4_416] {
        let rig = Rig::new();
        std::fs::write(rig.dir.path().join(FILE), &whole[..left]).unwrap();
        let volume = rig.volume(16 * MIB);
        let store = Store::of(&volume).unwrap();
        assert_eq!(store.get("a").unwrap(), None, "{left} bytes");
        set(&store, "b", b"2").unwrap();
        volume.close_store();
        assert_eq!(store.get("b").unwrap().as_deref(), Some(&b"2"[..]));
    }
}

#[test]
fn it_is_closed_when_nobody_calls() {
    let rig = Rig::new();
    let volume = rig.volume(16 * MIB);
    let store = Store::of(&volume).unwrap();
    let now = Instant::now();
    assert!(!volume.is_idle_store(now));
    set(&store, "a", b"1").unwrap();
    assert!(!volume.is_idle_store(now));
    assert!(!volume.is_idle_store(now + IDLE_MAX / 2));
    assert!(volume.is_idle_store(now + IDLE_MAX));
    volume.close_store();
    assert!(volume.store.open().is_none());
    assert!(!volume.is_idle_store(now + IDLE_MAX * 2));
    assert!(store.exists("a").unwrap());
}

#[test]
fn two_processes_do_not_have_it_at_once() {
    let rig = Rig::new();
    let (ours, theirs) = (rig.volume(16 * MIB), rig.volume(16 * MIB));
    set(&Store::of(&ours).unwrap(), "a", b"1").unwrap();
    let waiting = std::thread::spawn(move || Store::of(&theirs).unwrap().get("a").unwrap());
    ours.close_store();
    assert_eq!(waiting.join().unwrap().as_deref(), Some(&b"1"[..]));
}

#[test]
fn what_is_no_store_is_not_taken_for_one() {
    let rig = Rig::new();
    let path = rig.dir.path().join(FILE);
    std::fs::write(&path, vec![1; 10_000]).unwrap();
    let volume = rig.volume(16 * MIB);
    let store = Store::of(&volume).unwrap();
    assert!(matches!(store.get("a"), Err(StoreFault::Io(_))));
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(matches!(store.get("a"), Err(StoreFault::Io(_))));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(set(&store, "a", b""), Err(StoreFault::Io(_))));
    let plain = Volume::new(
        VolumeId::new(2),
        File::open(rig.dir.path()).unwrap(),
        Arc::default(),
        VolumeSpec::default(),
    );
    assert!(Store::of(&Arc::new(plain)).is_none());
}

/// A tenant that has so much memory left.
#[derive(Debug)]
struct Left(AtomicU64);

impl Purse for Left {
    fn take(&self, bytes: u64) -> bool {
        let next = |left: u64| left.checked_sub(bytes);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        taken.is_ok()
    }

    fn give(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[test]
fn the_pages_of_an_open_store_are_memory_of_its_tenant() {
    let all = CACHE_BYTES as u64;
    let left = Arc::new(Left(AtomicU64::new(all)));
    let tenant = Arc::new(TenantStorage::new(Arc::clone(&left) as Arc<dyn Purse>));
    let [one, two] = [(); 2].map(|()| Rig {
        dir: tempfile::tempdir().unwrap(),
        tenant: Arc::clone(&tenant),
    });
    let [one, two] = [one.volume(16 * MIB), two.volume(16 * MIB)];
    let [first, second] = [&one, &two].map(|volume| Store::of(volume).unwrap());
    set(&first, "a", b"1").unwrap();
    set(&first, "b", b"2").unwrap();
    assert_eq!(left.0.load(Ordering::Relaxed), 0, "once, while it is open");
    let refused = set(&second, "a", b"1").unwrap_err();
    assert!(matches!(refused, StoreFault::Memory), "{refused}");
    assert!(matches!(second.get("a"), Err(StoreFault::Memory)));
    one.close_store();
    assert_eq!(left.0.load(Ordering::Relaxed), all);
    set(&second, "a", b"1").unwrap();
    drop((second, two));
    assert_eq!(left.0.load(Ordering::Relaxed), all);
}
