//! What guests may ask other servers, and what they cannot reach.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use insula_tests::wait::holds;
use insula_tests::{Service, TestHost, until};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Connections that one server of a test answers at once; each has a thread.
const CONNECTIONS_MAX: usize = 64;
const PATIENCE: Duration = Duration::from_secs(20);

/// A server somewhere in the world, which here is on loopback.
struct World {
    address: SocketAddr,
    seen: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl World {
    /// Answers each connection by this function, with the request's head.
    fn new<S, F>(answer: F) -> Self
    where
        S: Into<Vec<u8>>,
        F: Fn(&str) -> S + Send + Sync + 'static,
    {
        Self::over(move |mut stream| {
            let request = read_request(&mut stream);
            let _ = stream.write_all(&answer(&request).into());
        })
    }

    fn over(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        let seen = Arc::<AtomicUsize>::default();
        let open = Arc::<AtomicUsize>::default();
        let ends = Arc::<AtomicBool>::default();
        let (counts, opens, ended) = (seen.clone(), open.clone(), ends.clone());
        let serve = Arc::new(serve);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let stream = stream.expect("a connection");
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                counts.fetch_add(1, Ordering::SeqCst);
                let before = opens.fetch_add(1, Ordering::SeqCst);
                assert!(before < CONNECTIONS_MAX, "too many connections");
                let (serve, opens) = (serve.clone(), opens.clone());
                std::thread::spawn(move || {
                    serve(stream);
                    opens.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            address,
            seen,
            open,
            ends,
            thread: Some(thread),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Head and body of a request of declared length.
fn read_request(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 64 << 10];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.parse::<usize>().expect("a length"))
            });
            let chunked = head.contains("transfer-encoding: chunked");
            if length.unwrap_or(0) <= body.len() && (!chunked || body.ends_with("0\r\n\r\n")) {
                return text;
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return text,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
        }
    }
}

