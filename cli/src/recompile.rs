//! `insula recompile`: waits until everything is compiled for the engine that the host has now.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::args::RecompileArgs;
use crate::client::Client;
use crate::output;

const PATH: &str = "/v1/recompilation";
const POLL: Duration = Duration::from_millis(200);
/// Cells of the bar.
const WIDTH: usize = 40;

/// Of services.
#[derive(Debug, Clone, Copy)]
struct Progress {
    all: u64,
    done: u64,
    failed: u64,
}

impl Progress {
    fn of(answer: &Value) -> Self {
        let number = |key: &str| answer[key].as_u64().unwrap_or(0);
        Self {
            all: number("services"),
            done: number("done"),
            failed: number("failed"),
        }
    }

    const fn goes_on(self) -> bool {
        self.done + self.failed < self.all
    }

    fn bar(self) -> String {
        let over = self.done + self.failed;
        let filled = over * WIDTH as u64 / self.all.max(1);
        let filled = usize::try_from(filled).unwrap_or(WIDTH).min(WIDTH);
        let (full, empty) = ("#".repeat(filled), "-".repeat(WIDTH - filled));
        format!("[{full}{empty}] {over}/{} services", self.all)
    }
}

pub(crate) async fn run(args: RecompileArgs) -> Result<()> {
    let client = Client::new(&args.connection)?;
    let mut stderr = std::io::stderr();
    let shows = stderr.is_terminal();
    // One that goes on already may leave something; then there is another.
    loop {
        let mut progress = Progress::of(&client.post(PATH, &json!({})).await?.json()?);
        if progress.all == 0 {
            break;
        }
        loop {
            if shows {
                write!(stderr, "\r{}", progress.bar())?;
                stderr.flush()?;
            }
            if !progress.goes_on() {
                break;
            }
            tokio::time::sleep(POLL).await;
            progress = Progress::of(&client.get(PATH).await?.json()?);
        }
        if shows {
            writeln!(stderr)?;
        }
        let Progress { all, failed, .. } = progress;
        if failed > 0 {
            bail!("{failed} of {all} services could not be compiled; the host's log says why");
        }
    }
    let host = client.get("/v1/host").await?.json()?;
    let engine = output::plain(host["wasmtime"].as_str().unwrap_or("?"));
    output::line(&format!("everything is compiled for wasmtime {engine}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_fills() {
        let at = |done, failed| Progress {
            all: 4,
            done,
            failed,
        };
        assert!(at(0, 0).bar().starts_with(&format!("[{}]", "-".repeat(40))));
        let half = at(1, 1).bar();
        assert!(half.starts_with(&format!("[{}{}]", "#".repeat(20), "-".repeat(20))));
        assert!(half.ends_with("2/4 services"));
        assert!(at(1, 1).goes_on() && !at(3, 1).goes_on());
        assert!(at(4, 0).bar().starts_with(&format!("[{}]", "#".repeat(40))));
    }
}
