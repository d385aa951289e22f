//! Loops forever while it is instantiated, before the handler can be entered: a
//! host that meters only the call never gets that far. Expected: `out_of_fuel`
//! or `timeout`.

use std::hint::black_box;

use wasip2::http::types::{Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};

/// The component's instantiation calls what its module exports under this name
/// (WASI application ABI, "Reactors"; `wasm-component-ld` makes it so).
#[cfg(target_os = "wasi")]
#[unsafe(export_name = "_initialize")]
extern "C" fn initialize() {
    endless();
}

#[cfg_attr(
    not(target_os = "wasi"),
    allow(dead_code, reason = "natively there is nothing that would call it")
)]
fn endless() -> ! {
    let mut n = 0_u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(_: IncomingRequest, to: ResponseOutparam) {
        ResponseOutparam::set(to, Ok(OutgoingResponse::new(Fields::new())));
    }
}

wasip2::http::proxy::export!(Component);
