//! Volumes: what a tenant keeps between requests, and where its services see it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::VolumeName;
use crate::quantity::Bytes;
use crate::spec::SpecErrors;

/// Volumes of one service.
pub const MOUNTS_MAX: usize = 8;
/// Inodes of one volume, at most: each has a name that may be listed.
pub const INODES_MAX: u64 = 1 << 16;
/// Inodes of a volume when nothing is said.
pub const INODES_DEFAULT: u64 = 1 << 14;
/// Size of a volume when nothing is said.
pub const SIZE_DEFAULT: Bytes = Bytes::mib(1024);
/// Longest path of a mount.
const PATH_MAX_BYTES: usize = 256;

/// What is in a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// Files: services mount it as a directory.
    #[default]
    Files,
    /// Keys and values: services open it as a bucket of `wasi:keyvalue`.
    Store,
}

/// What a volume holds, and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawVolumeSpec")]
pub struct VolumeSpec {
    /// Bytes: files in whole blocks of 4 KiB, and 1 KiB for each inode.
    #[serde(rename = "size_bytes")]
    pub size: Bytes,
    /// Files, directories and links.
    pub inodes: u64,
    /// What is in it; it stays so.
    #[serde(default)]
    pub kind: VolumeKind,
}

impl Default for VolumeSpec {
    fn default() -> Self {
        Self {
            size: SIZE_DEFAULT,
            inodes: INODES_DEFAULT,
            kind: VolumeKind::Files,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawVolumeSpec {
    #[serde(alias = "size_bytes")]
    size: Option<Bytes>,
    inodes: Option<u64>,
    kind: VolumeKind,
}

impl TryFrom<RawVolumeSpec> for VolumeSpec {
    type Error = SpecErrors;

    fn try_from(raw: RawVolumeSpec) -> Result<Self, SpecErrors> {
        let mut errors = SpecErrors::default();
        let defaults = Self::default();
        let spec = Self {
            size: raw.size.unwrap_or(defaults.size),
            inodes: raw.inodes.unwrap_or(defaults.inodes),
            kind: raw.kind,
        };
        if spec.inodes == 0 || spec.inodes > INODES_MAX {
            errors.push("inodes", format_args!("from 1 to {INODES_MAX}"));
        }
        errors.into_result(spec)
    }
}

/// What a guest may do with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    /// Read and write.
    #[default]
    Rw,
    /// Read.
    Ro,
}

/// Where a guest finds a volume: absolute, without `.` and `..`, no final slash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MountPath(String);

/// Why a path is none for a mount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no path for a volume, which is written \"/data\" or \"/var/lib/app\"")]
pub struct MountPathError(String);

impl MountPath {
    /// The path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for MountPath {
    type Error = MountPathError;

    fn try_from(path: String) -> Result<Self, MountPathError> {
        let segment = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.len() <= 64
                && segment
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        let rest = path.strip_prefix('/');
        let good = rest.is_some_and(|rest| rest.split('/').all(segment));
        if good && path.len() <= PATH_MAX_BYTES {
            Ok(Self(path))
        } else {
            Err(MountPathError(path.chars().take(80).collect()))
        }
    }
}

impl From<MountPath> for String {
    fn from(path: MountPath) -> Self {
        path.0
    }
}

impl fmt::Display for MountPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A volume in a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// Which of the tenant's volumes.
    pub name: VolumeName,
    /// Where.
    pub path: MountPath,
    /// What its guests may do with it.
    #[serde(default)]
    pub mode: MountMode,
}

/// A store of keys and values that a service may open, by the volume's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreGrant {
    /// Which of the tenant's volumes.
    pub name: VolumeName,
    /// What its guests may do with it.
    #[serde(default)]
    pub mode: MountMode,
}

fn check_count(errors: &mut SpecErrors, field: &'static str, given: usize) {
    if given > MOUNTS_MAX {
        errors.push(field, format_args!("at most {MOUNTS_MAX}, {given} given"));
    }
}

/// Notes what is wrong with the stores of one service.
pub(crate) fn check_stores(errors: &mut SpecErrors, stores: &[StoreGrant]) {
    check_count(errors, "stores", stores.len());
    for (index, store) in stores.iter().enumerate() {
        if stores[..index].iter().any(|other| other.name == store.name) {
            errors.push("stores", format_args!("{} twice", store.name));
        }
    }
}

/// Notes what is wrong with the mounts of one service.
pub(crate) fn check(errors: &mut SpecErrors, mounts: &[Mount]) {
    check_count(errors, "volumes", mounts.len());
    for (index, mount) in mounts.iter().enumerate() {
        let before = &mounts[..index];
        if before.iter().any(|other| other.path == mount.path) {
            errors.push("volumes", format_args!("{} twice", mount.path));
        }
        if before.iter().any(|other| other.name == mount.name) {
            errors.push("volumes", format_args!("{} twice", mount.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs() {
        let spec: VolumeSpec = serde_json::from_str(r#"{"size":"64MiB","inodes":10}"#).unwrap();
        let printed = serde_json::to_string(&spec).unwrap();
        assert_eq!(
            printed,
            r#"{"size_bytes":67108864,"inodes":10,"kind":"files"}"#
        );
        assert_eq!(serde_json::from_str::<VolumeSpec>(&printed).unwrap(), spec);
        assert_eq!(
            serde_json::from_str::<VolumeSpec>("{}").unwrap(),
            VolumeSpec::default()
        );
        let store: VolumeSpec = serde_json::from_str(r#"{"kind":"store"}"#).unwrap();
        assert_eq!(store.kind, VolumeKind::Store);
        for bad in [
            r#"{"inodes":0}"#,
            r#"{"inodes":99999999}"#,
            r#"{"size":"x"}"#,
            r#"{"kind":"x"}"#,
            r#"{"x":1}"#,
        ] {
            assert!(serde_json::from_str::<VolumeSpec>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths() {
        let path = |text: &str| MountPath::try_from(text.to_owned());
        for good in ["/data", "/var/lib/app", "/a.b/c-d_e"] {
            assert_eq!(path(good).unwrap().as_str(), good);
        }
        let long = format!("/{}", "a".repeat(65));
        for bad in [
            "", "/", "data", "/data/", "//data", "/./data", "/a/../b", "/..", "/a b", "/\u{e4}",
            "/a\0", "/a\\b", "/a:b", &long,
        ] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }
}
