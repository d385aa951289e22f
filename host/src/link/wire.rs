//! Messages to frames and back.

use std::fs::File;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::frame::FrameError;
use crate::messages::{Command, FromData, LOG_LINE_MAX_BYTES, LogRecord};

/// A message that is ready to be sent, or has come and is to be read.
#[derive(Debug)]
pub struct Parcel {
    /// Its JSON.
    pub payload: Vec<u8>,
    /// Its files.
    pub files: Vec<OwnedFd>,
}

/// A frame holds no message, or one that must not be.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Not the JSON of a message.
    #[error("not a message: {0}")]
    Json(#[from] serde_json::Error),
    /// It names a file that was not sent, or not one that was.
    #[error("the message and its {sent} files do not fit together")]
    Files {
        /// How many came.
        sent: usize,
    },
    /// A line of a log that is too long, or could forge another.
    #[error("a line of the log of service {0} is not one")]
    LogLine(insula_types::ServiceId),
    /// It does not fit into a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// What crosses.
pub trait Message: Sized {
    /// Ready to be sent.
    ///
    /// # Errors
    /// [`MessageError`].
    fn pack(self) -> Result<Parcel, MessageError>;

    /// Reads what has come.
    ///
    /// # Errors
    /// [`MessageError`].
    fn unpack(parcel: Parcel) -> Result<Self, MessageError>;
}

/// Stands for a file in JSON: which of the frame's it is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
struct Place(usize);

/// The files of a frame that no message has taken yet.
struct Files {
    left: Vec<Option<OwnedFd>>,
}

impl Files {
    fn take(&mut self, Place(place): Place) -> Result<File, MessageError> {
        let sent = self.left.len();
        let file = self.left.get_mut(place).and_then(Option::take);
        file.map(File::from).ok_or(MessageError::Files { sent })
    }

    fn all_taken(&self) -> Result<(), MessageError> {
        let sent = self.left.len();
        if self.left.iter().all(Option::is_none) {
            Ok(())
        } else {
            Err(MessageError::Files { sent })
        }
    }
}

impl Message for Command {
    fn pack(self) -> Result<Parcel, MessageError> {
        let mut files = Vec::new();
        let command = self.map_files(&mut |file: File| {
            files.push(OwnedFd::from(file));
            Ok::<_, MessageError>(Place(files.len() - 1))
        })?;
        let payload = serde_json::to_vec(&command)?;
        Ok(Parcel { payload, files })
    }

    fn unpack(parcel: Parcel) -> Result<Self, MessageError> {
        let command: Command<Place> = serde_json::from_slice(&parcel.payload)?;
        let left = parcel.files.into_iter().map(Some).collect();
        let mut files = Files { left };
        let command = command.map_files(&mut |place| files.take(place))?;
        files.all_taken()?;
        Ok(command)
    }
}

impl Message for FromData {
    fn pack(self) -> Result<Parcel, MessageError> {
        Ok(Parcel {
            payload: serde_json::to_vec(&self)?,
            files: Vec::new(),
        })
    }

    fn unpack(parcel: Parcel) -> Result<Self, MessageError> {
        let message = serde_json::from_slice(&parcel.payload)?;
        let sent = parcel.files.len();
        if sent > 0 {
            return Err(MessageError::Files { sent });
        }
        if let Self::Logs(records) = &message {
            for record in records {
                check(record)?;
            }
        }
        Ok(message)
    }
}

/// Longest id of a request: far more than ours have.
const REQUEST_ID_MAX_BYTES: usize = 256;
/// An escaped character takes no more than so many bytes for each that it had.
const ESCAPED: usize = 10;

/// The data process is not trusted with other services' logs more than with anything else: what it
/// could write for its own guests, it can write for all of them, but never two lines for one.
fn check(record: &LogRecord) -> Result<(), MessageError> {
    let plain = |text: &str| text.chars().all(|c| c == '\t' || !c.is_control());
    let good = record.text.len() <= LOG_LINE_MAX_BYTES * ESCAPED
        && record.request_id.len() <= REQUEST_ID_MAX_BYTES
        && plain(&record.text)
        && plain(&record.request_id);
    if good {
        Ok(())
    } else {
        Err(MessageError::LogLine(record.service))
    }
}

#[cfg(test)]
mod tests;
