//! `insula logs`: what a service wrote, and what the host says about its requests.

use std::fmt::Write as _;
use std::io;

use anyhow::Result;
use serde_json::Value;

use crate::args::{Format, LogsArgs, ServiceRef};
use crate::client::Client;
use crate::output::{self, Style};

pub(crate) async fn run(args: LogsArgs) -> Result<()> {
    let client = Client::new(&args.look.connection)?;
    let mode = if args.follow {
        Mode::Follow
    } else {
        Mode::Past
    };
    print(&client, &args.service, mode, args.tail, args.look.output).await
}

/// How much of a log is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// What is kept of it.
    Past,
    /// That, and what is yet to come.
    Follow,
}

/// Prints the log of a service until the host ends the answer; of what is past only the last
/// `tail` lines where that is given.
pub(crate) async fn print(
    client: &Client,
    service: &ServiceRef,
    mode: Mode,
    tail: Option<u32>,
    format: Format,
) -> Result<()> {
    let follow = mode == Mode::Follow;
    let tail = tail
        .map(|lines| format!("&tail={lines}"))
        .unwrap_or_default();
    let path = format!("{}/logs?follow={follow}{tail}", service.path());
    let mut stream = client.stream(&path).await?;
    let style = Style::of(&io::stdout());
    while let Some(line) = stream.line().await? {
        if line.trim().is_empty() {
            continue;
        }
        match format {
            Format::Json => output::line(&line)?,
            Format::Table => output::line(&pretty(&line, style))?,
        }
    }
    Ok(())
}

/// A line of JSON for people: time, version, source or level, message, fields.
fn pretty(line: &str, style: Style) -> String {
    let Ok(record) = serde_json::from_str::<Value>(line) else {
        return output::plain(line);
    };
    let text = |key: &str| record[key].as_str().unwrap_or_default();
    let source = text("source");
    let level = text("level");
    let word = output::plain(if level.is_empty() { source } else { level });
    let word = format!("{word:<6}");
    let word = match level {
        "error" => style.red(&word),
        "warn" => style.yellow(&word),
        _ if source == "host" => style.yellow(&word),
        _ => style.dim(&word),
    };
    let version = match &record["version"] {
        Value::Null => "-".to_owned(),
        version => output::plain(&format!("v{version}")),
    };
    let time = style.dim(&output::plain(clock(text("time"))));
    let mut shown = format!("{time} {version} {word} {}", output::plain(text("message")));
    if let Some(fields) = record["fields"].as_object() {
        for (key, value) in fields {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            let _ = write!(
                shown,
                " {}",
                style.dim(&output::plain(&format!("{key}={value}")))
            );
        }
    }
    shown
}

/// The time of day within an RFC 3339 time, to the millisecond; other texts as they are.
fn clock(time: &str) -> &str {
    let Some((_, clock)) = time.split_once('T') else {
        return time;
    };
    let clock = clock.trim_end_matches('Z');
    clock.get(..12).unwrap_or(clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_people() {
        let line = r#"{"time":"2026-11-23T08:37:50.123456Z","source":"stdout","version":3,
            "request_id":"x","message":"hi\u001b[2J","level":"info","fields":{"n":1,"s":"a"}}"#;
        let line = line.replace('\n', " ");
        let shown = pretty(&line, Style::Plain);
        assert_eq!(shown, "08:37:50.123 v3 info   hi\\u{1b}[2J n=1 s=a");
        assert_eq!(pretty("not json", Style::Plain), "not json");
        assert_eq!(clock("08:00"), "08:00");
    }
}
