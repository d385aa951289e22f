//! A guest's console, as a test uses it.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// An emulated processor that emulates a processor takes its time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);

/// How often a wait looks again though nothing was printed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What the guest printed so far.
#[derive(Clone, Default)]
pub(crate) struct Screen {
    inner: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (text, printed) = &*self.inner;
        text.lock().expect("nobody panics here").extend(bytes);
        printed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    pub(crate) fn len(&self) -> usize {
        self.inner.0.lock().expect("nobody panics here").len()
    }

    /// All of it from a place on.
    pub(crate) fn since(&self, place: usize) -> String {
        let text = self.inner.0.lock().expect("nobody panics here");
        String::from_utf8_lossy(&text[place.min(text.len())..]).into_owned()
    }

    /// Waits until the text from a place on satisfies `found`, which says what it was looking for.
    pub(crate) fn wait<T>(
        &self,
        place: usize,
        what: &str,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + PATIENCE;
        let (text, printed) = &*self.inner;
        let mut text = text.lock().expect("nobody panics here");
        loop {
            let now = String::from_utf8_lossy(&text[place.min(text.len())..]).into_owned();
            if let Some(found) = found(&now) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                left > Duration::ZERO,
                "no {what} in time; the console says:\n{now}"
            );
            // Not all of it at once: a guest that is over prints nothing more, and `found` sees it.
            text = printed
                .wait_timeout(text, left.min(LOOK_AGAIN))
                .expect("nobody panics here")
                .0;
        }
    }
}
