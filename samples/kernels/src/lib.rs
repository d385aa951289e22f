//! Seven small computations, to see what metering costs on each. They need
//! nothing but `wasi:*`, so that any host runs the same bytes.
//!
//! | path | does |
//! |---|---|
//! | `/matmul?n=N` | N products of two matrices of 64 × 64 doubles |
//! | `/sort?n=N` | sorts 4,096 numbers, N times |
//! | `/hash?n=N` | hashes 16 KiB, byte by byte, N times |
//! | `/map?n=N` | fills a hash map with 1,024 entries and looks each up, N times |
//! | `/fib?n=N` | the 16th Fibonacci number by calls alone, N times |
//! | `/sieve?n=N` | the primes below 16,384, N times |
//! | `/strings?n=N` | makes, splits, parses and joins text of 256 numbers, N times |
//! | `/endless` | loops forever |
//! | any other | answers at once, as `hello` does |
//!
//! Each answers with a number that depends on all that it computed.

#![forbid(unsafe_code)]

mod kernels;

use std::hint::black_box;

use insula_sdk::{Error, Request, Response, Result};

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let kernel = match req.uri().path() {
        "/matmul" => kernels::matmul,
        "/sort" => kernels::sort,
        "/hash" => kernels::hash,
        "/map" => kernels::map,
        "/fib" => kernels::fib,
        "/sieve" => kernels::sieve,
        "/strings" => kernels::strings,
        "/endless" => endless(),
        _ => return Ok(Response::text("Hello from Insula\n")),
    };
    let rounds: u64 = req
        .query("n")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::bad_request("n must be a number"))?;
    let sum = (0..rounds).fold(0_u64, |sum, round| {
        sum.wrapping_add(kernel(black_box(round)))
    });
    Ok(Response::text(format!("{sum}\n")))
}

fn endless() -> ! {
    let mut n = 0_u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    use super::handle;

    fn get(uri: &str) -> (StatusCode, String) {
        run(async {
            let mut response = call(handle, Request::get(uri)).await;
            (response.status(), response.body_mut().text().await.unwrap())
        })
    }

    #[test]
    fn rounds_are_summed_up() {
        assert_eq!(get("/fib?n=3"), (StatusCode::OK, "2961\n".to_owned()));
        assert_eq!(get("/fib?n=0").1, "0\n");
        assert_eq!(get("/fib").0, StatusCode::BAD_REQUEST);
        assert_eq!(get("/").1, "Hello from Insula\n");
    }
}
