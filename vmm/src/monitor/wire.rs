//! Packets and descriptors over a Unix socket that keeps packets apart (`SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::protocol::{DESCRIPTORS_MAX, MESSAGE_MAX_BYTES};

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX));

/// Which of the descriptors beside a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(u8);

/// A packet names a descriptor that did not come with it, or names one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("descriptor {slot} did not come with the packet, or is named twice")]
pub struct SlotError {
    /// Which.
    pub slot: u8,
}

/// Collects the descriptors that are to go with a packet.
#[derive(Debug, Default)]
pub struct Outgoing<'d>(Vec<BorrowedFd<'d>>);

impl<'d> Outgoing<'d> {
    /// Adds one; the slot is how the packet names it.
    ///
    /// # Errors
    /// There are too many.
    pub fn add(&mut self, descriptor: BorrowedFd<'d>) -> Result<Slot, SlotError> {
        let slot = u8::try_from(self.0.len()).unwrap_or(u8::MAX);
        if self.0.len() >= DESCRIPTORS_MAX {
            return Err(SlotError { slot });
        }
        self.0.push(descriptor);
        Ok(Slot(slot))
    }

    pub(super) fn as_slice(&self) -> &[BorrowedFd<'d>] {
        &self.0
    }
}

/// The descriptors that came with a packet. Those that it does not name are closed.
#[derive(Debug, Default)]
pub struct Incoming(Vec<Option<OwnedFd>>);

impl Incoming {
    /// Takes one out.
    ///
    /// # Errors
    /// It did not come, or was taken.
    pub fn take(&mut self, slot: Slot) -> Result<OwnedFd, SlotError> {
        let found = self.0.get_mut(usize::from(slot.0)).and_then(Option::take);
        found.ok_or(SlotError { slot: slot.0 })
    }

    /// The only one, if exactly one came.
    pub(super) fn only(mut self) -> Option<OwnedFd> {
        match self.0.as_mut_slice() {
            [one] => one.take(),
            _ => None,
        }
    }
}

/// Sends a packet. Never a part of it.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    with: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !with.is_empty() && !control.push(SendAncillaryMessage::ScmRights(with)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(bytes)];
    sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next packet; `None` when the other side is gone.
///
/// # Errors
/// The socket's, or a packet that was longer than may be, of which nothing is kept.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Incoming)>> {
    let mut bytes = vec![0; MESSAGE_MAX_BYTES];
    let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights.map(Some));
        }
    }
    if got
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    Ok(Some((bytes, Incoming(descriptors))))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a pair")
    }

    #[test]
    fn a_packet_and_its_descriptors_arrive_together() {
        let (here, there) = pair();
        let null = File::open("/dev/null").expect("opens");
        let mut with = Outgoing::default();
        let slot = with.add(null.as_fd()).expect("one");
        send(here.as_fd(), b"hello", with.as_slice()).expect("sent");
        send(here.as_fd(), b"again", &[]).expect("sent");
        let (bytes, mut descriptors) = receive(&there).expect("received").expect("a packet");
        assert_eq!(bytes, b"hello");
        let mut file = File::from(descriptors.take(slot).expect("it came"));
        assert_eq!(file.read(&mut [0; 1]).expect("reads"), 0);
        assert_eq!(descriptors.take(slot).expect_err("taken").slot, 0);
        let (bytes, descriptors) = receive(&there).expect("received").expect("a packet");
        assert_eq!(bytes, b"again");
        assert!(descriptors.only().is_none());
        drop(here);
        assert!(receive(&there).expect("an end").is_none());
    }

    #[test]
    fn what_is_too_long_is_an_error() {
        let (here, there) = pair();
        send(here.as_fd(), &vec![b' '; MESSAGE_MAX_BYTES + 1], &[]).expect("sent");
        assert!(receive(&there).is_err());
    }

    #[test]
    fn no_more_descriptors_than_there_is_room_for() {
        let null = File::open("/dev/null").expect("opens");
        let mut with = Outgoing::default();
        for _ in 0..DESCRIPTORS_MAX {
            with.add(null.as_fd()).expect("room");
        }
        assert!(with.add(null.as_fd()).is_err());
        let (here, there) = pair();
        send(here.as_fd(), b"many", with.as_slice()).expect("sent");
        let (_, mut descriptors) = receive(&there).expect("received").expect("a packet");
        let last = u8::try_from(DESCRIPTORS_MAX - 1).expect("small");
        assert!(descriptors.take(Slot(last)).is_ok());
    }
}
