//! From guest lines to reports for control: rate-limited per service, bounded in all, never
//! blocking a guest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use insula_metrics::TenantMetrics;
use insula_types::{ServiceId, VersionNumber};
use tokio::sync::Notify;

use crate::engine::LogLine;
use crate::messages::LogRecord;

/// Lines per second of one service that are kept.
const LINES_PER_SECOND: u32 = 500;
/// Lines that a service which was silent may write at once.
const LINES_BURST: u32 = 1_000;
/// Records that wait for control, of all services.
const WAITING_MAX: usize = 8_192;

/// All records that wait to be sent to control.
#[derive(Debug, Default)]
pub struct LogHub {
    waiting: Mutex<Vec<LogRecord>>,
    filled: Notify,
}

impl LogHub {
    fn push(&self, record: LogRecord) -> Result<(), LogRecord> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= WAITING_MAX {
            return Err(record);
        }
        waiting.push(record);
        drop(waiting);
        self.filled.notify_one();
        Ok(())
    }

    /// Waits for records, lets some more gather, and takes all.
    pub async fn take(&self) -> Vec<LogRecord> {
        loop {
            let records = self.take_now();
            if !records.is_empty() {
                return records;
            }
            self.filled.notified().await;
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Takes what is there.
    pub fn take_now(&self) -> Vec<LogRecord> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How long records gather before they are sent.
const GATHER: Duration = Duration::from_millis(5);

/// The log of one service: a token bucket before the hub.
#[derive(Debug)]
pub struct ServiceLog {
    service: ServiceId,
    hub: Arc<LogHub>,
    tenant: Arc<TenantMetrics>,
    bucket: Mutex<(f64, Instant)>,
    dropped: AtomicU64,
}

impl ServiceLog {
    /// The log of a service.
    #[must_use]
    pub fn new(service: ServiceId, hub: Arc<LogHub>, tenant: Arc<TenantMetrics>) -> Self {
        Self {
            service,
            hub,
            tenant,
            bucket: Mutex::new((f64::from(LINES_BURST), Instant::now())),
            dropped: AtomicU64::new(0),
        }
    }

    fn allowed(&self, now: Instant) -> bool {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let (tokens, since) = *bucket;
        let gained =
            now.saturating_duration_since(since).as_secs_f64() * f64::from(LINES_PER_SECOND);
        let tokens = (tokens + gained).min(f64::from(LINES_BURST));
        let allowed = tokens >= 1.0;
        *bucket = (if allowed { tokens - 1.0 } else { tokens }, now);
        allowed
    }

    /// Passes a line on, or counts it as dropped.
    pub fn line(&self, line: LogLine, version: VersionNumber, request_id: &str) {
        if self.allowed(Instant::now()) {
            let dropped = self.dropped.swap(0, Ordering::Relaxed);
            let record = LogRecord {
                service: self.service,
                version,
                time: SystemTime::now(),
                request_id: request_id.to_owned(),
                source: line.source,
                text: line.text,
                dropped,
            };
            match self.hub.push(record) {
                Ok(()) => return,
                Err(record) => self.dropped.fetch_add(record.dropped, Ordering::Relaxed),
            };
        }
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.tenant.log_lines_dropped(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::LogSource;

    #[test]
    fn a_flood_is_dropped_and_counted() {
        let hub = Arc::new(LogHub::default());
        let log = ServiceLog::new(ServiceId::new(1), hub.clone(), Arc::default());
        let line = |text: &str| LogLine {
            source: LogSource::Stdout,
            text: text.to_owned(),
        };
        let version = VersionNumber::new(1).unwrap();
        let flood = u64::from(LINES_BURST) * 3;
        for _ in 0..flood {
            log.line(line("x"), version, "r");
        }
        let kept = hub.take_now().len() as u64;
        assert!(
            kept >= u64::from(LINES_BURST) && kept < u64::from(LINES_BURST) * 2,
            "{kept}"
        );
        log.bucket.lock().unwrap().0 = 1.0;
        log.line(line("after"), version, "r");
        let after = hub.take_now();
        assert_eq!(after.len(), 1);
        assert_eq!(after[0].dropped, flood - kept);
    }
}
