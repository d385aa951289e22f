//! Writes lines to both of its log streams forever, as fast as the host takes
//! them. Expected: `timeout` or `out_of_fuel`; the log keeps a bounded number of
//! lines and says how many were dropped.

#![forbid(unsafe_code)]

use insula_sdk::{Request, Response};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    for n in 0_u64.. {
        println!("line {n} of a flood, and nobody will ever read what it says");
        eprintln!("line {n} of another flood");
    }
    Response::text("not reached\n")
}
