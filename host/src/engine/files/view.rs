//! The calls of `wasi:filesystem/types`.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use wasmtime::component::Resource;
use wasmtime_wasi::filesystem::{Descriptor, Dir};
use wasmtime_wasi::p2::bindings::clocks::wall_clock;
use wasmtime_wasi::p2::bindings::filesystem::preopens;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    self, DescriptorStat, DescriptorType, ErrorCode, HostDescriptor, HostDirectoryEntryStream,
    PathFlags,
};
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, FsError, FsResult, ReaddirIterator};
use wasmtime_wasi::{FsPerms, OpenMode};

use super::streams::{Reader, Target, Writer};
use super::{
    FilesView, Held, LISTINGS_MAX, Local, OPEN_MAX, OpenPlace, Place, STREAMS_MAX, away, now,
    refused,
};
use crate::engine::outgoing::Patron;
use crate::storage::{BLOCK_BYTES, Change, FileKey, Handle, Usage, Volume};

type Fd = Resource<Descriptor>;

impl FilesView<'_> {
    fn patron(&self) -> FsResult<Arc<dyn Patron>> {
        // Between two requests no guest runs.
        self.patron.cloned().ok_or_else(|| ErrorCode::Io.into())
    }

    fn held(&self, fd: &Fd) -> FsResult<Held> {
        let held = self.files.held.get(&fd.rep()).cloned();
        held.ok_or_else(|| ErrorCode::BadDescriptor.into())
    }

    fn descriptor(&self, fd: &Fd) -> FsResult<Descriptor> {
        Ok(self.table.get(fd)?.clone())
    }

    fn file(&self, fd: &Fd) -> FsResult<(OpenFile, FsPerms)> {
        let held = self.held(fd)?;
        match (self.table.get(fd)?, held.file) {
            (Descriptor::File(file), Some(handle)) => {
                let open = OpenFile {
                    file: Arc::clone(&file.file),
                    handle,
                    place: held.place,
                };
                Ok((open, file.perms))
            }
            _ => Err(ErrorCode::BadDescriptor.into()),
        }
    }

    /// A file that may be changed.
    fn writable(&self, fd: &Fd) -> FsResult<OpenFile> {
        let (open, perms) = self.file(fd)?;
        if perms.write_not_permitted() {
            return Err(ErrorCode::NotPermitted.into());
        }
        Ok(open)
    }

    /// A place for one more descriptor of this guest's.
    fn place(&self, volume: &Volume) -> Option<Arc<OpenPlace>> {
        if self.files.held.len() >= OPEN_MAX {
            return None;
        }
        volume.place().map(Arc::new)
    }

    /// A call that changes no quota.
    fn plain<T, C>(&self, fd: &Fd, call: C) -> impl Future<Output = FsResult<T>> + Send + use<T, C>
    where
        T: Send + 'static,
        C: FnOnce(&mut Local, Fd) -> FsResult<T> + Send + 'static,
    {
        let found = self.descriptor(fd);
        let found = found.and_then(|descriptor| Ok((descriptor, self.patron()?)));
        async move {
            let (descriptor, patron) = found?;
            away(&patron, move |local| {
                let fd = local.lend(&descriptor)?;
                call(local, fd)
            })
            .await
        }
    }

    /// A call that changes a volume.
    fn changing<T, C>(
        &self,
        fd: &Fd,
        call: C,
    ) -> impl Future<Output = FsResult<T>> + Send + use<T, C>
    where
        T: Send + 'static,
        C: FnOnce(&mut Local, &Descriptor, &Change<'_>) -> FsResult<T> + Send + 'static,
    {
        let found = self.descriptor(fd).and_then(|descriptor| {
            let volume = self.held(fd)?.volume;
            Ok((descriptor, volume, self.patron()?))
        });
        async move {
            let (descriptor, volume, patron) = found?;
            away(&patron, move |local| {
                let change = volume.change()?;
                call(local, &descriptor, &change)
            })
            .await
        }
    }

    fn target(&self, open: OpenFile) -> FsResult<Target> {
        let place = Arc::clone(&self.files.streams);
        // The files' own, and this one.
        if Arc::strong_count(&place) > STREAMS_MAX + 1 {
            return Err(ErrorCode::InsufficientMemory.into());
        }
        Ok(Target {
            patron: self.patron()?,
            file: open.file,
            handle: open.handle,
            _open: open.place,
            _place: place,
        })
    }
}

