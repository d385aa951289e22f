//! A body without an end, as fast as the host takes it. Expected: `timeout` or
//! `out_of_fuel`, or `canceled` when the client gives up first.

#![forbid(unsafe_code)]

use insula_sdk::{Bytes, Request, Response};

const CHUNK: &[u8] = &[b'x'; 64 * 1024];

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    Response::stream("application/octet-stream", |mut writer| async move {
        loop {
            writer.write(Bytes::from_static(CHUNK)).await?;
        }
    })
}
