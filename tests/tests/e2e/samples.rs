//! The useful samples, each doing what somebody would deploy it for.

use insula_tests::TestHost;

/// The samples that have a test here, in `canary`, `main_job`, `outbound`, `stores` or `volumes`, by
/// their folders.
pub(crate) const TESTED: [&str; 10] = [
    "canary",
    "counter",
    "echo",
    "fetch",
    "files",
    "hello",
    "kernels",
    "markdown",
    "sse",
    "thumbnail",
];

#[test]
fn markdown_becomes_html() {
    let host = TestHost::start();
    let markdown = host.tenant("a").create().deploy("markdown");
    let answer = markdown.post("/", "# Hi\n\n*you* & `me`\n").send();
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert_eq!(
        answer.text(),
        "<h1>Hi</h1>\n<p><em>you</em> &amp; <code>me</code></p>\n"
    );
    let long = "word *word*\n\n".repeat(50_000);
    let answer = markdown.post("/", long).send();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text().matches("<em>").count(), 50_000);
    assert_eq!(markdown.get("/").send().status, 405);
}

#[test]
fn kernels_compute_what_they_should() {
    let host = TestHost::start();
    let kernels = host.tenant("a").create().deploy("kernels");
    let answer = |path: &str| {
        let answer = kernels.get(path).send();
        assert_eq!(answer.status, 200, "{path}");
        answer.text()
    };
    // 987 is the 16th Fibonacci number, 1,900 primes are below 16,384.
    assert_eq!(answer("/fib?n=3"), "2961\n");
    assert_eq!(answer("/sieve?n=2"), "3800\n");
    for kernel in ["matmul", "sort", "hash", "map", "strings"] {
        let once = answer(&format!("/{kernel}?n=1"));
        assert_eq!(once, answer(&format!("/{kernel}?n=1")));
        assert_ne!(once, answer(&format!("/{kernel}?n=2")));
    }
    assert_eq!(kernels.get("/fib").send().status, 400);
    assert_eq!(answer("/"), "Hello from Insula\n");
}

#[test]
fn sse_streams_events() {
    let host = TestHost::start();
    let sse = host.tenant("a").create().deploy("sse");
    let mut stream = sse.get("/?count=3&interval_ms=20").open();
    assert_eq!(stream.head.status, 200);
    assert_eq!(
        stream.head.headers.get("content-type"),
        Some("text/event-stream")
    );
    for n in 1..=3 {
        let chunk = stream.piece().expect("a chunk").expect("an event");
        let event = format!("id: {n}\nevent: tick\ndata: {{\"n\":{n}}}\n\n");
        assert_eq!(
            String::from_utf8_lossy(&chunk),
            event,
            "an event is a chunk of its own"
        );
    }
    assert_eq!(stream.piece().expect("an end"), None);
}

#[test]
fn a_picture_becomes_a_thumbnail() {
    let host = TestHost::start();
    let thumbnail = host.tenant("a").create().deploy("thumbnail");
    let answer = thumbnail.post("/?width=30", png(300, 200)).send();
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    assert_eq!(answer.header("content-type"), Some("image/png"));
    assert_eq!(size_of(&answer.body), (30, 20));
    assert_eq!(thumbnail.post("/", "no picture").send().status, 415);
}

/// Width and height of a PNG, from its first chunk.
fn size_of(png: &[u8]) -> (u32, u32) {
    assert_eq!(&png[1..4], b"PNG");
    let number = |at: usize| u32::from_be_bytes([png[at], png[at + 1], png[at + 2], png[at + 3]]);
    (number(16), number(20))
}

/// A grey picture as a PNG (RFC 2083) whose pixels are not compressed (RFC 1951, 3.2.4).
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut pixels = Vec::new();
    for y in 0..height {
        pixels.push(0);
        pixels.extend((0..width).map(|x| u8::try_from((x * y) % 256).unwrap_or(0)));
    }
    let mut zlib = vec![0x78, 0x01];
    let mut blocks = pixels.chunks(0xffff).peekable();
    while let Some(block) = blocks.next() {
        zlib.push(u8::from(blocks.peek().is_none()));
        let length = u16::try_from(block.len()).expect("a chunk of 64 KiB");
        zlib.extend(length.to_le_bytes());
        zlib.extend((!length).to_le_bytes());
        zlib.extend(block);
    }
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in &pixels {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    zlib.extend(((b << 16) | a).to_be_bytes());
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = [
        &width.to_be_bytes()[..],
        &height.to_be_bytes(),
        &[8, 0, 0, 0, 0],
    ]
    .concat();
    for (kind, data) in [(b"IHDR", header), (b"IDAT", zlib), (b"IEND", Vec::new())] {
        let length = u32::try_from(data.len()).expect("a small picture");
        let typed = [&kind[..], &data].concat();
        file.extend(length.to_be_bytes());
        file.extend(&typed);
        file.extend(crc(&typed).to_be_bytes());
    }
    file
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            };
        }
    }
    !crc
}
