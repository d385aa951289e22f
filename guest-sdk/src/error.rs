//! What a handler fails with.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;

use http::StatusCode;

use crate::{IntoResponse, Response, log};

/// What handlers and bodies return.
pub type Result<T = Response, E = Error> = std::result::Result<T, E>;

/// A failure that becomes a response.
///
/// Any [`std::error::Error`] turns into one by `?`: the client gets a 500 with a
/// generic body, the log gets the whole chain of causes. What the client shall
/// read is said with [`Error::new`].
///
/// ```
/// use insula_sdk::{Error, Request, Result, StatusCode};
///
/// async fn handle(req: Request) -> Result<String> {
///     let n: u32 = req
///         .query("n")
///         .ok_or_else(|| Error::bad_request("n is missing"))?
///         .parse()?; // not a number: a 500, and a line in the log
///     Ok(format!("{}\n", u64::from(n) * 2))
/// }
/// # use insula_sdk::test::{call, run};
/// # assert_eq!(run(call(handle, Request::get("/?n=2"))).status(), StatusCode::OK);
/// # assert_eq!(run(call(handle, Request::get("/"))).status(), StatusCode::BAD_REQUEST);
/// # assert_eq!(run(call(handle, Request::get("/?n=x"))).status(), StatusCode::INTERNAL_SERVER_ERROR);
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    status: StatusCode,
    /// For the client. `None` says the status's own phrase.
    public: Option<Cow<'static, str>>,
    /// For the log.
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A response with this status and this text, which the client reads.
    pub fn new(status: StatusCode, public: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            status,
            public: Some(public.into()),
            source: None,
        }))
    }

    /// A 500 whose text goes to the log only.
    pub fn internal(private: impl Into<String>) -> Self {
        Self::from_source(private.into().into())
    }

    /// 400, and what was wrong with the request.
    pub fn bad_request(public: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, public)
    }

    /// 404.
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not found")
    }

    /// The status that the client gets.
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// Adds the cause, for the log.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    fn from_source(source: Box<dyn StdError + Send + Sync>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self(Box::new(Inner {
            status,
            public: None,
            source: Some(source),
        }))
    }

    fn public(&self) -> &str {
        match &self.0.public {
            Some(text) => text,
            None => self.0.status.canonical_reason().unwrap_or("error"),
        }
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Error {
    fn from(error: E) -> Self {
        Self::from_source(Box::new(error))
    }
}

impl From<Error> for Box<dyn StdError + Send + Sync> {
    fn from(error: Error) -> Self {
        error.to_string().into()
    }
}

/// The text for the log: what the client reads, then the chain of causes.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = false;
        if let Some(text) = &self.0.public {
            f.write_str(text)?;
            before = true;
        }
        let mut next: Option<&dyn StdError> = self.0.source.as_deref().map(|source| source as _);
        while let Some(cause) = next {
            if before {
                f.write_str(": ")?;
            }
            write!(f, "{cause}")?;
            before = true;
            next = cause.source();
        }
        if before {
            Ok(())
        } else {
            f.write_str(self.public())
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({self})", self.0.status.as_u16())
    }
}

impl IntoResponse for Error {
    /// Logs what is the guest's own fault.
    fn into_response(self) -> Response {
        if self.0.status.is_server_error() {
            log::error!("request failed: {self}", status = self.0.status.as_u16());
        }
        Response::text(format!("{}\n", self.public())).with_status(self.0.status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_reads_all_and_the_client_only_what_is_meant_for_it() {
        let cause = "x".parse::<u8>().unwrap_err();
        let error = Error::from(cause);
        assert_eq!(error.to_string(), "invalid digit found in string");
        assert_eq!(error.public(), "Internal Server Error");
        let error = Error::bad_request("n is no number").with_source("because of x");
        assert_eq!(error.to_string(), "n is no number: because of x");
        assert_eq!(error.public(), "n is no number");
    }
}
