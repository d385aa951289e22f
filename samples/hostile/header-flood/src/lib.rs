//! 100,000 response headers of a kibibyte each. Expected: `bad_response` or
//! `trap`, by the host's limit on the size of fields.

#![forbid(unsafe_code)]

use wasip2::http::types::{Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};

const HEADERS: usize = 100_000;
const VALUE: &[u8] = &[b'x'; 1024];

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, to: ResponseOutparam) {
        let fields = Fields::new();
        for n in 0..HEADERS {
            // Goes on although the host may have had enough.
            let _ = fields.append(&format!("x-flood-{n}"), VALUE);
        }
        ResponseOutparam::set(to, Ok(OutgoingResponse::new(fields)));
    }
}

wasip2::http::proxy::export!(Component);
