//! What the search takes from the environment, gathered in one place so that a
//! test can say something else.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Where to look and which programs to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder whose active toolchain counts (rustup chooses by folder).
    pub project_dir: PathBuf,
    /// Where prepared toolchains are kept: `<user's cache>/insula/wasm-toolchain`.
    /// `None` when the environment names neither a cache nor a home folder.
    pub cache_dir: Option<PathBuf>,
    /// The cargo to run.
    pub cargo: OsString,
    /// The rustc whose sysroot is the active toolchain's.
    pub rustc: OsString,
}

impl Settings {
    /// As the environment has it: `CARGO` and `RUSTC` if set, else those in
    /// `PATH`; the cache below `INSULA_CACHE_DIR`, else `XDG_CACHE_HOME/insula`,
    /// else `~/.cache/insula`.
    pub fn from_env(project_dir: &Path) -> Self {
        Self {
            project_dir: project_dir.to_path_buf(),
            cache_dir: cache_dir(|name| env::var_os(name).filter(|value| !value.is_empty())),
            cargo: program("CARGO", "cargo"),
            rustc: program("RUSTC", "rustc"),
        }
    }
}

fn program(variable: &str, default: &str) -> OsString {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| default.into())
}

fn cache_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let base = if let Some(own) = variable("INSULA_CACHE_DIR") {
        PathBuf::from(own)
    } else {
        let user = variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            // The XDG base directory specification: a relative path is to be ignored.
            .filter(|path| path.is_absolute())
            .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))?;
        user.join("insula")
    };
    Some(base.join("wasm-toolchain"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Option<PathBuf> {
        cache_dir(|name| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_cache_is_where_the_specification_says() {
        assert_eq!(from(&[]), None);
        assert_eq!(
            from(&[("HOME", "/h")]),
            Some("/h/.cache/insula/wasm-toolchain".into())
        );
        assert_eq!(
            from(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]),
            Some("/x/insula/wasm-toolchain".into())
        );
        assert_eq!(
            from(&[("HOME", "/h"), ("XDG_CACHE_HOME", "relative")]),
            Some("/h/.cache/insula/wasm-toolchain".into())
        );
        assert_eq!(
            from(&[("XDG_CACHE_HOME", "/x"), ("INSULA_CACHE_DIR", "/i")]),
            Some("/i/wasm-toolchain".into())
        );
    }
}
