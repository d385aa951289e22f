//! What `insula doctor` says about building guests: looks, changes nothing.

use std::fmt;
use std::path::PathBuf;

use crate::cache::Slot;
use crate::find::{Active, Linker, Source, advice, has_target, in_path};
use crate::settings::Settings;
use crate::{TARGET, debian};

/// What was found.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The active toolchain, `rustc 1.95.0 (…)`, if there is one.
    pub rustc: Option<String>,
    /// Whether there is a `wasm-component-ld`.
    pub component_linker: bool,
    /// Where a prepared toolchain is or would be kept.
    pub cache_dir: Option<PathBuf>,
    /// The verdict.
    pub readiness: Readiness,
}

/// Whether guests can be built here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Yes, at once.
    Ready(Source),
    /// Probably, after a preparation that the first build makes by itself. The
    /// ways that look open, in order.
    Preparable(Vec<String>),
    /// No; what to do about it.
    Missing(String),
}

impl Probe {
    /// Looks, without installing, downloading or writing anything.
    pub fn look(settings: &Settings) -> Self {
        let slot = settings.cache_dir.as_deref().map(Slot::new);
        let cache_dir = slot.as_ref().map(Slot::dir);
        let active = match Active::query(settings) {
            Ok(active) => active,
            Err(error) => {
                let readiness = Readiness::Missing(error.to_string());
                return Self {
                    rustc: None,
                    component_linker: false,
                    cache_dir,
                    readiness,
                };
            }
        };
        let linker = Linker::find(&active).is_some();
        Self {
            component_linker: linker,
            readiness: readiness(&active, slot.as_ref(), linker),
            rustc: Some(active.version),
            cache_dir,
        }
    }
}

fn readiness(active: &Active, slot: Option<&Slot>, linker: bool) -> Readiness {
    if has_target(&active.sysroot) {
        return Readiness::Ready(Source::Own);
    }
    if linker && let Some(prepared) = slot.and_then(Slot::ready) {
        return Readiness::Ready(Source::Unpacked(prepared.dir));
    }
    let mut ways = Vec::new();
    if in_path("rustup").is_some() {
        ways.push(format!("rustup target add {TARGET}"));
    }
    if linker && slot.is_some() && debian::available().is_ok() {
        ways.push(debian::WAY.to_owned());
    }
    if ways.is_empty() {
        Readiness::Missing(advice())
    } else {
        Readiness::Preparable(ways)
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(source) => write!(f, "ready: {source}"),
            Self::Preparable(ways) => {
                write!(f, "the first build prepares it: {}", ways.join(", else "))
            }
            Self::Missing(advice) => f.write_str(advice),
        }
    }
}
