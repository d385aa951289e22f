//! Loops forever in the handler. Expected: `out_of_fuel` or `timeout`.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Request, Response};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    let mut n = 0_u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}