/// An open file, and what it holds.
struct OpenFile {
    file: Arc<std::fs::File>,
    handle: Arc<Handle>,
    place: Arc<OpenPlace>,
}

/// What is at a path; `None` where nothing is.
fn at(
    local: &mut Local,
    dir: &Descriptor,
    flags: PathFlags,
    path: &str,
) -> FsResult<Option<(DescriptorStat, FileKey)>> {
    let fd = local.lend(dir)?;
    let stat = match now(local.view().stat_at(fd, flags, path.to_owned())) {
        Ok(stat) => stat,
        Err(error) => {
            return match error.downcast().map_err(FsError::trap)? {
                ErrorCode::NoEntry => Ok(None),
                other => Err(other.into()),
            };
        }
    };
    let fd = local.lend(dir)?;
    let hash = now(local.view().metadata_hash_at(fd, flags, path.to_owned()))?;
    Ok(Some((stat, hash.lower)))
}

/// What something takes in blocks, as [`Change::removed`] wants it.
fn size_of(stat: &DescriptorStat) -> u64 {
    match stat.type_ {
        DescriptorType::RegularFile => stat.size,
        _ => BLOCK_BYTES,
    }
}

/// Makes something that takes an inode and a block or none.
fn make<T>(change: &Change<'_>, price: Usage, make: impl FnOnce() -> FsResult<T>) -> FsResult<T> {
    change.take(price).map_err(|full| refused(full.into()))?;
    make().inspect_err(|_| change.give(price))
}

/// Takes a name away, and what it takes where that was the last of it.
fn unmake(
    local: &mut Local,
    dir: &Descriptor,
    change: &Change<'_>,
    path: &str,
    call: impl FnOnce(&mut Local, Fd) -> FsResult<()>,
) -> FsResult<()> {
    let before = at(local, dir, PathFlags::empty(), path)?;
    let fd = local.lend(dir)?;
    call(local, fd)?;
    if let Some((stat, key)) = before {
        change.removed(key, size_of(&stat));
    }
    Ok(())
}

/// Opens, and counts what comes of it.
fn open(
    local: &mut Local,
    dir: &Descriptor,
    change: &Change<'_>,
    (path_flags, path): (PathFlags, String),
    (oflags, flags): (types::OpenFlags, types::DescriptorFlags),
) -> FsResult<(Descriptor, Option<Handle>)> {
    let before = at(local, dir, path_flags, &path)?;
    let kind = before.as_ref().map(|(stat, _)| stat.type_);
    // Devices, pipes and sockets are nobody's who is a guest, and opening one may wait for ever.
    let usual = [
        DescriptorType::RegularFile,
        DescriptorType::Directory,
        DescriptorType::SymbolicLink,
    ];
    if kind.is_some_and(|kind| !usual.contains(&kind)) {
        return Err(ErrorCode::NotPermitted.into());
    }
    let fd = local.lend(dir)?;
    let call = |local: &mut Local| now(local.view().open_at(fd, path_flags, path, oflags, flags));
    let opened = match before {
        None if oflags.contains(types::OpenFlags::CREATE) => {
            make(change, Usage::inode(0), || call(local))?
        }
        _ => call(local)?,
    };
    let descriptor = local.table.get(&opened)?.clone();
    let Descriptor::File(file) = &descriptor else {
        return Ok((descriptor, None));
    };
    let hash = now(local.view().metadata_hash(opened))?;
    if let Some((stat, _)) = before
        && oflags.contains(types::OpenFlags::TRUNCATE)
    {
        change.emptied(hash.lower, stat.size);
    }
    let handle = change.opened(hash.lower, &file.file)?;
    Ok((descriptor, Some(handle)))
}

