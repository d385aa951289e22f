//! The last lines of each service, in memory.
//!
//! A ring holds [`LINES_MAX`] lines and [`BYTES_MAX`] bytes; followers read from it at their own
//! pace and are told how many lines they missed. Every field but `level`, `message` and `fields`
//! is the host's own: what a guest writes cannot forge them.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use insula_types::ServiceId;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use crate::messages::{LogRecord, LogSource};
use crate::state::Timestamp;

/// Lines of one service that are kept.
pub(crate) const LINES_MAX: usize = 1_000;
/// Bytes of one service's lines that are kept, as JSON.
pub(crate) const BYTES_MAX: usize = 256 << 10;
/// The words that a structured line may use as its level.
const LEVELS: [&str; 5] = ["trace", "debug", "info", "warn", "error"];

/// One service's lines.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    lines: VecDeque<Bytes>,
    bytes: usize,
    /// The number of the first line in `lines`; lines are numbered from 0.
    first: u64,
    closed: bool,
}

impl Ring {
    fn push(&mut self, line: Bytes) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > LINES_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.lines.pop_front() else {
                break;
            };
            self.bytes -= oldest.len();
            self.first += 1;
        }
    }

    fn end(&self) -> u64 {
        self.first + self.lines.len() as u64
    }

    /// Lines from number `from` on, as one chunk of NDJSON; and the number after the last.
    fn from(&self, from: u64) -> (Bytes, u64) {
        let mut chunk = Vec::new();
        if from < self.first {
            chunk.extend_from_slice(&missed(self.first - from));
        }
        let skip = usize::try_from(from.saturating_sub(self.first)).unwrap_or(usize::MAX);
        for line in self.lines.iter().skip(skip) {
            chunk.extend_from_slice(line);
        }
        (chunk.into(), self.end())
    }
}

fn missed(lines: u64) -> Bytes {
    let line = json!({
        "time": Timestamp::now(),
        "source": LogSource::Host.as_str(),
        "message": "lines were dropped because they were read too slowly",
        "dropped": lines,
    });
    format!("{line}\n").into()
}

/// A ring and those who wait for its next line.
#[derive(Debug, Default)]
pub(crate) struct ServiceLog {
    ring: RefCell<Ring>,
    changed: Notify,
}

impl ServiceLog {
    /// Where a reader begins who wants the last `tail` lines.
    pub(crate) fn start(&self, tail: u32) -> u64 {
        let ring = self.ring.borrow();
        ring.end().saturating_sub(u64::from(tail)).max(ring.first)
    }

    /// What there is from line `from` on, without waiting.
    pub(crate) fn read(&self, from: u64) -> (Bytes, u64) {
        self.ring.borrow().from(from)
    }

    /// Waits until there is something from line `from` on; `None` when the service is gone.
    pub(crate) async fn follow(&self, from: u64) -> Option<(Bytes, u64)> {
        loop {
            {
                let ring = self.ring.borrow();
                if ring.end() > from {
                    return Some(ring.from(from));
                }
                if ring.closed {
                    return None;
                }
            }
            // No other task runs between the look above and the registration here: both happen
            // in one poll on the control thread.
            self.changed.notified().await;
        }
    }
}

/// The logs of all services.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    services: HashMap<ServiceId, Rc<ServiceLog>>,
}

impl Logs {
    pub(crate) fn add_service(&mut self, service: ServiceId) {
        self.services.entry(service).or_default();
    }

    pub(crate) fn remove_service(&mut self, service: ServiceId) {
        if let Some(log) = self.services.remove(&service) {
            log.ring.borrow_mut().closed = true;
            log.changed.notify_waiters();
        }
    }

    pub(crate) fn service(&self, service: ServiceId) -> Option<Rc<ServiceLog>> {
        self.services.get(&service).cloned()
    }

    /// Takes lines; those of services that are gone are forgotten.
    pub(crate) fn take(&self, records: &[LogRecord]) {
        for record in records {
            if let Some(log) = self.services.get(&record.service) {
                log.ring.borrow_mut().push(line(record));
                log.changed.notify_waiters();
            }
        }
    }
}

