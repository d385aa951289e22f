//! Structured logging.
//!
//! ```
//! use insula_sdk::log;
//!
//! let (user, items) = ("ada", 3);
//! log::info!("order of {user} taken", items = items, express = true);
//! log::warn!("stock is low", left = Some(2.5), place = log::debug(&["a", "b"]));
//! ```
//!
//! The message is a literal; variables in scope may be captured in it. Fields
//! follow as `name = value`. A record is one line of JSON on stderr:
//! `{"level":"info","message":"…","fields":{"items":3}}`. An Insula host files
//! it under the service with its level and fields; any other host shows the line.
//! A panic is logged the same way before the guest traps.

use std::fmt::{self, Write as _};

/// How grave a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// For whoever mends the guest.
    Debug,
    /// What happened.
    Info,
    /// What should not have happened but did no harm.
    Warn,
    /// What failed.
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// What a field's value may be: numbers, truth values, texts, options and
/// references of these, and whatever [`display`] or [`debug()`] turns into text.
pub trait Value {
    /// Appends the value as JSON.
    fn append_json(&self, to: &mut String);
}

/// A value by its [`Display`](fmt::Display).
pub fn display(value: &impl fmt::Display) -> impl Value {
    Text(value.to_string())
}

/// A value by its [`Debug`](fmt::Debug).
pub fn debug(value: &impl fmt::Debug) -> impl Value {
    Text(format!("{value:?}"))
}

/// Writes a record; the macros call this.
pub fn record(level: Level, message: fmt::Arguments<'_>, fields: &[(&str, &dyn Value)]) {
    write_out(&line(level, message, fields));
}

fn line(level: Level, message: fmt::Arguments<'_>, fields: &[(&str, &dyn Value)]) -> String {
    let mut line = String::with_capacity(128);
    line.push_str("{\"level\":\"");
    line.push_str(level.name());
    line.push_str("\",\"message\":\"");
    let _ = Escaped(&mut line).write_fmt(message);
    line.push('"');
    for (n, (name, value)) in fields.iter().enumerate() {
        line.push_str(if n == 0 { ",\"fields\":{\"" } else { ",\"" });
        let _ = Escaped(&mut line).write_str(name);
        line.push_str("\":");
        value.append_json(&mut line);
    }
    line.push_str(if fields.is_empty() { "}\n" } else { "}}\n" });
    line
}

/// In one call, so that the host gets the line in one piece.
#[cfg(target_os = "wasi")]
fn write_out(line: &str) {
    use std::io::Write;
    // A host that shut stderr does not want to know.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// By the macro, which a test's harness captures.
#[cfg(not(target_os = "wasi"))]
fn write_out(line: &str) {
    eprint!("{line}");
}

/// Logs panics as records, in place of the standard text.
#[cfg(target_os = "wasi")]
pub(crate) fn panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload_as_str().unwrap_or("a value that is no text");
        match panic.location() {
            Some(at) => record(
                Level::Error,
                format_args!("panicked: {text}"),
                &[("file", &at.file()), ("line", &at.line())],
            ),
            None => record(Level::Error, format_args!("panicked: {text}"), &[]),
        }
    }));
}

struct Text(String);

impl Value for Text {
    fn append_json(&self, to: &mut String) {
        self.0.as_str().append_json(to);
    }
}

/// Appends what is written to it inside a JSON string (RFC 8259, section 7).
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            match character {
                '"' => self.0.push_str("\\\""),
                '\\' => self.0.push_str("\\\\"),
                '\n' => self.0.push_str("\\n"),
                '\r' => self.0.push_str("\\r"),
                '\t' => self.0.push_str("\\t"),
                control if control < ' ' => write!(self.0, "\\u{:04x}", u32::from(control))?,
                other => self.0.push(other),
            }
        }
        Ok(())
    }
}

impl Value for str {
    fn append_json(&self, to: &mut String) {
        to.push('"');
        let _ = Escaped(to).write_str(self);
        to.push('"');
    }
}

impl Value for String {
    fn append_json(&self, to: &mut String) {
        self.as_str().append_json(to);
    }
}

impl<T: Value + ?Sized> Value for &T {
    fn append_json(&self, to: &mut String) {
        (**self).append_json(to);
    }
}

impl<T: Value> Value for Option<T> {
    fn append_json(&self, to: &mut String) {
        match self {
            Some(value) => value.append_json(to),
            None => to.push_str("null"),
        }
    }
}

macro_rules! numbers {
    ($($kind:ty),*) => {$(
        impl Value for $kind {
            fn append_json(&self, to: &mut String) {
                let _ = write!(to, "{self}");
            }
        }
    )*};
}
numbers!(
    bool, u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize
);

impl Value for f64 {
    fn append_json(&self, to: &mut String) {
        if self.is_finite() {
            let _ = write!(to, "{self}");
        } else {
            // JSON has no such numbers.
            let _ = write!(to, "\"{self}\"");
        }
    }
}

impl Value for f32 {
    fn append_json(&self, to: &mut String) {
        f64::from(*self).append_json(to);
    }
}

/// Logs at a level: `record!(Level::Info, "message", name = value)`.
#[doc(hidden)]
#[macro_export]
macro_rules! __record {
    ($level:ident, $message:literal $(, $name:ident = $value:expr)* $(,)?) => {
        $crate::log::record(
            $crate::log::Level::$level,
            ::core::format_args!($message),
            &[$((::core::stringify!($name), &$value as &dyn $crate::log::Value)),*],
        )
    };
}

/// Logs for whoever mends the guest. See [`log`](crate::log).
#[doc(hidden)]
#[macro_export]
macro_rules! __debug {
    ($($record:tt)*) => { $crate::__record!(Debug, $($record)*) };
}

/// Logs what happened. See [`log`](crate::log).
#[doc(hidden)]
#[macro_export]
macro_rules! __info {
    ($($record:tt)*) => { $crate::__record!(Info, $($record)*) };
}

/// Logs what should not have happened. See [`log`](crate::log).
#[doc(hidden)]
#[macro_export]
macro_rules! __warn {
    ($($record:tt)*) => { $crate::__record!(Warn, $($record)*) };
}

/// Logs what failed. See [`log`](crate::log).
#[doc(hidden)]
#[macro_export]
macro_rules! __error {
    ($($record:tt)*) => { $crate::__record!(Error, $($record)*) };
}

#[doc(inline)]
pub use crate::{__debug as debug, __error as error, __info as info, __warn as warn};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_of_json() {
        let who = "a\"b\\c\nd\u{1}é";
        let line = line(
            Level::Warn,
            format_args!("hello {who}"),
            &[
                ("n", &-3),
                ("x", &1.5),
                ("nan", &f64::NAN),
                ("none", &None::<u8>),
                ("some", &Some("t")),
                ("yes", &true),
                ("shown", &display(&'c')),
            ],
        );
        assert_eq!(
            line,
            "{\"level\":\"warn\",\"message\":\"hello a\\\"b\\\\c\\nd\\u0001é\",\"fields\":\
             {\"n\":-3,\"x\":1.5,\"nan\":\"NaN\",\"none\":null,\"some\":\"t\",\"yes\":true,\
             \"shown\":\"c\"}}\n"
        );
    }

    #[test]
    fn without_fields_there_are_none() {
        assert_eq!(
            line(Level::Info, format_args!("hi"), &[]),
            "{\"level\":\"info\",\"message\":\"hi\"}\n"
        );
    }
}
