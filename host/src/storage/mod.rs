//! Volumes: directories of tenants, each with a quota that holds.
//!
//! ```text
//!  guest's call ─▶ a thread that may block ─▶ Volume::change ─▶ take room ─▶ the call ─▶ settle
//!                                              │ one at a time    │ quota exceeded: nothing is done
//!                                              │ per volume       ▼ and the guest is told
//! ```
//!
//! What a volume takes is counted here, where every change passes, and not by the file system: that
//! works on each of them, needs no privilege, and answers before anything is written (decision 17).
//! A file takes its size in whole blocks of 4 KiB, holes included, a directory or link one block, and
//! every inode 1 KiB for itself and its name; so what the disk gives is never more than what is counted, and a guest with a
//! thousand empty files pays for them. Files have one name: hard links are refused.
//!
//! Who owns what: [`Books`] under a short lock, never held over a system call; the order of changes
//! under a long one, held by threads that may block and by nobody else. A file that was removed while
//! it is open is paid for until its last [`Handle`] goes.
//!
//! On failure: a change that fails half-way is settled by the size that the file has afterwards. After
//! a crash, and at every start, a volume is counted anew before its first change. While a host is
//! replaced, two processes change it and neither has the other's changes in its books; when the old
//! one is gone, it is counted once more.
//!
//! *Invariant:* below a volume nothing is reached by an ambient path; the sum of a tenant's volumes
//! never grows beyond its limit by a guest's doing.

mod account;
mod copy;
mod pack;
mod places;
mod stores;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use insula_types::VolumeId;
use insula_types::volume::VolumeSpec;
use serde::{Deserialize, Serialize};

use account::{Account, Books, Open};

pub use account::{Full, Purse, TenantStorage};
pub use copy::{can_shut_in, clear, hand_over, has_openat2};
pub use pack::{Packer, unpack};
pub use places::{Place, look_at_the_limit};
pub use stores::{Page, Store, StoreFault, Write};

/// What files are counted in.
pub const BLOCK_BYTES: u64 = 4 << 10;
/// What an inode and its name take: 256 bytes for the one, at most 264 for the other on ext4, and as
/// much again for the directory's tree.
pub const INODE_BYTES: u64 = 1 << 10;

/// A size in whole blocks.
#[must_use]
pub const fn blocks(size: u64) -> u64 {
    match size.checked_next_multiple_of(BLOCK_BYTES) {
        Some(bytes) => bytes,
        None => u64::MAX,
    }
}

/// What something takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes, as they are counted here.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.inodes = self.inodes.saturating_add(other.inodes);
    }
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// There is no room for it.
    #[error(transparent)]
    Full(#[from] Full),
    /// The file system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One volume.
#[derive(Debug)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    root: File,
    account: Arc<Account>,
    /// Held for one change at a time; whether it was counted.
    changes: Mutex<bool>,
    /// Of one that holds keys and values.
    store: stores::State,
}

impl Volume {
    /// A volume whose content is below `root`. It is counted before its first change.
    #[must_use]
    pub fn new(id: VolumeId, root: File, tenant: Arc<TenantStorage>, quota: VolumeSpec) -> Self {
        Self {
            id,
            root,
            account: Arc::new(Account::new(tenant, quota)),
            changes: Mutex::new(false),
            store: stores::State::default(),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.account.books()
    }

    /// Sets the quota; what is used beyond it stays.
    pub fn set_quota(&self, quota: VolumeSpec) {
        self.books().quota = quota;
    }

    /// What it takes, as far as it was counted.
    #[must_use]
    pub fn used(&self) -> Usage {
        self.books().used
    }

    /// The same, once it was counted.
    #[must_use]
    pub fn counted(&self) -> Option<Usage> {
        let books = self.books();
        books.counted.then_some(books.used)
    }

    /// Another descriptor of its root.
    ///
    /// # Errors
    /// When there is none left.
    pub fn root(&self) -> io::Result<File> {
        self.root.try_clone()
    }

    /// A place for one of its files or directories to be open; `None` where guests have so many open
    /// that there is none.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        Place::take(&self.account.tenant)
    }

