//! Allocates and touches memory until it gets no more, and then aborts.
//! Expected: `out_of_memory`.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Request, Response};

const BLOCK_BYTES: usize = 1024 * 1024;

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    let mut blocks = Vec::new();
    loop {
        blocks.push(black_box(vec![0xA5_u8; BLOCK_BYTES]));
    }
}
