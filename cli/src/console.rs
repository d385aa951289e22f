//! `insula machine console`: this terminal becomes the machine's, until Ctrl-].

use std::io::{IsTerminal, Read, Write};

use anyhow::Result;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::args::MachineRef;
use crate::client::Client;
use crate::output;

/// Ctrl-]: the key that telnet and virsh leave a console with.
const LEAVE: u8 = 0x1d;
const CHUNK_BYTES: usize = 4 << 10;
/// Chunks that were typed, or pasted, and are not sent yet.
const TYPED_CHUNKS: usize = 16;

/// Every key goes to the guest as it is; undone when dropped.
struct Raw(Option<Termios>);

impl Raw {
    /// Does nothing where standard input is no terminal.
    fn new() -> Self {
        let stdin = std::io::stdin();
        let Ok(before) = tcgetattr(&stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        // Refused: then keys arrive line by line, which is better than no console.
        let set = tcsetattr(&stdin, OptionalActions::Now, &raw);
        Self(set.is_ok().then_some(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Until the guest's end, the end of what is typed, or Ctrl-].
pub(crate) async fn run(client: &Client, machine: &MachineRef) -> Result<()> {
    let path = format!("{}/console", machine.path());
    let (upgraded, _driver) = client.upgrade(&path, "insula-console").await?;
    if std::io::stdin().is_terminal() {
        output::note(&format!("the console of {machine}; Ctrl-] leaves it"));
    }
    let _raw = Raw::new();
    let (mut from, mut to) = tokio::io::split(upgraded);
    let mut typed = keyboard();
    let mut chunk = [0; CHUNK_BYTES];
    let mut typing = true;
    loop {
        // What was read is printed before the next wait; what was typed is sent whole.
        tokio::select! {
            read = from.read(&mut chunk) => match read? {
                0 => return Ok(()),
                length => {
                    let mut stdout = std::io::stdout().lock();
                    stdout.write_all(&chunk[..length])?;
                    stdout.flush()?;
                }
            },
            keys = typed.recv(), if typing => match keys {
                Some(Typed::Keys(keys)) => to.write_all(&keys).await?,
                Some(Typed::Leave) => return Ok(()),
                // What was piped in is over; its answer may still come.
                None => typing = false,
            },
        }
    }
}

enum Typed {
    Keys(Vec<u8>),
    Leave,
}

/// Reads standard input on a thread of its own, which ends with the process.
fn keyboard() -> mpsc::Receiver<Typed> {
    let (send, typed) = mpsc::channel(TYPED_CHUNKS);
    std::thread::spawn(move || {
        let mut chunk = [0; CHUNK_BYTES];
        let mut stdin = std::io::stdin().lock();
        while let Ok(length @ 1..) = stdin.read(&mut chunk) {
            let mut parts = chunk[..length].splitn(2, |key| *key == LEAVE);
            let keys = parts.next().unwrap_or_default().to_vec();
            if send.blocking_send(Typed::Keys(keys)).is_err() {
                return;
            }
            if parts.next().is_some() {
                let _ = send.blocking_send(Typed::Leave);
                return;
            }
        }
    });
    typed
}
