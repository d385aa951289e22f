//! What is refused and what is let through; and that hyper reads the rest as the guard does.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// The violation in a stream fed whole, if any.
fn verdict(stream: &[u8]) -> Result<HeadGuard, Violation> {
    let mut guard = HeadGuard::new();
    match guard.feed(stream) {
        Ok(()) => Ok(guard),
        Err(refused) => Err(refused.violation),
    }
}

/// A request with these lines after the request line.
fn with_fields(fields: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n").into_bytes()
}

fn chunked(body: &str) -> Vec<u8> {
    format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}").into_bytes()
}

#[test]
fn what_is_refused_in_a_head() {
    use Violation as V;
    let table: &[(&str, V)] = &[
        ("GET / HTTP/1.1\nHost: a\r\n\r\n", V::BareLf),
        ("GET / HTTP/1.1\r\nHost: a\n\r\n", V::BareLf),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n", V::BareLf),
        ("GET / HTTP/1.1\r\nHost: a\r\nX\n: b\r\n\r\n", V::BareLf),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: b\n\r\n", V::BareLf),
        ("\nGET / HTTP/1.1\r\n", V::BareLf),
        ("\r\n\nGET / HTTP/1.1\r\n", V::BareLf),
        ("\r\rGET / HTTP/1.1\r\n", V::BareCr),
        ("GET / HTTP/1.1\rHost: a\r\n\r\n", V::BareCr),
        ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", V::BareCr),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: b\rc\r\n\r\n", V::BareCr),
        ("GET / HTTP/1.1\r\nHost: a\r\n\rX: b\r\n\r\n", V::BareCr),
        ("\r\n\r\nGET / HTTP/1.1\r\n", V::RequestLine),
        (" GET / HTTP/1.1\r\n", V::RequestLine),
        ("GET  / HTTP/1.1\r\n", V::RequestLine),
        ("GET /  HTTP/1.1\r\n", V::RequestLine),
        ("GET / HTTP/1.1 \r\n", V::RequestLine),
        ("GET\t/ HTTP/1.1\r\n", V::RequestLine),
        ("GET /\0 HTTP/1.1\r\n", V::RequestLine),
        ("GET /\x7f HTTP/1.1\r\n", V::RequestLine),
        ("GET /\r\n", V::RequestLine),
        ("GET\r\n", V::RequestLine),
        ("G(T / HTTP/1.1\r\n", V::RequestLine),
        ("\x16\x03\x01\x02\0\x01", V::RequestLine),
        ("GET / HTTP/1.2\r\n", V::Version),
        ("GET / HTTP/2.0\r\n", V::Version),
        ("GET / http/1.1\r\n", V::Version),
        ("GET / HTTP/1.1.1\r\n", V::Version),
        ("GET / HTTP/11\r\n", V::Version),
        ("GET / X\r\n", V::Version),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", V::Version),
        ("PRI * HTTP/2.0\r\nHost: a\r\n\r\n", V::Version),
        ("\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", V::Version),
        ("CONNECT a:443 HTTP/1.1\r\n", V::Connect),
        ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", V::ObsFold),
        ("GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", V::ObsFold),
        ("GET / HTTP/1.1\r\nHost: a\r\n\tb\r\n\r\n", V::ObsFold),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
            V::ObsFold,
        ),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", V::SpaceBeforeColon),
        ("GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", V::SpaceBeforeColon),
        ("GET / HTTP/1.1\r\n: a\r\n\r\n", V::FieldName),
        ("GET / HTTP/1.1\r\nHost\r\n\r\n", V::FieldName),
        ("GET / HTTP/1.1\r\nHo\0st: a\r\n\r\n", V::FieldName),
        ("GET / HTTP/1.1\r\nHo\u{e4}st: a\r\n\r\n", V::FieldName),
        ("GET / HTTP/1.1\r\n\r\n", V::HostMissing),
        (
            "GET / HTTP/1.1\r\nX-Host: a\r\nHos: a\r\n\r\n",
            V::HostMissing,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            V::HostDuplicate,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n",
            V::HostDuplicate,
        ),
        (
            "GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
            V::HostDuplicate,
        ),
        (
            "GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            V::HostDuplicate,
        ),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", V::HostMalformed),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", V::HostMalformed),
        ("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", V::HostMalformed),
        ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", V::HostMalformed),
        ("GET / HTTP/1.1\r\nHost: a\\b\r\n\r\n", V::HostMalformed),
        ("GET / HTTP/1.1\r\nHost: a?b\r\n\r\n", V::HostMalformed),
        (
            "GET / HTTP/1.1\r\nHost: \u{fc}.example\r\n\r\n",
            V::HostMalformed,
        ),
        (
            "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
            V::TransferEncodingVersion,
        ),
    ];
    for (stream, violation) in table {
        assert_eq!(
            verdict(stream.as_bytes()).err(),
            Some(*violation),
            "{stream:?}"
        );
    }
}

