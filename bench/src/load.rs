//! The client: some keep-alive connections, each with one request under way, as fast as the server
//! answers (a closed loop). One thread and one epoll set, so that it costs little and the same for
//! every server.
//!
//! ```text
//!  connect ─▶ warm-up ─▶ probe ─▶ measured ─▶ probe ─▶ drain: nothing new is sent
//! ```
//!
//! A connection that fails is counted and opened again; a server that fails without end stops the
//! run.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use rustix::event::epoll;
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::cores::{Cores, Layout, Priority};
use crate::response;

/// Longest response.
const BUFFER_BYTES: usize = 16 << 10;
/// Failures without a good answer between them, after which a server counts as gone.
const FAILURES_MAX: u32 = 1_000;
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// What was sent is waited for this long.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How often the clock is looked at while nothing comes.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// Latencies are told apart up to a minute, to three digits.
const LATENCY_MAX_NS: u64 = 60_000_000_000;
const LATENCY_DIGITS: u8 = 3;

/// What to ask, how often, for how long.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    pub(crate) host: String,
    /// What every answer must have as its body.
    pub(crate) expected: Vec<u8>,
    pub(crate) connections: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
    pub(crate) cores: Cores,
    pub(crate) layout: Layout,
}

/// What came of it. `P` is what the caller looks at before and after.
#[derive(Debug)]
pub(crate) struct Outcome<P> {
    pub(crate) before: P,
    pub(crate) after: P,
    pub(crate) elapsed: Duration,
    /// Answers that were as expected.
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    /// From the writing of a request to its whole answer, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
    /// The client's own.
    pub(crate) client_cpu: Duration,
    /// Whether the kernel let the client run at real-time priority, where that was wanted.
    pub(crate) real_time: bool,
}

/// Runs a plan on a thread of its own, bound to the plan's cores.
pub(crate) fn run<P: Send>(
    plan: &Plan,
    probe: impl Fn() -> Result<P> + Send,
) -> Result<Outcome<P>> {
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            plan.cores.bind()?;
            let real_time = plan.layout == Layout::Shared && Priority::PACE.take();
            Client::new(plan)?.run(plan, probe, real_time)
        });
        client
            .join()
            .unwrap_or_else(|_| bail!("the client panicked"))
    })
}

fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

struct Connection {
    stream: TcpStream,
    buffer: Box<[u8]>,
    filled: usize,
    /// When the request that is under way was written.
    sent: Option<Instant>,
}

struct Client {
    epoll: OwnedFd,
    address: SocketAddr,
    request: Vec<u8>,
    expected: Vec<u8>,
    connections: Vec<Connection>,
    latency: Histogram<u64>,
    errors: u64,
    failures_in_a_row: u32,
    /// Whether an answer is followed by the next request.
    going_on: bool,
}

