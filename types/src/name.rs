//! Names, ids and digests.
//!
//! A name is a DNS label, because it becomes one: `<service>.<tenant>.<domain>`. On disk and in
//! messages only ids and digests are used, never names.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name, in bytes: the limit of one DNS label (RFC 1035, 2.3.4).
pub const NAME_MAX_BYTES: usize = 63;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than a DNS label may be.
    #[error("a name has at most {NAME_MAX_BYTES} characters, this one has {0}")]
    TooLong(usize),
    /// A character outside `[a-z0-9-]`.
    #[error("a name is made of a-z, 0-9 and '-'; {character:?} at position {position} is not")]
    Character {
        /// The offending character.
        character: char,
        /// Its byte position, from 0.
        position: usize,
    },
    /// A hyphen at either end.
    #[error("a name begins and ends with a letter or a digit")]
    Hyphen,
}

/// Checks `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`.
fn check_label(text: &str) -> Result<(), NameError> {
    check_name(text, "")
}

/// Checks the same with dots inside, as version numbers have them: `debian-6.1`.
fn check_dotted(text: &str) -> Result<(), NameError> {
    check_name(text, ".")
}

fn check_name(text: &str, beside: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    let wrong = text
        .char_indices()
        .find(|(_, c)| !matches!(c, 'a'..='z' | '0'..='9' | '-') && !beside.contains(*c));
    if let Some((position, character)) = wrong {
        return Err(NameError::Character {
            character,
            position,
        });
    }
    if text.len() > NAME_MAX_BYTES {
        return Err(NameError::TooLong(text.len()));
    }
    let ends = |c: char| c.is_ascii_alphanumeric();
    if !text.starts_with(ends) || !text.ends_with(ends) {
        return Err(NameError::Hyphen);
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                $check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name_type!(
    /// The name of a tenant: who pays, and who owns services and machines.
    TenantName,
    check_label
);
name_type!(
    /// The name of a service within its tenant.
    ServiceName,
    check_label
);
name_type!(
    /// The name of a machine within its tenant.
    MachineName,
    check_label
);
name_type!(
    /// The name of a volume within its tenant.
    VolumeName,
    check_label
);
name_type!(
    /// The name of an image: a kernel, an initial ramdisk, a disk.
    ImageName,
    check_dotted
);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// An id as the state handed it out.
            #[must_use]
            pub const fn new(id: u64) -> Self {
                Self(id)
            }

            /// The bare number, for storage.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id_type!(
    /// Identifies a tenant for as long as the data directory lives; never reused, so that a
    /// deleted tenant's successor of the same name is another one.
    TenantId
);
id_type!(
    /// Identifies a service for as long as the data directory lives; never reused.
    ServiceId
);
id_type!(
    /// Identifies a volume for as long as the data directory lives; never reused.
    VolumeId
);
id_type!(
    /// Identifies a machine for as long as the data directory lives; never reused.
    MachineId
);

/// The number of an uploaded component within its service, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionNumber(u32);

impl VersionNumber {
    /// A version number; versions count from 1.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 {
            None
        } else {
            Some(Self(number))
        }
    }

    /// The bare number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for VersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The SHA-256 of a blob. Printed as `sha256:<64 hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text that is not `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a digest is written sha256:<64 lower-case hex digits>")]
pub struct DigestError;

impl Digest {
    /// A digest from the 32 bytes of a SHA-256.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex digits without the algorithm: a file name.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let hex = text.strip_prefix("sha256:").ok_or(DigestError)?.as_bytes();
        if hex.len() != 64 {
            return Err(DigestError);
        }
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(DigestError),
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "a-b", "a--b", "hello2", longest.as_str()] {
            assert!(good.parse::<TenantName>().is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        let bad = [
            "",
            "-a",
            "a-",
            "-",
            "A",
            "a_b",
            "a.b",
            "a/b",
            "..",
            "ä",
            "a b",
            "a\0",
            long.as_str(),
        ];
        for bad in bad {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn digests_round_trip() {
        let digest = Digest::new(std::array::from_fn(|i| u8::try_from(i * 7).unwrap()));
        assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
        assert!("sha256:00".parse::<Digest>().is_err());
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
    }
}
