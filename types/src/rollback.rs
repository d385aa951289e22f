//! When the host takes a new version back by itself.

use serde::{Deserialize, Serialize};

use crate::quantity::Millis;

/// What of a new version is worse enough than its predecessor to take it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawAutoRollback")]
pub struct AutoRollback {
    /// Whether the host does so at all.
    pub enabled: bool,
    /// How many more of a hundred requests may fail than with the predecessor.
    pub error_margin_percent: u8,
    /// How slow the slowest hundredth may be, in percent of the predecessor's; absent: any.
    pub p99_percent: Option<u32>,
    /// Requests that the new version must have ended before it is judged.
    pub min_requests: u32,
    /// How long after its activation a version is watched.
    #[serde(rename = "watch_ms")]
    pub watch: Millis,
}

impl Default for AutoRollback {
    fn default() -> Self {
        Self {
            enabled: true,
            error_margin_percent: 20,
            p99_percent: None,
            min_requests: 20,
            watch: Millis::constant(300_000),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawAutoRollback {
    enabled: Option<bool>,
    error_margin_percent: Option<u8>,
    p99_percent: Option<u32>,
    min_requests: Option<u32>,
    watch: Option<Millis>,
    watch_ms: Option<u64>,
}

/// What is wrong with the settings: all of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("auto_rollback: {}", .0.join("; "))]
pub struct AutoRollbackError(Vec<String>);

/// Most requests to wait for.
const MIN_REQUESTS_MAX: u32 = 100_000;

impl TryFrom<RawAutoRollback> for AutoRollback {
    type Error = AutoRollbackError;

    fn try_from(raw: RawAutoRollback) -> Result<Self, AutoRollbackError> {
        let mut errors = Vec::new();
        let defaults = Self::default();
        let watch = match (raw.watch, raw.watch_ms) {
            (Some(_), Some(_)) => {
                errors.push("watch: given twice, as a quantity and in milliseconds".to_owned());
                defaults.watch
            }
            (Some(watch), None) => watch,
            (None, Some(ms)) => Millis::new(ms).unwrap_or_else(|error| {
                errors.push(format!("watch_ms: {error}"));
                defaults.watch
            }),
            (None, None) => defaults.watch,
        };
        let margin = raw
            .error_margin_percent
            .unwrap_or(defaults.error_margin_percent);
        if !(1..=99).contains(&margin) {
            errors.push("error_margin_percent: goes from 1 to 99".to_owned());
        }
        // Latencies are counted in steps of half an octave: what is less than one apart is equal.
        if raw
            .p99_percent
            .is_some_and(|p99| !(150..=100_000).contains(&p99))
        {
            errors.push("p99_percent: goes from 150 to 100000, or is absent".to_owned());
        }
        let min_requests = raw.min_requests.unwrap_or(defaults.min_requests);
        if !(5..=MIN_REQUESTS_MAX).contains(&min_requests) {
            errors.push(format!("min_requests: goes from 5 to {MIN_REQUESTS_MAX}"));
        }
        if !errors.is_empty() {
            return Err(AutoRollbackError(errors));
        }
        Ok(Self {
            enabled: raw.enabled.unwrap_or(defaults.enabled),
            error_margin_percent: margin,
            p99_percent: raw.p99_percent,
            min_requests,
            watch,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_means_default_and_what_was_read_can_be_written_back() {
        let read = |text: &str| serde_json::from_str::<AutoRollback>(text);
        assert_eq!(read("{}").unwrap(), AutoRollback::default());
        let some = read(r#"{"enabled":false,"p99_percent":200,"watch":"10s","min_requests":50}"#);
        let some = some.unwrap();
        assert_eq!((some.enabled, some.watch.get()), (false, 10_000));
        let text = serde_json::to_string(&some).unwrap();
        assert_eq!(read(&text).unwrap(), some);
    }

    #[test]
    fn all_mistakes_at_once() {
        let text = r#"{"error_margin_percent":0,"p99_percent":100,"min_requests":1,"watch":"1s","watch_ms":1}"#;
        let error = serde_json::from_str::<AutoRollback>(text)
            .unwrap_err()
            .to_string();
        for field in [
            "error_margin_percent",
            "p99_percent",
            "min_requests",
            "watch",
        ] {
            assert!(error.contains(field), "{error}");
        }
        assert!(serde_json::from_str::<AutoRollback>(r#"{"margin":1}"#).is_err());
    }
}
