//! Sockets of the machine's own kind, as a program in the guest uses them: the bed's program is
//! also in the guest, and there it answers or asks.
#![allow(
    unsafe_code,
    reason = "no crate that we use knows the addresses of these sockets"
)]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Length of an address, as system calls take it.
const ADDRESS_BYTES: libc::socklen_t = 16;
const HOST: u32 = 2;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all of it are integers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("a small number");
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn checked(returned: i32) -> io::Result<i32> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

fn owned(returned: i32) -> io::Result<OwnedFd> {
    let descriptor = checked(returned)?;
    // SAFETY: the system call before just gave it to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    owned(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })
}

/// Says `ready`, then answers each of `clients` connections to a port: every line comes back in
/// upper case.
pub(crate) fn answer(port: u32, clients: usize) -> io::Result<()> {
    let listener = socket()?;
    let any = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives until the call returns, and is as long as the call is told.
    checked(unsafe { libc::bind(listener.as_raw_fd(), (&raw const any).cast(), ADDRESS_BYTES) })?;
    // SAFETY: takes no pointers.
    checked(unsafe { libc::listen(listener.as_raw_fd(), 16) })?;
    writeln!(io::stdout(), "ready")?;
    for _ in 0..clients {
        let listener = listener.as_raw_fd();
        // SAFETY: null says that the client's address is not wanted.
        let client =
            owned(unsafe { libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) })?;
        let mut client = File::from(client);
        for line in BufReader::new(client.try_clone()?).lines() {
            writeln!(client, "{}", line?.to_uppercase())?;
        }
    }
    Ok(())
}

/// Sends a line to a port of the host, and prints all that comes back.
pub(crate) fn ask(port: u32, question: &str) -> io::Result<()> {
    let socket = socket()?;
    let host = address(HOST, port);
    // SAFETY: as for `bind`.
    checked(unsafe { libc::connect(socket.as_raw_fd(), (&raw const host).cast(), ADDRESS_BYTES) })?;
    let mut socket = File::from(socket);
    writeln!(socket, "{question}")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    write!(io::stdout(), "{answer}")
}
