//! What the host takes out of heads and puts into them.

use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue};

use crate::config::UrlScheme;
use crate::pool::request_id::{RequestId, new_traceparent};

/// Names that belong to one hop (RFC 9110, 7.6.1), in both directions.
static HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    http::header::PROXY_AUTHENTICATE,
    http::header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    http::header::TE,
    http::header::TRANSFER_ENCODING,
    http::header::UPGRADE,
];

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// How many of these a guest's request has that its client may not have sent, and `Host`.
const ADDED: usize = 6;

/// The answer's usage: in the head, or in the trailers of a streamed body.
pub(super) const INSULA_USAGE: HeaderName = HeaderName::from_static("insula-usage");

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // Comparing a few names costs less than looking each of these up, and most heads have none.
    if !headers.keys().any(|name| HOP_BY_HOP.contains(name)) {
        return;
    }
    if let Some(named) = headers.get(CONNECTION) {
        // Names in Connection belong to the hop as well; usually it is only "keep-alive".
        let named = named.clone();
        let names = named.to_str().unwrap_or("").split(',');
        for name in names.filter_map(|name| name.trim().parse::<HeaderName>().ok()) {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Prepares a client's head for the guest: what the client says of proxies is not trusted.
pub(super) fn prepare_request(
    headers: &mut HeaderMap,
    request_id: RequestId,
    client: &HeaderValue,
    (scheme, host): (UrlScheme, &HeaderValue),
) {
    strip_hop_by_hop(headers);
    headers.remove(http::header::FORWARDED);
    headers.reserve(ADDED);
    headers.insert(X_REQUEST_ID, request_id.header());
    headers.insert(FORWARDED_FOR, client.clone());
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(scheme.as_str()));
    headers.insert(FORWARDED_HOST, host.clone());
    if !headers.get(TRACEPARENT).is_some_and(is_traceparent) {
        headers.insert(TRACEPARENT, new_traceparent());
    }
}

/// Prepares a guest's head for the client.
pub(super) fn prepare_response(headers: &mut HeaderMap, request_id: RequestId) {
    strip_hop_by_hop(headers);
    headers.remove(INSULA_USAGE);
    headers.insert(X_REQUEST_ID, request_id.header());
}

pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// `version-traceid-parentid-flags` (W3C Trace Context, 3.2): 2, 32, 16 and 2 lower-case hex
/// digits, neither id all zero.
fn is_traceparent(value: &HeaderValue) -> bool {
    let hex = |part: &[u8], length: usize| {
        part.len() == length && part.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
    };
    let id = |part: &[u8], length| hex(part, length) && part.iter().any(|c| *c != b'0');
    let mut parts = value.as_bytes().split(|c| *c == b'-');
    let mut next = || parts.next().unwrap_or(b"");
    let (version, trace, parent, flags) = (next(), next(), next(), next());
    hex(version, 2) && version != b"ff" && id(trace, 32) && id(parent, 16) && hex(flags, 2)
}

/// Bytes of a head on the wire, but for the first line: each header takes its name, its value,
/// a colon, a space and the line's end.
pub(super) fn head_bytes(headers: &HeaderMap) -> u64 {
    let bytes: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    bytes as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_speak_for_the_host() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("x-forwarded-for", "6.6.6.6"),
            ("x-forwarded-host", "evil"),
            ("forwarded", "for=6.6.6.6"),
            ("x-request-id", "mine"),
            ("connection", "keep-alive, x-secret"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("accept", "*/*"),
        ] {
            set(&mut headers, name.parse().unwrap(), value);
        }
        let id = RequestId::new();
        let client = HeaderValue::from_static("127.0.0.1");
        let host = HeaderValue::from_static("a.b.localhost");
        prepare_request(&mut headers, id, &client, (UrlScheme::Https, &host));
        assert_eq!(headers["x-forwarded-for"], "127.0.0.1");
        assert_eq!(headers["x-forwarded-host"], "a.b.localhost");
        assert_eq!(headers["x-forwarded-proto"], "https");
        assert_eq!(headers["x-request-id"], id.as_str());
        assert_eq!(headers["accept"], "*/*");
        for gone in ["forwarded", "connection", "x-secret", "te"] {
            assert!(!headers.contains_key(gone), "{gone}");
        }
        assert!(is_traceparent(&headers["traceparent"]));
    }

    #[test]
    fn traceparents_are_kept_only_when_valid() {
        let valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (text, expected) in [
            (valid, true),
            (
                "00-00000000000000000000000000000000-b7ad6b7169203331-01",
                false,
            ),
            (
                "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                false,
            ),
            (
                "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                false,
            ),
            ("", false),
            ("00-1-2-3", false),
        ] {
            assert_eq!(
                is_traceparent(&HeaderValue::from_static(text)),
                expected,
                "{text}"
            );
        }
    }
}
