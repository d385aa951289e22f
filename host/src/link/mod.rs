//! How messages travel between control and data: over a stream socket, with files beside them.
//!
//! ```text
//!  message ─▶ JSON + files ─▶ frame: version, files, length, JSON ─▶ sendmsg, SCM_RIGHTS ─▶ …
//!  message ◀─ JSON + files ◀─ decoder: bounded, refuses what is not a frame ◀── recvmsg ◀── …
//! ```
//!
//! * [`frame`]: the layout, and the decoder that is fed with bytes
//! * [`wire`]: messages to frames and back, and what is checked on the way
//! * [`socket`]: bytes and descriptors through a socket
//!
//! Files go as descriptors; in the JSON stands which of the frame's descriptors it is. Each end
//! checks what it gets: a length beyond the bound, another version, a file that was not sent or a
//! line of a log that could forge another ends the connection, and with it the data process.
//!
//! *Invariant:* nothing that a peer sends makes this end keep more than one frame of
//! [`frame::PAYLOAD_MAX`] bytes and [`frame::FILES_MAX`] descriptors.

pub mod frame;
pub(crate) mod socket;
pub mod wire;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    /// The frame holds no message, or one that must not be.
    #[error(transparent)]
    Message(#[from] wire::MessageError),
    /// The peer asks more at once than one that is sound would.
    #[error("the other process asks too much")]
    Insistent,
    /// The peer is gone.
    #[error("the other process has closed the connection")]
    Closed,
}
