//! Write an HTTP workload as one async function, and deploy it on Insula or on
//! any other host of `wasi:http` 0.2.
//!
//! ```
//! use insula_sdk::{Request, Response, Result};
//!
//! #[insula_sdk::main]
//! async fn handle(req: Request) -> Result<Response> {
//!     let name = req.query("name").unwrap_or_else(|| "world".to_owned());
//!     insula_sdk::log::info!("greeting", name = name);
//!     Ok(Response::text(format!("Hello, {name}!\n")))
//! }
//! # use insula_sdk::test;
//! # let mut response = test::run(test::call(handle, Request::get("/?name=you")));
//! # assert_eq!(test::run(response.body_mut().text()).unwrap(), "Hello, you!\n");
//! ```
//!
//! The package needs `crate-type = ["cdylib"]`; `insula build` does the rest.
//! Natively the same handler is an ordinary function: [`test::call`] calls it in
//! a plain `cargo test`, without a host.
//!
//! | for | see |
//! |---|---|
//! | what comes in and goes out | [`Request`], [`Response`], [`Body`], [`IntoResponse`] |
//! | failing | [`Error`], [`Result`] |
//! | streaming | [`Body::chunk`], [`Response::stream`], [`Writer`] |
//! | the service's environment | [`mod@env`] |
//! | structured logging | [`mod@log`] |
//! | asking other servers | [`fetch()`] |
//! | waiting | [`mod@time`], and any combinator of the `futures` crates |
//! | keys and values that outlive a request | [`store`] |
//! | what the request has cost so far | [`usage()`] |
//!
//! [`Request`] and [`Response`] are thin: they dereference to, and convert from
//! and to, [`http::Request<Body>`] and [`http::Response<Body>`]; a handler may
//! take and return those instead. [`Body`] is an [`http_body::Body`].
//!
//! *Invariant:* a guest imports nothing beyond `wasi:*` unless it calls
//! [`usage()`].

#![deny(unsafe_code)]

mod body;
mod error;
mod fetch;
mod handler;
mod request;
mod response;
mod rt;
mod usage;
mod writer;

pub mod env;
pub mod log;
pub mod store;
#[cfg(not(target_os = "wasi"))]
pub mod test;
pub mod time;

#[cfg(target_os = "wasi")]
mod guest;
#[cfg(target_os = "wasi")]
mod outgoing;

pub use body::Body;
pub use error::{Error, Result};
pub use fetch::{FetchError, fetch};
pub use handler::IntoResponse;
pub use request::Request;
pub use response::Response;
pub use usage::{Usage, usage};
pub use writer::Writer;

pub use bytes::Bytes;
pub use http;
pub use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};

/// Makes an async function the component's handler: its
/// `wasi:http/incoming-handler` export.
///
/// The function takes a [`Request`] (or an [`http::Request<Body>`]) and returns
/// anything that is [`IntoResponse`], usually a [`Result<Response>`]. There is
/// one handler in a component. Natively, the function is left as it is.
///
/// ```
/// use insula_sdk::{Body, http};
///
/// #[insula_sdk::main]
/// async fn handle(req: http::Request<Body>) -> http::Response<Body> {
///     http::Response::new(req.into_body())
/// }
/// ```
pub use insula_sdk_macros::main;

#[doc(hidden)]
pub mod __private {
    pub use crate::handler::check;

    #[cfg(target_os = "wasi")]
    pub use crate::guest::run;
    #[cfg(target_os = "wasi")]
    pub use wasip2;
}

/// What [`main`] expands to beside the function.
#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($handler:ident) => {
        #[cfg(target_os = "wasi")]
        const _: () = {
            struct Component;

            impl $crate::__private::wasip2::exports::http::incoming_handler::Guest for Component {
                fn handle(
                    request: $crate::__private::wasip2::http::types::IncomingRequest,
                    response: $crate::__private::wasip2::http::types::ResponseOutparam,
                ) {
                    $crate::__private::run(request, response, $handler);
                }
            }

            $crate::__private::wasip2::http::proxy::export!(
                Component with_types_in $crate::__private::wasip2
            );
        };
        #[cfg(not(target_os = "wasi"))]
        const _: fn() = || $crate::__private::check($handler);
    };
}
