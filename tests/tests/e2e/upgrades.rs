//! New versions while clients ask without a pause: no request fails, and none is answered half by one
//! version and half by another.
//!
//! ```text
//!  8 connections that are kept ─ about 600 requests/s ─┐
//!  8 streams of an HTTP/2 connection ─ about 600 ──────┼─▶ service ◀── version, version, version …
//!  10 answers at a time that take 10 s ────────────────┘
//! ```
//!
//! Every version is the same program with another word in it, which stands in each event of its
//! answers. `INSULA_UPGRADES` asks for more than a few.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use insula_tests::{Service, TestHost, guests};
use serde_json::json;

use crate::kills::number_from;

const UPGRADES: u64 = 6;
/// In the sample's code, between `event: ` and the end of the line.
const WORD: &[u8] = b"event: tick\n";
/// Of a long answer; half a second lies between two.
const EVENTS: usize = 20;

/// The component whose answers say so.
pub(crate) fn saying(word: &str) -> Vec<u8> {
    let mut component = guests::bytes("sse");
    let all = component.windows(WORD.len()).enumerate();
    let places: Vec<usize> = all
        .filter_map(|(at, bytes)| (bytes == WORD).then_some(at))
        .collect();
    let [at] = places[..] else {
        panic!("the sample has its word at {places:?}");
    };
    let new = format!("event: {word}\n");
    component[at..at + WORD.len()].copy_from_slice(new.as_bytes());
    component
}

/// What was answered.
#[derive(Default)]
struct Heard {
    kept: AtomicU64,
    multiplexed: AtomicU64,
    long: AtomicU64,
    words: Mutex<BTreeSet<String>>,
    wrong: Mutex<Vec<String>>,
}

impl Heard {
    fn answer(&self, count: &AtomicU64, status: u16, text: &str, events: usize) {
        count.fetch_add(1, Ordering::Relaxed);
        let words = text.lines().filter_map(|line| line.strip_prefix("event: "));
        let words: Vec<&str> = words.collect();
        let one = words
            .first()
            .filter(|first| words.iter().all(|word| word == *first));
        match one {
            Some(word) if status == 200 && words.len() == events => {
                self.words.lock().expect("words").insert((*word).to_owned());
            }
            _ => self.failed(format!("{status}: {text:?}")),
        }
    }

    fn failed(&self, what: String) {
        self.wrong.lock().expect("a list").push(what);
    }
}

/// Asks on a connection that is kept.
fn keep_asking(service: &Service, heard: &Heard, ended: &AtomicBool) {
    let request = service.get("/?count=1");
    let mut connection = request.connect().expect("a connection");
    while !ended.load(Ordering::Relaxed) {
        match connection.exchange(&request) {
            Ok(answer) => heard.answer(&heard.kept, answer.status, &answer.text(), 1),
            Err(broken) => {
                heard.failed(format!("{broken:?}"));
                return;
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks for answers that take ten seconds.
fn keep_listening(service: &Service, heard: &Heard, ended: &AtomicBool) {
    let request = service.get(&format!("/?count={EVENTS}&interval_ms=500"));
    while !ended.load(Ordering::Relaxed) {
        match request.clone().try_send() {
            Ok(answer) => heard.answer(&heard.long, answer.status, &answer.text(), EVENTS),
            Err(broken) => heard.failed(format!("{broken:?}")),
        }
    }
}

/// Asks on streams of one connection.
async fn multiplex(service: &Service, to: std::net::SocketAddr, heard: &Heard, ended: &AtomicBool) {
    let stream = tokio::net::TcpStream::connect(to)
        .await
        .expect("a connection");
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let connection = hyper::client::conn::http2::handshake(executor, io).await;
    let (sender, connection) = connection.expect("HTTP/2");
    let connection = tokio::spawn(connection);
    let uri = format!("http://{}/?count=1", service.host_name());
    let client = || {
        let (mut sender, uri) = (sender.clone(), uri.clone());
        async move {
            while !ended.load(Ordering::Relaxed) {
                let request = hyper::Request::get(&uri).body(Empty::<Bytes>::new());
                let answered = sender.send_request(request.expect("a request")).await;
                let (status, body) = match answered {
                    Ok(answer) => (answer.status().as_u16(), answer.into_body().collect().await),
                    Err(error) => return heard.failed(format!("{error:?}")),
                };
                match body {
                    Ok(body) => {
                        let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
                        heard.answer(&heard.multiplexed, status, &text, 1);
                    }
                    Err(error) => heard.failed(format!("{error:?}")),
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let four = || async { tokio::join!(client(), client(), client(), client()) };
    tokio::join!(four(), four());
    connection.abort();
}

#[test]
fn new_versions_fail_no_request_and_mix_no_answer() {
    let upgrades = number_from("INSULA_UPGRADES").unwrap_or(UPGRADES);
    let host = TestHost::start();
    let tenant = host.tenant("a").create();
    let limits = json!({"timeout": "60s"});
    let service = tenant.service("web").limits(limits);
    let service = service.deploy_bytes(saying("v000"));
    let (heard, ended) = (Heard::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| keep_asking(&service, &heard, &ended));
        }
        for _ in 0..10 {
            scope.spawn(|| keep_listening(&service, &heard, &ended));
        }
        scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let runtime = runtime.expect("a runtime");
            runtime.block_on(multiplex(&service, host.ingress(), &heard, &ended));
        });
        for n in 1..=upgrades {
            let answer = service.upload(saying(&format!("v{n:03}")));
            assert_eq!(answer.status, 201, "{}", answer.text());
            assert_eq!(answer.json()["active"], true, "{}", answer.text());
            let now = service.get("/?count=1").send().text();
            assert!(now.contains(&format!("event: v{n:03}\n")), "{n}: {now}");
        }
        ended.store(true, Ordering::Relaxed);
    });
    let wrong = heard.wrong.into_inner().expect("a list");
    let words = heard.words.into_inner().expect("words").len();
    let [kept, multiplexed, long] =
        [&heard.kept, &heard.multiplexed, &heard.long].map(|count| count.load(Ordering::Relaxed));
    eprintln!(
        "{upgrades} upgrades: {kept} requests on kept connections, {multiplexed} by HTTP/2, {long} of \
         10 s, answered by {words} versions; {} wrong",
        wrong.len()
    );
    assert!(
        wrong.is_empty(),
        "{} of them: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
    assert!(words as u64 > upgrades / 2 && long >= 10, "{words}, {long}");
}
