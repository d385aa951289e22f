//! One HTTP/1.1 response, found in the bytes that have come so far (RFC 9112).

use std::borrow::Cow;

use anyhow::{Result, bail};

const FIELDS_MAX: usize = 32;

/// A whole response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response<'a> {
    pub(crate) status: u16,
    pub(crate) body: Cow<'a, [u8]>,
    /// How many bytes it took.
    pub(crate) length: usize,
    /// The server wants to close the connection.
    pub(crate) close: bool,
}

/// Where a body ends.
enum Framing {
    Length(usize),
    Chunked,
    /// Neither: it ends with the connection, so there is no telling from here.
    Open,
}

/// The response at the beginning of `bytes`; `None` when more must come.
///
/// # Errors
/// What follows is no response, or one that we cannot delimit.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Response<'_>>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(begin) = head.parse(bytes)? else {
        return Ok(None);
    };
    let status = head.code.unwrap_or(0);
    let (mut framing, mut close) = (Framing::Open, false);
    for field in head.headers {
        if field.name.eq_ignore_ascii_case("content-length") {
            framing = Framing::Length(std::str::from_utf8(field.value)?.trim().parse()?);
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
        } else if field.name.eq_ignore_ascii_case("connection") {
            close = field.value.eq_ignore_ascii_case(b"close");
        }
    }
    if status == 204 || status == 304 {
        framing = Framing::Length(0);
    }
    let found = match framing {
        Framing::Length(length) => bytes
            .get(begin..begin + length)
            .map(|body| (Cow::Borrowed(body), begin + length)),
        Framing::Chunked => chunks(bytes, begin)?.map(|(body, end)| (Cow::Owned(body), end)),
        Framing::Open => bail!("a response without a length"),
    };
    Ok(found.map(|(body, length)| Response {
        status,
        body,
        length,
        close,
    }))
}

/// The body that is in chunks from `at` on, and where it ends.
fn chunks(bytes: &[u8], mut at: usize) -> Result<Option<(Vec<u8>, usize)>> {
    let mut body = Vec::new();
    loop {
        let size = match httparse::parse_chunk_size(&bytes[at..]) {
            Ok(httparse::Status::Complete((line, size))) => {
                at += line;
                usize::try_from(size)?
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => bail!("a chunk without a size"),
        };
        if size == 0 {
            return Ok(trailers(bytes, at).map(|end| (body, end)));
        }
        let Some(chunk) = bytes.get(at..at.saturating_add(size).saturating_add(2)) else {
            return Ok(None);
        };
        if !chunk.ends_with(b"\r\n") {
            bail!("a chunk that does not end where it says");
        }
        body.extend_from_slice(&chunk[..size]);
        at += size + 2;
    }
}

/// The end of the trailers that begin at `at`.
fn trailers(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let line = bytes[at..].windows(2).position(|pair| pair == b"\r\n")?;
        at += line + 2;
        if line == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every proper beginning is incomplete, and the whole is what it should be.
    fn whole(text: &str, body: &str) {
        for end in 0..text.len() {
            let begun = parse(&text.as_bytes()[..end]).unwrap();
            assert_eq!(begun, None, "{:?}", &text[..end]);
        }
        let more = format!("{text}HTTP/1.1 200");
        let response = parse(more.as_bytes()).unwrap().unwrap();
        assert_eq!(response.body, body.as_bytes());
        assert_eq!(response.length, text.len());
    }

    #[test]
    fn both_framings() {
        whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc");
        whole("HTTP/1.1 204 No Content\r\n\r\n", "");
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        whole(
            &format!("{head}3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n"),
            "abc0123456789",
        );
        whole(&format!("{head}1\r\na\r\n0\r\nusage: x\r\n\r\n"), "a");
    }

    #[test]
    fn what_cannot_be_delimited_is_refused() {
        for text in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "220 smtp\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcde",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
