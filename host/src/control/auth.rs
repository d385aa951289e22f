//! Who calls, and what they may do.
//!
//! A bearer token is `insula_` and 64 hex digits of 32 random bytes; only its SHA-256 is stored.
//! Every request asks the store, so that a revoked token ends at once.

use std::cell::Cell;

use http::HeaderMap;
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use subtle::ConstantTimeEq;
use tokio::time::Instant;

use super::Control;
use super::changes::Actor;
use super::problem::{Code, Problem};
use crate::state::{Access, NewToken, Scope, Store, StoreError, Timestamp, TokenHash};

/// What a token's secret begins with, so that scanners of leaked secrets know it.
const PREFIX: &str = "insula_";
/// Failed attempts that are answered 401 before 429 takes over…
const FAILURES_BURST: f64 = 20.0;
/// …and how many more each second.
const FAILURES_PER_SECOND: f64 = 5.0;

/// What a route asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing, not even a token.
    Public,
    /// Nothing where only this machine can ask, else a token of the host: it names every tenant.
    PublicOnLoopback,
    /// A token of any scope; the handler shows only what that scope may see.
    Any(Access),
    /// A token of the host, or of the tenant in the path.
    Tenant(Access),
    /// A token of the host.
    Host(Access),
}

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) token: u64,
    pub(crate) name: String,
    pub(crate) scope: Scope,
    pub(crate) access: Access,
}

/// A token bucket of failed attempts. It never holds back a valid token: it bounds what the host
/// says to guessers, who have 2^256 guesses to make.
#[derive(Debug)]
pub(crate) struct FailureLimit {
    left: Cell<f64>,
    at: Cell<Instant>,
}

impl Default for FailureLimit {
    fn default() -> Self {
        Self {
            left: Cell::new(FAILURES_BURST),
            at: Cell::new(Instant::now()),
        }
    }
}

impl FailureLimit {
    /// Counts a failure and gives its answer.
    fn failed(&self, detail: &str) -> Problem {
        let now = Instant::now();
        let passed = now.duration_since(self.at.replace(now)).as_secs_f64();
        let left = (self.left.get() + passed * FAILURES_PER_SECOND).min(FAILURES_BURST);
        if left < 1.0 {
            self.left.set(left);
            return Problem::new(Code::AuthRateLimited, "try again with a valid token")
                .retry_after(1);
        }
        self.left.set(left - 1.0);
        Problem::new(Code::Unauthorized, detail)
    }
}

/// The hash under which a secret is stored.
pub(crate) fn hash(secret: &str) -> TokenHash {
    super::sha256(secret.as_bytes())
}

/// Makes a secret.
pub(crate) fn new_secret() -> std::io::Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{PREFIX}{hex}"))
}

/// Finds out who calls.
pub(crate) async fn authenticate(
    control: &Control,
    headers: &HeaderMap,
) -> Result<Caller, Problem> {
    const HOW: &str = "send Authorization: Bearer <token>; the first token is in \
        <data>/admin.token on the host";
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(control.failures.failed(HOW));
    };
    let secret = value.to_str().ok().and_then(|value| {
        let (scheme, secret) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
    });
    let Some(hash) = secret.map(hash) else {
        return Err(control.failures.failed(HOW));
    };
    let found = control
        .store(move |store| store.token_by_hash(&hash))
        .await?;
    let valid = found.filter(|token| {
        let same = bool::from(token.hash.ct_eq(&hash));
        same && token.expires.is_none_or(|at| at > Timestamp::now())
    });
    match valid {
        Some(token) => Ok(Caller {
            token: token.id,
            name: token.name,
            scope: token.scope,
            access: token.access,
        }),
        None => Err(control
            .failures
            .failed("the token is not valid, or no longer")),
    }
}

/// How often an answer that goes on looks whether its token is still valid.
const RECHECK: std::time::Duration = std::time::Duration::from_millis(500);

/// Waits until a token is deleted or expires.
pub(crate) async fn until_invalid(control: &Control, token: u64) {
    loop {
        tokio::time::sleep(RECHECK).await;
        let now = Timestamp::now();
        let valid = control.store(move |store| store.token_is_valid(token, now));
        // A store that cannot be read says nothing about the token.
        if matches!(valid.await, Ok(false)) {
            return;
        }
    }
}

/// Whether a caller may use a route. A tenant's token is answered as if other tenants did not
/// exist.
pub(crate) fn authorize(
    caller: &Caller,
    need: Need,
    tenant: Option<&insula_types::TenantName>,
) -> Result<(), Problem> {
    let access = match need {
        Need::Public => return Ok(()),
        Need::PublicOnLoopback => Access::Read,
        Need::Any(access) | Need::Tenant(access) | Need::Host(access) => access,
    };
    if let Scope::Tenant(_, own) = &caller.scope
        && tenant.is_some_and(|asked| asked != own)
    {
        return Err(Problem::not_found("tenant"));
    }
    let of_host = matches!(need, Need::Host(_) | Need::PublicOnLoopback);
    if of_host && matches!(caller.scope, Scope::Tenant(..)) {
        return Err(Problem::new(
            Code::Forbidden,
            "this needs a token of the host",
        ));
    }
    if caller.access < access {
        return Err(Problem::new(Code::Forbidden, "this token may only read"));
    }
    Ok(())
}

