//! `GET /?count=N&interval_ms=M`: N server-sent events, M milliseconds apart
//! (10 and 1000 when not given). `count=0` never ends.

#![forbid(unsafe_code)]

use std::time::Duration;

use insula_sdk::{Error, Request, Response, Result, time};

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let count = number(&req, "count", 10)?;
    let interval = Duration::from_millis(number(&req, "interval_ms", 1000)?);
    Response::stream("text/event-stream", move |mut writer| async move {
        let mut n = 0;
        loop {
            n += 1;
            writer
                .write(format!("id: {n}\nevent: tick\ndata: {{\"n\":{n}}}\n\n"))
                .await?;
            if n == count {
                return Ok(());
            }
            time::sleep(interval).await;
        }
    })
    .with_header("cache-control", "no-store")
}

fn number(req: &Request, name: &str, default: u64) -> Result<u64> {
    match req.query(name) {
        None => Ok(default),
        Some(text) => text
            .parse()
            .map_err(|_| Error::bad_request(format!("{name} must be a number"))),
    }
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    use super::handle;

    #[test]
    fn each_event_is_a_chunk_of_its_own() {
        run(async {
            let mut response = call(handle, Request::get("/?count=3&interval_ms=1")).await;
            assert_eq!(response.headers()["content-type"], "text/event-stream");
            for n in 1..=3 {
                let chunk = response.body_mut().chunk().await.unwrap().unwrap();
                assert_eq!(
                    chunk,
                    format!("id: {n}\nevent: tick\ndata: {{\"n\":{n}}}\n\n")
                );
            }
            assert!(response.body_mut().chunk().await.unwrap().is_none());
        });
    }

    #[test]
    fn refuses_what_is_no_number() {
        let response = run(call(handle, Request::get("/?count=many")));
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    }
}
