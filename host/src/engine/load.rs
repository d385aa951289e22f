//! The unsafe island: loading of compiled code.
#![allow(
    unsafe_code,
    reason = "wasmtime loads compiled code only through an unsafe function; see the SAFETY note"
)]

use insula_types::Digest;
use wasmtime::component::Component;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use super::artefact::{ArtefactKey, SealError, open};
use super::config::Engine;
use super::guest::Guest;

/// Why an artefact could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its file cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// An attempt before this one failed; it needs a new artefact.
    #[error("it is damaged")]
    Broken,
    /// It does not open.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// wasmtime refused it.
    #[error("the engine refused it: {0}")]
    Engine(wasmtime::Error),
    /// It needs something that the host does not have, or does not serve HTTP.
    #[error("it cannot be linked: {0}")]
    Link(wasmtime::Error),
}

/// The code of a component, mapped and linked: what an instance is made from.
pub(super) struct Code {
    pub(super) pre: ProxyPre<Guest>,
}

impl Engine {
    /// Opens a sealed artefact and makes it ready to be instantiated.
    ///
    /// # Errors
    /// [`LoadError`]; nothing of the artefact has run or stays mapped then.
    pub(super) fn load(
        &self,
        key: &ArtefactKey,
        digest: &Digest,
        compat: &str,
        sealed: &[u8],
    ) -> Result<Code, LoadError> {
        let code = open(key, digest, compat, sealed)?;
        // SAFETY: `deserialize` requires bytes that `Component::serialize` produced. `open`
        // authenticated them just now, in this process's own memory, with a key that only this
        // data directory holds and that `seal` applies to nothing but the output of our own
        // compiler child. The bytes are copied by wasmtime, so they cannot change afterwards.
        let component =
            unsafe { Component::deserialize(&self.inner, code) }.map_err(LoadError::Engine)?;
        self.link(&component).map_err(LoadError::Link)
    }

    /// Checks a component against the host's functions and the world that it must export.
    pub(super) fn link(&self, component: &Component) -> Result<Code, wasmtime::Error> {
        let pre = ProxyPre::new(self.linker.instantiate_pre(component)?)?;
        Ok(Code { pre })
    }
}
