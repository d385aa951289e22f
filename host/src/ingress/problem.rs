//! How a refusal looks: `application/problem+json` (RFC 9457), and nothing of anybody's insides.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use insula_types::Outcome;

use crate::pool::request_id::RequestId;

/// The status for an outcome: the one place where that is decided.
#[must_use]
pub const fn status(outcome: Outcome) -> StatusCode {
    match outcome {
        Outcome::Ok => StatusCode::OK,
        Outcome::Trap | Outcome::OutOfMemory | Outcome::BadResponse => StatusCode::BAD_GATEWAY,
        Outcome::OutOfFuel | Outcome::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Outcome::TenantOverloaded => StatusCode::TOO_MANY_REQUESTS,
        Outcome::HostOverloaded => StatusCode::SERVICE_UNAVAILABLE,
        Outcome::NotFound => StatusCode::NOT_FOUND,
        Outcome::BadRequest => StatusCode::BAD_REQUEST,
        // Nobody is there to see it: the code that nginx made the custom.
        Outcome::Canceled => match StatusCode::from_u16(499) {
            Ok(status) => status,
            Err(_) => StatusCode::BAD_REQUEST,
        },
        Outcome::HostError => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What a client is told.
const fn title(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "OK",
        Outcome::Trap => "The service failed",
        Outcome::OutOfFuel => "The service used up the compute that one request may use",
        Outcome::Timeout => "The service took too long",
        Outcome::OutOfMemory => "The service ran out of memory",
        Outcome::BadResponse => "The service gave no valid answer",
        Outcome::TenantOverloaded => "The service has too many requests; try again later",
        Outcome::HostOverloaded => "The host is busy; try again later",
        Outcome::NotFound => "There is no such service here",
        Outcome::BadRequest => "The request is not acceptable",
        Outcome::Canceled => "The request was cancelled",
        Outcome::HostError => "The host failed",
    }
}

/// RFC 9457, section 3.1, with two members of our own.
#[derive(serde::Serialize)]
struct Body<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    title: &'a str,
    status: u16,
    code: &'a str,
    request_id: &'a str,
}

/// A problem response.
#[must_use]
pub fn problem(outcome: Outcome, request_id: RequestId) -> Response<Bytes> {
    detailed(status(outcome), outcome, title(outcome), request_id)
}

/// The same for a refusal, with the seconds after which the client may try again.
#[must_use]
pub fn overloaded(
    outcome: Outcome,
    request_id: RequestId,
    retry_after: Option<u64>,
) -> Response<Bytes> {
    retry(problem(outcome, request_id), retry_after)
}

/// The same answer, with the seconds after which the client may try again.
#[must_use]
pub fn retry(mut response: Response<Bytes>, after: Option<u64>) -> Response<Bytes> {
    if let Some(seconds) = after {
        let seconds = HeaderValue::from(seconds);
        response.headers_mut().insert(RETRY_AFTER, seconds);
    }
    response
}

/// A problem response with a status and a title of its own.
#[must_use]
pub fn detailed(
    status: StatusCode,
    outcome: Outcome,
    title: &str,
    request_id: RequestId,
) -> Response<Bytes> {
    let body = Body {
        kind: "about:blank",
        title,
        status: status.as_u16(),
        code: outcome.as_str(),
        request_id: request_id.as_str(),
    };
    // Plain strings and a number: nothing of it can fail.
    let body = serde_json::to_vec(&body).unwrap_or_default();
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(super::headers::X_REQUEST_ID, request_id.header());
    response
}
