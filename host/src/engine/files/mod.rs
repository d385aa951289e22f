//! The files of a guest: `wasi:filesystem` over the volumes that its service mounts.
//!
//! ```text
//!  guest ─▶ FilesView ─▶ a thread that may block: quota ▸ wasmtime-wasi's own call ▸ settle
//!             │                                     └ Local: a table with just what the call needs
//!             └ remembers of each descriptor which volume it is of, and keeps open files counted
//! ```
//!
//! Paths, symbolic links and permissions are wasmtime-wasi's business, which resolves a path below
//! its directory in one step of the kernel's (`openat2`). What is added here is the quota, in front
//! of everything that could make a volume grow, and where it runs: never on a worker, whose other
//! tenants would wait for the disk, and at the tenant's expense ([`super::Offload`]).

mod streams;
mod view;

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::{Arc, LazyLock};

use tokio::sync::oneshot;
use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemCtx, WasiFilesystemCtxView};
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};
use wasmtime_wasi::p2::{FsError, FsResult};
use wasmtime_wasi::runtime::poll_noop;

use super::guest::Guest;
use super::outgoing::Patron;
use crate::storage::{ChangeError, Handle, Place as OpenPlace, Volume};

/// Files and directories that one guest has open at once.
const OPEN_MAX: usize = 256;
/// Streams of files that one guest has at once: each can hold 64 KiB.
const STREAMS_MAX: usize = 64;
/// Listings of directories that one guest has at once: each is in memory whole.
const LISTINGS_MAX: usize = 1;

/// Where a guest finds a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory.
    Path(String),
    /// A bucket of keys and values.
    Store(String),
}

/// A volume where a guest sees it.
#[derive(Debug, Clone)]
pub struct Mounted {
    /// The volume.
    pub volume: Arc<Volume>,
    /// Where.
    pub place: Place,
    /// Whether it may be changed.
    pub writable: bool,
}

/// What a descriptor of a guest's stands for.
#[derive(Clone)]
struct Held {
    volume: Arc<Volume>,
    /// `None` for a directory.
    file: Option<Arc<Handle>>,
    /// Kept for as long as anything uses the descriptor.
    place: Arc<OpenPlace>,
}

/// The files of one guest.
pub(super) struct Files {
    mounts: Arc<[Mounted]>,
    held: HashMap<u32, Held>,
    listings: HashSet<u32>,
    /// As many as there are streams, and one.
    streams: Arc<()>,
}

impl Files {
    /// Whether nothing is open but the directories that a guest begins with.
    pub(super) fn is_at_rest(&self) -> bool {
        self.listings.is_empty()
            && Arc::strong_count(&self.streams) == 1
            && self.held.len() <= self.mounts.len()
            && self.held.values().all(|held| held.file.is_none())
    }

    pub(super) fn new(mounts: Arc<[Mounted]>) -> Self {
        Self {
            mounts,
            held: HashMap::new(),
            listings: HashSet::new(),
            streams: Arc::default(),
        }
    }
}

/// A guest's files, during one call.
pub(super) struct FilesView<'a> {
    pub(super) table: &'a mut ResourceTable,
    pub(super) files: &'a mut Files,
    pub(super) patron: Option<&'a Arc<dyn Patron>>,
}

struct GuestFiles;

impl HasData for GuestFiles {
    type Data<'a> = FilesView<'a>;
}

/// Defines `wasi:filesystem`, in place of another definition.
pub(super) fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    preopens::add_to_linker::<Guest, GuestFiles>(linker, Guest::files)?;
    types::add_to_linker::<Guest, GuestFiles>(linker, Guest::files)
}

/// What one call needs, on a thread that may block.
struct Local {
    table: ResourceTable,
    context: WasiFilesystemCtx,
}

/// Opens files whose calls are made where they are asked for, and not on a thread of tokio's.
static CONTEXT: LazyLock<WasiFilesystemCtx> = LazyLock::new(|| {
    let mut builder = wasmtime_wasi::WasiCtx::builder();
    let mut context = builder.allow_blocking_current_thread(true).build();
    context.filesystem().clone()
});

impl Local {
    fn new() -> Self {
        Self {
            table: ResourceTable::new(),
            context: CONTEXT.clone(),
        }
    }

    fn view(&mut self) -> WasiFilesystemCtxView<'_> {
        WasiFilesystemCtxView {
            ctx: &mut self.context,
            table: &mut self.table,
        }
    }

    /// Another handle for the call: it takes the one that it gets.
    fn lend(&mut self, descriptor: &Descriptor) -> FsResult<Resource<Descriptor>> {
        Ok(self.table.push(descriptor.clone())?)
    }
}

/// The result of a call that does not wait: it blocks.
fn now<T>(call: impl Future<Output = FsResult<T>>) -> FsResult<T> {
    let waits = || FsError::trap(wasmtime::format_err!("a call on files waits"));
    poll_noop(pin!(call)).unwrap_or_else(|| Err(waits()))
}

fn refused(error: ChangeError) -> FsError {
    match error {
        ChangeError::Full(_) => ErrorCode::Quota.into(),
        ChangeError::Io(error) => error.into(),
    }
}

/// Does something on a thread that may block.
async fn away<T: Send + 'static>(
    patron: &Arc<dyn Patron>,
    work: impl FnOnce(&mut Local) -> FsResult<T> + Send + 'static,
) -> FsResult<T> {
    begin(patron, work)
        .await
        .unwrap_or_else(|_| Err(ErrorCode::Io.into()))
}

/// The same, to be waited for later.
fn begin<T: Send + 'static>(
    patron: &Arc<dyn Patron>,
    work: impl FnOnce(&mut Local) -> FsResult<T> + Send + 'static,
) -> oneshot::Receiver<FsResult<T>> {
    let (done, wait) = oneshot::channel();
    Arc::clone(patron).offload(Box::new(move || {
        // Its guest may be gone.
        let _ = done.send(work(&mut Local::new()));
    }));
    wait
}
