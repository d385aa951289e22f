//! Where the guests of a service may send HTTP requests to.
//!
//! A rule is written `https://api.example.com`: a scheme, a host and, where it is not the scheme's
//! own, a port. `https://*.example.com` stands for every name below `example.com`, at any depth, and
//! not for `example.com` itself. A bare `*` is no rule: whoever may reach everything says so name by
//! name, or is not restricted by a list at all.
//!
//! There is one written form of a host, and comparing is comparing that: lower case, no final dot,
//! IDNs in their ASCII form (`xn--…`), IPv4 as four decimal numbers, IPv6 in brackets. What other
//! programs read as an address in some other way (`127.1`, `0x7f000001`, `017700000001`) is neither
//! a name nor an address here and is refused.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::spec::is_host_name;

/// Most rules of one service.
pub const OUTBOUND_MAX: usize = 64;
/// Longest rule, or authority, that is looked at: a host name has 253 characters.
const TEXT_MAX: usize = 300;

/// How to speak to a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutboundScheme {
    /// In the clear.
    Http,
    /// Over TLS.
    Https,
}

impl OutboundScheme {
    /// The word before `://`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// The port where none is named (RFC 9110, 4.2.1 and 4.2.2).
    #[must_use]
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A host in its one written form.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutboundHost {
    /// To be resolved.
    Name(String),
    /// To be connected to.
    Address(IpAddr),
}

impl fmt::Display for OutboundHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// Why a text names no destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutboundError {
    /// Neither `http://` nor `https://`.
    #[error("{0:?} begins with neither http:// nor https://")]
    Scheme(String),
    /// More than a scheme, a host and a port.
    #[error("{0:?} has more than a scheme, a host and a port")]
    More(String),
    /// No host name and no address in its usual form.
    #[error(
        "{0:?} is neither a host name (IDNs as xn--…) nor an address in its usual form ([::1], 192.0.2.1)"
    )]
    Host(String),
    /// A `*` that is not the whole of the first label, or with fewer than two labels after it.
    #[error("{0:?}: a * stands for the names below a domain, as in https://*.example.com")]
    Wildcard(String),
    /// No port.
    #[error("{0:?} is not a port")]
    Port(String),
    /// A port of something that is not HTTP.
    #[error("port {0} is not for HTTP: of those below 1024, 80 and 443 are")]
    ReservedPort(u16),
}

/// What a text shows of itself in an error: never more than a line.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Where one request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    scheme: OutboundScheme,
    host: OutboundHost,
    port: u16,
}

impl Destination {
    /// The destination of a request with this scheme and this authority.
    ///
    /// # Errors
    /// [`OutboundError`] when the authority is not one host and perhaps a port.
    pub fn new(scheme: OutboundScheme, authority: &str) -> Result<Self, OutboundError> {
        let (host, port) = split(authority)?;
        Ok(Self {
            scheme,
            host: host_of(host)?,
            port: port.unwrap_or(scheme.default_port()),
        })
    }

    /// How to speak to it.
    #[must_use]
    pub const fn scheme(&self) -> OutboundScheme {
        self.scheme
    }

    /// Its host.
    #[must_use]
    pub const fn host(&self) -> &OutboundHost {
        &self.host
    }

    /// Its port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Host and port as they stand in `Host` (RFC 9110, 7.2): without the scheme's own port.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.port == self.scheme.default_port() {
            self.host.to_string()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Which hosts a rule is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Hosts {
    Exactly(OutboundHost),
    /// Names that end in this, which begins with a dot.
    Below(String),
}

/// One entry of a service's `outbound`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OutboundRule {
    scheme: OutboundScheme,
    hosts: Hosts,
    port: u16,
}

impl OutboundRule {
    /// Whether a request may go there by this rule.
    #[must_use]
    pub fn allows(&self, to: &Destination) -> bool {
        let host = match (&self.hosts, &to.host) {
            (Hosts::Exactly(host), other) => host == other,
            (Hosts::Below(domain), OutboundHost::Name(name)) => name.ends_with(domain.as_str()),
            (Hosts::Below(_), OutboundHost::Address(_)) => false,
        };
        host && self.scheme == to.scheme && self.port == to.port
    }
}

impl FromStr for OutboundRule {
    type Err = OutboundError;

