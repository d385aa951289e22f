//! Stores of keys and values: a volume that holds one database and nothing else.
//!
//! ```text
//!  guest's call ─▶ a thread that may block ─▶ Store ─┬ reads: a snapshot of the database, beside others
//!                                                    └ writes: Volume::change ▸ one transaction ▸ fsync
//!                                                         │
//!            Backing: takes room of the volume's quota ◀──┘ before each block that is new
//! ```
//!
//! All services and instances of a tenant share one open database per store; it is opened by its
//! first call and closed when nobody called for a while. A write has happened, durably, when its call
//! returns, and not at all when it fails. Copies of the volume are taken between two writes.
//!
//! On failure: a database that met an error is closed, and opened again by the next call, which
//! finds what was committed. That is so too when the quota has no room; so that this is not done for
//! nothing again and again, what is as large is refused until something has changed. The last
//! [`RESERVE_BYTES`] are for removing. Another process that has the store open (a host that is being
//! replaced) is waited for, for a while.
//!
//! *Invariant:* no guest reaches the file but through here: the engine trusts its own pages.

mod backing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use insula_types::volume::VolumeKind;
use redb::{Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use rustix::fs::{FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::account::{Full, Standing, Taken};
use super::{Change, Usage, Volume};
use backing::{Backing, Shared};

/// Longest key.
pub(super) const KEY_MAX_BYTES: usize = 1 << 10;
/// Longest value.
pub(super) const VALUE_MAX_BYTES: usize = 1 << 20;
/// Keys of one call.
pub(super) const BATCH_MAX: usize = 1_000;
/// Keys and values of one call.
pub(super) const BATCH_MAX_BYTES: usize = 4 << 20;
/// Keys of one page of a listing.
pub(super) const PAGE_MAX: usize = 1_000;
/// The same, in bytes: what is longer than this is a page of its own.
const PAGE_MAX_BYTES: usize = 256 << 10;
/// What only removing may use, of a volume's size: what it writes before it frees.
pub(super) const RESERVE_BYTES: u64 = 256 << 10;
/// Pages of one database in memory, which are its tenant's while it is open.
const CACHE_BYTES: usize = 512 << 10;
/// Nobody called for this long: the database is closed.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How often, and how many times, a store that another process has is asked for.
const LOCKED_WAIT: Duration = Duration::from_millis(20);
const LOCKED_TRIES: u32 = 250;

const FILE: &str = "store";
/// A key's place in the order of coming, and its value.
const VALUES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("values");
/// The keys in the order in which they came.
const KEYS: TableDefinition<'_, u64, &str> = TableDefinition::new("keys");

/// Why a store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StoreFault {
    /// There is no room for it.
    #[error("quota exceeded: {0}")]
    Full(#[from] Full),
    /// The key is too long.
    #[error("the key has {0} bytes, more than {KEY_MAX_BYTES}")]
    Key(usize),
    /// The value is too long.
    #[error("the value has {0} bytes, more than {VALUE_MAX_BYTES}")]
    Value(usize),
    /// The batch has too many keys.
    #[error("{0} keys at once are more than {BATCH_MAX}")]
    Batch(usize),
    /// The batch is too large.
    #[error("{0} bytes at once are more than {BATCH_MAX_BYTES}")]
    BatchBytes(usize),
    /// What is to be incremented is not a number.
    #[error("the value is not a decimal number below 2^64")]
    NotANumber,
    /// It would be incremented beyond its end.
    #[error("the sum is not below 2^64")]
    Overflow,
    /// The tenant has no memory for its pages.
    #[error("the tenant has no memory left to open it")]
    Memory,
    /// Another process has it.
    #[error("the store is in use by another process")]
    Busy,
    /// The file system said no.
    #[error("the store's file: {0}")]
    Io(#[from] io::Error),
    /// The database said no.
    #[error("the store's database: {0}")]
    Engine(Box<redb::Error>),
}

/// The database's own errors, of which there is one type for each of its steps.
fn engine(error: impl Into<redb::Error>) -> StoreFault {
    StoreFault::Engine(Box::new(error.into()))
}

/// A change of one key.
#[derive(Debug, Clone)]
pub enum Write {
    /// It has this value.
    Set(String, Vec<u8>),
    /// It is gone.
    Delete(String),
}

impl Write {
    fn bytes(&self) -> usize {
        match self {
            Self::Set(key, value) => key.len() + value.len(),
            Self::Delete(key) => key.len(),
        }
    }

    fn check(&self) -> Result<(), StoreFault> {
        let (Self::Set(key, _) | Self::Delete(key)) = self;
        check_key(key)?;
        match self {
            Self::Set(_, value) if value.len() > VALUE_MAX_BYTES => {
                Err(StoreFault::Value(value.len()))
            }
            _ => Ok(()),
        }
    }
}

fn check_key(key: &str) -> Result<(), StoreFault> {
    if key.len() > KEY_MAX_BYTES {
        return Err(StoreFault::Key(key.len()));
    }
    Ok(())
}

/// A part of a listing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// Keys, in the order in which they came.
    pub keys: Vec<String>,
    /// Where the next part begins, if there is one.
    pub next: Option<u64>,
}

#[derive(Debug)]
struct Open {
    database: Database,
    backing: Arc<Backing>,
    _cache: Taken,
}

/// So much had no room when things stood like this.
#[derive(Debug)]
struct Refusal {
    full: Full,
    bytes: usize,
    standing: Standing,
}

/// What a volume holds of its store.
#[derive(Debug, Default)]
pub(super) struct State {
    open: RwLock<Option<Open>>,
    refusal: Mutex<Option<Refusal>>,
    called: AtomicBool,
    /// When it was last seen to have been called.
    since: Mutex<Option<Instant>>,
}

impl State {
    fn open(&self) -> RwLockReadGuard<'_, Option<Open>> {
        // A database in which something panicked is closed by its next caller's error.
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Open> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.take()
    }

    fn refusal(&self) -> std::sync::MutexGuard<'_, Option<Refusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    /// Whether its database is open and nobody has called for so long that it should be closed.
    #[must_use]
    pub fn is_idle_store(&self, now: Instant) -> bool {
        let state = &self.store;
        let mut since = state.since.lock().unwrap_or_else(PoisonError::into_inner);
        if state.called.swap(false, Ordering::Relaxed) {
            *since = Some(now);
        }
        let idle = since.is_some_and(|since| now.saturating_duration_since(since) >= IDLE_MAX);
        if idle {
            *since = None;
        }
        idle
    }

    /// Whether it holds keys and values.
    #[must_use]
    pub fn is_store(&self) -> bool {
        self.books().quota.kind == VolumeKind::Store
    }

    /// Closes its database, if it is open; calls wait meanwhile. Blocks.
    pub fn close_store(self: &Arc<Self>) {
        let Ok(_change) = self.change() else { return };
        // What is committed is durable already.
        drop(self.store.take());
    }
}

/// A volume of keys and values. Every call blocks.
#[derive(Debug, Clone)]
pub struct Store(Arc<Volume>);

impl Store {
    /// The store in a volume, where it is one.
    #[must_use]
    pub fn of(volume: &Arc<Volume>) -> Option<Self> {
        volume.is_store().then(|| Self(Arc::clone(volume)))
    }

    /// The value of a key.
    ///
    /// # Errors
    /// [`StoreFault`].
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreFault> {
        check_key(key)?;
        self.read(|values, _| {
            let found = values.get(key).map_err(engine)?;
            Ok(found.map(|found| found.value().1.to_vec()))
        })
    }

    /// Whether there is such a key.
    ///
    /// # Errors
    /// [`StoreFault`].
    pub fn exists(&self, key: &str) -> Result<bool, StoreFault> {
        check_key(key)?;
        self.read(|values, _| Ok(values.get(key).map_err(engine)?.is_some()))
    }

    /// The values of several keys, all of one moment.
    ///
    /// # Errors
    /// [`StoreFault`]; also when the values together are too large.
    pub fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, StoreFault> {
        if keys.len() > BATCH_MAX {
            return Err(StoreFault::Batch(keys.len()));
        }
        keys.iter().try_for_each(|key| check_key(key))?;
        self.read(|values, _| {
            let (mut found, mut bytes) = (Vec::with_capacity(keys.len()), 0);
            for key in keys {
                let value = values.get(key.as_str()).map_err(engine)?;
                let value = value.map(|value| value.value().1.to_vec());
                bytes += value.as_ref().map_or(0, Vec::len);
                if bytes > BATCH_MAX_BYTES {
                    return Err(StoreFault::BatchBytes(bytes));
                }
                found.push(value);
            }
            Ok(found)
        })
    }

    /// Keys, from where an earlier page ended. What comes or goes meanwhile may be missed or not; any
    /// other key is listed once.
    ///
    /// # Errors
    /// [`StoreFault`].
    pub fn keys(&self, from: u64) -> Result<Page, StoreFault> {
        self.read(|_, keys| {
            let (mut page, mut bytes) = (Page::default(), 0);
            for entry in keys.range(from..).map_err(engine)? {
                let (place, key) = entry.map_err(engine)?;
                let key = key.value();
                bytes += key.len();
                if page.keys.len() == PAGE_MAX || (bytes > PAGE_MAX_BYTES && !page.keys.is_empty())
                {
                    page.next = Some(place.value());
                    break;
                }
                page.keys.push(key.to_owned());
            }
            Ok(page)
        })
    }

    /// Makes changes in their order: all of them, or none.
    ///
    /// # Errors
    /// [`StoreFault`]; nothing is changed then.
    pub fn write(&self, writes: &[Write]) -> Result<(), StoreFault> {
        if writes.len() > BATCH_MAX {
            return Err(StoreFault::Batch(writes.len()));
        }
        writes.iter().try_for_each(Write::check)?;
        let bytes: usize = writes.iter().map(Write::bytes).sum();
        if bytes > BATCH_MAX_BYTES {
            return Err(StoreFault::BatchBytes(bytes));
        }
        let sets = |write: &Write| matches!(write, Write::Set(..));
        let wanted = writes.iter().any(sets).then_some(bytes);
        self.change(wanted, |tables| {
            writes.iter().try_for_each(|write| match write {
                Write::Set(key, value) => tables.set(key, value),
                Write::Delete(key) => tables.delete(key),
            })
        })
    }

    /// Adds to a value that is a decimal number; one that is not there counts as 0. The sum.
    ///
    /// # Errors
    /// [`StoreFault`]; nothing is changed then.
    pub fn increment(&self, key: &str, delta: u64) -> Result<u64, StoreFault> {
        check_key(key)?;
        self.change(Some(key.len()), |tables| {
            let before = {
                let found = tables.values.get(key).map_err(engine)?;
                found.map_or(Ok(0), |found| number(found.value().1))?
            };
            let after = before.checked_add(delta).ok_or(StoreFault::Overflow)?;
            tables.set(key, after.to_string().as_bytes())?;
            Ok(after)
        })
    }

    fn read<T>(
        &self,
        read: impl Fn(&Values, &Keys) -> Result<T, StoreFault>,
    ) -> Result<T, StoreFault> {
        let state = &self.0.store;
        state.called.store(true, Ordering::Relaxed);
        let once = |open: &Open| {
            let transaction = open.database.begin_read().map_err(engine)?;
            let (values, keys) = tables(&transaction)?;
            read(&values, &keys)
        };
        if let Some(open) = &*state.open() {
            match once(open) {
                // Perhaps of a write that failed, and whose database is about to be closed.
                Err(StoreFault::Engine(_)) => {}
                result => return result,
            }
        }
        let change = self.0.change()?;
        let result = match &*self.opened(&change)? {
            Some(open) => once(open),
            None => Err(StoreFault::Busy),
        };
        if matches!(result, Err(StoreFault::Engine(_))) {
            drop(state.take());
        }
        result
    }

    /// One transaction, durable when it returns. `wanted` is how much it may add, where it adds.
    fn change<T>(
        &self,
        wanted: Option<usize>,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, StoreFault>,
    ) -> Result<T, StoreFault> {
        let state = &self.0.store;
        state.called.store(true, Ordering::Relaxed);
        let change = self.0.change()?;
        if let Some(bytes) = wanted {
            self.check_refusal(bytes)?;
        }
        let guard = self.opened(&change)?;
        let Some(open) = &*guard else {
            return Err(StoreFault::Busy);
        };
        open.backing.keep(wanted.map_or(0, |_| RESERVE_BYTES));
        let result = transact(&open.database, work);
        open.backing.keep(0);
        let refused = open.backing.refused();
        drop(guard);
        match (result, refused) {
            (Err(StoreFault::Engine(error)), refused) => {
                drop(state.take());
                let Some(full) = refused else {
                    return Err(StoreFault::Engine(error));
                };
                *state.refusal() = Some(Refusal {
                    full,
                    bytes: wanted.unwrap_or(0),
                    standing: self.0.account.standing(),
                });
                Err(full.into())
            }
            (result, _) => {
                if result.is_ok() {
                    *state.refusal() = None;
                }
                result
            }
        }
    }

    /// Whether as much had no room before, and nothing has changed since.
    fn check_refusal(&self, bytes: usize) -> Result<(), StoreFault> {
        let refusal = self.0.store.refusal();
        let standing = self.0.account.standing();
        match &*refusal {
            Some(refusal) if refusal.standing == standing && bytes >= refusal.bytes => {
                Err(refusal.full.into())
            }
            _ => Ok(()),
        }
    }

    /// The database, which is opened where it is not.
    fn opened(&self, change: &Change<'_>) -> Result<RwLockReadGuard<'_, Option<Open>>, StoreFault> {
        let state = &self.0.store;
        if state.open().is_none() {
            let opened = self.open(change)?;
            *state.open.write().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        }
        // Nobody closes it but who has the right to change the volume.
        Ok(state.open())
    }

    fn open(&self, change: &Change<'_>) -> Result<Open, StoreFault> {
        let cache = self.0.account.tenant.memory(CACHE_BYTES as u64);
        let cache = cache.ok_or(StoreFault::Memory)?;
        let file = self.file(change)?;
        lock(&file)?;
        let backing = Arc::new(Backing::new(file, Arc::clone(&self.0.account))?);
        let opened = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(Shared(Arc::clone(&backing)));
        let opened = opened.map_err(engine).and_then(|database| {
            let reading = database.begin_read().map_err(engine)?;
            if reading.open_table(KEYS).is_err() {
                transact(&database, |_| Ok(()))?;
            }
            Ok(database)
        });
        match (opened, backing.refused()) {
            (Ok(database), _) => Ok(Open {
                database,
                backing,
                _cache: cache,
            }),
            (Err(_), Some(full)) => Err(full.into()),
            (Err(error), None) => Err(error),
        }
    }

    /// The file, which is made where there is none.
    fn file(&self, change: &Change<'_>) -> Result<File, StoreFault> {
        let root = &self.0.root;
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let open = |more: OFlags| {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
            let mode = if more.is_empty() {
                Mode::empty()
            } else {
                Mode::RUSR | Mode::WUSR
            };
            rustix::fs::openat2(root, FILE, flags, mode, how).map(File::from)
        };
        match open(OFlags::empty()) {
            Ok(file) if file.metadata()?.is_file() => return Ok(file),
            Ok(_) => return Err(io::Error::other("this is no file").into()),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let price = Usage::inode(0);
        change.take(price)?;
        let made = open(OFlags::CREATE | OFlags::EXCL).and_then(|file| {
            rustix::fs::fsync(root)?;
            Ok(file)
        });
        made.map_err(|error| {
            change.give(price);
            io::Error::from(error).into()
        })
    }
}

/// A number below 2^64, in decimal digits.
fn number(digits: &[u8]) -> Result<u64, StoreFault> {
    let text = std::str::from_utf8(digits).ok();
    let text = text.filter(|text| !text.starts_with('+'));
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or(StoreFault::NotANumber)
}

/// Only one process has a store open: two would not see one another's pages.
fn lock(file: &File) -> Result<(), StoreFault> {
    for _ in 0..LOCKED_TRIES {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCKED_WAIT),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Err(StoreFault::Busy)
}

type Values = redb::ReadOnlyTable<&'static str, (u64, &'static [u8])>;
type Keys = redb::ReadOnlyTable<u64, &'static str>;

fn tables(transaction: &ReadTransaction) -> Result<(Values, Keys), StoreFault> {
    let values = transaction.open_table(VALUES).map_err(engine)?;
    let keys = transaction.open_table(KEYS).map_err(engine)?;
    Ok((values, keys))
}

/// Both tables, to be written to.
struct Tables<'t> {
    values: redb::Table<'t, &'static str, (u64, &'static [u8])>,
    keys: redb::Table<'t, u64, &'static str>,
}

impl Tables<'_> {
    fn set(&mut self, key: &str, value: &[u8]) -> Result<(), StoreFault> {
        let known = self.values.get(key).map_err(engine)?;
        let known = known.map(|found| found.value().0);
        let place = match known {
            Some(place) => place,
            None => {
                let last = self.keys.last().map_err(engine)?;
                let place = last.map_or(0, |(place, _)| place.value().saturating_add(1));
                self.keys.insert(place, key).map_err(engine)?;
                place
            }
        };
        self.values.insert(key, (place, value)).map_err(engine)?;
        Ok(())
    }

    fn delete(&mut self, key: &str) -> Result<(), StoreFault> {
        let gone = self.values.remove(key).map_err(engine)?;
        let place = gone.map(|found| found.value().0);
        if let Some(place) = place {
            self.keys.remove(place).map_err(engine)?;
        }
        Ok(())
    }
}

fn transact<T>(
    database: &Database,
    work: impl FnOnce(&mut Tables<'_>) -> Result<T, StoreFault>,
) -> Result<T, StoreFault> {
    let transaction = database.begin_write().map_err(engine)?;
    let done = {
        let mut tables = Tables {
            values: transaction.open_table(VALUES).map_err(engine)?,
            keys: transaction.open_table(KEYS).map_err(engine)?,
        };
        work(&mut tables)?
    };
    transaction.commit().map_err(engine)?;
    Ok(done)
}
