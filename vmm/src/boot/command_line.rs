//! The kernel's command line.

use std::fmt;
use std::str::FromStr;

use vm_memory::Bytes as _;

use super::BootError;
use crate::layout::{COMMAND_LINE, COMMAND_LINE_MAX_BYTES};
use crate::memory::GuestMemory;

/// Printable, without an end mark, and not longer than any x86 Linux takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CommandLine(String);

/// Why it is no command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// Too long.
    #[error("a command line of {bytes} bytes: a kernel takes {}", COMMAND_LINE_MAX_BYTES - 1)]
    Long {
        /// Its length.
        bytes: usize,
    },
    /// Not printable ASCII.
    #[error("a command line holds printable ASCII, not {found:?} at {at}")]
    Character {
        /// What was found.
        found: char,
        /// Where, in bytes.
        at: usize,
    },
}

impl FromStr for CommandLine {
    type Err = CommandLineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.len();
        if bytes >= COMMAND_LINE_MAX_BYTES {
            return Err(CommandLineError::Long { bytes });
        }
        let odd = |character: &char| !matches!(character, ' '..='~');
        match text.char_indices().find(|(_, character)| odd(character)) {
            Some((at, found)) => Err(CommandLineError::Character { found, at }),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl CommandLine {
    /// Length without the end mark.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts it where kernels are told to look; `most` counts the end mark.
    pub(super) fn write(&self, memory: &GuestMemory, most: usize) -> Result<(), BootError> {
        if self.len() >= most {
            let bytes = self.len();
            return Err(BootError::CommandLine { bytes, most });
        }
        let mut bytes = self.0.clone().into_bytes();
        bytes.push(0);
        memory
            .write_slice(&bytes, COMMAND_LINE)
            .map_err(|_| BootError::Place {
                what: "the command line",
                address: COMMAND_LINE.0,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_would_misread_is_refused() {
        assert!("console=ttyS0 panic=-1".parse::<CommandLine>().is_ok());
        for bad in ["a\0b", "a\nb", "ä", "\x7f"] {
            assert!(bad.parse::<CommandLine>().is_err(), "{bad:?}");
        }
        let long = "x".repeat(COMMAND_LINE_MAX_BYTES);
        assert!(long.parse::<CommandLine>().is_err());
        assert!(long[1..].parse::<CommandLine>().is_ok());
    }
}