    fn from_str(text: &str) -> Result<Self, OutboundError> {
        let (scheme, authority) = if let Some(rest) = text.strip_prefix("https://") {
            (OutboundScheme::Https, rest)
        } else if let Some(rest) = text.strip_prefix("http://") {
            (OutboundScheme::Http, rest)
        } else {
            return Err(OutboundError::Scheme(shown(text)));
        };
        let (host, port) = split(authority)?;
        let port = port.unwrap_or(scheme.default_port());
        if port < 1024 && port != 80 && port != 443 {
            return Err(OutboundError::ReservedPort(port));
        }
        let hosts = match host.strip_prefix("*.") {
            None if host.contains('*') => return Err(OutboundError::Wildcard(shown(text))),
            None => Hosts::Exactly(host_of(host)?),
            Some(domain) => match host_of(domain)? {
                OutboundHost::Name(name) if name.contains('.') => Hosts::Below(format!(".{name}")),
                _ => return Err(OutboundError::Wildcard(shown(text))),
            },
        };
        Ok(Self {
            scheme,
            hosts,
            port,
        })
    }
}

impl TryFrom<String> for OutboundRule {
    type Error = OutboundError;

    fn try_from(text: String) -> Result<Self, OutboundError> {
        text.parse()
    }
}

impl fmt::Display for OutboundRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme.as_str())?;
        match &self.hosts {
            Hosts::Exactly(host) => write!(f, "{host}")?,
            Hosts::Below(domain) => write!(f, "*{domain}")?,
        }
        if self.port == self.scheme.default_port() {
            Ok(())
        } else {
            write!(f, ":{}", self.port)
        }
    }
}

impl From<OutboundRule> for String {
    fn from(rule: OutboundRule) -> Self {
        rule.to_string()
    }
}

/// Host and port of an authority that has nothing else: no userinfo, no path, no empty port.
fn split(authority: &str) -> Result<(&str, Option<u16>), OutboundError> {
    let host_error = || OutboundError::Host(shown(authority));
    if authority.is_empty() || authority.len() > TEXT_MAX {
        return Err(host_error());
    }
    if authority.contains(['/', '\\', '?', '#', '@']) {
        return Err(OutboundError::More(shown(authority)));
    }
    let end = match (authority.starts_with('['), authority.find(']')) {
        (true, Some(end)) => end + 1,
        (true, None) => return Err(host_error()),
        (false, _) => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, rest) = authority.split_at(end);
    let Some(port) = rest.strip_prefix(':') else {
        return if rest.is_empty() {
            Ok((host, None))
        } else {
            Err(host_error())
        };
    };
    let number = port.parse::<u16>().ok().filter(|number| {
        // No sign, no leading zero.
        *number > 0 && number.to_string() == port
    });
    let number = number.ok_or_else(|| OutboundError::Port(shown(port)))?;
    Ok((host, Some(number)))
}

