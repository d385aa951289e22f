//! Stores for tests, in the thread's memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use super::{Page, StoreError};

type Pairs = BTreeMap<String, Vec<u8>>;

thread_local! {
    static STORES: RefCell<HashMap<String, Pairs>> = RefCell::default();
}

/// A store's name.
#[derive(Debug)]
pub(super) struct Bucket(String);

fn with<T>(bucket: &Bucket, work: impl FnOnce(&mut Pairs) -> T) -> T {
    STORES.with_borrow_mut(|stores| work(stores.entry(bucket.0.clone()).or_default()))
}

pub(super) fn open(name: &str) -> Result<Bucket, StoreError> {
    Ok(Bucket(name.to_owned()))
}

pub(super) fn get(bucket: &Bucket, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(with(bucket, |pairs| pairs.get(key).cloned()))
}

pub(super) fn get_many(
    bucket: &Bucket,
    keys: &[String],
) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
    keys.iter().map(|key| get(bucket, key)).collect()
}

pub(super) fn exists(bucket: &Bucket, key: &str) -> Result<bool, StoreError> {
    Ok(with(bucket, |pairs| pairs.contains_key(key)))
}

pub(super) fn set(bucket: &Bucket, key: &str, value: &[u8]) -> Result<(), StoreError> {
    with(bucket, |pairs| {
        pairs.insert(key.to_owned(), value.to_owned())
    });
    Ok(())
}

pub(super) fn set_many(bucket: &Bucket, pairs: &[(String, Vec<u8>)]) -> Result<(), StoreError> {
    pairs
        .iter()
        .try_for_each(|(key, value)| set(bucket, key, value))
}

pub(super) fn delete(bucket: &Bucket, key: &str) -> Result<(), StoreError> {
    with(bucket, |pairs| pairs.remove(key));
    Ok(())
}

pub(super) fn delete_many(bucket: &Bucket, keys: &[String]) -> Result<(), StoreError> {
    keys.iter().try_for_each(|key| delete(bucket, key))
}

pub(super) fn increment(bucket: &Bucket, key: &str, delta: u64) -> Result<u64, StoreError> {
    let other = |text: &str| StoreError::Other(text.to_owned());
    let before = match get(bucket, key)? {
        None => 0,
        Some(value) => {
            let number = String::from_utf8(value).ok();
            let number = number.and_then(|text| text.parse::<u64>().ok());
            number.ok_or_else(|| other("the value is not a decimal number below 2^64"))?
        }
    };
    let after = before.checked_add(delta);
    let after = after.ok_or_else(|| other("the sum is not below 2^64"))?;
    set(bucket, key, after.to_string().as_bytes())?;
    Ok(after)
}

pub(super) fn keys(bucket: &Bucket, from: Option<u64>) -> Result<Page, StoreError> {
    let from = usize::try_from(from.unwrap_or(0)).unwrap_or(usize::MAX);
    Ok(with(bucket, |pairs| Page {
        keys: pairs.keys().skip(from).cloned().collect(),
        next: None,
    }))
}
