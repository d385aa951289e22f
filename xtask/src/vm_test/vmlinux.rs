//! The ELF kernel inside a bzImage: what a monitor boots through its PVH entry, without the
//! decompressor that the image brings along.
//!
//! Sources: "The Linux/x86 Boot Protocol" (setup_sects, payload_offset, payload_length);
//! LZ4's `lz4_Frame_format.md` (legacy frame) and `lz4_Block_format.md`. Debian's cloud kernel is
//! compressed with LZ4; a kernel that is not is refused by name.

use anyhow::{Context, Result, bail};

/// Of a legacy frame, little-endian.
const LZ4_LEGACY: u32 = 0x184c_2102;
/// What a legacy frame's blocks hold at most.
const BLOCK_BYTES: usize = 8 << 20;
/// No kernel is larger; a broken image may say so.
const KERNEL_BYTES: usize = 256 << 20;

/// Takes a bzImage, gives the ELF file.
pub(super) fn extract(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("the kernel is no bzImage");
    }
    let setup_sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let protected = (setup_sectors + 1) * 512;
    let start = protected + word(image, 0x248).context("payload_offset")?;
    let length = word(image, 0x24c).context("payload_length")?;
    let payload = image.get(start..).and_then(|rest| rest.get(..length));
    let kernel = frame(payload.context("the payload is not in the image")?)?;
    if kernel.get(..4) != Some(b"\x7fELF") {
        bail!("the payload is no ELF file");
    }
    Ok(kernel)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let found = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u32::from_le_bytes(*found)).ok()
}

/// Blocks with their lengths before them; the kernel's build appends the whole length, which looks
/// like one more and ends them.
fn frame(payload: &[u8]) -> Result<Vec<u8>> {
    if word(payload, 0) != usize::try_from(LZ4_LEGACY).ok() {
        bail!("the kernel is not compressed with LZ4, as Debian's cloud kernel is");
    }
    let end = payload.len().saturating_sub(4);
    let whole = word(payload, end).context("the payload has no length")?;
    if whole > KERNEL_BYTES {
        bail!("a kernel of {whole} bytes");
    }
    let mut kernel = Vec::with_capacity(whole);
    let mut at = 4;
    while at < end && kernel.len() < whole {
        let length = word(payload, at).context("a block has no length")?;
        at += 4;
        let compressed = payload.get(at..).and_then(|rest| rest.get(..length));
        block(compressed.context("a block is cut short")?, &mut kernel)?;
        at += length;
    }
    if kernel.len() != whole {
        bail!("{} bytes came of a kernel of {whole}", kernel.len());
    }
    Ok(kernel)
}

/// One block, of which matches reach back no further than its own start.
fn block(mut input: &[u8], output: &mut Vec<u8>) -> Result<()> {
    let first = output.len();
    loop {
        let token = take(&mut input, 1)?[0];
        let literals = length(&mut input, usize::from(token >> 4))?;
        output.extend(take(&mut input, literals)?);
        // The last sequence has no match.
        if input.is_empty() {
            return Ok(());
        }
        let back = take(&mut input, 2)?;
        let back = usize::from(u16::from_le_bytes([back[0], back[1]]));
        let count = length(&mut input, usize::from(token & 15))? + 4;
        let there = output.len() - first;
        if back == 0 || back > there || there + count > BLOCK_BYTES {
            bail!("a match outside its block");
        }
        // Byte by byte: a match may reach into what it writes.
        for _ in 0..count {
            output.push(output[output.len() - back]);
        }
    }
}

/// Fifteen is continued by bytes that add up, until one is not 255.
fn length(input: &mut &[u8], nibble: usize) -> Result<usize> {
    let mut sum = nibble;
    if nibble < 15 {
        return Ok(sum);
    }
    loop {
        let byte = take(input, 1)?[0];
        sum += usize::from(byte);
        if byte != 255 {
            return Ok(sum);
        }
    }
}

fn take<'i>(input: &mut &'i [u8], count: usize) -> Result<&'i [u8]> {
    let (taken, rest) = input
        .split_at_checked(count)
        .context("a block ends early")?;
    *input = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut output = Vec::new();
        block(bytes, &mut output).map(|()| output)
    }

    #[test]
    fn literals_and_matches() {
        // "abc", then six bytes from three back, then "xyz" without a match.
        let block = [0x32, b'a', b'b', b'c', 3, 0, 0x30, b'x', b'y', b'z'];
        assert_eq!(unpacked(&block).expect("a block"), b"abcabcabcxyz");
        // A run: one literal, and 4 + 15 + 255 + 1 of it again.
        let run = [0x1f, b'a', 1, 0, 255, 1, 0x00];
        assert_eq!(unpacked(&run).expect("a block"), [b'a'; 276]);
    }

    #[test]
    fn broken_blocks_are_refused() {
        for broken in [
            &[][..],
            &[0x30, b'a'],
            &[0x10, b'a', 2, 0, 0],
            &[0x10, b'a', 0, 0, 0],
            &[0x1f, b'a', 1, 0, 255],
            &[0xf0],
        ] {
            unpacked(broken).expect_err("it is broken");
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        extract(&[0; 4096]).expect_err("no bzImage");
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c] = 100;
        let error = extract(&image).expect_err("not LZ4").to_string();
        assert!(error.contains("LZ4"), "{error}");
    }
}
