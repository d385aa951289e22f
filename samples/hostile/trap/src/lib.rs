//! Traps at once. Expected: `trap`.

#![forbid(unsafe_code)]

use insula_sdk::{Request, Response};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    std::process::abort()
}
