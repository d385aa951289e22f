//! Takes of one thing without end, and keeps it: which, says the path. Expected:
//! `trap` by the host's limit on that thing, or what the case says; see
//! `tests/tests/e2e/hostile.rs`.

#![forbid(unsafe_code)]

use std::hint::black_box;

use wasip2::cli::environment::{get_arguments, get_environment};
use wasip2::cli::stdin::get_stdin;
use wasip2::clocks::monotonic_clock;
use wasip2::filesystem::preopens::get_directories;
use wasip2::filesystem::types::{DescriptorFlags, OpenFlags, PathFlags};
use wasip2::http::types::{Fields, IncomingRequest, OutgoingResponse, ResponseOutparam};
use wasip2::io::poll;
use wasip2::random::random;

/// More than any host gives of anything.
const MANY: usize = 1_000_000;
/// 292 years.
const WAIT_NS: u64 = 1 << 63;

struct Component;

impl wasip2::exports::http::incoming_handler::Guest for Component {
    fn handle(request: IncomingRequest, to: ResponseOutparam) {
        let path = request.path_with_query().unwrap_or_default();
        match path.as_str() {
            "/resources" => keep(Fields::new),
            "/pollables" => keep(|| monotonic_clock::subscribe_duration(WAIT_NS)),
            "/streams" => keep(get_stdin),
            "/outgoing" => keep(|| OutgoingResponse::new(Fields::new())),
            "/directories" => directories(),
            "/preopens" => keep(get_directories),
            "/environment" => keep(get_environment),
            "/arguments" => loop {
                black_box(get_arguments());
            },
            "/append" => append(),
            "/list" => {
                let entry = ("x-flood".to_owned(), vec![b'x'; 1024]);
                black_box(Fields::from_list(&vec![entry; 16 << 10])).ok();
            }
            "/poll" => {
                let never = monotonic_clock::subscribe_duration(WAIT_NS);
                black_box(poll::poll(&vec![&never; MANY]));
            }
            "/random" => {
                black_box(random::get_random_bytes(1 << 32));
            }
            "/stdin" => loop {
                black_box(get_stdin().blocking_read(1)).ok();
            },
            "/message" => panic!("{}", "x".repeat(1 << 20)),
            "/unread" => answer(to),
            "/unfinished" => {
                let response = OutgoingResponse::new(Fields::new());
                let body = response.body();
                ResponseOutparam::set(to, Ok(response));
                std::mem::forget(body);
            }
            other => panic!("{other}"),
        }
    }
}

fn answer(to: ResponseOutparam) {
    ResponseOutparam::set(to, Ok(OutgoingResponse::new(Fields::new())));
}

/// Opens the volume that it has, again and again.
fn directories() {
    let volumes = get_directories();
    let (volume, _) = volumes.first().expect("a volume");
    let flags = (OpenFlags::DIRECTORY, DescriptorFlags::READ);
    keep(|| {
        let opened = volume.open_at(PathFlags::empty(), ".", flags.0, flags.1);
        opened.expect("one more directory")
    });
}

fn keep<T>(make: impl Fn() -> T) {
    black_box((0..MANY).map(|_| make()).collect::<Vec<_>>());
}

/// Of an empty value, so that only names count.
fn append() {
    let fields = Fields::new();
    for _ in 0..MANY {
        // Goes on although the host may have had enough.
        let _ = fields.append("x", b"");
    }
}

wasip2::http::proxy::export!(Component);