fn host_of(text: &str) -> Result<OutboundHost, OutboundError> {
    let error = || OutboundError::Host(shown(text));
    if let Some(inner) = text.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or_else(error)?;
        let address: Ipv6Addr = inner.parse().map_err(|_| error())?;
        return Ok(OutboundHost::Address(address.into()));
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if let Ok(address) = name.parse::<Ipv4Addr>() {
        return Ok(OutboundHost::Address(address.into()));
    }
    // What ends in a number is an address to a browser and to inet_aton(3), in one of many forms.
    let last = name.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last.strip_prefix("0x");
    let is_number = last.bytes().all(|byte| byte.is_ascii_digit())
        || hexadecimal.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if is_number || !is_host_name(&name) {
        return Err(error());
    }
    Ok(OutboundHost::Name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(scheme: OutboundScheme, authority: &str) -> Destination {
        Destination::new(scheme, authority).unwrap()
    }

    #[test]
    fn rules_have_one_written_form() {
        for (given, canonical) in [
            ("https://api.example.com", "https://api.example.com"),
            ("https://API.Example.com.", "https://api.example.com"),
            ("https://api.example.com:443", "https://api.example.com"),
            (
                "https://api.example.com:8443",
                "https://api.example.com:8443",
            ),
            ("http://example.com:443", "http://example.com:443"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://192.0.2.1", "http://192.0.2.1"),
            ("http://[2001:DB8::1]:8080", "http://[2001:db8::1]:8080"),
            ("https://*.Example.com", "https://*.example.com"),
            (
                "https://xn--bcher-kva.example",
                "https://xn--bcher-kva.example",
            ),
            ("https://a_b.example", "https://a_b.example"),
        ] {
            let rule: OutboundRule = given.parse().unwrap();
            assert_eq!(rule.to_string(), canonical);
            assert_eq!(canonical.parse::<OutboundRule>(), Ok(rule));
        }
    }

    #[test]
    fn what_is_no_rule() {
        let long = format!("https://{}.example", "a".repeat(64));
        let longer = format!("https://{}", "a.".repeat(127) + "a");
        for bad in [
            "",
            "*",
            "https://",
            "https://*",
            "https://*.com",
            "https://*.1.2",
            "https://a.*.example.com",
            "https://a*.example.com",
            "https://*example.com",
            "https://*.*.example.com",
            "api.example.com",
            "ftp://example.com",
            "HTTPS://example.com",
            "https:example.com",
            "https://example.com/",
            "https://example.com/v1",
            "https://example.com?q",
            "https://example.com#f",
            "https://user@example.com",
            "https://user:password@example.com",
            "https://example.com\\@evil.example",
            "https://example.com:",
            "https://example.com:0",
            "https://example.com:+80",
            "https://example.com:0443",
            "https://example.com:65536",
            "https://example.com:22",
            "https://example.com:25",
            "https://example..com",
            "https://.example.com",
            "https://example.com..",
            "https://exa mple.com",
            "https://b\u{fc}cher.example",
            "https://example.com\0",
            "https://example.com\n",
            "http://127.1",
            "http://2130706433",
            "http://0x7f000001",
            "http://0x7f.1",
            "http://017700000001",
            "http://0177.0.0.1",
            "http://127.0.0.01",
            "http://1.2.3.4.5",
            "http://example.0x1f",
            "http://::1",
            "http://[::1",
            "http://[::1]x",
            "http://[fe80::1%eth0]",
            "http://[127.0.0.1]",
            &long,
            &longer,
        ] {
            assert!(bad.parse::<OutboundRule>().is_err(), "{bad:?}");
        }
        assert!(
            format!("https://{}", "a.".repeat(126) + "a")
                .parse::<OutboundRule>()
                .is_ok()
        );
    }

    #[test]
    fn a_rule_allows_what_it_names_and_nothing_else() {
        use OutboundScheme::{Http, Https};
        let rule = |text: &str| text.parse::<OutboundRule>().unwrap();
        let exact = rule("https://api.example.com");
        assert!(exact.allows(&to(Https, "api.example.com")));
        assert!(exact.allows(&to(Https, "API.EXAMPLE.COM.:443")));
        for (scheme, other) in [
            (Http, "api.example.com"),
            (Http, "api.example.com:443"),
            (Https, "api.example.com:8443"),
            (Https, "example.com"),
            (Https, "x.api.example.com"),
            (Https, "api.example.com.evil.example"),
            (Https, "xapi.example.com"),
            (Https, "127.0.0.1"),
        ] {
            assert!(!exact.allows(&to(scheme, other)), "{other}");
        }
        let below = rule("https://*.example.com");
        assert!(below.allows(&to(Https, "a.example.com")));
        assert!(below.allows(&to(Https, "a.b.example.com")));
        for other in [
            "example.com",
            "evilexample.com",
            "a.example.com.evil",
            "192.0.2.1",
        ] {
            assert!(!below.allows(&to(Https, other)), "{other}");
        }
        assert!(rule("http://192.0.2.1").allows(&to(Http, "192.0.2.1")));
        assert!(
            rule("http://[::1]:81".replace("81", "8081").as_str())
                .allows(&to(Http, "[0:0::1]:8081"))
        );
        // The same place to the kernel, another one to a reader.
        assert!(!rule("http://192.0.2.1").allows(&to(Http, "[::ffff:192.0.2.1]")));
    }

    #[test]
    fn authorities_of_requests() {
        use OutboundScheme::{Http, Https};
        assert_eq!(to(Https, "EXAMPLE.com:443").authority(), "example.com");
        assert_eq!(to(Http, "example.com:443").authority(), "example.com:443");
        assert_eq!(to(Http, "[::1]:8080").authority(), "[::1]:8080");
        for bad in [
            "",
            ":80",
            "a@b",
            "a:b@c",
            "a/b",
            "a\\b",
            "a:80:80",
            "a:",
            "a:99999",
            "a b",
            "127.1",
            "0",
            "[::1%25eth0]",
            "[::1]:",
        ] {
            assert!(Destination::new(Http, bad).is_err(), "{bad:?}");
        }
    }
}
