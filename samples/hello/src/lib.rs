//! The smallest guest: one line of text, whatever was asked.

#![forbid(unsafe_code)]

use insula_sdk::{Request, Response};

#[insula_sdk::main]
async fn handle(_: Request) -> Response {
    Response::text("Hello from Insula\n")
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    #[test]
    fn says_hello() {
        run(async {
            let mut response = call(super::handle, Request::get("/")).await;
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(
                response.body_mut().text().await.unwrap(),
                "Hello from Insula\n"
            );
        });
    }
}
