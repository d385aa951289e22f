//! A backup, as a download: see [`crate::state::backup`].

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use bytes::Bytes;
use futures::stream;
use insula_types::TenantName;

use super::volumes::{self, CopyFailed};
use crate::control::Control;
use crate::control::http_types::{Call, Reply};
use crate::control::link::LinkError;
use crate::control::problem::{Answer, Code, Problem};
use crate::messages::Refusal;
use crate::state::backup::{Backup, Piece};
use crate::state::volumes::VolumeDirectory;
use crate::state::{Page, Store, StoreError, Volume};

/// Records that are read at once.
const PAGE: u32 = 100;

/// Holds back the removal of files while a backup is read; one at a time.
struct Running {
    control: Rc<Control>,
    /// The copy of a volume that is being sent.
    copy: RefCell<Option<VolumeDirectory>>,
}

impl Running {
    fn begin(control: &Rc<Control>) -> Result<Self, Problem> {
        if control.backup_runs.replace(true) {
            let detail = "a backup is being taken already";
            return Err(Problem::new(Code::HostBusy, detail).retry_after(10));
        }
        Ok(Self {
            control: Rc::clone(control),
            copy: RefCell::default(),
        })
    }

    /// The next bytes, for which a volume may have to be copied first.
    async fn next(&self, mut backup: Backup) -> io::Result<(Option<Bytes>, Backup)> {
        loop {
            let read = self.control.files.run(move |files| {
                let piece = backup.next(files)?;
                io::Result::Ok((piece, backup))
            });
            let (piece, rest) = read.await.map_err(io::Error::other)??;
            backup = rest;
            let volume = match piece {
                Piece::Bytes(chunk) => return Ok((Some(chunk), backup)),
                Piece::End => return Ok((None, backup)),
                Piece::Wanted(volume) => volume,
            };
            self.remove_copy().await;
            let Some(directory) = self.copy(&volume).await? else {
                continue;
            };
            let begun = self.control.files.run(move |files| {
                let copy = files.open_volume(&directory)?;
                let chunk = backup.copied(&volume, &copy)?;
                io::Result::Ok((Some(chunk), backup))
            });
            return begun.await.map_err(io::Error::other)?;
        }
    }

    /// A copy of a volume, unless it is gone.
    async fn copy(&self, volume: &Volume) -> io::Result<Option<VolumeDirectory>> {
        let failed = |problem: &Problem| io::Error::other(problem.detail().to_owned());
        let directory = volumes::new_directory().map_err(|problem| failed(&problem))?;
        match volumes::copy_into(&self.control, volume, &directory).await {
            Ok(()) => {
                self.copy.replace(Some(directory.clone()));
                Ok(Some(directory))
            }
            Err(CopyFailed::Told(LinkError::Refused(Refusal::UnknownVolume(id)))) => {
                tracing::info!(%id, "a volume was deleted while a backup was taken");
                Ok(None)
            }
            Err(CopyFailed::Told(error)) => Err(io::Error::other(error)),
            Err(CopyFailed::Files(problem)) => Err(failed(&problem)),
        }
    }

    async fn remove_copy(&self) {
        let copy = self.copy.take();
        volumes::remove(&self.control, copy.into_iter().collect()).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.backup_runs.set(false);
        let (control, copy) = (Rc::clone(&self.control), self.copy.take());
        // What was to be removed meanwhile is removed now.
        self.control.spawn(async move {
            volumes::remove(&control, copy.into_iter().collect()).await;
            control.collect_garbage().await;
        });
    }
}

/// All volumes that there are.
fn all_volumes(store: &mut dyn Store) -> Result<Vec<Volume>, StoreError> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = Page { after, limit: PAGE };
        let tenants = store.tenants(&page)?;
        let names: Vec<TenantName> = tenants.items.into_iter().map(|one| one.name).collect();
        for name in names {
            let mut page = Page {
                after: None,
                limit: PAGE,
            };
            loop {
                let volumes = store.volumes(&name, &page)?;
                all.extend(volumes.items);
                page.after = volumes.next;
                if page.after.is_none() {
                    break;
                }
            }
        }
        after = tenants.next;
        if after.is_none() {
            return Ok(all);
        }
    }
}

pub(crate) async fn download(control: Rc<Control>, _: Call) -> Answer {
    let running = Running::begin(&control)?;
    let (database, components, volumes) = {
        // Nothing is removed between the copy and the list of what it refers to.
        let _mutation = control.mutation.lock().await;
        let directory = control.files.run(|files| files.directory()).await??;
        control
            .store(move |store| {
                let copy = store.copy(&directory)?;
                Ok((copy, store.digests()?, all_volumes(store)?))
            })
            .await?
    };
    let backup = Backup::new(database, components, volumes);
    let chunks = stream::try_unfold((backup, running), |(backup, running)| async move {
        let (chunk, backup) = running.next(backup).await?;
        io::Result::Ok(chunk.map(|chunk| (chunk, (backup, running))))
    });
    Ok(Reply::try_stream("application/x-tar", chunks))
}
