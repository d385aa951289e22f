//! A body shorter than its `content-length`. Expected: `bad_response`, and the
//! client sees the response cut off.

#![forbid(unsafe_code)]

use wasip2::http::types::{
    Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, to: ResponseOutparam) {
        let fields = Fields::new();
        let _ = fields.append("content-length", b"1000");
        let response = OutgoingResponse::new(fields);
        let Ok(body) = response.body() else { return };
        ResponseOutparam::set(to, Ok(response));
        if let Ok(stream) = body.write() {
            let _ = stream.blocking_write_and_flush(b"short");
        }
        // The host says that it is too short; this guest does not listen.
        let _ = OutgoingBody::finish(body, None);
    }
}

wasip2::http::proxy::export!(Component);
