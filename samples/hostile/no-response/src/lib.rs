//! Returns without a response. Expected: `bad_response`.

#![forbid(unsafe_code)]

use wasip2::http::types::{IncomingRequest, ResponseOutparam};

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, _: ResponseOutparam) {}
}

wasip2::http::proxy::export!(Component);
