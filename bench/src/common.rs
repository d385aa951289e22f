//! What all subcommands but `cost` are told alike.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cores::{Layout, Places};
use crate::peers::{self, Missing};
use crate::servers::Bed;

/// Options of every run.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Common {
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) rounds: u16,
    /// For how long, each time
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub(crate) seconds: u16,
    /// Only this way of dividing the cores; nothing is written then
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Where `benchmarks.md` and the plots go; nothing is written when it is `-`
    #[arg(long, default_value_os_t = peers::repository().join("docs"))]
    out: PathBuf,
    /// The `insula` to measure
    #[arg(long)]
    insula: Option<PathBuf>,
    /// Where the built samples are
    #[arg(long, default_value_os_t = peers::repository().join("target/guests"))]
    guests: PathBuf,
    /// Fetch the peers that are missing
    #[arg(long)]
    install_peers: bool,
}

impl Common {
    pub(crate) fn layouts(&self) -> Vec<Layout> {
        self.layout.map_or(Layout::ALL.to_vec(), |one| vec![one])
    }

    pub(crate) fn measured(&self) -> Duration {
        Duration::from_secs(u64::from(self.seconds))
    }

    pub(crate) const fn missing(&self) -> Missing {
        if self.install_peers {
            Missing::Installed
        } else {
            Missing::Refused
        }
    }

    /// The bytes of a built sample.
    pub(crate) fn guest(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.guest_path(name);
        fs::read(&path).with_context(|| {
            let path = path.display();
            format!("{path}: cargo xtask guests makes it")
        })
    }

    pub(crate) fn guest_path(&self, name: &str) -> PathBuf {
        self.guests.join(format!("{name}.wasm"))
    }

    /// What servers are started with. `wasmtime` is empty where it has no part.
    pub(crate) fn bed(&self, layout: Layout, scratch: &Path, wasmtime: PathBuf) -> Result<Bed> {
        let insula = match &self.insula {
            Some(path) => path.clone(),
            None => peers::built("target/dist/insula", "cargo build --profile dist -p insula")?,
        };
        Ok(Bed {
            component: self.guest_path("hello"),
            insula,
            wasmtime,
            places: Places::of(layout)?,
            scratch: scratch.to_owned(),
            expected: HELLO.to_vec(),
        })
    }

    /// Where to write; `None` when the run was one part of what there is.
    pub(crate) fn out(&self, whole: Whole) -> Option<&Path> {
        let all = whole == Whole::Everything && self.layout.is_none();
        (all && self.out.as_os_str() != "-").then_some(&*self.out)
    }

    /// The command line, to be repeated.
    pub(crate) fn command(&self, verb: &str) -> String {
        let (rounds, seconds) = (self.rounds, self.seconds);
        format!("cargo xtask bench {verb} --rounds {rounds} --seconds {seconds}")
    }
}

/// Whether all that a subcommand can measure was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whole {
    Everything,
    Part,
}

impl Whole {
    /// Of a list of what is wanted, where nothing wanted means everything.
    pub(crate) const fn unless_only<T>(only: &[T]) -> Self {
        if only.is_empty() {
            Self::Everything
        } else {
            Self::Part
        }
    }
}

/// What the sample `hello` answers.
pub(crate) const HELLO: &[u8] = b"Hello from Insula\n";

/// Counts of a run are far below 2^52, where this would begin to round.
pub(crate) fn count(number: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let count = number as f64;
    count
}
