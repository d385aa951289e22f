//! Guest memory as a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{
    Bytes as _, FileOffset, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

use crate::memory::{GuestMemory, MemoryError, MemorySize};

const PAGE: usize = 4096;
/// What is looked at at once.
const CHUNK_PAGES: usize = 64;

/// Writes all regions, one after the other, into an empty file; returns when they are durable. vCPUs
/// and devices must be at rest.
pub(crate) fn write(memory: &GuestMemory, file: &File) -> io::Result<()> {
    let whole: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(whole)?;
    let mut buffer = vec![0; CHUNK_PAGES * PAGE];
    let mut start = 0;
    for region in memory.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let left = usize::try_from(region.len() - offset).unwrap_or(usize::MAX);
            let chunk = &mut buffer[..left.min(CHUNK_PAGES * PAGE)];
            region
                .read_slice(chunk, MemoryRegionAddress(offset))
                .map_err(io::Error::other)?;
            write_pages(file, chunk, start + offset)?;
            offset += chunk.len() as u64;
        }
        start += region.len();
    }
    file.sync_data()
}

/// Writes the pages that are not all zero, those that follow each other together.
fn write_pages(file: &File, chunk: &[u8], at: u64) -> io::Result<()> {
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut run: Option<(usize, usize)> = None;
    for (number, page) in chunk.chunks(PAGE).enumerate() {
        let (from, to) = (number * PAGE, number * PAGE + page.len());
        run = match (run, zero(page)) {
            (None, true) => None,
            (None, false) => Some((from, to)),
            (Some((start, _)), false) => Some((start, to)),
            (Some((start, end)), true) => {
                file.write_all_at(&chunk[start..end], at + start as u64)?;
                None
            }
        };
    }
    if let Some((start, end)) = run {
        file.write_all_at(&chunk[start..end], at + start as u64)?;
    }
    Ok(())
}

/// Maps a file as the memory of a machine of this size. Nothing that the guest writes reaches it.
pub(crate) fn map(size: MemorySize, file: File) -> Result<GuestMemory, MemoryError> {
    let bytes = size.get();
    let refused = |reason: String| MemoryError::Map { bytes, reason };
    let there = file
        .metadata()
        .map_err(|error| refused(error.to_string()))?;
    if there.len() != bytes {
        // A page beyond the file's end would be a SIGBUS later.
        return Err(refused(format!("the file has {} bytes", there.len())));
    }
    let file = Arc::new(file);
    let mut start = 0;
    let mut regions = Vec::new();
    for (place, length) in size.regions() {
        let offset = FileOffset::from_arc(Arc::clone(&file), start);
        let length_here = usize::try_from(length).map_err(|error| refused(error.to_string()))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let mapped = MmapRegion::build(Some(offset), length_here, protection, flags);
        let mapped = mapped.map_err(|error| refused(error.to_string()))?;
        let region = GuestRegionMmap::new(mapped, place);
        regions.push(region.ok_or_else(|| refused("it does not fit".to_owned()))?);
        start += length;
    }
    GuestMemory::from_regions(regions).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use insula_types::Bytes;
    use vm_memory::GuestAddress;

    use super::*;

    fn size(mib: u64) -> MemorySize {
        MemorySize::new(Bytes::mib(mib)).expect("a size")
    }

    #[test]
    fn what_was_written_is_there_and_zeroes_take_no_room() {
        let memory = crate::memory::create(size(64)).expect("memory");
        let places = [0, 4095, 8192, 1 << 20, (64 << 20) - 3];
        for place in places {
            memory
                .write_slice(b"abc", GuestAddress(place))
                .expect("inside");
        }
        let file = tempfile::tempfile().expect("a file");
        write(&memory, &file).expect("room");
        let stored = file.metadata().expect("open").blocks() * 512;
        assert!(stored < 1 << 20, "{stored} bytes for a handful of pages");

        let copies =
            [(); 2].map(|()| map(size(64), file.try_clone().expect("open")).expect("maps"));
        copies[0]
            .write_slice(b"xyz", GuestAddress(8192))
            .expect("inside");
        for (copy, at_8192) in copies.iter().zip([b"xyz", b"abc"]) {
            for place in places {
                let mut bytes = [0; 3];
                copy.read_slice(&mut bytes, GuestAddress(place))
                    .expect("inside");
                assert_eq!(&bytes, if place == 8192 { at_8192 } else { b"abc" });
            }
        }
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(32 << 20).expect("room");
        assert!(map(size(64), file).is_err());
    }
}
