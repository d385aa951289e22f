//! What the kernel says of a process (`proc(5)`).

use std::fs;

/// A file of a process that lives.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn file(pid: u32, name: &str) -> String {
    let path = format!("/proc/{pid}/{name}");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A field of `/proc/PID/status`; nothing where the process is gone, or has none of that name.
#[must_use]
pub fn status(pid: u32, field: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(name, _)| *name == field)?;
    Some(value.trim().to_owned())
}

/// Whether it is there, and not only waits to be buried.
#[must_use]
pub fn runs(pid: u32) -> bool {
    let state = status(pid, "State").unwrap_or_default();
    !state.is_empty() && !state.starts_with(['Z', 'X'])
}

/// Those that its threads made, and those that were left to it.
#[must_use]
pub fn children_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let all: String = lists.collect();
    let numbers = all.split_whitespace().map(str::parse);
    numbers.filter_map(Result::ok).collect()
}