#[test]
fn what_is_refused_in_a_header() {
    use Violation as V;
    let table: &[(&str, V)] = &[
        ("X: \0\r\n", V::ControlInValue),
        ("X: a\0b\r\n", V::ControlInValue),
        ("X: 1234567\x7f9abcdef\r\n", V::ControlInValue),
        ("X: 1234567\x1b9abcdef\r\n", V::ControlInValue),
        ("Content-Length: 1\x0b\r\n", V::ControlInValue),
        ("Transfer-Encoding: \x0bchunked\r\n", V::ControlInValue),
        ("Content-Length:\r\n", V::ContentLength),
        ("Content-Length: \t\r\n", V::ContentLength),
        ("Content-Length: +5\r\n", V::ContentLength),
        ("Content-Length: -5\r\n", V::ContentLength),
        ("Content-Length: 0x5\r\n", V::ContentLength),
        ("Content-Length: 5 5\r\n", V::ContentLength),
        ("Content-Length: 5.0\r\n", V::ContentLength),
        ("Content-Length: \"5\"\r\n", V::ContentLength),
        ("Content-Length: \u{0665}\r\n", V::ContentLength),
        ("Content-Length: 5,5\r\n", V::ContentLengthList),
        ("Content-Length: 5 , 5\r\n", V::ContentLengthList),
        ("Content-Length: ,5\r\n", V::ContentLengthList),
        (
            "Content-Length: 5\r\nContent-Length: 5\r\n",
            V::ContentLengthDuplicate,
        ),
        (
            "Content-Length: 5\r\ncontent-length: 6\r\n",
            V::ContentLengthDuplicate,
        ),
        (
            "Content-Length: 9223372036854775808\r\n",
            V::ContentLengthTooLarge,
        ),
        (
            "Content-Length: 18446744073709551616\r\n",
            V::ContentLengthTooLarge,
        ),
        (
            "Content-Length: 18446744073709551621\r\n",
            V::ContentLengthTooLarge,
        ),
        (
            "Content-Length: 99999999999999999999999999\r\n",
            V::ContentLengthTooLarge,
        ),
        (
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            V::LengthAndCoding,
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
            V::LengthAndCoding,
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            V::TransferEncodingDuplicate,
        ),
        (
            "Transfer-Encoding: chunked\r\nTRANSFER-ENCODING: identity\r\n",
            V::TransferEncodingDuplicate,
        ),
        ("Transfer-Encoding:\r\n", V::TransferEncoding),
        ("Transfer-Encoding: identity\r\n", V::TransferEncoding),
        ("Transfer-Encoding: gzip, chunked\r\n", V::TransferEncoding),
        (
            "Transfer-Encoding: chunked, chunked\r\n",
            V::TransferEncoding,
        ),
        ("Transfer-Encoding: chunked,\r\n", V::TransferEncoding),
        ("Transfer-Encoding: xchunked\r\n", V::TransferEncoding),
        ("Transfer-Encoding: chunkedx\r\n", V::TransferEncoding),
        ("Transfer-Encoding: chunked;q=1\r\n", V::TransferEncoding),
        ("Transfer-Encoding: \"chunked\"\r\n", V::TransferEncoding),
        ("Transfer-Encoding: chun ked\r\n", V::TransferEncoding),
        (
            "Transfer-Encoding: chunkedchunkedchunked\r\n",
            V::TransferEncoding,
        ),
        ("Transfer-Encoding : chunked\r\n", V::SpaceBeforeColon),
        ("Transfer-Encoding\r\n: chunked\r\n", V::FieldName),
    ];
    for (fields, violation) in table {
        assert_eq!(
            verdict(&with_fields(fields)).err(),
            Some(*violation),
            "{fields:?}"
        );
    }
}

