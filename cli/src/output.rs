//! What is printed: tables for people, JSON for programs, problems on stderr.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;

use crate::args::Format;

/// Writes to stdout at once. A closed pipe is an error, which `main` takes for the end.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a line to stdout.
pub(crate) fn line(text: &str) -> io::Result<()> {
    print(&format!("{text}\n"))
}

/// Writes a line to stderr: what is going on, not what was asked for. Nobody reading it is no
/// reason to stop.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Waits for something that takes its time, and shows on a terminal how long it has taken.
pub(crate) async fn with_time<T>(what: &str, wanted: impl Future<Output = T>) -> T {
    if !io::stderr().is_terminal() {
        return wanted.await;
    }
    let began = Instant::now();
    let mut wanted = std::pin::pin!(wanted);
    loop {
        match tokio::time::timeout(SHOWN_EVERY, &mut wanted).await {
            Ok(answer) => {
                // Over the line: nothing of it is to stay.
                let _ = write!(io::stderr(), "\r{:1$}\r", "", what.len() + 16);
                return answer;
            }
            Err(_) => {
                let seconds = began.elapsed().as_secs_f32();
                let _ = write!(io::stderr(), "\r{what}: {seconds:.1} s");
            }
        }
    }
}

/// How often [`with_time`] shows it.
const SHOWN_EVERY: Duration = Duration::from_millis(200);

/// Writes an error and its causes to stderr.
pub(crate) fn error(error: &anyhow::Error) {
    let label = Style::of(&io::stderr()).red("error:");
    note(&format!("{label} {error:#}"));
}

/// Whether the cause is that nobody reads our output any more.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Colour, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Colour,
}

impl Style {
    /// Colour on a terminal that can show it and whose user wants it (<https://no-color.org>).
    pub(crate) fn of(stream: &impl IsTerminal) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if stream.is_terminal() && !unwanted && !dumb {
            Self::Colour
        } else {
            Self::Plain
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
}

/// How a number in an answer is shown to people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// As it is.
    Plain,
    /// In binary units.
    Bytes,
    /// Thousandths of a core.
    Millicores,
    /// Milliseconds.
    Millis,
    /// Seconds, as a fraction.
    Seconds,
    /// The first characters of a digest.
    Digest,
}

/// A column of a table, or a line of a description: its title and where in the JSON its value is
/// (the first of the pointers, RFC 6901, that leads somewhere).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) title: &'static str,
    pub(crate) pointers: &'static [&'static str],
    pub(crate) kind: Kind,
}

impl Field {
    pub(crate) const fn new(
        title: &'static str,
        pointers: &'static [&'static str],
        kind: Kind,
    ) -> Self {
        Self {
            title,
            pointers,
            kind,
        }
    }

    fn show(&self, value: &Value) -> String {
        let found = self
            .pointers
            .iter()
            .filter_map(|pointer| value.pointer(pointer))
            .find(|value| !value.is_null());
        found.map_or_else(|| "-".to_owned(), |value| show(value, self.kind))
    }
}

fn show(value: &Value, kind: Kind) -> String {
    match (kind, value.as_u64()) {
        (Kind::Bytes, Some(bytes)) => bytes_text(bytes),
        (Kind::Millicores, Some(millicores)) => format!("{millicores}m"),
        (Kind::Millis, Some(ms)) if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
        (Kind::Millis, Some(ms)) => format!("{ms}ms"),
        (Kind::Seconds, _) if value.is_number() => {
            format!("{:.3}s", value.as_f64().unwrap_or_default())
        }
        (Kind::Digest, _) => {
            let text = value.as_str().unwrap_or_default();
            let hex = text.strip_prefix("sha256:").unwrap_or(text);
            plain(&hex.chars().take(12).collect::<String>())
        }
        _ => show_plain(value),
    }
}

fn show_plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => plain(text),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(show_plain).collect::<Vec<_>>().join(" "),
        Value::Object(map) if map.is_empty() => "-".to_owned(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| format!("{}={}", plain(key), show_plain(value)))
            .collect::<Vec<_>>()
            .join(" "),
        other => other.to_string(),
    }
}

/// A size in the largest binary unit that leaves a number of at least one.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(crate) fn bytes_text(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    let unit = UNITS.iter().find(|(_, size)| bytes >= *size);
    match unit {
        Some((unit, size)) if bytes.is_multiple_of(*size) => format!("{}{unit}", bytes / size),
        Some((unit, size)) => format!("{:.1}{unit}", bytes as f64 / *size as f64),
        None => format!("{bytes}B"),
    }
}

/// Text from a host or a guest, harmless on a terminal: whoever wrote it must not move the
/// cursor, change the title or hide what stands before it.
pub(crate) fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        // U+202A–U+202E and U+2066–U+2069 reorder what stands around them.
        let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && c != '\t') || reorders {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// A list of objects, one line each.
pub(crate) fn table(fields: &[Field], items: &[Value]) -> String {
    let header = fields.iter().map(|field| field.title.to_owned()).collect();
    let rows = items
        .iter()
        .map(|item| fields.iter().map(|field| field.show(item)).collect());
    columns(std::iter::once(header).chain(rows).collect())
}

/// Rows of cells, padded to columns two spaces apart.
pub(crate) fn columns(rows: Vec<Vec<String>>) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// One object, a field per line.
pub(crate) fn description(fields: &[Field], item: &Value) -> String {
    let rows = fields
        .iter()
        .map(|field| vec![field.title.to_owned(), field.show(item)]);
    columns(rows.collect())
}

/// JSON as the host gave it, indented.
pub(crate) fn json(value: &Value) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)?;
    Ok(())
}

/// Prints a list answer.
pub(crate) fn list(format: Format, fields: &[Field], answer: &Value) -> Result<()> {
    match format {
        Format::Json => json(answer),
        Format::Table => {
            let none = Vec::new();
            let items = answer.get("items").and_then(Value::as_array);
            print(&table(fields, items.unwrap_or(&none)))?;
            Ok(())
        }
    }
}

/// Prints one object.
pub(crate) fn object(format: Format, fields: &[Field], answer: &Value) -> Result<()> {
    match format {
        Format::Json => json(answer),
        Format::Table => {
            print(&description(fields, answer))?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up_and_absent_values_are_dashes() {
        let fields = [
            Field::new("NAME", &["/name"], Kind::Plain),
            Field::new("MEMORY", &["/spec/memory/limit_bytes"], Kind::Bytes),
            Field::new("CPU", &["/spec/cpu/limit_millicores"], Kind::Millicores),
        ];
        let items = [
            json!({"name": "a", "spec": {"memory": {"limit_bytes": 512 << 20}}}),
            json!({"name": "longer", "spec": {"cpu": {"limit_millicores": 1500}}}),
        ];
        assert_eq!(
            table(&fields, &items),
            "NAME    MEMORY  CPU\na       512MiB  -\nlonger  -       1500m\n"
        );
    }

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1KiB"),
            (1536, "1.5KiB"),
            (64 << 20, "64MiB"),
            (3 << 29, "1.5GiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
    }

    #[test]
    fn a_guest_cannot_move_the_cursor() {
        assert_eq!(plain("\x1b[2Jgone\ttab\r"), "\\u{1b}[2Jgone\ttab\\u{d}");
        assert_eq!(plain("\u{9b}2J\u{202e}x"), "\\u{9b}2J\\u{202e}x");
    }
}
