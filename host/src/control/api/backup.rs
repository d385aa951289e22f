//! A backup, as a download: see [`crate::state::backup`].

use std::rc::Rc;

use futures::stream;

use crate::control::Control;
use crate::control::http_types::{Call, Reply};
use crate::control::problem::{Answer, Code, Problem};
use crate::state::backup::Backup;

/// Holds back the removal of files while a backup is read; one at a time.
struct Running(Rc<Control>);

impl Running {
    fn begin(control: &Rc<Control>) -> Result<Self, Problem> {
        if control.backup_runs.replace(true) {
            let detail = "a backup is being taken already";
            return Err(Problem::new(Code::HostBusy, detail).retry_after(10));
        }
        Ok(Self(Rc::clone(control)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.backup_runs.set(false);
        let control = Rc::clone(&self.0);
        // What was to be removed meanwhile is removed now.
        self.0.spawn(async move { control.collect_garbage().await });
    }
}

pub(crate) async fn download(control: Rc<Control>, _: Call) -> Answer {
    let running = Running::begin(&control)?;
    let (database, components) = {
        // Nothing is removed between the copy and the list of what it refers to.
        let _mutation = control.mutation.lock().await;
        let directory = control.files.run(|files| files.directory()).await??;
        control
            .store(move |store| Ok((store.copy(&directory)?, store.digests()?)))
            .await?
    };
    let backup = Backup::new(database, components);
    let chunks = stream::try_unfold((backup, running), |(mut backup, running)| async move {
        let read = running.0.files.run(move |files| {
            let chunk = backup.next(files)?;
            std::io::Result::Ok((chunk, backup))
        });
        let (chunk, backup) = read.await.map_err(std::io::Error::other)??;
        Ok(chunk.map(|chunk| (chunk, (backup, running))))
    });
    Ok(Reply::try_stream("application/x-tar", chunks))
}
