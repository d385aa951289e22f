//! An HTTP workload for Insula.

use insula_sdk::{Request, Response, Result, log};

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    let name = req.query("name").unwrap_or_else(|| "world".to_owned());
    log::info!("greeting", name = name, path = req.uri().path());
    Ok(Response::text(format!("Hello, {name}!\n")))
}

#[cfg(test)]
mod tests {
    use insula_sdk::Request;
    use insula_sdk::test::{call, run};

    #[test]
    fn greets() {
        run(async {
            let mut response = call(super::handle, Request::get("/?name=you")).await;
            assert_eq!(response.body_mut().text().await.unwrap(), "Hello, you!\n");
        });
    }
}
