//! A single request and its response: for setting a server up, and for seeing whether it answers.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::response;

/// Longest answer that is read.
const ANSWER_MAX_BYTES: usize = 64 << 20;
/// For each step of a call; a deploy compiles within one.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) host: &'a str,
    /// Lines of the head, each with its end.
    pub(crate) fields: &'a str,
    pub(crate) body: &'a [u8],
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The bytes of its head.
    head: Vec<u8>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A field of the head.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let head = std::str::from_utf8(&self.head).ok()?;
        head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Call<'_> {
    /// Status and body of the answer.
    pub(crate) fn send(&self, to: SocketAddr) -> Result<(u16, Vec<u8>)> {
        let answer = self.send_whole(to)?;
        Ok((answer.status, answer.body))
    }

    /// The answer with its head.
    pub(crate) fn send_whole(&self, to: SocketAddr) -> Result<Answer> {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (method, path, host) = (self.method, self.path, self.host);
        let length = match self.body.len() {
            0 if method == "GET" => String::new(),
            length => format!("Content-Length: {length}\r\n"),
        };
        let fields = self.fields;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{fields}{length}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(self.body)?;
        let mut bytes = Vec::new();
        let mut piece = [0; 16 << 10];
        while bytes.len() < ANSWER_MAX_BYTES {
            let count = stream
                .read(&mut piece)
                .with_context(|| format!("reading the answer to {method} {path}"))?;
            bytes.extend_from_slice(&piece[..count]);
            if let Some(response) = response::parse(&bytes)? {
                let (status, body) = (response.status, response.body.into_owned());
                let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
                bytes.truncate(end.unwrap_or(0));
                let head = bytes;
                return Ok(Answer { status, head, body });
            }
            if count == 0 {
                bail!("the answer to {method} {path} was cut off");
            }
        }
        bail!("the answer to {method} {path} is too long")
    }
}
