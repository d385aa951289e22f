//! A guest to try a host with.
//!
//! | path | does |
//! |---|---|
//! | `/` and any other | streams the request's body back, with its content type |
//! | `/info` | method, URI, headers and environment as JSON |
//! | `/log?message=TEXT` | logs a structured line, and prints one on stdout |
//! | `/usage` | fuel and memory so far, as JSON |
//! | `/count` | how many requests this instance has counted: 1, unless its service reuses instances |
//! | `/burn?n=N` | N steps of a computation: the same fuel and answer every time |
//! | `/burn?ms=M` | computes for M milliseconds |
//! | `/sleep?ms=M` | waits |
//! | `/alloc?mib=N` | allocates N MiB and touches every page |
//! | `/status?code=C` | answers with that status |
//! | `/fail` | fails: a 500, and a line in the log |
//! | `/panic` | panics: the instance traps |

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use insula_sdk::http::header::CONTENT_TYPE;
use insula_sdk::{Error, Request, Response, Result, StatusCode, env, log, time, usage};
use serde_json::json;

static COUNT: AtomicU64 = AtomicU64::new(0);

const MIB: usize = 1024 * 1024;
/// Memory comes in pages of this size (WebAssembly, "Memory Instances").
const PAGE_BYTES: usize = 64 * 1024;
/// How many steps lie between two looks at the clock.
const STEPS_PER_LOOK: u64 = 10_000;

#[insula_sdk::main]
async fn handle(req: Request) -> Result<Response> {
    match req.uri().path() {
        "/info" => info(&req),
        "/log" => log_line(&req),
        "/usage" => {
            let used = usage();
            Response::json(&json!({ "fuel": used.fuel, "memory_bytes": used.memory_bytes }))
        }
        "/count" => {
            let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
            Ok(Response::text(format!("{count}\n")))
        }
        "/burn" => burn(&req),
        "/sleep" => {
            let duration = Duration::from_millis(number(&req, "ms")?);
            time::sleep(duration).await;
            Ok(Response::text("slept\n"))
        }
        "/alloc" => alloc(&req),
        "/status" => {
            let code = u16::try_from(number(&req, "code")?).unwrap_or_default();
            let status = StatusCode::from_u16(code)
                .map_err(|_| Error::bad_request("code must be a status"))?;
            Ok(Response::text(format!("{status}\n")).with_status(status))
        }
        "/fail" => Err(Error::internal("failed as it was told to")),
        "/panic" => panic!("panicked as it was told to"),
        _ => Ok(echo(req)),
    }
}

fn echo(req: Request) -> Response {
    let content_type = req.headers().get(CONTENT_TYPE).cloned();
    let mut response = Response::new(req.into_body());
    if let Some(content_type) = content_type {
        response.headers_mut().insert(CONTENT_TYPE, content_type);
    }
    response
}

fn info(req: &Request) -> Result<Response> {
    let mut headers = BTreeMap::<_, Vec<_>>::new();
    for (name, value) in req.headers() {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        headers.entry(name.as_str()).or_default().push(value);
    }
    let env: BTreeMap<_, _> = env::vars().collect();
    Response::json(&json!({
        "method": req.method().as_str(),
        "uri": req.uri().to_string(),
        "path": req.uri().path(),
        "query": req.query_pairs().collect::<BTreeMap<_, _>>(),
        "headers": headers,
        "env": env,
    }))
}

fn log_line(req: &Request) -> Result<Response> {
    let message = req.query("message").unwrap_or_else(|| "hello".to_owned());
    log::info!("{message}", path = req.uri().path(), length = message.len());
    println!("stdout: {message}");
    Ok(Response::text("logged\n"))
}

fn burn(req: &Request) -> Result<Response> {
    let result = if req.query("ms").is_some() {
        let until = Instant::now() + Duration::from_millis(number(req, "ms")?);
        let mut state = 1;
        while Instant::now() < until {
            state = steps(state, STEPS_PER_LOOK);
        }
        state
    } else {
        steps(1, number(req, "n")?)
    };
    Ok(Response::text(format!("{result}\n")))
}

/// A linear congruential generator (Knuth's MMIX constants), kept from being
/// computed at a stroke.
fn steps(mut state: u64, n: u64) -> u64 {
    for _ in 0..n {
        state = black_box(state)
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
    }
    state
}

fn alloc(req: &Request) -> Result<Response> {
    let mib = usize::try_from(number(req, "mib")?)
        .ok()
        .filter(|mib| *mib <= 4096)
        .ok_or_else(|| Error::bad_request("mib must be at most 4096"))?;
    let mut block: Vec<u8> = vec![0; mib * MIB];
    for page in block.chunks_mut(PAGE_BYTES) {
        page[0] = 1;
    }
    let pages: usize = black_box(&block)
        .chunks(PAGE_BYTES)
        .map(|page| usize::from(page[0]))
        .sum();
    Ok(Response::text(format!("{pages} pages\n")))
}

fn number(req: &Request, name: &str) -> Result<u64> {
    req.query(name)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Error::bad_request(format!("{name} must be a number")))
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
    fn echoes() {
        run(async {
            let request = Request::post("/any", "body")
                .with_header("content-type", "a/b")
                .unwrap();
            let mut response = call(handle, request).await;
            assert_eq!(response.headers()["content-type"], "a/b");
            assert_eq!(response.body_mut().text().await.unwrap(), "body");
        });
    }

    #[test]
    fn computes_the_same_every_time() {
        assert_eq!(get("/burn?n=1000"), get("/burn?n=1000"));
        assert_eq!(get("/burn?n=1").1, "7806831264735756412\n");
        assert_eq!(get("/burn?ms=2").0, StatusCode::OK);
    }

    #[test]
    fn does_as_it_is_told() {
        assert_eq!(get("/alloc?mib=2").1, "32 pages\n");
        assert_eq!(get("/sleep?ms=1").1, "slept\n");
        assert_eq!(get("/log?message=x").1, "logged\n");
        assert_eq!(get("/status?code=418").0, StatusCode::IM_A_TEAPOT);
        assert_eq!(get("/status?code=7").0, StatusCode::BAD_REQUEST);
        assert_eq!(get("/usage").1, r#"{"fuel":0,"memory_bytes":0}"#);
        assert_eq!(
            get("/fail"),
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                "Internal Server Error\n".into()
            )
        );
        assert!(get("/info?a=b").1.contains(r#""query":{"a":"b"}"#));
    }
}
