//! Writes one byte to every page of 48 MiB (`?mib=N` for another size), and
//! answers. A write is a few units of fuel and, on memory that no instance has
//! touched since it was given back, a page fault: a hundred times the time that
//! the fuel stands for. Asked again and again, each time in a fresh instance, it
//! is a storm of faults. Expected: `ok` and the time charged, or `out_of_memory`
//! where the limit is smaller.

#![forbid(unsafe_code)]

use std::hint::black_box;

use insula_sdk::{Error, Request, Response, Result};

const MIB: usize = 1024 * 1024;
/// What the host's kernel maps at a time, smaller than a page of WebAssembly.
const PAGE_BYTES: usize = 4096;

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let mib: usize = match req.query("mib") {
        None => 48,
        Some(text) => text
            .parse()
            .ok()
            .filter(|mib| *mib <= 4096)
            .ok_or_else(|| Error::bad_request("mib must be at most 4096"))?,
    };
    // Not zeroed: that would be one `memory.fill`, and touch all pages at a stroke.
    let mut block: Vec<u8> = Vec::with_capacity(mib * MIB);
    let mut pages = 0_u64;
    for page in block.spare_capacity_mut().chunks_mut(PAGE_BYTES) {
        if let Some(first) = page.first_mut() {
            black_box(first.write(1));
            pages += 1;
        }
    }
    Ok(Response::text(format!("{pages} pages\n")))
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    #[test]
    fn touches_every_page() {
        run(async {
            let mut response = call(super::handle, Request::get("/?mib=2")).await;
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.body_mut().text().await.unwrap(), "512 pages\n");
        });
    }
}