    /// Begins a change: others wait until it is over. Blocks.
    ///
    /// # Errors
    /// When the volume could not be counted.
    pub fn change(self: &Arc<Self>) -> io::Result<Change<'_>> {
        let mut counted = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if !*counted {
            let used = copy::usage(&self.root)?;
            self.account.tenant.has(used.bytes);
            let mut books = self.books();
            (books.used, books.counted) = (used, true);
            *counted = true;
        }
        Ok(Change {
            volume: self,
            _others_wait: counted,
        })
    }

    /// Counts it anew, after another process has changed it as well. Blocks, and changes wait.
    ///
    /// # Errors
    /// When it could not be counted; the books stay as they were.
    pub fn recount(self: &Arc<Self>) -> io::Result<()> {
        let _change = self.change()?;
        let mut used = copy::usage(&self.root)?;
        let mut books = self.books();
        for open in books.open.values().filter(|open| open.orphan) {
            used += Usage::inode(open.bytes);
        }
        self.account.tenant.has(used.bytes);
        self.account.tenant.give(books.used.bytes);
        books.used = used;
        Ok(())
    }

    /// Copies everything as it is at one moment into an empty directory. Blocks, and changes wait.
    ///
    /// # Errors
    /// When `quota` or the tenant's limit is less than what there is; those of the file system.
    pub fn copy_to(self: &Arc<Self>, to: &File, quota: VolumeSpec) -> Result<(), ChangeError> {
        let change = self.change()?;
        let used = self.used();
        if used.bytes > quota.size.get() {
            return Err(Full::Bytes.into());
        }
        if used.inodes > quota.inodes {
            return Err(Full::Inodes.into());
        }
        self.account.tenant.take(used.bytes)?;
        let copied = copy::copy(&self.root, to);
        // The copy is counted when it becomes a volume.
        self.account.tenant.give(used.bytes);
        drop(change);
        Ok(copied?)
    }

    fn closed(&self, key: u64) {
        let mut books = self.books();
        let Entry::Occupied(mut entry) = books.open.entry(key) else {
            return;
        };
        entry.get_mut().handles -= 1;
        if entry.get().handles > 0 {
            return;
        }
        let open = entry.remove();
        if open.orphan {
            let gone = Usage::inode(open.bytes);
            self.account.give(&mut books, gone);
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let counted = *self
            .changes
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if counted {
            let used = self.books().used.bytes;
            self.account.tenant.give(used);
        }
    }
}

/// A file of a volume that is open, by one descriptor or several.
#[derive(Debug)]
pub struct Handle {
    volume: Arc<Volume>,
    key: u64,
}

impl Handle {
    /// Its volume.
    #[must_use]
    pub const fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.volume.closed(self.key);
    }
}

/// What identifies a file for as long as it is there.
pub type FileKey = u64;

/// The right to change a volume, and its books with it.
#[derive(Debug)]
pub struct Change<'a> {
    volume: &'a Arc<Volume>,
    _others_wait: MutexGuard<'a, bool>,
}

impl Change<'_> {
    /// Takes room for something new.
    ///
    /// # Errors
    /// [`Full`]; nothing is taken then.
    pub fn take(&self, wanted: Usage) -> Result<(), Full> {
        self.volume.account.take(wanted, 0)
    }

    /// Gives back what [`Change::take`] took.
    pub fn give(&self, gone: Usage) {
        let mut books = self.volume.books();
        self.volume.account.give(&mut books, gone);
    }

    /// A file was opened.
    ///
    /// # Errors
    /// When its size cannot be read.
    pub fn opened(&self, key: FileKey, file: &File) -> io::Result<Handle> {
        let bytes = blocks(file.metadata()?.len());
        let mut books = self.volume.books();
        let open = books.open.entry(key).or_insert(Open {
            handles: 0,
            bytes,
            orphan: false,
        });
        open.handles += 1;
        drop(books);
        Ok(Handle {
            volume: Arc::clone(self.volume),
            key,
        })
    }

    /// A file of `size` bytes lost its name, or something else that takes one block did.
    pub fn removed(&self, key: FileKey, size: u64) {
        let mut books = self.volume.books();
        if let Some(open) = books.open.get_mut(&key) {
            open.orphan = true;
            return;
        }
        let gone = Usage::inode(blocks(size));
        self.volume.account.give(&mut books, gone);
    }

    /// Does something to an open file after which it has `wanted` bytes, if it succeeds. The room is
    /// taken before and settled after it, by what the file has become.
    ///
    /// # Errors
    /// [`ChangeError::Full`] before anything was done.
    pub fn resize<T>(
        &self,
        handle: &Handle,
        file: &File,
        wanted: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, ChangeError> {
        let before = blocks(file.metadata()?.len());
        let taken = blocks(wanted).saturating_sub(before);
        if taken > 0 {
            self.take(Usage {
                bytes: taken,
                inodes: 0,
            })?;
        }
        let result = change();
        // Without a size to be read, what was taken is what it has at most.
        let after = file.metadata();
        let after = after.map_or(before + taken, |after| blocks(after.len()));
        let mut books = self.volume.books();
        let unused = (before + taken).saturating_sub(after);
        let gone = Usage {
            bytes: unused,
            inodes: 0,
        };
        self.volume.account.give(&mut books, gone);
        if let Some(open) = books.open.get_mut(&handle.key) {
            open.bytes = after;
        }
        Ok(result?)
    }

    /// An open file was cut to nothing by another way than [`Change::resize`].
    pub fn emptied(&self, key: FileKey, size_before: u64) {
        let mut books = self.volume.books();
        let gone = Usage {
            bytes: blocks(size_before),
            inodes: 0,
        };
        self.volume.account.give(&mut books, gone);
        if let Some(open) = books.open.get_mut(&key) {
            open.bytes = 0;
        }
    }
}