#[test]
fn what_is_refused_in_a_chunked_body() {
    use Violation as V;
    let long_extension = format!("1;{}\r\na\r\n", "e".repeat(CHUNK_EXTENSION_BYTES_MAX));
    let many_extensions = format!("1;{}\r\na\r\n", "e".repeat(999)).repeat(17);
    let long_trailers = format!("0\r\nX: {}\r\n\r\n", "t".repeat(TRAILER_BYTES_MAX));
    let many_trailers = format!("0\r\n{}\r\n", "x: y\r\n".repeat(FIELDS_MAX + 1));
    let table: &[(&str, V)] = &[
        ("\r\n", V::Chunk),
        ("g\r\n", V::Chunk),
        (" 1\r\na\r\n", V::Chunk),
        ("+1\r\na\r\n", V::Chunk),
        ("0x1\r\na\r\n", V::Chunk),
        ("1 \r\na\r\n", V::Chunk),
        ("1\ta\r\n", V::Chunk),
        ("1;a\0\r\n", V::Chunk),
        ("1\r\nab\r\n", V::Chunk),
        (";a\r\n", V::Chunk),
        ("1\n", V::BareLf),
        ("1;a\n", V::BareLf),
        ("1 \n", V::BareLf),
        ("1\r\na\n", V::BareLf),
        ("\n", V::BareLf),
        ("0\r\n\n", V::BareLf),
        ("1\ra\r\n", V::BareCr),
        ("1;a\rb\r\n", V::BareCr),
        ("1\r\na\r1", V::BareCr),
        ("0\r\n\rX", V::BareCr),
        ("10000000000000000\r\n", V::ChunkTooLarge),
        ("00000000000000001\r\n", V::ChunkTooLarge),
        ("fffffffffffffffff\r\n", V::ChunkTooLarge),
        (&long_extension, V::ChunkExtensionTooLarge),
        (&many_extensions, V::ChunkExtensionTooLarge),
        (&long_trailers, V::TrailersTooLarge),
        (&many_trailers, V::TooManyFields),
        ("0\r\nContent-Length: 5\r\n\r\n", V::TrailerForbidden),
        (
            "0\r\nTransfer-Encoding: chunked\r\n\r\n",
            V::TrailerForbidden,
        ),
        ("0\r\nHost: b\r\n\r\n", V::TrailerForbidden),
        ("0\r\nX: y\r\n z\r\n\r\n", V::ObsFold),
        ("0\r\nX : y\r\n\r\n", V::SpaceBeforeColon),
        ("0\r\nX: \0\r\n\r\n", V::ControlInValue),
        ("0\r\nGET / HTTP/1.1\r\n", V::SpaceBeforeColon),
    ];
    for (body, violation) in table {
        let result = verdict(&chunked(body));
        assert_eq!(result.err(), Some(*violation), "{body:?}");
    }
}

#[test]
fn limits_are_where_they_are_said_to_be() {
    let target = |bytes| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "t".repeat(bytes));
    let line_rest = "GET / HTTP/1.1\r\n".len();
    assert!(verdict(target(REQUEST_LINE_BYTES_MAX - line_rest).as_bytes()).is_ok());
    let long = verdict(target(REQUEST_LINE_BYTES_MAX - line_rest + 1).as_bytes());
    assert_eq!(long.err(), Some(Violation::RequestLineTooLong));

    let value = |bytes| with_fields(&format!("X: {}\r\n", "v".repeat(bytes)));
    let head_rest = with_fields("X: \r\n").len();
    assert!(verdict(&value(HEAD_BYTES_MAX - head_rest)).is_ok());
    let large = verdict(&value(HEAD_BYTES_MAX - head_rest + 1));
    assert_eq!(large.err(), Some(Violation::HeadTooLarge));

    let fields = |count| with_fields(&"x: y\r\n".repeat(count));
    assert!(verdict(&fields(FIELDS_MAX - 1)).is_ok());
    assert_eq!(
        verdict(&fields(FIELDS_MAX)).err(),
        Some(Violation::TooManyFields)
    );

    let extension = |bytes| chunked(&format!("1{}\r\na\r\n0\r\n\r\n", ";".repeat(bytes)));
    assert!(verdict(&extension(CHUNK_EXTENSION_BYTES_MAX)).is_ok());
    let large = verdict(&extension(CHUNK_EXTENSION_BYTES_MAX + 1));
    assert_eq!(large.err(), Some(Violation::ChunkExtensionTooLarge));

    let trailer = |bytes| chunked(&format!("0\r\nx:{}\r\n\r\n", "t".repeat(bytes)));
    assert!(verdict(&trailer(TRAILER_BYTES_MAX - "x:\r\n\r\n".len())).is_ok());
    let large = verdict(&trailer(TRAILER_BYTES_MAX - "x:\r\n\r\n".len() + 1));
    assert_eq!(large.err(), Some(Violation::TrailersTooLarge));

    assert!(verdict(&with_fields("Content-Length: 9223372036854775807\r\n")).is_ok());
    assert!(verdict(&chunked("ffffffffffffffff\r\na")).is_ok());
}

