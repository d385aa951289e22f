//! The header before each frame (virtio 1.2, 5.1.6): what is left to the other side to compute.
//!
//! The tap takes and gives the same header. What a guest writes into it reaches the host's kernel,
//! so it is looked at first: only kinds that were negotiated, only offsets within the frame.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
};

/// Length with the number of buffers, which modern devices always have.
pub(super) const HEADER_BYTES: usize = 12;
/// Where the number of buffers is.
pub(super) const BUFFERS_AT: usize = 10;

/// Whether the host's kernel may see this header with a frame of `frame_bytes`. `Some` is the
/// header to send: what means nothing in this direction is cleared.
pub(super) fn checked(
    header: [u8; HEADER_BYTES],
    frame_bytes: u32,
    accepted: u64,
) -> Option<[u8; HEADER_BYTES]> {
    let [flags, kind, rest @ ..] = header;
    let [header_bytes, segment_bytes, start, offset, _] = {
        let (fields, _) = rest.as_chunks::<2>();
        let fields: [[u8; 2]; 5] = fields.try_into().ok()?;
        fields.map(|field| u32::from(u16::from_le_bytes(field)))
    };
    let has = |bit: u32| accepted & 1 << bit != 0;
    let needs_checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if needs_checksum {
        // The checksum is two bytes long.
        let inside = start + offset + 2 <= frame_bytes;
        if !has(VIRTIO_NET_F_CSUM) || !inside {
            return None;
        }
    }
    let ecn = u32::from(kind) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let segmented = u32::from(kind) & !VIRTIO_NET_HDR_GSO_ECN;
    let known = match segmented {
        VIRTIO_NET_HDR_GSO_NONE => !ecn,
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
        VIRTIO_NET_HDR_GSO_UDP => has(VIRTIO_NET_F_HOST_UFO) && !ecn,
        _ => false,
    };
    if !known || ecn && !has(VIRTIO_NET_F_HOST_ECN) {
        return None;
    }
    let whole = segmented == VIRTIO_NET_HDR_GSO_NONE;
    // 5.1.6.2: segmentation needs the checksum, and a length for the segments.
    if !whole && (!needs_checksum || segment_bytes == 0 || header_bytes > frame_bytes) {
        return None;
    }
    let mut clean = header;
    clean[0] = flags & u8::try_from(VIRTIO_NET_HDR_F_NEEDS_CSUM).unwrap_or(1);
    if whole {
        // hdr_len and gso_size mean nothing then.
        clean[2..6].fill(0);
    }
    if !needs_checksum {
        clean[6..10].fill(0);
    }
    clean[BUFFERS_AT..].fill(0);
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_UFO
        | 1 << VIRTIO_NET_F_HOST_ECN;

    fn header(flags: u8, kind: u8, fields: [u16; 5]) -> [u8; HEADER_BYTES] {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (place, field) in header[2..].chunks_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        header
    }

    #[test]
    fn what_was_negotiated_passes() {
        let plain = header(0, 0, [0; 5]);
        assert_eq!(checked(plain, 60, 0), Some(plain));
        let checksum = header(1, 0, [0, 0, 34, 16, 0]);
        assert_eq!(checked(checksum, 60, ALL), Some(checksum));
        for kind in [1, 0x81, 3, 4, 0x84] {
            let segmented = header(1, kind, [54, 1448, 34, 16, 0]);
            assert_eq!(checked(segmented, 5000, ALL), Some(segmented), "{kind}");
        }
    }

    #[test]
    fn what_means_nothing_is_cleared() {
        // DATA_VALID, RSC_INFO, stale fields, a number of buffers.
        let noisy = header(6, 0, [9, 9, 9, 9, 9]);
        assert_eq!(checked(noisy, 60, ALL), Some([0; HEADER_BYTES]));
    }

    #[test]
    fn lies_do_not_pass() {
        let bad = [
            (header(1, 0, [0, 0, 34, 16, 0]), 60, 0),
            (header(1, 0, [0, 0, 50, 9, 0]), 60, ALL),
            (header(1, 0, [0, 0, u16::MAX, u16::MAX, 0]), 60, ALL),
            (header(1, 1, [54, 1448, 34, 16, 0]), 60, ALL & !(1 << 11)),
            (header(1, 4, [54, 1448, 34, 16, 0]), 60, ALL & !(1 << 12)),
            (header(1, 0x81, [54, 1448, 34, 16, 0]), 60, ALL & !(1 << 13)),
            (header(1, 3, [54, 1448, 34, 16, 0]), 60, ALL & !(1 << 14)),
            (header(0, 1, [54, 1448, 34, 16, 0]), 60, ALL),
            (header(1, 1, [54, 0, 34, 16, 0]), 60, ALL),
            (header(1, 1, [61, 1448, 34, 16, 0]), 60, ALL),
            (header(1, 2, [54, 1448, 34, 16, 0]), 60, ALL),
            (header(1, 5, [54, 1448, 34, 16, 0]), 60, ALL),
            (header(0, 0x80, [0; 5]), 60, ALL),
            (header(1, 0x83, [54, 1448, 34, 16, 0]), 60, ALL),
        ];
        for (header, bytes, accepted) in bad {
            assert_eq!(checked(header, bytes, accepted), None, "{header:?}");
        }
    }

    proptest! {
        #[test]
        fn what_passes_stays_within_the_frame(
            bytes in any::<[u8; HEADER_BYTES]>(),
            frame in 0_u32..70_000,
            accepted in any::<u64>(),
        ) {
            if let Some(header) = checked(bytes, frame, accepted) {
                let field = |at| u32::from(u16::from_le_bytes([header[at], header[at + 1]]));
                prop_assert!(header[0] == 0 || field(6) + field(8) + 2 <= frame);
                prop_assert!(header[1] == 0 || field(2) <= frame && header[0] == 1);
                // Doing it twice changes nothing.
                prop_assert_eq!(checked(header, frame, accepted), Some(header));
            }
        }
    }
}
