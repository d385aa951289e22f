//! Frames of HTTP/2 by hand (RFC 9113, RFC 7541), as a client that means harm writes them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
/// Of a kind that nobody knows.
pub(super) const UNKNOWN: u8 = 0x42;

pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One frame.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A header that no table has, and none is to have.
pub(super) fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        // Below 127: in seven bits.
        field.push(u8::try_from(text.len()).expect("short"));
        field.extend(text.as_bytes());
    }
    field
}

/// The pseudo-headers of a request.
pub(super) fn head(method: &str, authority: &str) -> Vec<u8> {
    // Of the static table: `:scheme http`, `:path /`, `:method GET` or `POST`.
    let mut head = vec![0x86, 0x84, if method == "GET" { 0x82 } else { 0x83 }];
    // A literal, whose name is that of entry 1: `:authority`.
    head.extend([1, u8::try_from(authority.len()).expect("short")]);
    head.extend(authority.as_bytes());
    head
}

/// A connection on which a client of HTTP/2 has begun.
pub(super) fn begin(to: SocketAddr, settings: &[(u16, u32)]) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut payload = Vec::new();
    for (name, value) in settings {
        payload.extend(name.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    stream.write_all(PREFACE)?;
    stream.write_all(&frame(SETTINGS, 0, 0, &payload))?;
    Ok(stream)
}

/// Reads and forgets all that comes, on a thread of its own.
pub(super) fn forget_answers(stream: &TcpStream) {
    let mut reader = stream.try_clone().expect("a descriptor");
    std::thread::spawn(move || {
        let mut waste = [0; 16 << 10];
        while matches!(reader.read(&mut waste), Ok(1..)) {}
    });
}

/// Writes pieces until the connection is closed; how many bytes that took. `None` where it was not
/// closed in time.
pub(super) fn flood(
    stream: &mut TcpStream,
    within: Duration,
    mut piece: impl FnMut() -> Vec<u8>,
) -> Option<u64> {
    let patience = Some(Duration::from_millis(500));
    stream.set_write_timeout(patience).expect("a patience");
    let until = Instant::now() + within;
    let mut sent = 0;
    while Instant::now() < until {
        let bytes = piece();
        let mut rest = &bytes[..];
        while !rest.is_empty() && Instant::now() < until {
            match stream.write(rest) {
                Ok(count) => rest = &rest[count..],
                // The host does not read for a while: that is its right.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return Some(sent),
            }
        }
        sent += bytes.len() as u64;
    }
    None
}
