//! Calls the host forever: the clock, and 4 KiB of random bytes to copy
//! (`?bytes=N` for another number). What runs in the host burns no fuel, so the
//! fuel stands for a small part of the time. Expected: `timeout` or
//! `out_of_fuel`.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Request, Response};

const RANDOM_BYTES: u64 = 4096;

#[insula_sdk::main]
async fn handle(req: Request) -> Response {
    let bytes = req
        .query("bytes")
        .and_then(|text| text.parse().ok())
        .unwrap_or(RANDOM_BYTES);
    loop {
        black_box(wasip2::clocks::monotonic_clock::now());
        black_box(wasip2::random::random::get_random_bytes(bytes));
    }
}
