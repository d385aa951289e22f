//! A connection with hyper behind it, on paused time.

use std::convert::Infallible;

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::sleep;

use super::*;

const GET: &str = "GET /0 HTTP/1.1\r\nHost: a\r\n\r\n";

/// How one connection went.
struct Went {
    answers: String,
    served: Result<(), hyper::Error>,
    handle: ConnectionHandle,
    took: Duration,
}

impl Went {
    fn statuses(&self) -> Vec<&str> {
        self.answers
            .split("HTTP/1.1 ")
            .skip(1)
            .map(|answer| &answer[..3])
            .collect()
    }

    fn seconds(&self) -> u64 {
        self.took.as_secs()
    }
}

/// Serves one connection. `/<seconds>` answers after so long, without looking at the body;
/// `/read/<seconds>` reads the body then, and answers its length or 422 if it failed;
/// `/large` answers a mebibyte.
async fn serve(buffer_bytes: usize, client: impl AsyncFnOnce(&mut DuplexStream)) -> Went {
    let began = Instant::now();
    let (mut near, far) = duplex(buffer_bytes);
    let (guarded, handle) = GuardedIo::new(far, Timeouts::default());
    let in_service = handle.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let in_progress = in_service.begin_request();
        async move {
            let response = respond(request).await;
            drop(in_progress);
            Ok::<_, Infallible>(response)
        }
    });
    let server = async {
        let served = http1::Builder::new()
            .serve_connection(TokioIo::new(guarded), service)
            .await;
        (served, began.elapsed())
    };
    let client = async move {
        client(&mut near).await;
        let mut answers = Vec::new();
        let _ = near.read_to_end(&mut answers).await;
        String::from_utf8(answers).unwrap()
    };
    let ((served, took), answers) = tokio::join!(server, client);
    Went {
        answers,
        served,
        handle,
        took,
    }
}