impl Client {
    fn new(plan: &Plan) -> Result<Self> {
        let mut client = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            address: plan.address,
            request: format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", plan.host).into_bytes(),
            expected: plan.expected.clone(),
            connections: Vec::with_capacity(plan.connections),
            latency: Histogram::new_with_max(LATENCY_MAX_NS, LATENCY_DIGITS)?,
            errors: 0,
            failures_in_a_row: 0,
            going_on: true,
        };
        for index in 0..plan.connections {
            let stream = client.connect(index)?;
            client.connections.push(Connection {
                stream,
                buffer: vec![0; BUFFER_BYTES].into(),
                filled: 0,
                sent: None,
            });
        }
        Ok(client)
    }

    fn connect(&self, index: usize) -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_PATIENCE)
            .with_context(|| format!("connecting to {}", self.address))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let data = epoll::EventData::new_u64(index as u64);
        epoll::add(&self.epoll, &stream, data, epoll::EventFlags::IN)?;
        Ok(stream)
    }

    fn run<P>(
        mut self,
        plan: &Plan,
        probe: impl Fn() -> Result<P>,
        real_time: bool,
    ) -> Result<Outcome<P>> {
        let now = Instant::now();
        for index in 0..self.connections.len() {
            self.send(index, now)?;
        }
        self.until(now + plan.warm_up)?;
        self.latency.reset();
        self.errors = 0;
        let (cpu, before, began) = (thread_cpu(), probe()?, Instant::now());
        self.until(began + plan.measured)?;
        let (elapsed, after) = (began.elapsed(), probe()?);
        let client_cpu = thread_cpu().saturating_sub(cpu);
        let (latency, errors) = (self.latency.clone(), self.errors);
        self.going_on = false;
        self.until(Instant::now() + DRAIN_PATIENCE)?;
        Ok(Outcome {
            before,
            after,
            elapsed,
            requests: latency.len(),
            errors,
            latency,
            client_cpu,
            real_time,
        })
    }

    /// Handles what comes until then, or until nothing more is under way.
    fn until(&mut self, deadline: Instant) -> Result<()> {
        let mut events = Vec::with_capacity(self.connections.len());
        while Instant::now() < deadline {
            if !self.going_on && self.connections.iter().all(|one| one.sent.is_none()) {
                break;
            }
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&TICK),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for answers"),
            }
            for event in &events {
                // `data` lies unaligned in the kernel's record.
                let data = event.data;
                self.ready(usize::try_from(data.u64())?)?;
            }
        }
        Ok(())
    }

    fn ready(&mut self, index: usize) -> Result<()> {
        match self.receive(index) {
            Ok(None) => Ok(()),
            Ok(Some(now)) => {
                self.failures_in_a_row = 0;
                if self.going_on {
                    self.send(index, now)
                } else {
                    Ok(())
                }
            }
            Err(error) => self.failed(index, error),
        }
    }

    /// Reads what is there. The time at which the answer was whole, if it is.
    fn receive(&mut self, index: usize) -> Result<Option<Instant>> {
        let connection = &mut self.connections[index];
        let count = match connection
            .stream
            .read(&mut connection.buffer[connection.filled..])
        {
            Ok(0) => bail!("the connection was closed"),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        connection.filled += count;
        let bytes = &connection.buffer[..connection.filled];
        let Some(response) = response::parse(bytes)? else {
            if connection.filled == BUFFER_BYTES {
                bail!("an answer longer than {BUFFER_BYTES} bytes");
            }
            return Ok(None);
        };
        if response.status != 200 || *response.body != *self.expected {
            bail!(
                "status {}, {} bytes of body",
                response.status,
                response.body.len()
            );
        }
        if response.length != connection.filled || response.close {
            bail!("more than an answer, or the last one of this connection");
        }
        connection.filled = 0;
        let now = Instant::now();
        if let Some(sent) = connection.sent.take() {
            let took = u64::try_from((now - sent).as_nanos())?;
            self.latency.saturating_record(took);
        }
        Ok(Some(now))
    }

    fn send(&mut self, index: usize, now: Instant) -> Result<()> {
        let connection = &mut self.connections[index];
        connection.sent = Some(now);
        match connection.stream.write(&self.request) {
            Ok(count) if count == self.request.len() => Ok(()),
            Ok(_) => self.failed(index, anyhow::anyhow!("a request was written in part")),
            Err(error) => self.failed(index, error.into()),
        }
    }

    /// Counts a failure and begins again on a new connection.
    fn failed(&mut self, index: usize, error: anyhow::Error) -> Result<()> {
        self.errors += 1;
        self.failures_in_a_row += 1;
        if self.failures_in_a_row > FAILURES_MAX {
            return Err(error.context(format!("{FAILURES_MAX} failures in a row, the last")));
        }
        // Closing the old one takes it out of the set.
        let stream = self.connect(index)?;
        let connection = &mut self.connections[index];
        connection.stream = stream;
        connection.filled = 0;
        connection.sent = None;
        if self.going_on {
            self.send(index, Instant::now())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    /// A server that answers `answers` requests on each connection and then closes it.
    fn server(answers: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // Both kinds of thread end with the test's process at the latest.
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut request = [0; 1024];
                    for _ in 0..answers {
                        if !matches!(stream.read(&mut request), Ok(1..)) {
                            return;
                        }
                        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
                        if stream.write_all(answer).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn load(address: SocketAddr, expected: &[u8], measured: Duration) -> Result<Outcome<()>> {
        let plan = Plan {
            address,
            host: "test".to_owned(),
            expected: expected.to_vec(),
            connections: 4,
            warm_up: Duration::from_millis(20),
            measured,
            cores: Cores::allowed().unwrap(),
            layout: Layout::Split,
        };
        run(&plan, || Ok(()))
    }

    #[test]
    fn good_answers_are_counted_and_timed() {
        let outcome = load(server(usize::MAX), b"hi", SHORT).unwrap();
        assert!(outcome.requests > 0);
        assert_eq!(outcome.errors, 0);
        assert_eq!(outcome.latency.len(), outcome.requests);
        assert!(outcome.elapsed >= SHORT);
        assert!(outcome.latency.max() < 10_000_000_000);
    }

    #[test]
    fn closed_connections_are_errors_and_are_opened_again() {
        let outcome = load(server(3), b"hi", SHORT).unwrap();
        assert!(outcome.requests > 0 && outcome.errors > 0);
        // Three good ones, then the end, on each connection.
        assert!(outcome.requests <= 3 * (outcome.errors + 8));
    }

    #[test]
    fn a_server_that_only_answers_wrongly_stops_the_run() {
        // Ends long before its time.
        let result = load(server(usize::MAX), b"ho", Duration::from_secs(60));
        let error = result.map(|outcome| outcome.errors).unwrap_err();
        assert!(format!("{error:#}").contains("status 200"), "{error:#}");
    }
}
