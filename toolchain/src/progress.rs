//! How long work tells whoever waits for it what it is doing.

use std::fmt;
use std::io::Write;
use std::time::Duration;

/// Receives what happens, as it happens. All methods have an empty default.
pub trait Progress {
    /// A step begins or a fact was found; one line without a line break.
    fn step(&mut self, message: &str) {
        let _ = message;
    }

    /// The step is still going on after `elapsed`; called about once a second.
    fn tick(&mut self, message: &str, elapsed: Duration) {
        let _ = (message, elapsed);
    }

    /// A line that a child process wrote, as it is (it may hold colour codes
    /// when [`Progress::colour`] is true).
    fn output(&mut self, line: &str) {
        let _ = line;
    }

    /// Whether children may colour their output.
    fn colour(&self) -> bool {
        false
    }
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}

/// Writes steps and output as lines, and for a step that takes long another
/// line every [`LineProgress::TICK_EVERY`].
pub struct LineProgress<W> {
    to: W,
    colour: bool,
    last_tick: Duration,
}

impl<W: Write> LineProgress<W> {
    /// The pause between two lines about one long step.
    pub const TICK_EVERY: Duration = Duration::from_secs(10);

    /// Writes to `to`, without colour. Errors in writing are ignored: a closed
    /// terminal is no reason to stop a build.
    pub fn new(to: W) -> Self {
        Self {
            to,
            colour: false,
            last_tick: Duration::ZERO,
        }
    }

    /// Lets children colour their output.
    #[must_use]
    pub fn with_colour(mut self, colour: bool) -> Self {
        self.colour = colour;
        self
    }
}

impl<W: Write> Progress for LineProgress<W> {
    fn step(&mut self, message: &str) {
        self.last_tick = Duration::ZERO;
        let _ = writeln!(self.to, "{message}");
    }

    fn tick(&mut self, message: &str, elapsed: Duration) {
        if elapsed < self.last_tick {
            self.last_tick = Duration::ZERO;
        }
        if elapsed.saturating_sub(self.last_tick) >= Self::TICK_EVERY {
            self.last_tick = elapsed;
            let _ = writeln!(self.to, "  … {message} ({} s)", elapsed.as_secs());
        }
    }

    fn output(&mut self, line: &str) {
        let _ = writeln!(self.to, "{line}");
    }

    fn colour(&self) -> bool {
        self.colour
    }
}

impl<W> fmt::Debug for LineProgress<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LineProgress")
            .field("colour", &self.colour)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_step_gets_a_line_every_ten_seconds() {
        let mut written = Vec::new();
        let mut progress = LineProgress::new(&mut written);
        progress.step("building std");
        for second in 0..25 {
            progress.tick("core", Duration::from_secs(second));
        }
        progress.step("done");
        let text = String::from_utf8(written).unwrap();
        assert_eq!(
            text,
            "building std\n  … core (10 s)\n  … core (20 s)\ndone\n"
        );
    }
}
