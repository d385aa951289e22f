//! Bytes and descriptors through a socket: one end of a connection, blocking or not.
//!
//! A receive is all or nothing, so both readers may be dropped between two frames and within one;
//! a send that is dropped half-way leaves the stream of no use.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as Blocking;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::LinkError;
use super::frame::{Decoder, FILES_MAX, FrameError, encode};
use super::wire::{Message, Parcel};

/// Bytes that are received at once.
const PIECE: usize = 64 << 10;

/// What has come and was not read yet.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    decoder: Decoder,
    files: VecDeque<OwnedFd>,
}

impl Inbox {
    /// One `recvmsg`. `false` at the end of the stream.
    fn receive(&mut self, socket: BorrowedFd<'_>, piece: &mut [u8]) -> io::Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(piece)];
        let received = recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other("descriptors were lost: too many are open"));
        }
        self.decoder.push(&piece[..received.bytes]);
        Ok(received.bytes > 0)
    }

    /// The next message, when it is complete.
    fn next<M: Message>(&mut self) -> Result<Option<M>, LinkError> {
        let Some(frame) = self.decoder.next()? else {
            // They come with the first byte of their frame: these are of at most two frames.
            let waiting = self.files.len();
            if waiting > 2 * FILES_MAX {
                return Err(FrameError::TooManyFiles(waiting).into());
            }
            return Ok(None);
        };
        if self.files.len() < frame.files {
            let sent = self.files.len();
            return Err(super::wire::MessageError::Files { sent }.into());
        }
        let files = self.files.drain(..frame.files).collect();
        let payload = frame.payload;
        Ok(Some(M::unpack(Parcel { payload, files })?))
    }
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let flags = SendFlags::NOSIGNAL;
    Ok(sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        flags,
    )?)
}

/// A message of which a part may have been sent.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// They go with the first byte.
    files: Vec<OwnedFd>,
}

impl Outgoing {
    fn new(message: impl Message) -> Result<Self, LinkError> {
        let Parcel { payload, files } = message.pack()?;
        Ok(Self {
            bytes: encode(&payload, files.len())?,
            sent: 0,
            files,
        })
    }

    /// One `sendmsg`. Whether all of it is sent.
    fn go_on(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let files: Vec<_> = self.files.iter().map(AsFd::as_fd).collect();
        self.sent += send_some(socket, &self.bytes[self.sent..], &files)?;
        self.files.clear();
        Ok(self.sent == self.bytes.len())
    }
}

/// Does a step of a process that has nothing else to do.
fn uninterrupted<T>(mut step: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match step() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Sends a message.
///
/// # Errors
/// [`LinkError`]; when it is of the message and not of the socket, nothing was sent.
pub(crate) async fn send(socket: &UnixStream, message: impl Message) -> Result<(), LinkError> {
    let mut outgoing = Outgoing::new(message)?;
    let mut step = || outgoing.go_on(socket.as_fd());
    while !socket.async_io(Interest::WRITABLE, &mut step).await? {}
    Ok(())
}

/// Waits for the next message. May be dropped at any time.
///
/// # Errors
/// [`LinkError`].
pub(crate) async fn receive<M: Message>(
    socket: &UnixStream,
    inbox: &mut Inbox,
) -> Result<M, LinkError> {
    let mut piece = vec![0; PIECE];
    loop {
        if let Some(message) = inbox.next()? {
            return Ok(message);
        }
        let receiving = || inbox.receive(socket.as_fd(), &mut piece);
        if !socket.async_io(Interest::READABLE, receiving).await? {
            return Err(LinkError::Closed);
        }
    }
}

/// Sends a message from a process that has nothing else to do.
///
/// # Errors
/// [`LinkError`].
pub(crate) fn send_blocking(socket: &Blocking, message: impl Message) -> Result<(), LinkError> {
    let mut outgoing = Outgoing::new(message)?;
    while !uninterrupted(|| outgoing.go_on(socket.as_fd()))? {}
    Ok(())
}

/// Waits for the next message in a process that has nothing else to do.
///
/// # Errors
/// [`LinkError`].
pub(crate) fn receive_blocking<M: Message>(
    socket: &Blocking,
    inbox: &mut Inbox,
) -> Result<M, LinkError> {
    let mut piece = vec![0; PIECE];
    loop {
        if let Some(message) = inbox.next()? {
            return Ok(message);
        }
        if !uninterrupted(|| inbox.receive(socket.as_fd(), &mut piece))? {
            return Err(LinkError::Closed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use insula_types::spec::ServiceSpec;
    use insula_types::{Digest, ServiceId, TenantId, Traffic, VersionNumber};

    use super::*;
    use crate::messages::{Command, IntendedVersion, ServiceIntent, ToData};

    fn service(seq: u64, files: usize) -> Command {
        let version = |number: usize| {
            let mut file = tempfile::tempfile().unwrap();
            write!(file, "{seq}/{number}").unwrap();
            file.rewind().unwrap();
            IntendedVersion {
                number: VersionNumber::new(u32::try_from(number).unwrap() + 1).unwrap(),
                digest: Digest::new([7; 32]),
                artefact: Some(file),
            }
        };
        Command {
            seq,
            body: ToData::Service(Box::new(ServiceIntent {
                id: ServiceId::new(1),
                tenant: TenantId::new(1),
                name: "hello".parse().unwrap(),
                spec: ServiceSpec {
                    env: [("K".to_owned(), "v".repeat(60_000))].into(),
                    ..ServiceSpec::default()
                },
                traffic: Traffic::none(),
                versions: (0..files).map(version).collect(),
                awaited: Vec::new(),
                mounts: Vec::new(),
            })),
        }
    }

    fn check(command: Command, seq: u64, files: usize) {
        assert_eq!(command.seq, seq);
        let ToData::Service(intent) = command.body else {
            panic!("another message");
        };
        assert_eq!(intent.versions.len(), files);
        for (number, version) in intent.versions.into_iter().enumerate() {
            let mut text = String::new();
            version.artefact.unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("{seq}/{number}"));
        }
    }

    #[test]
    fn files_arrive_with_their_messages() {
        let (here, there) = Blocking::pair().unwrap();
        let counts = [0, 3, 1, 0, FILES_MAX, 2];
        let sender = std::thread::spawn(move || {
            for (seq, files) in (0..).zip(counts) {
                send_blocking(&here, service(seq, files)).unwrap();
            }
        });
        let mut inbox = Inbox::default();
        for (seq, files) in (0..).zip(counts) {
            check(receive_blocking(&there, &mut inbox).unwrap(), seq, files);
        }
        sender.join().unwrap();
        let end = receive_blocking::<Command>(&there, &mut inbox);
        assert!(matches!(end, Err(LinkError::Closed)), "{end:?}");
    }

    #[tokio::test]
    async fn both_ends_may_be_asynchronous() {
        let (here, there) = UnixStream::pair().unwrap();
        let counts = [1, 0, 2, FILES_MAX];
        let sending = async {
            for (seq, files) in (0..).zip(counts) {
                send(&here, service(seq, files)).await.unwrap();
            }
        };
        let receiving = async {
            let mut inbox = Inbox::default();
            for (seq, files) in (0..).zip(counts) {
                check(receive(&there, &mut inbox).await.unwrap(), seq, files);
            }
        };
        tokio::join!(sending, receiving);
        let too_many = send(&here, service(0, FILES_MAX + 1)).await;
        assert!(matches!(too_many, Err(LinkError::Frame(_))), "{too_many:?}");
    }
}
