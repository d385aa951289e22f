//! Writing an initramfs: the "newc" format (kernel, `Documentation/driver-api/early-userspace/
//! buffer-format.rst`), as much of it as we need.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// File types and permissions, as in `st_mode`.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// An archive, as it grows.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// With `/dev/console`, which the kernel gives init as its standard streams.
    pub(super) fn new() -> Result<Self> {
        let mut archive = Self::default();
        for directory in ["bin", "dev", "proc", "sys", "tmp", "root", "modules", "bed"] {
            archive.directory(directory)?;
        }
        archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
        Ok(archive)
    }

    /// A folder of its own, before what lies in it.
    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, (0, 0), &[])
    }

    /// A file that may be executed.
    pub(super) fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.entry(name, PROGRAM, (0, 0), content)
    }

    /// A copy of a file.
    pub(super) fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| from.display().to_string())?;
        self.file(name, &content)
    }

    /// A copy of a file under its own path, with the folders that lead there.
    pub(super) fn copy_at(&mut self, path: &str) -> Result<()> {
        let name = path.trim_start_matches('/');
        for (end, _) in name.match_indices('/') {
            // Once more does no harm.
            self.directory(&name[..end])?;
        }
        self.copy(name, Path::new(path))
    }

    /// All of it.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of 4 GiB")?;
        let name_size = u32::try_from(name.len() + 1).context("a long name")?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        let length = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_ends_them() {
        let mut archive = Archive::new().expect("small");
        archive.file("init", b"12345").expect("small");
        let bytes = archive.finish().expect("small");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 8 + 1 + 1 + 1);
        let at = text.find("init\0").expect("the file");
        assert_eq!((at - 110) % 4, 0, "a header of 110 bytes starts on four");
        assert!(text.contains("TRAILER!!!\0"));
    }
}
