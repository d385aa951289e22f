//! Sleeps in a host call while it is instantiated: no fuel is burned, and the
//! handler is never entered. Expected: `timeout`.

use wasip2::clocks::monotonic_clock;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};

/// 292 years.
const WAIT_NS: u64 = 1 << 63;

/// The component's instantiation calls what its module exports under this name
/// (WASI application ABI, "Reactors"; `wasm-component-ld` makes it so).
#[cfg(target_os = "wasi")]
#[unsafe(export_name = "_initialize")]
extern "C" fn initialize() {
    sleep();
}

#[cfg_attr(
    not(target_os = "wasi"),
    allow(dead_code, reason = "natively there is nothing that would call it")
)]
fn sleep() {
    monotonic_clock::subscribe_duration(WAIT_NS).block();
}

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, to: ResponseOutparam) {
        ResponseOutparam::set(to, Ok(OutgoingResponse::new(Fields::new())));
    }
}

wasip2::http::proxy::export!(Component);
