//! The stores of a guest: `wasi:keyvalue` over volumes of keys and values.
//!
//! ```text
//!  guest ─▶ KeyValueView ─▶ a thread that may block, at the tenant's expense ─▶ storage::Store
//! ```
//!
//! A guest opens a store by the name of its volume, and only those that its service lists: others are
//! `access-denied`, whether they are there or not, and so is a change of one that is listed to be
//! read. What was set is durable when the call returns. Batches happen as a whole or not at all, which
//! is more than the proposal asks. Listings come in the order in which keys were added. A number that
//! is incremented is decimal text, as in wasmtime's own implementation.
//!
//! On failure the guest gets `other`, with a text that says what was too large or that there is no
//! room (`quota exceeded: …`); what the host itself could not do is in the host's log.

use std::sync::Arc;

use tokio::sync::oneshot;
use wasmtime::component::{HasData, Linker, Resource, ResourceTable, ResourceTableError};

use super::files::{Mounted, Place};
use super::guest::Guest;
use super::outgoing::Patron;
use crate::storage::{Store, StoreFault, Write};

mod bindings {
    #![allow(
        missing_docs,
        unreachable_pub,
        missing_debug_implementations,
        reason = "generated from the interface"
    )]

    wasmtime::component::bindgen!({
        path: "wit/keyvalue",
        world: "wasi:keyvalue/imports",
        imports: { default: async | trappable },
        with: { "wasi:keyvalue/store.bucket": super::Bucket },
        trappable_error_type: { "wasi:keyvalue/store.error" => super::Error },
    });
}

use bindings::wasi::keyvalue::{atomics, batch, store};

/// A store that a guest has opened.
#[derive(Debug, Clone)]
#[allow(unreachable_pub, reason = "what is generated exports it again")]
pub struct Bucket {
    store: Store,
    writable: bool,
}

/// Why a call failed.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "what is generated exports it again")]
pub enum Error {
    /// The guest is told.
    Told(store::Error),
    /// The guest is ended.
    Trap(wasmtime::Error),
}

impl From<ResourceTableError> for Error {
    fn from(error: ResourceTableError) -> Self {
        Self::Trap(error.into())
    }
}

fn other(text: impl Into<String>) -> Error {
    Error::Told(store::Error::Other(text.into()))
}

impl From<StoreFault> for Error {
    fn from(fault: StoreFault) -> Self {
        match fault {
            StoreFault::Io(_) | StoreFault::Engine(_) => {
                tracing::warn!(%fault, "a store of a guest");
                other("the store cannot be read or written now")
            }
            fault => other(fault.to_string()),
        }
    }
}

/// A guest's stores, during one call.
pub(super) struct KeyValueView<'a> {
    pub(super) table: &'a mut ResourceTable,
    pub(super) mounts: &'a Arc<[Mounted]>,
    pub(super) patron: Option<&'a Arc<dyn Patron>>,
}

struct KeyValues;

impl HasData for KeyValues {
    type Data<'a> = KeyValueView<'a>;
}

/// Defines `wasi:keyvalue`.
pub(super) fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    store::add_to_linker::<Guest, KeyValues>(linker, Guest::key_values)?;
    atomics::add_to_linker::<Guest, KeyValues>(linker, Guest::key_values)?;
    batch::add_to_linker::<Guest, KeyValues>(linker, Guest::key_values)
}

/// What a call does to a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

impl KeyValueView<'_> {
    /// Does something to a bucket's store on a thread that may block.
    fn call<T, C>(
        &self,
        bucket: &Resource<Bucket>,
        access: Access,
        call: C,
    ) -> impl Future<Output = Result<T, Error>> + Send + use<T, C>
    where
        T: Send + 'static,
        C: FnOnce(&Store) -> Result<T, StoreFault> + Send + 'static,
    {
        let begun = self.begin(bucket, access, call);
        async move {
            let gone = |_| other("the host has no thread for this now");
            Ok(begun?.await.map_err(gone)??)
        }
    }

    fn begin<T, C>(
        &self,
        bucket: &Resource<Bucket>,
        access: Access,
        call: C,
    ) -> Result<oneshot::Receiver<Result<T, StoreFault>>, Error>
    where
        T: Send + 'static,
        C: FnOnce(&Store) -> Result<T, StoreFault> + Send + 'static,
    {
        let Bucket { store, writable } = self.table.get(bucket)?.clone();
        if access == Access::Write && !writable {
            return Err(Error::Told(store::Error::AccessDenied));
        }
        // Between two requests no guest runs.
        let patron = self.patron.cloned();
        let patron = patron.ok_or_else(|| other("there is no request"))?;
        let (done, wait) = oneshot::channel();
        patron.offload(Box::new(move || {
            // Its guest may be gone.
            let _ = done.send(call(&store));
        }));
        Ok(wait)
    }
}

