//! The smallest kernel, as in the tests of the monitor: an ELF image with a PVH entry that says `>`, echoes what is typed, and turns
//! the machine off on `q`.

/// 32-bit protected mode, as a PVH entry is.
///
/// ```text
///    mov al, '>'; mov dx, 0x3f8; out dx, al
/// 1: mov dx, 0x3fd; in al, dx; test al, 1; jz 1b
///    mov dx, 0x3f8; in al, dx; out dx, al
///    cmp al, 'q'; jne 1b
///    mov dx, 0x601; mov al, 0x34; out dx, al
/// 2: hlt; jmp 2b
/// ```
const CODE: [u8; 37] = [
    0xb0, 0x3e, 0x66, 0xba, 0xf8, 0x03, 0xee, 0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7,
    0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 0x71, 0x75, 0xed, 0x66, 0xba, 0x01, 0x06, 0xb0, 0x34,
    0xee, 0xf4, 0xeb, 0xfd, 0x90,
];
const LOAD: u64 = 0x10_0000;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// ELF-64 specification, figures 2 and 6; Xen's `elfnote.h` for the note.
pub(super) fn image() -> Vec<u8> {
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let mut note = Vec::new();
    // Lengths of name and value, type XEN_ELFNOTE_PHYS32_ENTRY.
    for word in [4_u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD.to_le_bytes());
    let code_at = note_at + note.len() as u64;

    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // executable
    image.extend(62_u16.to_le_bytes()); // x86-64
    image.extend(1_u32.to_le_bytes());
    for word in [LOAD, HEADER, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, at: u64, to: u64, bytes: u64| {
        image.extend(kind.to_le_bytes());
        image.extend(7_u32.to_le_bytes());
        for word in [at, to, to, bytes, bytes, 4] {
            image.extend(word.to_le_bytes());
        }
    };
    segment(1, code_at, LOAD, CODE.len() as u64);
    segment(4, note_at, 0, note.len() as u64);
    image.extend(note);
    image.extend(CODE);
    image
}
