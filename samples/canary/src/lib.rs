//! Looks for what another tenant left, and leaves marks of its own.
//!
//! `GET /?turn=N` looks through all files and keys that it can reach, and at those that it should not
//! reach. Every value must be the mark that the environment's `MARK` says. Then it writes the mark to
//! a file and to a key of its own, whose names say the turn. 200 when it saw nothing but its own marks,
//! and those of its last turns; 510 and what it saw otherwise.

#![forbid(unsafe_code)]

use std::fs;

use insula_sdk::store::Store;
use insula_sdk::{Request, Response, Result, StatusCode};

/// Its own directory and store.
const DIRECTORY: &str = "/data";
const STORE: &str = "keys";
/// Marks that it keeps.
const KEPT: u64 = 4;

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let turn = req.query("turn").and_then(|turn| turn.parse::<u64>().ok());
    let turn = turn.unwrap_or(0);
    let mark = std::env::var("MARK").unwrap_or_default();
    let found = look(&mark, turn).and_then(|()| leave(&mark, turn));
    Ok(match found {
        Ok(()) => Response::text("nothing\n"),
        Err(seen) => Response::text(seen).with_status(StatusCode::NOT_EXTENDED),
    })
}

fn look(mark: &str, turn: u64) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let mut files = 0;
    for entry in fs::read_dir(DIRECTORY).map_err(|error| failed(&error))? {
        let path = entry.map_err(|error| failed(&error))?.path();
        let text = fs::read(&path).map_err(|error| failed(&error))?;
        is_own(mark, &path.display().to_string(), &text)?;
        files += 1;
    }
    let store = Store::open(STORE).map_err(|error| failed(&error))?;
    let keys = store.keys(None).map_err(|error| failed(&error))?.keys;
    for key in &keys {
        let value = store.get(key).map_err(|error| failed(&error))?;
        is_own(mark, key, &value.unwrap_or_default())?;
    }
    let expected = turn.min(KEPT);
    let seen = (files, keys.len() as u64);
    if seen != (expected, expected) {
        return Err(format!("{seen:?} marks of {expected}"));
    }
    for path in [
        "/",
        "/data/..",
        "/data/../..",
        "/proc/self",
        "/volumes",
        ".",
    ] {
        if fs::read_dir(path).is_ok_and(has_entries) {
            return Err(format!("{path} is there"));
        }
    }
    for name in ["", "default", "data", "other", "keys/../keys"] {
        if Store::open(name).is_ok() {
            return Err(format!("the store {name:?} is there"));
        }
    }
    Ok(())
}

fn has_entries(mut directory: fs::ReadDir) -> bool {
    directory.next().is_some()
}

fn is_own(mark: &str, place: &str, seen: &[u8]) -> Result<(), String> {
    if place.contains(mark) && seen == mark.as_bytes() {
        return Ok(());
    }
    let seen = String::from_utf8_lossy(seen);
    Err(format!("{place} has {seen:?}"))
}

fn leave(mark: &str, turn: u64) -> Result<(), String> {
    let name = format!("{mark}-{}", turn % KEPT);
    let written = fs::write(format!("{DIRECTORY}/{name}"), mark);
    written.map_err(|error| error.to_string())?;
    let store = Store::open(STORE).map_err(|error| error.to_string())?;
    let set = store.set(&name, mark);
    set.map_err(|error| error.to_string())
}