#[test]
fn what_is_let_through() {
    let table: &[(&[u8], u64, Phase)] = &[
        (b"", 0, Phase::Idle),
        (b"P", 0, Phase::Head),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", 0, Phase::Head),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\n", 0, Phase::PassThrough),
        (b"PROPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", 1, Phase::Idle),
        (b"GET / HTTP/1.0\r\n\r\n", 1, Phase::Idle),
        (b"GET / HTTP/1.1\r\nhost:A.example.:8080\t \r\n\r\n", 1, Phase::Idle),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 1, Phase::Idle),
        (b"GET http://a:80/b HTTP/1.1\r\nHost: a:80\r\n\r\n", 1, Phase::Idle),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n", 1, Phase::Idle),
        (b"connect / HTTP/1.1\r\nHost: a\r\n\r\n", 1, Phase::Idle),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\nX: \xc3\xa4\tb\x80\r\n\r\n", 1, Phase::Idle),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", 1, Phase::Idle),
        (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 2, Phase::Idle),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 002 \r\n\r\na", 1, Phase::Body),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n\0\n\rGE", 1, Phase::Head),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", 1, Phase::Idle),
        (b"PUT / HTTP/1.1\r\nHost: a\r\ntransfer-encoding:\tCHUNKED \r\n\r\n1 \t;a=\"b\tc\";d\r\n\n\r\n0;z\r\nX: y\r\n\r\n", 1, Phase::Idle),
        (b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n00\r\nX: y\r\n", 1, Phase::Body),
    ];
    for (stream, requests, phase) in table {
        let guard =
            verdict(stream).map_err(|violation| (violation, stream.escape_ascii().to_string()));
        let guard = guard.unwrap();
        let shown = stream.escape_ascii();
        assert_eq!(
            (guard.requests(), guard.phase()),
            (*requests, *phase),
            "{shown}"
        );
    }
}

#[test]
fn a_refusal_is_final_and_says_what_may_be_handed_on() {
    let mut guard = HeadGuard::new();
    let stream = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\0GET /2";
    let refused = Refused {
        violation: Violation::RequestLine,
        deliverable: 29,
    };
    assert_eq!(guard.feed(stream), Err(refused));
    assert_eq!(
        guard.feed(b"GET / HTTP/1.1\r\n"),
        Err(Refused {
            deliverable: 0,
            ..refused
        })
    );

    let mut guard = HeadGuard::new();
    let stream = b"GET / HTTP/1.1\r\nX: y\r\n\r\n";
    let refused = Refused {
        violation: Violation::HostMissing,
        deliverable: stream.len() - 1,
    };
    assert_eq!(guard.feed(stream), Err(refused));
}

#[test]
fn every_status_fits_its_violation() {
    assert_eq!(Violation::HeadTooLarge.status(), 431);
    assert_eq!(Violation::RequestLineTooLong.status(), 414);
    assert_eq!(Violation::ContentLengthTooLarge.status(), 413);
    assert_eq!(Violation::BareLf.status(), 400);
}