impl store::Host for KeyValueView<'_> {
    async fn open(&mut self, identifier: String) -> Result<Resource<Bucket>, Error> {
        let named = |mounted: &&Mounted| matches!(&mounted.place, Place::Store(name) if *name == identifier);
        let denied = || Error::Told(store::Error::AccessDenied);
        let mounted = self.mounts.iter().find(named).ok_or_else(denied)?;
        let bucket = Bucket {
            store: Store::of(&mounted.volume).ok_or_else(denied)?,
            writable: mounted.writable,
        };
        Ok(self.table.push(bucket)?)
    }

    fn convert_error(&mut self, error: Error) -> wasmtime::Result<store::Error> {
        match error {
            Error::Told(error) => Ok(error),
            Error::Trap(error) => Err(error),
        }
    }
}

impl store::HostBucket for KeyValueView<'_> {
    async fn get(
        &mut self,
        bucket: Resource<Bucket>,
        key: String,
    ) -> Result<Option<Vec<u8>>, Error> {
        let call = move |store: &Store| store.get(&key);
        self.call(&bucket, Access::Read, call).await
    }

    async fn set(
        &mut self,
        bucket: Resource<Bucket>,
        key: String,
        value: Vec<u8>,
    ) -> Result<(), Error> {
        let call = move |store: &Store| store.write(&[Write::Set(key, value)]);
        self.call(&bucket, Access::Write, call).await
    }

    async fn delete(&mut self, bucket: Resource<Bucket>, key: String) -> Result<(), Error> {
        let call = move |store: &Store| store.write(&[Write::Delete(key)]);
        self.call(&bucket, Access::Write, call).await
    }

    async fn exists(&mut self, bucket: Resource<Bucket>, key: String) -> Result<bool, Error> {
        let call = move |store: &Store| store.exists(&key);
        self.call(&bucket, Access::Read, call).await
    }

    async fn list_keys(
        &mut self,
        bucket: Resource<Bucket>,
        cursor: Option<u64>,
    ) -> Result<store::KeyResponse, Error> {
        let call = move |store: &Store| store.keys(cursor.unwrap_or(0));
        let page = self.call(&bucket, Access::Read, call).await?;
        Ok(store::KeyResponse {
            keys: page.keys,
            cursor: page.next,
        })
    }

    async fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
        self.table.delete(bucket)?;
        Ok(())
    }
}

impl atomics::Host for KeyValueView<'_> {
    async fn increment(
        &mut self,
        bucket: Resource<Bucket>,
        key: String,
        delta: u64,
    ) -> Result<u64, Error> {
        let call = move |store: &Store| store.increment(&key, delta);
        self.call(&bucket, Access::Write, call).await
    }
}

impl batch::Host for KeyValueView<'_> {
    async fn get_many(
        &mut self,
        bucket: Resource<Bucket>,
        keys: Vec<String>,
    ) -> Result<Vec<Option<(String, Vec<u8>)>>, Error> {
        let call = move |store: &Store| {
            let values = store.get_many(&keys)?.into_iter().zip(keys);
            let pairs = values.map(|(value, key)| value.map(|value| (key, value)));
            Ok(pairs.collect())
        };
        self.call(&bucket, Access::Read, call).await
    }

    async fn set_many(
        &mut self,
        bucket: Resource<Bucket>,
        pairs: Vec<(String, Vec<u8>)>,
    ) -> Result<(), Error> {
        let writes = pairs.into_iter().map(|(key, value)| Write::Set(key, value));
        let writes: Vec<Write> = writes.collect();
        let call = move |store: &Store| store.write(&writes);
        self.call(&bucket, Access::Write, call).await
    }

    async fn delete_many(
        &mut self,
        bucket: Resource<Bucket>,
        keys: Vec<String>,
    ) -> Result<(), Error> {
        let writes: Vec<Write> = keys.into_iter().map(Write::Delete).collect();
        let call = move |store: &Store| store.write(&writes);
        self.call(&bucket, Access::Write, call).await
    }
}