/// Writes at an offset, as far as the quota goes.
pub(super) fn write_at(
    volume: &Arc<Volume>,
    handle: &Handle,
    file: &std::fs::File,
    bytes: &[u8],
    offset: Option<u64>,
) -> FsResult<u64> {
    let change = volume.change()?;
    let size = file.metadata()?.len();
    let offset = offset.unwrap_or(size);
    let end = offset.checked_add(bytes.len() as u64);
    let end = end.filter(|end| i64::try_from(*end).is_ok());
    let end = end.ok_or(ErrorCode::FileTooLarge)?;
    let wanted = if bytes.is_empty() {
        size
    } else {
        size.max(end)
    };
    let written = change
        .resize(handle, file, wanted, || file.write_at(bytes, offset))
        .map_err(refused)?;
    Ok(written as u64)
}

impl preopens::Host for FilesView<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Fd, String)>> {
        let mut directories = Vec::with_capacity(self.files.mounts.len());
        for mount in self.files.mounts.iter() {
            let Place::Path(path) = &mount.place else {
                continue;
            };
            let (perms, mode) = if mount.writable {
                (FsPerms::ReadWrite, OpenMode::READ | OpenMode::WRITE)
            } else {
                (FsPerms::ReadOnly, OpenMode::READ)
            };
            let place = self.place(&mount.volume);
            let place = place.ok_or_else(|| wasmtime::format_err!("too much is open"))?;
            let dir = Dir::new(mount.volume.root()?, perms, mode, true);
            let fd = self.table.push(Descriptor::Dir(dir))?;
            let held = Held {
                volume: Arc::clone(&mount.volume),
                file: None,
                place,
            };
            self.files.held.insert(fd.rep(), held);
            directories.push((fd, path.clone()));
        }
        Ok(directories)
    }
}

impl types::Host for FilesView<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn filesystem_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<ErrorCode>> {
        Ok(self.table.get(&error)?.downcast_ref().copied())
    }
}

