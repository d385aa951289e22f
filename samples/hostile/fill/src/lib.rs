//! Fills 64 MiB (`?mib=N` for another size) again and again, each time in one
//! `memory.fill`, inside which nothing can preempt it: a slice cannot be shorter
//! than that. Expected: `out_of_memory` where the limit is smaller, else
//! `timeout` or `out_of_fuel`, and no other tenant waits for it.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Request, Response};

const MIB: usize = 1024 * 1024;

#[insula_sdk::main]
async fn handle(req: Request) -> Response {
    let mib = req
        .query("mib")
        .and_then(|text| text.parse().ok())
        .unwrap_or(64);
    let mut block = vec![0_u8; mib * MIB];
    let mut value = 0_u8;
    loop {
        value = value.wrapping_add(1);
        black_box(&mut block).fill(value);
    }
}