/// A record as one line of NDJSON.
fn line(record: &LogRecord) -> Bytes {
    let mut object = Map::new();
    object.insert(
        "time".to_owned(),
        Timestamp::from(record.time).to_string().into(),
    );
    let structured = match record.source {
        LogSource::Stderr => structured(&record.text),
        LogSource::Stdout | LogSource::Host => None,
    };
    let (level, message, fields) = match structured {
        Some((level, message, fields)) => (Some(level), message, fields),
        None => (None, record.text.clone(), Map::new()),
    };
    if let Some(level) = level {
        object.insert("level".to_owned(), level.into());
    }
    object.insert("source".to_owned(), record.source.as_str().into());
    object.insert("version".to_owned(), record.version.get().into());
    object.insert("request_id".to_owned(), record.request_id.as_str().into());
    object.insert("message".to_owned(), message.into());
    if !fields.is_empty() {
        object.insert("fields".to_owned(), fields.into());
    }
    if record.dropped > 0 {
        object.insert("dropped".to_owned(), record.dropped.into());
    }
    format!("{}\n", Value::Object(object)).into()
}

/// A line that is a JSON object with a known `level` and a `message`; all else in it becomes
/// `fields`, with the entries of its own `fields` beside the rest.
fn structured(text: &str) -> Option<(&'static str, String, Map<String, Value>)> {
    if !text.starts_with('{') {
        return None;
    }
    let Ok(Value::Object(mut object)) = serde_json::from_str(text) else {
        return None;
    };
    let given = object.get("level")?.as_str()?.to_ascii_lowercase();
    let level = LEVELS.into_iter().find(|level| *level == given)?;
    let message = object.get("message")?.as_str()?.to_owned();
    object.remove("level");
    object.remove("message");
    if let Some(Value::Object(nested)) = object.get("fields") {
        let nested = nested.clone();
        object.remove("fields");
        object.extend(nested);
    }
    Some((level, message, object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use insula_types::VersionNumber;

    fn record(source: LogSource, text: &str) -> LogRecord {
        LogRecord {
            service: ServiceId::new(1),
            version: VersionNumber::new(2).unwrap(),
            time: std::time::UNIX_EPOCH,
            request_id: "r1".to_owned(),
            source,
            text: text.to_owned(),
            dropped: 0,
        }
    }

    fn parsed(source: LogSource, text: &str) -> Value {
        serde_json::from_slice(&line(&record(source, text))).unwrap()
    }

    #[test]
    fn structured_lines_of_stderr() {
        let text = r#"{"level":"WARN","message":"m","request_id":"forged","fields":{"a":1},"b":2}"#;
        let line = parsed(LogSource::Stderr, text);
        assert_eq!(
            line,
            json!({"time":"1970-01-01T00:00:00.000Z","level":"warn","source":"stderr","version":2,
                "request_id":"r1","message":"m","fields":{"request_id":"forged","a":1,"b":2}})
        );
        assert_eq!(
            parsed(LogSource::Stdout, text)["message"],
            text,
            "only stderr"
        );
        for plain in [
            "{",
            "{}",
            r#"{"level":"loud","message":"m"}"#,
            r#"{"level":"info"}"#,
            "text",
        ] {
            let line = parsed(LogSource::Stderr, plain);
            assert_eq!(line["message"], plain);
            assert!(line.get("level").is_none());
        }
    }

    #[test]
    fn a_ring_is_bounded_and_says_what_was_missed() {
        let mut logs = Logs::default();
        logs.add_service(ServiceId::new(1));
        let log = logs.service(ServiceId::new(1)).unwrap();
        let lines: Vec<_> = (0..LINES_MAX + 5)
            .map(|number| record(LogSource::Stdout, &number.to_string()))
            .collect();
        logs.take(&lines);
        let (chunk, next) = log.read(0);
        let text = String::from_utf8(chunk.to_vec()).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["dropped"], 5);
        assert_eq!(text.lines().count(), LINES_MAX + 1);
        assert_eq!(next, u64::try_from(LINES_MAX + 5).unwrap());
        assert_eq!(log.start(3), next - 3);

        let long = "x".repeat(8 << 10);
        logs.take(&vec![record(LogSource::Stdout, &long); 100]);
        assert!(log.ring.borrow().bytes <= BYTES_MAX);
    }

    #[test]
    fn a_follower_ends_with_its_service() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut logs = Logs::default();
        logs.add_service(ServiceId::new(1));
        let log = logs.service(ServiceId::new(1)).unwrap();
        runtime.block_on(async {
            let (seen, ()) = tokio::join!(log.follow(0), async {
                logs.take(&[record(LogSource::Stdout, "x")]);
            });
            assert_eq!(seen.unwrap().1, 1);
            let (seen, ()) = tokio::join!(log.follow(1), async {
                logs.remove_service(ServiceId::new(1));
            });
            assert!(seen.is_none());
        });
    }
}
