//! Recurses until the stack is full. Expected: `trap`.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Request, Response};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    Response::text(format!("{}\n", depth(black_box(0))))
}

/// No tail call: the sum is made after the return.
#[inline(never)]
fn depth(n: u64) -> u64 {
    if n == u64::MAX {
        0
    } else {
        depth(black_box(n + 1)).wrapping_add(n)
    }
}
