//! Calling a handler without a host, in a plain `cargo test`.
//!
//! ```
//! use insula_sdk::test::{call, run};
//! use insula_sdk::{Request, Response, Result, StatusCode};
//!
//! async fn shout(mut req: Request) -> Result<Response> {
//!     Ok(Response::text(req.text().await?.to_uppercase()))
//! }
//!
//! run(async {
//!     let mut response = call(shout, Request::post("/", "quiet")).await;
//!     assert_eq!(response.status(), StatusCode::OK);
//!     assert_eq!(response.body_mut().text().await.unwrap(), "QUIET");
//! });
//! ```
//!
//! Bodies are in memory, [`usage`](crate::usage()) is zero, the log goes to
//! stderr. This module is not there when a guest is built.

use crate::{IntoResponse, Request, Response, handler, rt};

/// Calls a handler as the host does: an error becomes its response. What panics,
/// panics.
pub async fn call<H, A, F>(handler: H, request: impl Into<Request>) -> Response
where
    H: FnOnce(A) -> F,
    A: From<Request>,
    F: Future<Output: IntoResponse>,
{
    handler::respond(handler, request.into()).await
}

/// Runs a future to its end on this thread.
pub fn run<F: Future>(future: F) -> F::Output {
    match rt::block_on(future) {
        Ok(output) => output,
        Err(rt::Stalled) => panic!("the future waits for nothing"),
    }
}