impl HostDescriptor for FilesView<'_> {
    async fn advise(
        &mut self,
        fd: Fd,
        offset: u64,
        len: u64,
        advice: types::Advice,
    ) -> FsResult<()> {
        self.plain(&fd, move |local, fd| {
            now(local.view().advise(fd, offset, len, advice))
        })
        .await
    }

    async fn sync_data(&mut self, fd: Fd) -> FsResult<()> {
        self.plain(&fd, |local, fd| now(local.view().sync_data(fd)))
            .await
    }

    async fn sync(&mut self, fd: Fd) -> FsResult<()> {
        self.plain(&fd, |local, fd| now(local.view().sync(fd)))
            .await
    }

    async fn get_flags(&mut self, fd: Fd) -> FsResult<types::DescriptorFlags> {
        self.plain(&fd, |local, fd| now(local.view().get_flags(fd)))
            .await
    }

    async fn get_type(&mut self, fd: Fd) -> FsResult<DescriptorType> {
        self.plain(&fd, |local, fd| now(local.view().get_type(fd)))
            .await
    }

    async fn set_size(&mut self, fd: Fd, size: u64) -> FsResult<()> {
        let OpenFile { file, handle, .. } = self.writable(&fd)?;
        if i64::try_from(size).is_err() {
            return Err(ErrorCode::FileTooLarge.into());
        }
        self.changing(&fd, move |_, _, change| {
            let cut = || file.set_len(size);
            change.resize(&handle, &file, size, cut).map_err(refused)
        })
        .await
    }

    async fn set_times(
        &mut self,
        fd: Fd,
        accessed: types::NewTimestamp,
        modified: types::NewTimestamp,
    ) -> FsResult<()> {
        check_times([&accessed, &modified])?;
        self.plain(&fd, move |local, fd| {
            now(local.view().set_times(fd, accessed, modified))
        })
        .await
    }

    async fn read(&mut self, fd: Fd, len: u64, offset: u64) -> FsResult<(Vec<u8>, bool)> {
        self.plain(&fd, move |local, fd| {
            now(local.view().read(fd, len, offset))
        })
        .await
    }

    async fn write(&mut self, fd: Fd, bytes: Vec<u8>, offset: u64) -> FsResult<u64> {
        let OpenFile { file, handle, .. } = self.writable(&fd)?;
        let patron = self.patron()?;
        away(&patron, move |_| {
            write_at(handle.volume(), &handle, &file, &bytes, Some(offset))
        })
        .await
    }

    async fn read_directory(&mut self, fd: Fd) -> FsResult<Resource<ReaddirIterator>> {
        if self.files.listings.len() >= LISTINGS_MAX {
            return Err(ErrorCode::InsufficientMemory.into());
        }
        let listing = self.plain(&fd, |local, fd| {
            let listing = now(local.view().read_directory(fd))?;
            Ok(local.table.delete(listing)?)
        });
        let listing = listing.await?;
        let listing = self.table.push(listing)?;
        self.files.listings.insert(listing.rep());
        Ok(listing)
    }

    async fn create_directory_at(&mut self, fd: Fd, path: String) -> FsResult<()> {
        self.changing(&fd, |local, dir, change| {
            let fd = local.lend(dir)?;
            make(change, Usage::inode(BLOCK_BYTES), || {
                now(local.view().create_directory_at(fd, path))
            })
        })
        .await
    }

    async fn stat(&mut self, fd: Fd) -> FsResult<DescriptorStat> {
        self.plain(&fd, |local, fd| now(local.view().stat(fd)))
            .await
    }

    async fn stat_at(
        &mut self,
        fd: Fd,
        flags: PathFlags,
        path: String,
    ) -> FsResult<DescriptorStat> {
        self.plain(&fd, move |local, fd| {
            now(local.view().stat_at(fd, flags, path))
        })
        .await
    }

    async fn set_times_at(
        &mut self,
        fd: Fd,
        flags: PathFlags,
        path: String,
        accessed: types::NewTimestamp,
        modified: types::NewTimestamp,
    ) -> FsResult<()> {
        check_times([&accessed, &modified])?;
        self.plain(&fd, move |local, fd| {
            now(local
                .view()
                .set_times_at(fd, flags, path, accessed, modified))
        })
        .await
    }

    /// A file has one name: what it takes could not be told from its names otherwise.
    async fn link_at(&mut self, _: Fd, _: PathFlags, _: String, _: Fd, _: String) -> FsResult<()> {
        Err(ErrorCode::NotPermitted.into())
    }

    async fn open_at(
        &mut self,
        fd: Fd,
        path_flags: PathFlags,
        path: String,
        oflags: types::OpenFlags,
        flags: types::DescriptorFlags,
    ) -> FsResult<Fd> {
        let volume = self.held(&fd)?.volume;
        // WASI 0.2 has no word for too many open files.
        let place = self.place(&volume).ok_or(ErrorCode::InsufficientMemory)?;
        let (descriptor, handle) = self
            .changing(&fd, move |local, dir, change| {
                open(local, dir, change, (path_flags, path), (oflags, flags))
            })
            .await?;
        let fd = self.table.push(descriptor)?;
        let file = handle.map(Arc::new);
        let held = Held {
            volume,
            file,
            place,
        };
        self.files.held.insert(fd.rep(), held);
        Ok(fd)
    }

    fn drop(&mut self, fd: Fd) -> wasmtime::Result<()> {
        self.files.held.remove(&fd.rep());
        self.table.delete(fd)?;
        Ok(())
    }

    async fn readlink_at(&mut self, fd: Fd, path: String) -> FsResult<String> {
        self.plain(&fd, |local, fd| now(local.view().readlink_at(fd, path)))
            .await
    }

    async fn remove_directory_at(&mut self, fd: Fd, path: String) -> FsResult<()> {
        self.changing(&fd, |local, dir, change| {
            unmake(local, dir, change, &path.clone(), |local, fd| {
                now(local.view().remove_directory_at(fd, path))
            })
        })
        .await
    }

    async fn rename_at(
        &mut self,
        fd: Fd,
        path: String,
        new_fd: Fd,
        new_path: String,
    ) -> FsResult<()> {
        let new_dir = self.descriptor(&new_fd)?;
        if !Arc::ptr_eq(&self.held(&fd)?.volume, &self.held(&new_fd)?.volume) {
            return Err(ErrorCode::CrossDevice.into());
        }
        self.changing(&fd, move |local, dir, change| {
            let moved = at(local, dir, PathFlags::empty(), &path)?;
            let replaced = at(local, &new_dir, PathFlags::empty(), &new_path)?;
            let (fd, new_fd) = (local.lend(dir)?, local.lend(&new_dir)?);
            now(local.view().rename_at(fd, path, new_fd, new_path))?;
            if let (Some((_, moved)), Some((stat, replaced))) = (moved, replaced)
                && moved != replaced
            {
                change.removed(replaced, size_of(&stat));
            }
            Ok(())
        })
        .await
    }

    async fn symlink_at(&mut self, fd: Fd, target: String, path: String) -> FsResult<()> {
        self.changing(&fd, |local, dir, change| {
            let fd = local.lend(dir)?;
            make(change, Usage::inode(BLOCK_BYTES), || {
                now(local.view().symlink_at(fd, target, path))
            })
        })
        .await
    }

    async fn unlink_file_at(&mut self, fd: Fd, path: String) -> FsResult<()> {
        self.changing(&fd, |local, dir, change| {
            unmake(local, dir, change, &path.clone(), |local, fd| {
                now(local.view().unlink_file_at(fd, path))
            })
        })
        .await
    }

    fn read_via_stream(&mut self, fd: Fd, offset: u64) -> FsResult<Resource<DynInputStream>> {
        if let Descriptor::Dir(_) = self.table.get(&fd)? {
            return Err(ErrorCode::IsDirectory.into());
        }
        let (open, _) = self.file(&fd)?;
        let reader = Reader::new(self.target(open)?, offset);
        let reader: DynInputStream = Box::new(reader);
        Ok(self.table.push(reader)?)
    }

    fn write_via_stream(&mut self, fd: Fd, offset: u64) -> FsResult<Resource<DynOutputStream>> {
        let open = self.writable(&fd)?;
        let writer = Writer::new(self.target(open)?, Some(offset));
        let writer: DynOutputStream = Box::new(writer);
        Ok(self.table.push(writer)?)
    }

    fn append_via_stream(&mut self, fd: Fd) -> FsResult<Resource<DynOutputStream>> {
        let open = self.writable(&fd)?;
        let writer = Writer::new(self.target(open)?, None);
        let writer: DynOutputStream = Box::new(writer);
        Ok(self.table.push(writer)?)
    }

    async fn is_same_object(&mut self, one: Fd, other: Fd) -> wasmtime::Result<bool> {
        let other = self.table.get(&other)?.clone();
        let same = self.plain(&one, move |local, one| {
            let other = local.lend(&other)?;
            let mut view = local.view();
            now(async { Ok(view.is_same_object(one, other).await) })
        });
        match same.await {
            Ok(same) => same,
            Err(_) => Ok(false),
        }
    }

    async fn metadata_hash(&mut self, fd: Fd) -> FsResult<types::MetadataHashValue> {
        self.plain(&fd, |local, fd| now(local.view().metadata_hash(fd)))
            .await
    }

    async fn metadata_hash_at(
        &mut self,
        fd: Fd,
        flags: PathFlags,
        path: String,
    ) -> FsResult<types::MetadataHashValue> {
        self.plain(&fd, move |local, fd| {
            now(local.view().metadata_hash_at(fd, flags, path))
        })
        .await
    }
}

