//! `POST /` with Markdown, back comes HTML: an element, or with `?page=TITLE` a
//! whole page.

#![forbid(unsafe_code)]

use insula_sdk::{Error, Method, Request, Response, Result, StatusCode};
use pulldown_cmark::{Options, Parser, html};

/// Longer texts are refused; a rendered text is a few times as long.
const LIMIT_BYTES: usize = 4 * 1024 * 1024;

#[insula_sdk::main]
async fn handle(mut req: Request) -> Result<Response> {
    if req.method() != Method::POST {
        return Response::text("POST Markdown to get HTML\n")
            .with_status(StatusCode::METHOD_NOT_ALLOWED)
            .with_header("allow", "POST");
    }
    let bytes = req.body_mut().bytes_up_to(LIMIT_BYTES).await?;
    let markdown = std::str::from_utf8(&bytes)
        .map_err(|error| Error::bad_request("the text is not UTF-8").with_source(error))?;
    let rendered = render(markdown);
    Ok(Response::html(match req.query("page") {
        Some(title) => page(&title, &rendered),
        None => rendered,
    }))
}

fn render(markdown: &str) -> String {
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_TASKLISTS;
    let mut rendered = String::with_capacity(markdown.len() * 2);
    html::push_html(&mut rendered, Parser::new_ext(markdown, options));
    rendered
}

fn page(title: &str, rendered: &str) -> String {
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    format!("<!doctype html>\n<meta charset=\"utf-8\">\n<title>{title}</title>\n{rendered}")
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Request, StatusCode};

    use super::handle;

    #[test]
    fn renders() {
        run(async {
            let mut response = call(handle, Request::post("/", "# Hi\n\n*you*")).await;
            assert_eq!(
                response.headers()["content-type"],
                "text/html; charset=utf-8"
            );
            let html = response.body_mut().text().await.unwrap();
            assert_eq!(html, "<h1>Hi</h1>\n<p><em>you</em></p>\n");
        });
    }

    #[test]
    fn makes_a_page() {
        run(async {
            let request = Request::post("/?page=a+%3Cb", "x");
            let html = call(handle, request).await.body_mut().text().await.unwrap();
            assert!(html.contains("<title>a &lt;b</title>\n<p>x</p>"), "{html}");
        });
    }

    #[test]
    fn refuses_what_is_no_text_and_what_is_not_posted() {
        run(async {
            let response = call(handle, Request::post("/", vec![0xff])).await;
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
            let response = call(handle, Request::get("/")).await;
            assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(response.headers()["allow"], "POST");
        });
    }
}