async fn respond(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let seconds = path.rsplit('/').next().and_then(|text| text.parse().ok());
    sleep(Duration::from_secs(seconds.unwrap_or(0))).await;
    let (status, body) = if path.starts_with("/read/") {
        match request.into_body().collect().await {
            Ok(body) => (200, body.to_bytes().len().to_string().into()),
            Err(_) => (422, Bytes::new()),
        }
    } else if path == "/large" {
        (200, vec![b'x'; 1 << 20].into())
    } else {
        (200, Bytes::new())
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

const HOUR: Duration = Duration::from_secs(3_600);

async fn send(client: &mut DuplexStream, text: &str) {
    client.write_all(text.as_bytes()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_silently() {
    let went = serve(4_096, async |client| send(client, GET).await).await;
    assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 60));
    assert!(went.served.is_ok());
    assert_eq!(went.handle.ended(), Some(Ended::Idle));
    assert_eq!(went.handle.bytes_in(), GET.len() as u64);
    assert_eq!(went.handle.bytes_out(), went.answers.len() as u64);
    assert_eq!(went.handle.requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_never_spoke_is_idle() {
    let went = serve(4_096, async |_| ()).await;
    assert_eq!((went.statuses(), went.seconds()), (vec![], 60));
    assert!(went.served.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_not_idle_while_a_request_is_served() {
    let slow = "GET /200 HTTP/1.1\r\nHost: a\r\n\r\n";
    let went = serve(4_096, async |client| send(client, slow).await).await;
    assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 260));
    assert!(went.served.is_ok());
}

#[tokio::test(start_paused = true)]
async fn each_request_begins_idleness_anew() {
    let client = async |client: &mut DuplexStream| {
        for _ in 0..10 {
            send(client, GET).await;
            sleep(Duration::from_secs(50)).await;
        }
    };
    let went = serve(4_096, client).await;
    assert_eq!((went.statuses().len(), went.seconds()), (10, 510));
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_is_answered_with_408() {
    let client = async |client: &mut DuplexStream| {
        for byte in GET.bytes().take(9) {
            client.write_all(&[byte]).await.unwrap();
            sleep(Duration::from_secs(1)).await;
        }
    };
    let went = serve(4_096, client).await;
    assert_eq!((went.statuses(), went.seconds()), (vec!["408"], 10));
    assert!(went.answers.contains("\r\nconnection: close\r\n"));
    assert!(went.served.is_err());
    assert_eq!(went.handle.ended(), Some(Ended::Head));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stays_after_our_answer_is_left() {
    let client = async |client: &mut DuplexStream| {
        send(client, "GET").await;
        sleep(HOUR).await;
    };
    let went = serve(4_096, client).await;
    // 10 for the head, 1 to close.
    assert_eq!((went.statuses(), went.seconds()), (vec!["408"], 11));
}

#[tokio::test(start_paused = true)]
async fn a_violation_is_answered_with_a_problem() {
    let bad = "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
    let went = serve(4_096, async |client| send(client, bad).await).await;
    assert_eq!(
        went.answers.as_bytes(),
        violation_response(&Violation::HostDuplicate)
    );
    let (head, body) = went.answers.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{head}");
    assert!(
        head.contains(&format!("content-length: {}\r\n", body.len())),
        "{head}"
    );
    assert_eq!(
        body,
        "{\"type\":\"about:blank\",\"title\":\"Bad Request\",\"status\":400,\
         \"code\":\"bad_request\",\"detail\":\"there is more than one Host header\"}"
    );
    assert_eq!(
        went.handle.ended(),
        Some(Ended::Violation(Violation::HostDuplicate))
    );
    assert!(went.served.is_err());
}

#[tokio::test(start_paused = true)]
async fn tls_on_a_plain_port_is_answered() {
    let went = serve(4_096, async |client| send(client, "\x16\x03\x01").await).await;
    assert_eq!(
        went.answers.as_bytes(),
        violation_response(&Violation::RequestLine)
    );
}

#[tokio::test(start_paused = true)]
async fn what_came_before_a_violation_is_answered_first() {
    let get = "GET /5 HTTP/1.1\r\nHost: a\r\n\r\n";
    for bad in [
        "\0",
        "\n",
        "\r\r",
        "GET\0",
        "GET / HTTP/1.1\n",
        "GET / HTTP/1.1\r\n\r\n",
        "X: \n",
    ] {
        for split in [false, true] {
            let client = async |client: &mut DuplexStream| {
                if split {
                    send(client, get).await;
                    sleep(Duration::from_secs(1)).await;
                    send(client, bad).await;
                } else {
                    send(client, &format!("{get}{get}{bad}")).await;
                }
            };
            let went = serve(4_096, client).await;
            let expected = if split {
                vec!["200", "400"]
            } else {
                vec!["200", "200", "400"]
            };
            assert_eq!(went.statuses(), expected, "{bad:?}");
            assert!(matches!(went.handle.ended(), Some(Ended::Violation(_))));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_ours_waits_for_a_response_that_is_not_taken_yet() {
    let client = async |client: &mut DuplexStream| {
        send(client, "GET /large HTTP/1.1\r\nHost: a\r\n\r\nGET\0").await;
        sleep(Duration::from_secs(20)).await;
    };
    let went = serve(1_024, client).await;
    assert_eq!(went.statuses(), ["200", "400"]);
    let first = went.answers.split("HTTP/1.1 ").nth(1).unwrap();
    assert_eq!(first.split_once("\r\n\r\n").unwrap().1.len(), 1 << 20);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_body_fails_while_it_is_read() {
    let head = "PUT /read/0 HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n";
    let client = async |client: &mut DuplexStream| {
        send(client, head).await;
        for _ in 0..3 {
            send(client, "x").await;
            sleep(Duration::from_secs(14)).await;
        }
    };
    let went = serve(4_096, client).await;
    assert_eq!((went.statuses(), went.seconds()), (vec!["422"], 28 + 15));
    assert_eq!(went.handle.ended(), Some(Ended::Body));
}

#[tokio::test(start_paused = true)]
async fn a_body_that_nobody_reads_does_not_stall() {
    let head = "PUT /read/100 HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n";
    let client = async |client: &mut DuplexStream| {
        send(client, head).await;
        send(client, &"x".repeat(1_000_000)).await;
    };
    let went = serve(4_096, client).await;
    assert_eq!((went.statuses(), went.seconds()), (vec!["200"], 160));
    assert!(
        went.answers.ends_with("\r\n\r\n1000000"),
        "{}",
        went.answers
    );
}

#[tokio::test(start_paused = true)]
async fn a_violation_in_a_body_fails_the_body() {
    let head = "PUT /read/0 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for bad in ["1\nx\r\n0\r\n\r\n", "1\r\nxy", "0\r\nHost: b\r\n\r\n"] {
        let client =
            async |client: &mut DuplexStream| send(client, &format!("{GET}{head}{bad}")).await;
        let went = serve(4_096, client).await;
        assert_eq!(went.statuses(), ["200", "422"], "{bad:?}");
        assert!(matches!(went.handle.ended(), Some(Ended::Violation(_))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_is_left() {
    let client = async |client: &mut DuplexStream| {
        send(client, "GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut some = [0; 512];
        for _ in 0..3 {
            sleep(Duration::from_secs(29)).await;
            client.read_exact(&mut some).await.unwrap();
        }
        sleep(Duration::from_secs(31)).await;
    };
    let went = serve(1_024, client).await;
    assert_eq!(
        (went.handle.ended(), went.seconds()),
        (Some(Ended::Write), 3 * 29 + 30)
    );
    assert!(went.served.is_err());
}

#[tokio::test(start_paused = true)]
async fn pieces_go_out_whole_and_in_order() {
    let (mut near, far) = duplex(64);
    let (mut guarded, handle) = GuardedIo::new(far, Timeouts::default());
    let head = vec![b'h'; JOINED_BYTES_MAX - 2];
    for body in [&b""[..], b"b", b"bc", b"bcd"] {
        let mut expected = head.clone();
        expected.extend(body);
        let before = handle.bytes_out();
        let write = async {
            let mut sent = 0;
            while sent < expected.len() {
                let (head, body) = (
                    &head[sent.min(head.len())..],
                    &body[sent.saturating_sub(head.len())..],
                );
                let slices = [io::IoSlice::new(head), io::IoSlice::new(body)];
                sent += guarded.write_vectored(&slices).await.unwrap();
            }
        };
        let mut got = vec![0; expected.len()];
        let (_, read) = tokio::join!(write, near.read_exact(&mut got));
        read.unwrap();
        assert_eq!(got, expected);
        assert_eq!(handle.bytes_out() - before, expected.len() as u64);
    }
}

#[tokio::test(start_paused = true)]
async fn http_2_passes_through() {
    let (mut near, far) = duplex(4_096);
    let (mut guarded, handle) = GuardedIo::new(far, Timeouts::default());
    let sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\n\n\0";
    near.write_all(sent).await.unwrap();
    let mut got = vec![0; sent.len()];
    guarded.read_exact(&mut got).await.unwrap();
    assert_eq!(got, sent);
    let busy = handle.begin_request();
    let waited = tokio::time::timeout(HOUR, guarded.read(&mut got)).await;
    assert!(waited.is_err(), "not idle");
    drop(busy);
    assert_eq!(guarded.read(&mut got).await.unwrap(), 0);
    assert_eq!(handle.ended(), Some(Ended::Idle));
}

proptest! {
    /// Whatever comes after some good requests, and in whatever pieces: all of them are
    /// answered, whole, before anything else is said, and nothing is said after a refusal.
    #[test]
    fn answers_are_never_mixed(
        good in 0..4usize,
        bad in "[\r\n\0 :A-Za-z0-9]{0,20}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let stream = GET.replace("/0", "/1").repeat(good) + &bad;
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.push(stream.len());
        cuts.sort_unstable();
        let went = runtime.block_on(serve(128, async |client: &mut DuplexStream| {
            let mut from = 0;
            for cut in cuts {
                // It may have been refused, and not be read any more.
                let _ = client.write_all(&stream.as_bytes()[from..cut]).await;
                from = cut;
                sleep(Duration::from_millis(700)).await;
            }
        }));
        let statuses = went.statuses();
        prop_assert_eq!(statuses.iter().take_while(|status| **status == "200").count(), good);
        prop_assert!(statuses.len() <= good + 1, "{:?}", statuses);
    }
}
