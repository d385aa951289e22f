//! Running a child with a bounded time, and passing on what it says while it
//! runs.

use std::io::{self, BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// How often a running child's progress is reported and its deadline checked.
const TICK: Duration = Duration::from_secs(1);

/// How a child ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) ending: Ending,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

#[derive(Debug)]
pub(crate) enum Ending {
    Exited(ExitStatus),
    /// It was killed because it took longer than this.
    TimedOut(Duration),
}

impl Finished {
    pub(crate) fn success(&self) -> bool {
        matches!(self.ending, Ending::Exited(status) if status.success())
    }

    /// One line for an error message: how it ended and its last words.
    pub(crate) fn reason(&self) -> String {
        let ending = self.ending_text();
        let last_words = self
            .stderr
            .lines()
            .rev()
            .map(str::trim)
            .find(|line| !line.is_empty());
        match last_words {
            Some(words) => format!("{ending}: {words}"),
            None => ending,
        }
    }

    pub(crate) fn ending_text(&self) -> String {
        match self.ending {
            Ending::Exited(status) => status.to_string(),
            Ending::TimedOut(limit) => format!("took longer than {} s", limit.as_secs()),
        }
    }
}

/// What a running child is reported as.
pub(crate) enum Event<'a> {
    /// A line on stderr.
    Line(&'a str),
    /// It still runs.
    Tick(Duration),
}

enum Message {
    Line(String),
    /// Both pipes are shut.
    Closed(String),
}

/// Runs `command` to its end or until `limit` has passed, with no input.
pub(crate) fn run(
    command: &mut Command,
    limit: Duration,
    mut report: impl FnMut(Event<'_>),
) -> io::Result<Finished> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    thread::spawn(move || read_pipes(stdout, stderr, &sender));

    let mut written = String::new();
    let mut next_tick = TICK;
    loop {
        let elapsed = started.elapsed();
        if elapsed >= limit {
            let _ = child.kill();
            child.wait()?;
            return Ok(Finished {
                ending: Ending::TimedOut(limit),
                stdout: String::new(),
                stderr: written,
            });
        }
        if elapsed >= next_tick {
            report(Event::Tick(elapsed));
            next_tick = elapsed + TICK;
        }
        let wait = next_tick.saturating_sub(elapsed).min(limit - elapsed);
        match receiver.recv_timeout(wait) {
            Ok(Message::Line(line)) => {
                report(Event::Line(&line));
                written.push_str(&line);
                written.push('\n');
            }
            Ok(Message::Closed(stdout)) => {
                let status = child.wait()?;
                return Ok(Finished {
                    ending: Ending::Exited(status),
                    stdout,
                    stderr: written,
                });
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait()?;
                let stdout = String::new();
                return Ok(Finished {
                    ending: Ending::Exited(status),
                    stdout,
                    stderr: written,
                });
            }
        }
    }
}

/// Runs `command` quietly.
pub(crate) fn run_quiet(command: &mut Command, limit: Duration) -> io::Result<Finished> {
    run(command, limit, |_| {})
}

fn read_pipes(
    stdout: Option<impl Read + Send + 'static>,
    stderr: Option<impl Read>,
    sender: &Sender<Message>,
) {
    let stdout = thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = stdout {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    });
    if let Some(pipe) = stderr {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line)
                .trim_end_matches('\r')
                .to_owned();
            if sender.send(Message::Line(line)).is_err() {
                return;
            }
        }
    }
    let _ = sender.send(Message::Closed(stdout.join().unwrap_or_default()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_passed_on() {
        let mut lines = Vec::new();
        let finished = run(
            Command::new("sh").args(["-c", "echo out; echo one >&2; echo two >&2; exit 3"]),
            Duration::from_secs(30),
            |event| {
                if let Event::Line(line) = event {
                    lines.push(line.to_owned());
                }
            },
        )
        .unwrap();
        assert!(!finished.success());
        assert_eq!(lines, ["one", "two"]);
        assert_eq!(finished.stdout, "out\n");
        assert_eq!(finished.reason(), "exit status: 3: two");
    }

    #[test]
    fn a_child_that_takes_too_long_is_killed() {
        let started = Instant::now();
        let finished =
            run_quiet(Command::new("sleep").arg("60"), Duration::from_millis(200)).unwrap();
        assert!(matches!(finished.ending, Ending::TimedOut(_)));
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