#[test]
fn a_run_of_text_ends_at_the_first_control_byte() {
    for length in 0..40 {
        let mut text = vec![b'a'; length];
        assert_eq!(text_run::<0x20>(&text), length);
        for at in 0..length {
            for (byte, ends) in [
                (0, true),
                (0x1f, true),
                (b' ', false),
                (0x7f, true),
                (0x80, false),
                (0xff, false),
            ] {
                text[at] = byte;
                let expected = if ends { at } else { length };
                assert_eq!(
                    text_run::<0x20>(&text),
                    expected,
                    "{byte:#x} at {at} of {length}"
                );
            }
            text[at] = b'~';
        }
    }
}

/// One valid request as bytes.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let field = (
        "x-[a-zA-Z0-9_~-]{0,12}",
        "[ \t]{0,2}",
        "[!-~]{0,30}( [!-~]{1,5}){0,2}",
        "[ \t]{0,2}",
    )
        .prop_map(|(name, before, value, after)| format!("{name}:{before}{value}{after}\r\n"));
    let fields = prop::collection::vec(field, 0..5).prop_map(|fields| fields.concat());
    let trailer =
        ("x-[a-z]{1,8}", "[!-~]{1,20}").prop_map(|(name, value)| format!("{name}: {value}\r\n"));
    let trailers = prop::collection::vec(trailer, 0..3).prop_map(|trailers| trailers.concat());
    let data = prop::collection::vec(any::<u8>(), 1..60);
    let chunk = (
        data,
        "(;[a-z]{1,5}(=[a-z0-9]{1,5})?){0,2}",
        "0{0,3}",
        any::<bool>(),
    )
        .prop_map(|(data, extension, zeros, upper)| {
            let size = if upper {
                format!("{:X}", data.len())
            } else {
                format!("{:x}", data.len())
            };
            [
                format!("{zeros}{size}{extension}\r\n").as_bytes(),
                &data,
                b"\r\n",
            ]
            .concat()
        });
    let chunks = prop::collection::vec(chunk, 0..4).prop_map(|chunks| chunks.concat());
    let body = prop_oneof![
        Just((String::new(), Vec::new())),
        prop::collection::vec(any::<u8>(), 0..100)
            .prop_map(|body| (format!("Content-Length: {}\r\n", body.len()), body)),
        (chunks, trailers).prop_map(|(chunks, trailers)| {
            let last = format!("0\r\n{trailers}\r\n");
            (
                "Transfer-Encoding: chunked\r\n".to_owned(),
                [&chunks, last.as_bytes()].concat(),
            )
        }),
    ];
    let line = (
        "(\r\n)?",
        "GET|POST|PUT|DELETE|PATCH|OPTIONS",
        "/[a-z0-9/._~%-]{0,20}",
        "[a-z]{1,8}(:80)?",
    );
    (line, fields.clone(), body, fields).prop_map(
        |((empty, method, target, host), before, (framing, body), after)| {
            // A stray percent is no valid escape to everybody.
            let target = target.replace('%', "%41");
            let head = format!(
                "{empty}{method} {target} HTTP/1.1\r\n{before}Host: {host}\r\n{framing}{after}\r\n"
            );
            [head.as_bytes(), &body].concat()
        },
    )
}

/// Valid requests, one after the other, and how many.
fn pipeline() -> impl Strategy<Value = (Vec<u8>, u64)> {
    prop::collection::vec(request(), 1..5)
        .prop_map(|requests| (requests.concat(), requests.len() as u64))
}

/// A pipeline with a few bytes changed to those that matter to framing.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop::sample::select(vec![
        "\r",
        "\n",
        "\r\n",
        " ",
        "\t",
        ":",
        ";",
        ",",
        "0",
        "5",
        "a",
        "\0",
        "\x7f",
        "\u{e4}",
        "Host: b\r\n",
        "Content-Length: 3\r\n",
        "Transfer-Encoding: chunked\r\n",
        "\r\n\r\n",
        "GET /x HTTP/1.1\r\n",
        "1.0",
    ]);
    let change = (any::<prop::sample::Index>(), 0..4usize, piece);
    (pipeline(), prop::collection::vec(change, 0..4)).prop_map(|((mut stream, _), changes)| {
        for (at, removed, piece) in changes {
            let at = at.index(stream.len() + 1);
            let end = (at + removed).min(stream.len());
            stream.splice(at..end, piece.bytes());
        }
        stream
    })
}

