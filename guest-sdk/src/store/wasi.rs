//! Between [`Store`](super::Store) and `wasi:keyvalue` 0.2.0-draft.

use super::bindings::wasi::keyvalue::store::Error;
use super::bindings::wasi::keyvalue::{atomics, batch, store};
use super::{Page, StoreError};

pub(super) use store::Bucket;

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        match error {
            Error::NoSuchStore => Self::NoSuchStore,
            Error::AccessDenied => Self::AccessDenied,
            Error::Other(text) => Self::Other(text),
        }
    }
}

pub(super) fn open(name: &str) -> Result<Bucket, StoreError> {
    Ok(store::open(name)?)
}

pub(super) fn get(bucket: &Bucket, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(bucket.get(key)?)
}

pub(super) fn get_many(
    bucket: &Bucket,
    keys: &[String],
) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
    let found = batch::get_many(bucket, keys)?;
    let values = found.into_iter().map(|pair| pair.map(|(_, value)| value));
    Ok(values.collect())
}

pub(super) fn exists(bucket: &Bucket, key: &str) -> Result<bool, StoreError> {
    Ok(bucket.exists(key)?)
}

pub(super) fn set(bucket: &Bucket, key: &str, value: &[u8]) -> Result<(), StoreError> {
    Ok(bucket.set(key, value)?)
}

pub(super) fn set_many(bucket: &Bucket, pairs: &[(String, Vec<u8>)]) -> Result<(), StoreError> {
    Ok(batch::set_many(bucket, pairs)?)
}

pub(super) fn delete(bucket: &Bucket, key: &str) -> Result<(), StoreError> {
    Ok(bucket.delete(key)?)
}

pub(super) fn delete_many(bucket: &Bucket, keys: &[String]) -> Result<(), StoreError> {
    Ok(batch::delete_many(bucket, keys)?)
}

pub(super) fn increment(bucket: &Bucket, key: &str, delta: u64) -> Result<u64, StoreError> {
    Ok(atomics::increment(bucket, key, delta)?)
}

pub(super) fn keys(bucket: &Bucket, from: Option<u64>) -> Result<Page, StoreError> {
    let page = bucket.list_keys(from)?;
    Ok(Page {
        keys: page.keys,
        next: page.cursor,
    })
}
