//! The header of a packet (virtio 1.2, 5.10.6), checked when it is read.

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// Whoever runs the machine (`VMADDR_CID_HOST`).
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket that we know.
const STREAM: u16 = 1;

/// `flags` of a shutdown: its sender receives no more, its sender sends no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Operation {
    fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn code(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// Both ends of a connection, as seen from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// How much its sender has room for, and what of that it has passed on (5.10.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Credit {
    pub(super) room_bytes: u32,
    pub(super) forwarded: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    pub(super) operation: Operation,
    pub(super) flags: u32,
    pub(super) data_bytes: u32,
    pub(super) credit: Credit,
}

/// What the driver's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parsed {
    Packet(Header),
    /// Of a kind that we do not know, between these ports: the answer is a reset.
    Unknown(Ports),
    /// Not from this guest, or not for the host: to be dropped.
    Stray,
}

impl Header {
    /// A packet without data.
    pub(super) fn new(ports: Ports, operation: Operation) -> Self {
        Self {
            ports,
            operation,
            flags: 0,
            data_bytes: 0,
            credit: Credit::default(),
        }
    }

    /// From the driver of the guest `guest_cid`.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES], guest_cid: u64) -> Parsed {
        let wide = |at: usize| u64::from_le_bytes(array(bytes, at));
        let word = |at: usize| u32::from_le_bytes(array(bytes, at));
        let short = |at: usize| u16::from_le_bytes(array(bytes, at));
        if wide(0) != guest_cid || wide(8) != HOST_CID {
            return Parsed::Stray;
        }
        let ports = Ports {
            guest: word(16),
            host: word(20),
        };
        match Operation::from_code(short(30)) {
            Some(operation) if short(28) == STREAM => Parsed::Packet(Self {
                ports,
                operation,
                flags: word(32),
                data_bytes: word(24),
                credit: Credit {
                    room_bytes: word(36),
                    forwarded: word(40),
                },
            }),
            _ => Parsed::Unknown(ports),
        }
    }

    /// For the driver.
    pub(super) fn encode(&self, guest_cid: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
            at += field.len();
        };
        put(&HOST_CID.to_le_bytes());
        put(&guest_cid.to_le_bytes());
        put(&self.ports.host.to_le_bytes());
        put(&self.ports.guest.to_le_bytes());
        put(&self.data_bytes.to_le_bytes());
        put(&STREAM.to_le_bytes());
        put(&self.operation.code().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.credit.room_bytes.to_le_bytes());
        put(&self.credit.forwarded.to_le_bytes());
        bytes
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    // Every place that is asked for lies in the header.
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().unwrap_or([0; N])
}
