//! The environment that the service's spec gives its guests.

use crate::{Error, Result};

/// A variable's value, if it is set (and is UTF-8).
///
/// ```
/// assert_eq!(insula_sdk::env::var("NO_SUCH_VARIABLE"), None);
/// ```
pub fn var(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A variable's value.
///
/// # Errors
/// A 500, and a log line that names the variable, when it is not set.
pub fn required(name: &str) -> Result<String> {
    var(name).ok_or_else(|| Error::internal(format!("the variable {name} is not set")))
}

/// All variables.
pub fn vars() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
