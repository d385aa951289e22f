//! Counts visits, and keeps keys and values.
//!
//! | method, path | does |
//! |---|---|
//! | `GET /` | counts a visit; how many there were |
//! | `GET /KEY` | the key's value; 404 where there is none |
//! | `PUT /KEY` | the body becomes its value |
//! | `DELETE /KEY` | takes the key away |
//! | `POST /KEY?do=increment&n=N` | adds N; the sum |
//! | `POST /KEY?do=exists` | `true` or `false` |
//! | `POST /?do=list` | all keys, a line each |
//! | `POST /KEY?do=fill&n=N&bytes=B` | N keys `KEY0`, `KEY1`, …, with so many bytes each; how many there was room for, and what was said then |
//! | `POST /KEY?do=many&n=N&bytes=B` | the same in one batch; then they are read and taken away in one |
//! | `POST /KEY?do=handles&n=N` | opens the store N times and keeps it open |
//!
//! The store is the one that `?store=` or the environment's `STORE` names, or `counters`. What fails
//! is answered with 409 and the error.

#![forbid(unsafe_code)]

use insula_sdk::store::{Store, StoreError};
use insula_sdk::{Bytes, Error, Method, Request, Response, Result, StatusCode};

/// What is asked, beside the key.
struct Asked {
    what: String,
    number: u64,
    size: usize,
    body: Bytes,
}

#[insula_sdk::main]
async fn handle(mut req: Request) -> Result<Response> {
    let number = |name: &str| req.query(name).and_then(|text| text.parse::<u64>().ok());
    let asked = Asked {
        what: req.query("do").unwrap_or_default(),
        number: number("n").unwrap_or(1),
        size: usize::try_from(number("bytes").unwrap_or(0)).unwrap_or(usize::MAX),
        body: Bytes::new(),
    };
    let name = req.query("store").or_else(|| std::env::var("STORE").ok());
    let name = name.unwrap_or_else(|| "counters".to_owned());
    let key = req.query("key");
    let key = key.unwrap_or_else(|| req.uri().path().trim_start_matches('/').to_owned());
    let asked = Asked {
        body: req.bytes().await?,
        ..asked
    };
    let method = req.method().clone();
    Ok(match answer(&method, &name, &key, &asked) {
        Ok(Some(bytes)) => Response::bytes("application/octet-stream", bytes),
        Ok(None) => return Err(Error::new(StatusCode::NOT_FOUND, "there is no such key")),
        Err(error) => Response::text(format!("{error}\n")).with_status(StatusCode::CONFLICT),
    })
}

fn answer(
    method: &Method,
    name: &str,
    key: &str,
    asked: &Asked,
) -> Result<Option<Vec<u8>>, StoreError> {
    let store = Store::open(name)?;
    match *method {
        Method::GET if key.is_empty() => {
            let visits = store.increment("visits", 1)?;
            Ok(Some(format!("{visits}\n").into()))
        }
        Method::GET => store.get(key),
        Method::PUT => store.set(key, &asked.body).map(done),
        Method::DELETE => store.delete(key).map(done),
        _ => act(&store, name, key, asked).map(Some),
    }
}

fn done((): ()) -> Option<Vec<u8>> {
    Some(Vec::new())
}

fn act(store: &Store, name: &str, key: &str, asked: &Asked) -> Result<Vec<u8>, StoreError> {
    let count = asked.number;
    let said = match asked.what.as_str() {
        "increment" => store.increment(key, count)?.to_string(),
        "exists" => store.exists(key)?.to_string(),
        "list" => list(store)?,
        "fill" => fill(store, key, asked),
        "many" => many(store, key, asked)?,
        "handles" => {
            let handles = (0..count).map(|_| Store::open(name));
            let handles = handles.collect::<Result<Vec<_>, _>>()?;
            handles.len().to_string()
        }
        other => return Err(StoreError::Other(format!("nobody can do {other:?}"))),
    };
    Ok((said + "\n").into())
}

fn list(store: &Store) -> Result<String, StoreError> {
    let (mut all, mut from) = (Vec::new(), None);
    loop {
        let page = store.keys(from)?;
        all.extend(page.keys);
        from = page.next;
        if from.is_none() {
            return Ok(all.join("\n"));
        }
    }
}

fn fill(store: &Store, key: &str, asked: &Asked) -> String {
    let value = vec![7; asked.size];
    for number in 0..asked.number {
        if let Err(error) = store.set(&format!("{key}{number}"), &value) {
            return format!("{number} {error}");
        }
    }
    asked.number.to_string()
}

fn many(store: &Store, key: &str, asked: &Asked) -> Result<String, StoreError> {
    let keys: Vec<String> = (0..asked.number).map(|n| format!("{key}{n}")).collect();
    let pair = |key: &String| (key.clone(), vec![7; asked.size]);
    store.set_many(&keys.iter().map(pair).collect::<Vec<_>>())?;
    let found = store.get_many(&keys)?;
    store.delete_many(&keys)?;
    Ok(found.iter().flatten().count().to_string())
}

#[cfg(test)]
mod tests {
    use insula_sdk::test::{call, run};
    use insula_sdk::{Body, Method, Request, StatusCode};

    use super::handle;

    fn send(method: Method, uri: &str, body: &'static str) -> (StatusCode, String) {
        run(async {
            let mut request = Request::post(uri, Body::from(body));
            *request.method_mut() = method;
            let mut response = call(handle, request).await;
            (response.status(), response.body_mut().text().await.unwrap())
        })
    }

    #[test]
    fn counts_and_keeps() {
        let get = |uri: &str| send(Method::GET, uri, "").1;
        let post = |uri: &str| send(Method::POST, uri, "").1;
        assert_eq!(get("/"), "1\n");
        assert_eq!(get("/"), "2\n");
        assert_eq!(send(Method::PUT, "/a", "hello").0, StatusCode::OK);
        assert_eq!(get("/a"), "hello");
        assert_eq!(post("/a?do=exists"), "true\n");
        assert_eq!(post("/n?do=increment&n=5"), "5\n");
        assert_eq!(post("/?do=list"), "a\nn\nvisits\n");
        assert_eq!(post("/f?do=fill&n=3&bytes=10"), "3\n");
        assert_eq!(post("/m?do=many&n=3&bytes=10"), "3\n");
        assert_eq!(post("/?do=handles&n=3"), "3\n");
        assert_eq!(send(Method::DELETE, "/a", "").0, StatusCode::OK);
        assert_eq!(send(Method::GET, "/a", "").0, StatusCode::NOT_FOUND);
        assert_eq!(send(Method::POST, "/a?do=x", "").0, StatusCode::CONFLICT);
        assert_eq!(get("/?store=other"), "1\n");
    }
}
