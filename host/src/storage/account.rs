//! Who pays for how much.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use insula_types::Bytes;
use insula_types::volume::VolumeSpec;

use super::places::Places;
use super::{FileKey, Usage};

/// Whose quota does not allow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The volume's, in bytes.
    #[error("the volume is full")]
    Bytes,
    /// The volume's, in inodes.
    #[error("the volume has no inode left")]
    Inodes,
    /// The tenant's, over all its volumes.
    #[error("the tenant's storage is full")]
    Tenant,
}

/// Whose memory it is that open stores take.
pub trait Purse: Debug + Send + Sync {
    /// Whether there was so much.
    fn take(&self, bytes: u64) -> bool;
    /// Gives back what was taken.
    fn give(&self, bytes: u64);
}

/// The storage of one tenant: all its volumes together.
#[derive(Debug)]
pub struct TenantStorage {
    used: AtomicU64,
    limit: AtomicU64,
    /// Of the tenant; `None` where nobody counts.
    memory: Option<Arc<dyn Purse>>,
    /// What its guests have open.
    pub(super) open: Places,
}

/// Memory that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    of: Arc<TenantStorage>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(memory) = &self.of.memory {
            memory.give(self.bytes);
        }
    }
}

impl Default for TenantStorage {
    fn default() -> Self {
        Self {
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            memory: None,
            open: Places::of_a_tenant(),
        }
    }
}

impl TenantStorage {
    /// Without a limit; what open stores need of memory is taken from there.
    #[must_use]
    pub fn new(memory: Arc<dyn Purse>) -> Self {
        Self {
            memory: Some(memory),
            ..Self::default()
        }
    }

    /// Memory of the tenant's, if there is so much.
    pub(super) fn memory(self: &Arc<Self>, bytes: u64) -> Option<Taken> {
        let has = |memory: &Arc<dyn Purse>| memory.take(bytes);
        self.memory.as_ref().is_none_or(has).then(|| Taken {
            of: Arc::clone(self),
            bytes,
        })
    }

    /// Sets the limit; what is used beyond it stays.
    pub fn set_limit(&self, limit: Option<Bytes>) {
        let limit = limit.map_or(u64::MAX, Bytes::get);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes of all its volumes that were counted.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self, bytes: u64) -> Result<(), Full> {
        let limit = self.limit.load(Ordering::Relaxed);
        let next = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        taken.map(drop).map_err(|_| Full::Tenant)
    }

    /// What is there already, whatever the limit.
    pub(super) fn has(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn give(&self, bytes: u64) {
        let next = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }
}

/// A file that is open somewhere.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) handles: u32,
    /// Its blocks.
    pub(super) bytes: u64,
    /// It has no name any more.
    pub(super) orphan: bool,
}

#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) quota: VolumeSpec,
    pub(super) used: Usage,
    pub(super) counted: bool,
    pub(super) open: HashMap<FileKey, Open>,
}

/// The books of one volume, and its tenant's.
#[derive(Debug)]
pub(super) struct Account {
    pub(super) tenant: Arc<TenantStorage>,
    books: Mutex<Books>,
}

/// All that decides whether something has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    quota: u64,
    used: u64,
    tenant_limit: u64,
    tenant_used: u64,
}

impl Account {
    pub(super) fn new(tenant: Arc<TenantStorage>, quota: VolumeSpec) -> Self {
        let books = Books {
            quota,
            ..Books::default()
        };
        Self {
            tenant,
            books: Mutex::new(books),
        }
    }

    pub(super) fn books(&self) -> MutexGuard<'_, Books> {
        // Consistent between any two statements under the lock.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room, of which `keep` bytes are left free.
    pub(super) fn take(&self, wanted: Usage, keep: u64) -> Result<(), Full> {
        let mut books = self.books();
        let mut after = books.used;
        after += wanted;
        // What shrinks or stays is never refused, however small the quota has become.
        if wanted.bytes > 0 && after.bytes.saturating_add(keep) > books.quota.size.get() {
            return Err(Full::Bytes);
        }
        if wanted.inodes > 0 && after.inodes > books.quota.inodes {
            return Err(Full::Inodes);
        }
        self.tenant.take(wanted.bytes)?;
        books.used = after;
        Ok(())
    }

    pub(super) fn give(&self, books: &mut Books, gone: Usage) {
        books.used.bytes = books.used.bytes.saturating_sub(gone.bytes);
        books.used.inodes = books.used.inodes.saturating_sub(gone.inodes);
        self.tenant.give(gone.bytes);
    }

    pub(super) fn standing(&self) -> Standing {
        let books = self.books();
        Standing {
            quota: books.quota.size.get(),
            used: books.used.bytes,
            tenant_limit: self.tenant.limit.load(Ordering::Relaxed),
            tenant_used: self.tenant.used_bytes(),
        }
    }
}
