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
//! What a handler [fetches](crate::fetch()) is answered by [`answer_fetches`]. Bodies are in memory, [`usage`](crate::usage()) is zero, the log goes to
//! stderr. This module is not there when a guest is built.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;

use crate::{IntoResponse, Request, Response, handler, rt};

type Answer = Pin<Box<dyn Future<Output = Response>>>;
type Answers = Rc<dyn Fn(Request) -> Answer>;

thread_local! {
    static ANSWERS: RefCell<Option<Answers>> = const { RefCell::new(None) };
}

/// From now on, and on this thread, what is fetched is answered by this function.
///
/// ```
/// use insula_sdk::test::{answer_fetches, call, run};
/// use insula_sdk::{Request, Response, Result};
///
/// async fn handle(_: Request) -> Result<Response> {
///     let mut answer = insula_sdk::fetch(Request::get("https://api.example.com/motto")).await?;
///     Ok(Response::text(answer.body_mut().text().await?.to_uppercase()))
/// }
///
/// answer_fetches(|req: Request| async move { Response::text(req.uri().path().to_owned()) });
/// let mut response = run(call(handle, Request::get("/")));
/// assert_eq!(run(response.body_mut().text()).unwrap(), "/MOTTO");
/// ```
pub fn answer_fetches<H, F>(handler: H)
where
    H: Fn(Request) -> F + 'static,
    F: Future<Output: IntoResponse> + 'static,
{
    let answer = move |request| {
        let response = handler(request);
        let answer: Answer = Box::pin(async move { response.await.into_response() });
        answer
    };
    ANSWERS.set(Some(Rc::new(answer)));
}

/// The answer to a request that was sent here.
pub(crate) async fn fetched(request: Request) -> Option<Response> {
    let answers = ANSWERS.with_borrow(Clone::clone)?;
    Some(answers(request).await)
}

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