/// The verdict on a stream fed in pieces.
fn verdict_in_pieces(stream: &[u8], cuts: &[usize]) -> Result<(u64, Phase), Violation> {
    let mut guard = HeadGuard::new();
    let mut from = 0;
    for cut in cuts.iter().copied().chain([stream.len()]) {
        let piece = &stream[from.min(cut)..cut];
        if let Err(refused) = guard.feed(piece) {
            assert!(refused.deliverable <= piece.len());
            return Err(refused.violation);
        }
        from = from.max(cut);
    }
    Ok((guard.requests(), guard.phase()))
}

/// The request lines that the guard sees, up to where it refuses.
fn targets_for_guard(stream: &[u8]) -> (Vec<String>, Option<Violation>) {
    let mut guard = HeadGuard::new();
    let (mut targets, mut head) = (Vec::new(), Vec::new());
    for byte in stream {
        let before = guard.requests();
        if let Err(refused) = guard.feed(&[*byte]) {
            return (targets, Some(refused.violation));
        }
        head.push(*byte);
        if guard.requests() > before {
            let text = String::from_utf8_lossy(&head).trim_start().to_owned();
            targets.push(text.split(' ').nth(1).unwrap().to_owned());
        }
        if guard.phase() != Phase::Head {
            head.clear();
        }
    }
    (targets, None)
}

/// The requests that hyper serves from a stream, and whether it was content with it.
fn targets_for_hyper(stream: &[u8]) -> (Vec<String>, bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let targets = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&targets);
    let service =
        hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let seen = Rc::clone(&seen);
            async move {
                seen.borrow_mut().push(request.uri().to_string());
                let _whole = request.into_body().collect().await;
                Ok::<_, Infallible>(http::Response::new(Empty::<Bytes>::new()))
            }
        });
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let content = runtime.block_on(async {
        client.write_all(stream).await.unwrap();
        client.shutdown().await.unwrap();
        let served = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service)
            .await;
        let mut answers = Vec::new();
        client.read_to_end(&mut answers).await.unwrap();
        served.is_ok() && !answers.windows(13).any(|window| window == b"HTTP/1.1 400 ")
    });
    (targets.take(), content)
}

proptest! {
    #[test]
    fn valid_requests_are_never_refused((stream, requests) in pipeline()) {
        prop_assert_eq!(verdict_in_pieces(&stream, &[]), Ok((requests, Phase::Idle)));
    }

    #[test]
    fn cuts_do_not_matter(stream in mutated(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.sort_unstable();
        let bytewise: Vec<_> = (0..stream.len()).collect();
        let whole = verdict_in_pieces(&stream, &[]);
        prop_assert_eq!(verdict_in_pieces(&stream, &cuts), whole);
        prop_assert_eq!(verdict_in_pieces(&stream, &bytewise), whole);
    }

    #[test]
    fn no_bytes_make_it_panic(stream in prop::collection::vec(any::<u8>(), 0..300), cut in any::<prop::sample::Index>()) {
        let cut = cut.index(stream.len() + 1);
        prop_assert_eq!(verdict_in_pieces(&stream, &[cut]), verdict_in_pieces(&stream, &[]));
    }

    #[test]
    fn hyper_sees_the_same_requests((stream, requests) in pipeline()) {
        let (targets, content) = targets_for_hyper(&stream);
        prop_assert!(content);
        prop_assert_eq!(targets.len() as u64, requests);
        prop_assert_eq!(targets, targets_for_guard(&stream).0);
    }

    /// What the guard lets through has one reading: hyper finds no other requests in it. It
    /// may find fewer, where it refuses what the guard leaves to it, or closes.
    #[test]
    fn hyper_reads_what_is_let_through_the_same_way(stream in mutated()) {
        let mut guard = HeadGuard::new();
        let handed_on = match guard.feed(&stream) {
            Ok(()) => &stream[..],
            Err(refused) => &stream[..refused.deliverable],
        };
        let (hyper, content) = targets_for_hyper(handed_on);
        let (guarded, violation) = targets_for_guard(&stream);
        prop_assert!(guarded.starts_with(&hyper), "hyper {:?}, guard {:?}", hyper, guarded);
        if content && violation.is_none() && guard.phase() == Phase::Idle && !stream.windows(3).any(|w| w == b"1.0") {
            prop_assert_eq!(hyper.len(), guarded.len());
        }
    }
}