/// A time that the kernel has no number for is the guest's mistake.
fn check_times(times: [&types::NewTimestamp; 2]) -> FsResult<()> {
    let possible = |time: &wall_clock::Datetime| {
        i64::try_from(time.seconds).is_ok_and(|seconds| seconds < i64::MAX / 2)
            && time.nanoseconds < 1_000_000_000
    };
    let good = times.iter().all(|time| match time {
        types::NewTimestamp::Timestamp(time) => possible(time),
        _ => true,
    });
    if good {
        Ok(())
    } else {
        Err(ErrorCode::Invalid.into())
    }
}

impl HostDirectoryEntryStream for FilesView<'_> {
    async fn read_directory_entry(
        &mut self,
        listing: Resource<ReaddirIterator>,
    ) -> FsResult<Option<types::DirectoryEntry>> {
        // It is in memory; wasmtime-wasi's own call looks it up in a table.
        let mut context = super::CONTEXT.clone();
        let mut view = wasmtime_wasi::filesystem::WasiFilesystemCtxView {
            ctx: &mut context,
            table: self.table,
        };
        view.read_directory_entry(listing).await
    }

    fn drop(&mut self, listing: Resource<ReaddirIterator>) -> wasmtime::Result<()> {
        self.files.listings.remove(&listing.rep());
        self.table.delete(listing)?;
        Ok(())
    }
}
