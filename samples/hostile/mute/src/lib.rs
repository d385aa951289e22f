//! Never answers, and burns no fuel: it waits for a clock in a host call, where
//! neither fuel nor epochs bound it. Expected: `timeout`.

#![forbid(unsafe_code)]

use wasip2::clocks::monotonic_clock;
use wasip2::http::types::{IncomingRequest, ResponseOutparam};

/// 292 years.
const WAIT_NS: u64 = 1 << 63;

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, _: ResponseOutparam) {
        monotonic_clock::subscribe_duration(WAIT_NS).block();
    }
}

wasip2::http::proxy::export!(Component);