fn ok(body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// A host whose guests may reach loopback.
fn open_host() -> TestHost {
    TestHost::plan()
        .arg("--outbound-networks", "127.0.0.0/8")
        .start()
}

fn fetcher(host: &TestHost, outbound: Value) -> Service {
    let tenant = host.tenant("a").create();
    let spec = json!({"outbound": outbound, "limits": {"timeout": "20s"}});
    tenant.service("fetch").spec(spec).deploy("fetch")
}

fn escaped(url: &str) -> String {
    let mut text = String::new();
    for byte in url.bytes() {
        if byte.is_ascii_alphanumeric() {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

/// The status of the answer, or why there is none.
fn ask(fetch: &Service, url: &str) -> String {
    let answer = fetch.get(&format!("/status?url={}", escaped(url))).send();
    assert_eq!(answer.status, 200, "{url}: {}", answer.text());
    answer.text().trim().to_owned()
}

fn results(host: &TestHost, expected: &[(&str, u64)]) {
    host.metrics_when("outgoing requests are counted", |metrics| {
        for (result, count) in expected {
            let labels = [("tenant", "a"), ("result", *result)];
            let is = metrics.count("insula_outbound_requests_total", &labels);
            holds(is == *count, format!("{is} {result}, not {count}"))?;
        }
        Ok(())
    });
}

#[test]
fn a_request_and_its_answer_pass_through() {
    let world = World::new(|request: &str| {
        assert!(
            request.starts_with("POST /v1?q=a%20b HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains("\r\ncontent-type: text/x\r\n"),
            "{request}"
        );
        assert!(
            request.ends_with("hello") || request.contains("\r\nhello\r\n"),
            "{request}"
        );
        let host = request.lines().find(|line| line.starts_with("host: "));
        ok(host.unwrap_or("none"))
    });
    let host = open_host();
    let fetch = fetcher(&host, json!([world.url("")]));
    let url = escaped(&world.url("/v1?q=a%20b"));
    let answer = fetch.post(&format!("/?url={url}"), "hello");
    let answer = answer.header("content-type", "text/x").send();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.text(), format!("host: {}", world.address));
    results(&host, &[("ok", 1)]);
    let metrics = host.metrics();
    for direction in ["in", "out"] {
        let labels = [("tenant", "a"), ("direction", direction)];
        let bytes = metrics.count("insula_outbound_bytes_total", &labels);
        assert!((20..1_000).contains(&bytes), "{bytes} {direction}");
    }
}

#[test]
fn a_large_answer_streams_and_a_redirect_is_the_guests_business() {
    const BYTES: usize = 8 << 20;
    let world = World::new(|request: &str| {
        if request.starts_with("GET /moved ") {
            let to = "http://169.254.169.254/latest/meta-data/";
            return format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n")
                .into_bytes();
        }
        let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n").into_bytes();
        answer.extend((0..BYTES).map(|n| u8::try_from(n % 251).expect("below 251")));
        answer
    });
    let host = open_host();
    let fetch = fetcher(&host, json!([world.url("")]));
    let large = fetch
        .get(&format!("/?url={}", escaped(&world.url("/large"))))
        .send();
    assert_eq!(large.body.len(), BYTES);
    assert!(
        large
            .body
            .iter()
            .enumerate()
            .all(|(n, byte)| usize::from(*byte) == n % 251)
    );
    let moved = fetch
        .get(&format!("/?url={}", escaped(&world.url("/moved"))))
        .send();
    assert_eq!(moved.status, 302);
    assert_eq!(world.seen(), 2);
    // Where it leads is asked for like anything else.
    assert_eq!(
        ask(&fetch, moved.header("location").expect("a location")),
        "HTTP-request-denied"
    );
}

#[test]
fn a_redirect_leads_to_no_address_that_is_closed() {
    const STATUSES: [u16; 4] = [301, 302, 307, 308];
    const CLOSED: [&str; 6] = [
        "http://169.254.169.254",
        "http://10.0.0.1",
        "http://[::1]:8081",
        "http://[::ffff:169.254.169.254]",
        "http://[64:ff9b::a9fe:a9fe]",
        "http://[fd00:ec2::254]",
    ];
    // `GET /STATUS/N ` is answered with STATUS and leads to the N-th.
    let world = World::new(|request: &str| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let mut parts = path.split('/').skip(1);
        let status = parts.next().unwrap_or_default();
        let to = parts.next().and_then(|n| n.parse::<usize>().ok());
        let to = to.map_or("", |n| CLOSED[n]);
        format!("HTTP/1.1 {status} Moved\r\nlocation: {to}/\r\ncontent-length: 0\r\n\r\n")
            .into_bytes()
    });
    let host = open_host();
    let mut list = vec![world.url("")];
    list.extend(CLOSED.map(str::to_owned));
    let fetch = fetcher(&host, json!(list));
    for status in STATUSES {
        for (n, closed) in CLOSED.iter().enumerate() {
            let url = world.url(&format!("/{status}/{n}"));
            let moved = fetch.get(&format!("/?url={}", escaped(&url))).send();
            assert_eq!(moved.status, status, "{}", moved.text());
            let to = moved.header("location").expect("a location");
            assert!(to.starts_with(closed), "{to}");
            assert_eq!(
                ask(&fetch, to),
                "destination-IP-prohibited",
                "{status} to {to}"
            );
        }
    }
    assert_eq!(world.seen(), STATUSES.len() * CLOSED.len());
}

#[test]
fn nothing_that_is_not_on_the_list_is_reached() {
    let world = World::new(|_: &str| ok("no"));
    let host = open_host();
    let port = world.address.port();
    let closed = fetcher(&host, json!([]));
    assert_eq!(ask(&closed, &world.url("/")), "HTTP-request-denied");
    let list = json!([
        "http://127.0.0.1:8001",
        format!("https://127.0.0.1:{port}"),
        format!("http://*.example.com:{port}"),
    ]);
    let path = "/v1/tenants/a/services/fetch";
    host.admin().put(path, &json!({"outbound": list}));
    for url in [
        world.url("/"),
        format!("http://localhost:{port}/"),
        format!("http://example.com:{port}/"),
        format!("http://127.0.0.1.:{port}/"),
    ] {
        assert_eq!(ask(&closed, &url), "HTTP-request-denied", "{url}");
    }
    // What is no destination in its one written form is not looked up on the list.
    for authority in [
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "u@127.0.0.1",
    ] {
        let answer = ask(&closed, &format!("http://{authority}:{port}/"));
        assert!(
            ["HTTP-request-URI-invalid", "HTTP-request-denied"].contains(&answer.as_str()),
            "{authority}: {answer}"
        );
    }
    assert_eq!(world.seen(), 0);
    until(PATIENCE, "the log says so", || {
        let said = format!("outbound: http://127.0.0.1:{port} is not on the service's list");
        let log = format!("{:?}", closed.log());
        holds(log.contains(&said), log)
    });
}

#[test]
fn no_list_opens_what_the_operator_left_closed() {
    let world = World::new(|_: &str| ok("no"));
    let port = world.address.port();
    let host = TestHost::start();
    let (ingress, admin) = (host.ingress().port(), host.admin_address().port());
    let mut list: Vec<String> = Vec::new();
    for port in [port, ingress, admin] {
        for name in [
            "127.0.0.1",
            "localhost",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
        ] {
            list.push(format!("http://{name}:{port}"));
        }
    }
    for address in [
        "10.0.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "192.168.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::1]",
        "[2002:7f00:1::]",
        "[2001::1]",
        "[fd00:ec2::254]",
        "[fe80::1]",
        "[ff02::1]",
        "[::127.0.0.1]",
    ] {
        list.push(format!("http://{address}"));
    }
    let count = list.len() as u64;
    let fetch = fetcher(&host, json!(list));
    for url in &list {
        assert_eq!(
            ask(&fetch, &format!("{url}/")),
            "destination-IP-prohibited",
            "{url}"
        );
    }
    assert_eq!(world.seen(), 0);
    results(&host, &[("prohibited", count), ("ok", 0)]);
}

#[test]
fn a_guest_learns_what_went_wrong() {
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port");
    let refuses = nobody.local_addr().expect("an address").port();
    drop(nobody);
    let silent = World::over(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let rude = World::new(|request: &str| match request {
        text if text.starts_with("GET /short ") => {
            "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort".to_owned()
        }
        text if text.starts_with("GET /head ") => {
            format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(64 << 10))
        }
        text if text.starts_with("GET /gone ") => String::new(),
        _ => "220 mail.example ESMTP\r\n".to_owned(),
    });
    let host = open_host();
    let list = json!([
        format!("http://127.0.0.1:{refuses}"),
        "http://nothing.invalid",
        format!("https://127.0.0.1:{}", rude.address.port()),
        rude.url(""),
        silent.url(""),
    ]);
    let fetch = fetcher(&host, list);
    let answer = ask(&fetch, &format!("http://127.0.0.1:{refuses}/"));
    assert_eq!(answer, "connection-refused");
    assert_eq!(ask(&fetch, "http://nothing.invalid/"), "DNS-error");
    assert_eq!(ask(&fetch, &rude.url("/mail")), "HTTP-protocol-error");
    assert_eq!(ask(&fetch, &rude.url("/gone")), "HTTP-response-incomplete");
    assert_eq!(
        ask(&fetch, &rude.url("/head")),
        "HTTP-response-header-section-size"
    );
    let url = escaped(&rude.url("/short"));
    assert!(
        fetch.get(&format!("/?url={url}")).try_send().is_err(),
        "it is cut off"
    );
    // A server that says nothing is given up with the request.
    let spec = json!({"outbound": [silent.url("")], "limits": {"timeout": "300ms"}});
    host.admin().put("/v1/tenants/a/services/fetch", &spec);
    let began = Instant::now();
    let answer = fetch
        .get(&format!("/status?url={}", escaped(&silent.url("/"))))
        .send();
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert!(began.elapsed() < Duration::from_secs(5));
    until(PATIENCE, "the connection is closed", || {
        let open = silent.open.load(Ordering::SeqCst);
        holds(open == 0, format!("{open} open"))
    });
    results(
        &host,
        &[("connect", 1), ("dns", 1), ("protocol", 3), ("ok", 1)],
    );
}

#[test]
fn too_many_at_once_are_refused_and_later_ones_are_not() {
    let gate = Arc::<AtomicBool>::default();
    let open = gate.clone();
    let world = World::new(move |_: &str| {
        let until = Instant::now() + PATIENCE;
        while !open.load(Ordering::SeqCst) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        ok("at last")
    });
    let host = open_host();
    let fetch = fetcher(&host, json!([world.url("")]));
    let request = fetch.get(&format!("/status?n=40&url={}", escaped(&world.url("/"))));
    let asking = std::thread::spawn(move || request.send());
    results(&host, &[("ok", 0)]);
    until(PATIENCE, "as many as may be are on their way", || {
        let seen = world.seen();
        holds(seen == 16, format!("{seen} connections"))
    });
    gate.store(true, Ordering::SeqCst);
    let answer = asking.join().expect("an answer");
    let text = answer.text();
    assert_eq!(text.matches("200\n").count(), 16, "{text}");
    assert_eq!(
        text.matches("connection-limit-reached\n").count(),
        24,
        "{text}"
    );
    for _ in 0..3 {
        let answer = fetch.get(&format!("/status?n=16&url={}", escaped(&world.url("/"))));
        assert_eq!(answer.send().text().matches("200\n").count(), 16);
    }
}

#[test]
fn a_client_that_leaves_takes_the_outgoing_request_with_it() {
    let silent = World::over(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let host = open_host();
    let fetch = fetcher(&host, json!([silent.url("")]));
    let before = host.open_files();
    for _ in 0..20 {
        let request = fetch.get(&format!("/?url={}", escaped(&silent.url("/"))));
        let mut connection = fetch.connect();
        connection.write(&request).expect("sent");
        let count = silent.seen();
        until(PATIENCE, "the server is asked", || {
            let seen = silent.seen();
            holds(
                seen > count || silent.open.load(Ordering::SeqCst) > 0,
                format!("{seen}"),
            )
        });
        drop(connection);
        until(PATIENCE, "the connection is closed", || {
            let open = silent.open.load(Ordering::SeqCst);
            holds(open == 0, format!("{open} open"))
        });
    }
    until(PATIENCE, "no descriptor is left", || {
        let open = host.open_files();
        holds(open <= before + 4, format!("{open} after {before}"))
    });
    assert_eq!(host.when_ended("a", 20).requests("a", "canceled"), 20);
}

#[test]
fn https_is_spoken_to_those_whom_the_systems_roots_vouch_for() {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    let certificate = params.self_signed(&key).expect("a certificate");
    let dir = TempDir::with_prefix("insula-test-").expect("a directory");
    let roots = dir.path().join("roots.pem");
    fs::write(&roots, certificate.pem()).expect("a file");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
        )
        .expect("a configuration");
    let config = Arc::new(config);
    let world = World::over(move |stream| {
        let tls = ServerConnection::new(config.clone()).expect("a connection");
        let mut stream = StreamOwned::new(tls, stream);
        let request = read_request(&mut stream);
        let host = request.lines().find(|line| line.starts_with("host: "));
        let _ = stream.write_all(ok(host.unwrap_or("none")).as_bytes());
        stream.conn.send_close_notify();
        let _ = stream.flush();
    });
    let port = world.address.port();
    let list = json!([
        format!("https://localhost:{port}"),
        format!("https://127.0.0.1:{port}"),
    ]);
    let trusting = TestHost::plan()
        .arg("--outbound-networks", "127.0.0.0/8,::1/128")
        .env("SSL_CERT_FILE", roots.as_os_str())
        .start();
    let fetch = fetcher(&trusting, list.clone());
    let url = format!("https://localhost:{port}/");
    let answer = fetch.get(&format!("/?url={}", escaped(&url))).send();
    assert_eq!(answer.text(), format!("host: localhost:{port}"));
    // The certificate is for another name.
    let by_address = format!("https://127.0.0.1:{port}/");
    assert_eq!(ask(&fetch, &by_address), "TLS-certificate-error");
    results(&trusting, &[("ok", 1), ("tls", 1)]);
    let strange = open_host();
    let fetch = fetcher(&strange, list);
    assert_eq!(ask(&fetch, &by_address), "TLS-certificate-error");
}
