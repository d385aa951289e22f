//! Handlers as a guest's author writes and tests them.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures::future::{Either, join, join_all, select};
use futures::stream;
use insula_sdk::test::{call, run};
use insula_sdk::{Body, Bytes, Error, Request, Response, Result, StatusCode, http, time};

#[test]
fn sleeps_run_side_by_side() {
    let started = Instant::now();
    run(async {
        let pause = || time::sleep(Duration::from_millis(40));
        join(join_all((0..20).map(|_| pause())), pause()).await;
    });
    // One after another they would take 840 ms.
    assert!(
        started.elapsed() < Duration::from_millis(600),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn the_first_of_two_wins() {
    run(async {
        let short = Box::pin(time::sleep(Duration::from_millis(1)));
        let long = Box::pin(time::sleep(Duration::from_secs(3600)));
        assert!(matches!(select(long, short).await, Either::Right(_)));
    });
}

#[test]
fn a_handler_over_the_types_of_the_http_crate() {
    async fn reverse(req: http::Request<Body>) -> Result<http::Response<Body>, Error> {
        let mut bytes = req.into_body().bytes().await?.to_vec();
        bytes.reverse();
        Ok(http::Response::builder().status(201).body(bytes.into())?)
    }
    run(async {
        let mut response = call(reverse, Request::post("/", "abc")).await;
        assert_eq!(response.status(), StatusCode::CREATED);
        assert_eq!(response.body_mut().text().await.unwrap(), "cba");
    });
}

#[test]
fn chunks_pass_through_one_by_one() {
    async fn shout(mut req: Request) -> Response {
        Response::stream("text/plain", |mut writer| async move {
            while let Some(chunk) = req.chunk().await? {
                writer.write(chunk.to_ascii_uppercase()).await?;
            }
            Ok(())
        })
    }
    run(async {
        let parts = ["a", "", "b"].map(|part| Ok::<_, Error>(Bytes::from(part)));
        let request = Request::post("/", Body::from_stream(stream::iter(parts)));
        let mut response = call(shout, request).await;
        assert_eq!(response.body_mut().chunk().await.unwrap().unwrap(), "A");
        assert_eq!(response.body_mut().chunk().await.unwrap().unwrap(), "B");
        assert!(response.body_mut().chunk().await.unwrap().is_none());
    });
}

#[test]
fn bodies_are_bounded_where_the_handler_says() {
    async fn small_only(mut req: Request) -> Result<String> {
        Ok(req.body_mut().bytes_up_to(3).await?.len().to_string())
    }
    run(async {
        let status =
            async |body: &'static str| call(small_only, Request::post("/", body)).await.status();
        assert_eq!(status("").await, StatusCode::OK);
        assert_eq!(status("abc").await, StatusCode::OK);
        assert_eq!(status("abcd").await, StatusCode::PAYLOAD_TOO_LARGE);
    });
}

#[test]
fn errors_tell_the_client_only_what_they_should() {
    async fn fail(_: Request) -> Result<()> {
        Err(std::io::Error::other("the password is hunter2"))?
    }
    run(async {
        let mut response = call(fail, Request::get("/")).await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(
            response.body_mut().text().await.unwrap(),
            "Internal Server Error\n"
        );
    });
}

#[test]
fn an_abandoned_body_drops_what_wrote_it() {
    struct Guard(Rc<RefCell<bool>>);
    impl Drop for Guard {
        fn drop(&mut self) {
            *self.0.borrow_mut() = true;
        }
    }
    let dropped = Rc::new(RefCell::new(false));
    let guard = Guard(dropped.clone());
    let mut body = Body::stream(|mut writer| async move {
        let _guard = guard;
        loop {
            writer.write("again ").await?;
        }
    });
    run(async { assert!(body.chunk().await.unwrap().is_some()) });
    assert!(!*dropped.borrow());
    drop(body);
    assert!(*dropped.borrow());
}

#[cfg(feature = "json")]
#[test]
fn json_in_and_out() {
    #[derive(serde::Serialize, serde::Deserialize)]
    struct Point {
        x: i32,
        y: i32,
    }
    async fn mirror(mut req: Request) -> Result<Response> {
        let Point { x, y } = req.json().await?;
        Response::json(&Point { x: y, y: x })
    }
    run(async {
        let mut response = call(mirror, Request::post("/", r#"{"x":1,"y":2}"#)).await;
        assert_eq!(response.headers()["content-type"], "application/json");
        assert_eq!(
            response.body_mut().text().await.unwrap(),
            r#"{"x":2,"y":1}"#
        );
        let response = call(mirror, Request::post("/", "{")).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    });
}
