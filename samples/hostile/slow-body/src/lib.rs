//! A body without an end, one byte every 100 ms. Expected: `timeout`, or
//! `canceled` when the client gives up first.

#![forbid(unsafe_code)]

use std::time::Duration;

use insula_sdk::{Request, Response, time};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    Response::stream("text/plain", |mut writer| async move {
        loop {
            writer.write(".").await?;
            time::sleep(Duration::from_millis(100)).await;
        }
    })
}
