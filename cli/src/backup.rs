//! `insula backup` and `insula restore`.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::args::{BackupArgs, RestoreArgs};
use crate::client::Client;
use crate::output;

/// Writes to a name beside the last one, so that there is a whole backup or none.
pub(crate) async fn backup(args: BackupArgs) -> Result<()> {
    let to = if args.to.is_dir() {
        args.to.join(name_of(SystemTime::now()))
    } else {
        args.to
    };
    if to.exists() {
        bail!("{} is there already", to.display());
    }
    let client = Client::new(&args.connection)?;
    let mut stream = client.stream("/v1/backup").await?;
    let part = beside(&to);
    let written = async {
        let mut options = OpenOptions::new();
        // It holds what tenants uploaded and set.
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        let mut bytes = 0;
        while let Some(chunk) = stream.chunk().await? {
            file.write_all(&chunk)?;
            bytes += chunk.len() as u64;
        }
        file.sync_all()?;
        fs::rename(&part, &to)?;
        let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        anyhow::Ok(bytes)
    };
    let bytes = match written.await {
        Ok(bytes) => bytes,
        Err(error) => {
            // It may not be there.
            let _ = fs::remove_file(&part);
            return Err(error.context(format!("{} was not written", to.display())));
        }
    };
    output::note(&format!(
        "wrote {} ({})",
        to.display(),
        output::bytes_text(bytes)
    ));
    Ok(())
}

fn beside(to: &Path) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    to.with_file_name(name)
}

/// `insula-2026-11-25T050000Z.tar`.
fn name_of(time: SystemTime) -> String {
    let time = insula_host::state::Timestamp::from(time).to_string();
    let seconds = time.split('.').next().unwrap_or_default();
    format!("insula-{}Z.tar", seconds.replace(':', ""))
}

pub(crate) fn restore(args: &RestoreArgs) -> Result<()> {
    let file = File::open(&args.from).with_context(|| args.from.display().to_string())?;
    let restored = insula_host::state::backup::restore(BufReader::new(file), &args.data)?;
    output::note(&format!(
        "restored {} components and {} volumes into {}; `insula serve --data {}` compiles and serves them",
        restored.components,
        restored.volumes,
        args.data.display(),
        args.data.display()
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(
            name_of(SystemTime::UNIX_EPOCH),
            "insula-1970-01-01T000000Z.tar"
        );
        assert_eq!(beside(Path::new("a/b.tar")), Path::new("a/b.tar.part"));
    }
}