/// Refuses what a page of another web site makes a browser send. `Origin` is let through where it
/// is the admin API's own address, written as an address (a name could be rebound).
pub(crate) fn check_origin(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(origin) = headers.get(ORIGIN) else {
        return Ok(());
    };
    let own = headers
        .get(HOST)
        .and_then(|host| host.to_str().ok())
        .filter(|host| {
            let name = host.rsplit_once(':').map_or(*host, |(name, _)| name);
            name == "localhost"
                || name
                    .trim_matches(['[', ']'])
                    .parse::<std::net::IpAddr>()
                    .is_ok()
        });
    let same = own.is_some_and(|own| {
        origin
            .to_str()
            .ok()
            .and_then(|origin| origin.split_once("://"))
            .is_some_and(|(_, authority)| authority == own)
    });
    if same {
        Ok(())
    } else {
        Err(Problem::new(
            Code::ForeignOrigin,
            "the admin API is not for web pages",
        ))
    }
}

/// The file with the first token.
pub(crate) const ADMIN_TOKEN: &str = "admin.token";

/// Why there is no administrator's token.
#[derive(Debug, thiserror::Error)]
pub enum AdminTokenError {
    /// The file cannot be written, or there is no randomness.
    #[error("the administrator's token cannot be written: {0}")]
    File(#[from] std::io::Error),
    /// Its hash cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes the administrator's token when nobody can administer the host, or when its file is gone
/// (which is how a lost one is replaced: delete the file and restart). The file comes first: a
/// crash before the hash is stored makes the next start write another.
pub(crate) fn ensure_admin_token(
    data: &crate::state::DataDir,
    store: &mut dyn Store,
    now: Timestamp,
) -> Result<(), AdminTokenError> {
    if store.has_admin_token(now)? && data.read(ADMIN_TOKEN)?.is_some() {
        return Ok(());
    }
    let secret = new_secret()?;
    data.write_secret(ADMIN_TOKEN, format!("{secret}\n").as_bytes())?;
    let token = NewToken {
        hash: hash(&secret),
        name: "admin".to_owned(),
        tenant: None,
        access: Access::Write,
        expires: None,
    };
    store.in_one(|store| {
        let token = store.add_token(&token, now)?;
        let after = super::documents::token(&token);
        let audit = Actor::host("makeAdminToken").token(token.id, None, None, Some(after));
        store.audit(&audit, now)
    })?;
    tracing::info!(file = ADMIN_TOKEN, "made an administrator's token");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn origins() {
        let allowed = |host: &'static str, origin: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static(host));
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
            check_origin(&headers).is_ok()
        };
        assert!(allowed("127.0.0.1:8081", "http://127.0.0.1:8081"));
        assert!(allowed("localhost:8081", "http://localhost:8081"));
        assert!(allowed("[::1]:8081", "http://[::1]:8081"));
        assert!(!allowed("127.0.0.1:8081", "http://evil.example"));
        assert!(!allowed("127.0.0.1:8081", "null"));
        assert!(
            !allowed("evil.example:8081", "http://evil.example:8081"),
            "a rebound name"
        );
        assert!(check_origin(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn scopes() {
        let caller = |scope, access| Caller {
            token: 1,
            name: "t".to_owned(),
            scope,
            access,
        };
        let tenant = || Scope::Tenant(insula_types::TenantId::new(1), "a".parse().unwrap());
        let (own, other) = ("a".parse().unwrap(), "b".parse().unwrap());
        let code = |caller: &Caller, need, tenant| {
            authorize(caller, need, tenant)
                .err()
                .map(|problem| problem.code())
        };
        let writer = caller(tenant(), Access::Write);
        assert_eq!(code(&writer, Need::Tenant(Access::Write), Some(&own)), None);
        assert_eq!(
            code(&writer, Need::Tenant(Access::Read), Some(&other)),
            Some(Code::NotFound)
        );
        assert_eq!(
            code(&writer, Need::Host(Access::Write), Some(&own)),
            Some(Code::Forbidden)
        );
        assert_eq!(
            code(&writer, Need::Host(Access::Write), Some(&other)),
            Some(Code::NotFound)
        );
        let reader = caller(Scope::Host, Access::Read);
        assert_eq!(code(&reader, Need::Host(Access::Read), None), None);
        assert_eq!(
            code(&reader, Need::Host(Access::Write), None),
            Some(Code::Forbidden)
        );
    }
}
