//! Asks other servers, and hands on what they say.
//!
//! | path | does |
//! |---|---|
//! | `/?url=URL` | sends the request on, method, content type and body; streams the answer back |
//! | `/status?url=URL&n=N` | sends N requests at once; a line for each: the status, or why there is none |
//! | `/hold?url=URL` | reads the head of an answer and then waits |

#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use insula_sdk::http::header::CONTENT_TYPE;
use insula_sdk::{
    Error, FetchError, Request, Response, Result, StatusCode, Uri, fetch, http, time,
};

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let url = req.query("url");
    let url = url.ok_or_else(|| Error::bad_request("url is missing"))?;
    let url: Uri = url.parse().map_err(|_| Error::bad_request("url is none"))?;
    match req.uri().path() {
        "/status" => {
            let n = req.query("n").and_then(|n| n.parse().ok()).unwrap_or(1);
            Ok(Response::text(statuses(&url, n).await))
        }
        "/hold" => {
            let answer = fetch(get(&url)).await;
            time::sleep(Duration::from_secs(60)).await;
            Ok(Response::text(line(&answer)))
        }
        _ => hand_on(req, url).await,
    }
}

fn get(url: &Uri) -> Request {
    let mut request = http::Request::new(());
    *request.uri_mut() = url.clone();
    request.into()
}

async fn hand_on(req: Request, url: Uri) -> Result<Response> {
    let mut onward = http::Request::new(());
    *onward.method_mut() = req.method().clone();
    *onward.uri_mut() = url;
    if let Some(kind) = req.headers().get(CONTENT_TYPE) {
        onward.headers_mut().insert(CONTENT_TYPE, kind.clone());
    }
    let body = req.into_body();
    match fetch(onward.map(|()| body)).await {
        Ok(answer) => Ok(answer),
        Err(error) => {
            let text = format!("{}\n", error.code());
            Ok(Response::text(text).with_status(StatusCode::BAD_GATEWAY))
        }
    }
}

fn line(answer: &Result<Response, FetchError>) -> String {
    match answer {
        Ok(answer) => format!("{}\n", answer.status().as_u16()),
        Err(error) => format!("{}\n", error.code()),
    }
}

/// All at once; in the order in which they were sent.
async fn statuses(url: &Uri, n: usize) -> String {
    let mut waiting: Vec<Pin<Box<dyn Future<Output = String>>>> = Vec::new();
    for _ in 0..n {
        let request = get(url);
        waiting.push(Box::pin(async move { line(&fetch(request).await) }));
    }
    let mut lines = vec![None; n];
    poll_fn(|cx| {
        for (line, answer) in lines.iter_mut().zip(&mut waiting) {
            if line.is_none()
                && let Poll::Ready(text) = answer.as_mut().poll(cx)
            {
                *line = Some(text);
            }
        }
        if lines.iter().all(Option::is_some) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    lines.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{answer_fetches, call, run};
    use insula_sdk::{Request, Response, StatusCode};

    use super::handle;

    #[test]
    fn hands_on() {
        answer_fetches(|mut req: Request| async move {
            let body = req.text().await?;
            let text = format!("{} {} {body}", req.method(), req.uri());
            Ok::<_, insula_sdk::Error>(Response::text(text).with_status(StatusCode::ACCEPTED))
        });
        run(async {
            let request = Request::post("/?url=http%3A%2F%2Fa.example%2Fx", "hello");
            let mut response = call(handle, request).await;
            assert_eq!(response.status(), StatusCode::ACCEPTED);
            let text = response.body_mut().text().await.unwrap();
            assert_eq!(text, "POST http://a.example/x hello");
            let mut response =
                call(handle, Request::get("/status?n=2&url=http://a.example/")).await;
            assert_eq!(response.body_mut().text().await.unwrap(), "202\n202\n");
        });
    }

    #[test]
    fn says_why_not() {
        run(async {
            let mut response = call(handle, Request::get("/?url=http://a.example/")).await;
            assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
            assert!(
                response
                    .body_mut()
                    .text()
                    .await
                    .unwrap()
                    .starts_with("nothing")
            );
            let response = call(handle, Request::get("/")).await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        });
    }
}
