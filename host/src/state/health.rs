//! Whether the state can still be trusted to keep what it acknowledges.
//!
//! After a failed fsync nobody knows what is on the disk: the kernel drops the dirty pages, and a
//! second fsync that succeeds says nothing about them. So the first error of that kind is the
//! last: writes are refused from then on, reads and serving go on, and a restart begins with what
//! the disk has. A disk that is merely full is another matter: nothing was written, and when there
//! is room again it goes on.

use std::sync::{Arc, OnceLock};

/// The state was stopped; see the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the state takes no more changes since an input/output error ({0}); what runs is served; \
     check the disk, then restart the host"
)]
pub struct Stopped(pub String);

/// Shared by all that write into the data directory.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<OnceLock<String>>);

impl Health {
    /// Stops the state. The first reason counts.
    pub fn stop(&self, reason: impl std::fmt::Display) {
        if self.0.set(reason.to_string()).is_ok() {
            tracing::error!(%reason, "the state takes no more changes");
        }
    }

    /// Why it was stopped, if it was.
    #[must_use]
    pub fn stopped(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Asked before every write.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn check(&self) -> Result<(), Stopped> {
        match self.stopped() {
            None => Ok(()),
            Some(reason) => Err(Stopped(reason.to_owned())),
        }
    }

    /// For the result of an fsync: an error that leaves the disk unknown stops the state.
    ///
    /// # Errors
    /// The one that was given, or [`Stopped`] within one.
    pub fn after_sync(&self, result: std::io::Result<()>) -> std::io::Result<()> {
        match result {
            Err(error) if !is_full(&error) => {
                self.stop(format_args!("fsync: {error}"));
                self.check().map_err(std::io::Error::other)
            }
            result => result,
        }
    }
}

/// Whether an error says no more than that there is no room.
#[must_use]
pub fn is_full(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_sync_stops_and_a_full_disk_does_not() {
        let health = Health::default();
        let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        assert!(health.after_sync(Err(full)).is_err());
        assert_eq!(health.check(), Ok(()));
        let broken = std::io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error());
        let other = health.clone();
        assert!(other.after_sync(Err(broken)).is_err());
        assert!(health.check().is_err(), "for all that share it");
    }
}
