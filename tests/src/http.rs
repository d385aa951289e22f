//! A blocking HTTP/1.1 client over a plain socket.
//!
//! It is not one of the stacks that the host is made of, and it shows what is on the wire: where
//! a body was cut, which chunk came when, what the trailers were. It accepts only what is framed
//! well, so that a host that answers nonsense fails its test.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// How long a client waits for the next byte, unless a test says otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

/// Names in lower case, in the order in which they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a header that stands once; `None` where there is none.
    ///
    /// # Panics
    /// When it stands more than once.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut values = self.0.iter().filter(|(known, _)| known == name);
        let first = values.next();
        assert!(values.next().is_none(), "{name} stands twice in {self:?}");
        first.map(|(_, value)| value.as_str())
    }

    /// All values of a header.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let values = self.0.iter().filter(move |(known, _)| known == name);
        values.map(|(_, value)| value.as_str())
    }
}

/// The head of a response.
#[derive(Debug, Clone)]
pub struct Head {
    /// The status code.
    pub status: u16,
    /// The header lines.
    pub headers: Headers,
}

/// A whole response.
#[derive(Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The header lines.
    pub headers: Headers,
    /// The body, without its framing.
    pub body: Vec<u8>,
    /// What followed a chunked body.
    pub trailers: Headers,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = &self.body[..self.body.len().min(2_000)];
        f.debug_struct("Answer")
            .field("status", &self.status)
            .field("headers", &self.headers)
            .field("body", &String::from_utf8_lossy(body))
            .field("trailers", &self.trailers)
            .finish()
    }
}

/// What `insula-usage` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Fuel that the request burned.
    pub fuel: u64,
    /// CPU time that it was charged.
    pub cpu_us: u64,
    /// The most memory that its instance had.
    pub memory_peak: u64,
    /// The version that answered.
    pub version: u64,
}

impl Usage {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let mut fields = text.split(';').filter_map(|field| field.split_once('='));
            let (_, value) = fields.find(|(known, _)| *known == name)?;
            value.parse().ok()
        };
        Some(Self {
            fuel: field("fuel")?,
            cpu_us: field("cpu_us")?,
            memory_peak: field("memory_peak")?,
            version: field("version")?,
        })
    }
}

impl Answer {
    /// A header that stands once.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// The body as text.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap_or_else(|_| panic!("no text: {self:?}"))
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// What `insula-usage` says, in the head or in the trailers.
    ///
    /// # Panics
    /// When it is missing or malformed.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let here = self.headers.get("insula-usage");
        let text = here.or_else(|| self.trailers.get("insula-usage"));
        let text = text.unwrap_or_else(|| panic!("no insula-usage: {self:?}"));
        Usage::parse(text).unwrap_or_else(|| panic!("not a usage: {text}"))
    }

    /// The `code` of a problem, after everything that a problem must have was looked at.
    ///
    /// # Panics
    /// When it is not a well-formed problem.
    pub fn problem(&self) -> String {
        let kind = self.header("content-type").unwrap_or_default();
        assert!(
            kind.starts_with("application/problem+json"),
            "not a problem but {kind:?}: {self:?}"
        );
        let problem = self.json();
        assert_eq!(problem["status"], self.status, "{problem}");
        assert!(self.status >= 400, "{problem}");
        assert!(problem["type"].is_string(), "{problem}");
        let words = |field: &str| problem[field].as_str().is_some_and(|text| !text.is_empty());
        assert!(words("title"), "a problem has a title: {problem}");
        assert!(words("code"), "a problem has a code: {problem}");
        problem["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Title and detail of a problem, together.
    #[must_use]
    pub fn problem_words(&self) -> String {
        let problem = self.json();
        let words = |field: &str| problem[field].as_str().unwrap_or_default().to_owned();
        format!(
            "{} {} {}",
            words("title"),
            words("detail"),
            problem["errors"]
        )
    }
}

/// A response that ended before its end.
#[derive(Debug)]
pub struct Broken {
    /// The head, if it came.
    pub head: Option<Head>,
    /// What came of the body.
    pub body: Vec<u8>,
    /// What was wrong.
    pub error: io::Error,
}

/// A request being written down.
#[derive(Debug, Clone)]
#[must_use]
pub struct Request {
    to: SocketAddr,
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Body,
    patience: Duration,
}

#[derive(Debug, Clone)]
enum Body {
    None,
    Sized(Vec<u8>),
    Chunked(Vec<Vec<u8>>),
}

impl Request {
    /// A request to `to` for `host`.
    pub fn new(to: SocketAddr, host: &str, method: &str, target: &str) -> Self {
        Self {
            to,
            method: method.to_owned(),
            target: target.to_owned(),
            headers: vec![("host".to_owned(), host.to_owned())],
            body: Body::None,
            patience: PATIENCE,
        }
    }

    /// One more header line.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// The body, with its length in the head.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Body::Sized(body.into());
        self
    }

    /// The body, in these chunks.
    pub fn chunks(mut self, chunks: impl IntoIterator<Item = impl Into<Vec<u8>>>) -> Self {
        self.body = Body::Chunked(chunks.into_iter().map(Into::into).collect());
        self
    }

    /// How long to wait for the next byte of the answer.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The head as it goes on the wire.
    #[must_use]
    pub fn head_bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        match &self.body {
            Body::None => {}
            Body::Sized(body) => head.push_str(&format!("content-length: {}\r\n", body.len())),
            Body::Chunked(_) => head.push_str("transfer-encoding: chunked\r\n"),
        }
        head.push_str("\r\n");
        head.into_bytes()
    }

    /// A connection to where it goes.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(&self) -> io::Result<Connection> {
        let connection = Connection::open(self.to)?;
        connection.patience(self.patience);
        Ok(connection)
    }

    /// Sends it on a connection of its own and reads the whole answer.
    ///
    /// # Errors
    /// [`Broken`], when there is no whole answer.
    pub fn try_send(self) -> Result<Answer, Broken> {
        let connection = self.connect().map_err(|error| Broken {
            head: None,
            body: Vec::new(),
            error,
        });
        connection?.exchange(&self)
    }

    /// Sends it on a connection of its own and reads the whole answer.
    ///
    /// # Panics
    /// When there is no whole answer.
    pub fn send(self) -> Answer {
        let line = format!("{} {} {:?}", self.method, self.target, self.headers);
        self.try_send()
            .unwrap_or_else(|broken| panic!("{line}: {broken:?}"))
    }

    /// Sends it, and reads no further than the head of the answer.
    ///
    /// # Panics
    /// When there is no head.
    pub fn open(self) -> Streaming {
        let mut connection = self.connect().expect("a connection");
        connection.write(&self).expect("a request that can be sent");
        connection.streaming(&self.method)
    }
}

/// A response whose body is still coming.
#[derive(Debug)]
pub struct Streaming {
    /// Its head.
    pub head: Head,
    /// Its connection, for whoever sends the rest of the request meanwhile.
    pub connection: Connection,
    framing: Framing,
}

impl Streaming {
    /// The next piece, as the host framed it; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks, or the framing.
    pub fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.connection.piece(&mut self.framing)
    }

    /// What followed the body; complete after its end.
    #[must_use]
    pub fn trailers(&self) -> Headers {
        match &self.framing {
            Framing::Ended(trailers) => trailers.clone(),
            _ => Headers::default(),
        }
    }
}

/// How the end of a body is found.
#[derive(Debug)]
enum Framing {
    Length(u64),
    Chunked,
    ToTheEnd,
    Ended(Headers),
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
}

/// Sends on a connection that somebody else reads from.
#[derive(Debug)]
pub struct Sender(TcpStream);

impl Sender {
    /// Sends bytes as they are.
    ///
    /// # Errors
    /// When the host does not take them.
    pub fn write_all(mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn open(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// How long to wait for the next byte.
    ///
    /// # Panics
    /// When it is zero.
    pub fn patience(&self, patience: Duration) {
        self.reader
            .get_ref()
            .set_read_timeout(Some(patience))
            .expect("a span above zero");
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// When the host does not take them.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// A second handle that only sends, for another thread.
    ///
    /// # Panics
    /// When the system has no more handles.
    #[must_use]
    pub fn second_writer(&self) -> Sender {
        Sender(self.reader.get_ref().try_clone().expect("a second handle"))
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn finish(&mut self) -> io::Result<()> {
        self.reader.get_ref().shutdown(Shutdown::Write)
    }

    /// All that the host still says until it closes; a reset counts as its end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // What came before an error is in `rest`.
        let _ = self.reader.read_to_end(&mut rest);
        rest
    }

    /// Whether the host has closed, or said what nobody asked for; without waiting.
    pub fn is_closed_already(&mut self) -> bool {
        let stream = self.reader.get_ref();
        let mut byte = [0];
        let looked = stream
            .set_nonblocking(true)
            .and_then(|()| stream.peek(&mut byte));
        let open = matches!(looked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        let back = self.reader.get_ref().set_nonblocking(false);
        !open || back.is_err() || !self.reader.buffer().is_empty()
    }

    /// Whether the host closes without another byte.
    pub fn is_closed(&mut self) -> bool {
        match self.reader.fill_buf() {
            Ok(bytes) => bytes.is_empty(),
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    /// Sends a request, with its body.
    ///
    /// # Errors
    /// When the host does not take it.
    pub fn write(&mut self, request: &Request) -> io::Result<()> {
        let mut bytes = request.head_bytes();
        match &request.body {
            Body::None => {}
            Body::Sized(body) => bytes.extend_from_slice(body),
            Body::Chunked(chunks) => {
                for chunk in chunks {
                    bytes.extend(Self::chunk(chunk));
                }
                bytes.extend_from_slice(b"0\r\n\r\n");
            }
        }
        self.raw(&bytes)
    }

    /// One chunk of a body as it goes on the wire.
    #[must_use]
    pub fn chunk(data: &[u8]) -> Vec<u8> {
        [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// [`Broken`], when there is no whole answer.
    pub fn exchange(&mut self, request: &Request) -> Result<Answer, Broken> {
        // A host that has heard enough answers before it has read all.
        let sent = self.write(request);
        match (self.answer(&request.method), sent) {
            (Err(broken), Err(error)) if broken.head.is_none() => Err(Broken { error, ..broken }),
            (answer, _) => answer,
        }
    }

    /// Reads a whole answer to a request of this method.
    ///
    /// # Errors
    /// [`Broken`], when it ends before its end.
    pub fn answer(&mut self, method: &str) -> Result<Answer, Broken> {
        let head = self.head().map_err(|error| Broken {
            head: None,
            body: Vec::new(),
            error,
        })?;
        let mut body = Vec::new();
        let trailers = self.body(method, &head, &mut body);
        match trailers {
            Ok(trailers) => Ok(Answer {
                status: head.status,
                headers: head.headers,
                body,
                trailers,
            }),
            Err(error) => Err(Broken {
                head: Some(head),
                body,
                error,
            }),
        }
    }

    fn body(&mut self, method: &str, head: &Head, body: &mut Vec<u8>) -> io::Result<Headers> {
        let mut framing = Framing::of(method, head)?;
        while let Some(piece) = self.piece(&mut framing)? {
            body.extend_from_slice(&piece);
        }
        match framing {
            Framing::Ended(trailers) => Ok(trailers),
            _ => Ok(Headers::default()),
        }
    }

    /// Reads the head of an answer and leaves its body where it is.
    ///
    /// # Panics
    /// When there is no well-formed head.
    #[must_use]
    pub fn streaming(mut self, method: &str) -> Streaming {
        let head = self.head().expect("a head");
        let framing = Framing::of(method, &head).expect("a body that is framed well");
        Streaming {
            head,
            connection: self,
            framing,
        }
    }

    fn line(&mut self) -> io::Result<String> {
        const LINE_MAX: u64 = 256 << 10;
        let mut line = Vec::new();
        (&mut self.reader)
            .take(LINE_MAX)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = line.strip_suffix(b"\r\n").ok_or_else(|| {
            wrong(format!(
                "a line without CRLF: {:?}",
                String::from_utf8_lossy(&line)
            ))
        })?;
        String::from_utf8(text.to_vec()).map_err(|_| wrong("a line that is not UTF-8"))
    }

    fn fields(&mut self) -> io::Result<Headers> {
        let mut headers = Headers::default();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(headers);
            }
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| wrong(format!("a header without colon: {line:?}")))?;
            let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
            if name.is_empty() || !name.chars().all(token) {
                return Err(wrong(format!("a header's name: {name:?}")));
            }
            headers
                .0
                .push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// Reads one head.
    ///
    /// # Errors
    /// When the connection ends or what comes is none.
    pub fn head(&mut self) -> io::Result<Head> {
        let line = self.line()?;
        let status = line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or_else(|| wrong(format!("a status line: {line:?}")))?;
        let headers = self.fields()?;
        // Nobody asked for 100-continue: any other is part of the answer.
        if status == 100 {
            return self.head();
        }
        Ok(Head { status, headers })
    }

    fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Vec<u8>>> {
        const PIECE_MAX: usize = 64 << 10;
        match framing {
            Framing::Ended(_) => Ok(None),
            Framing::Length(0) => {
                *framing = Framing::Ended(Headers::default());
                Ok(None)
            }
            Framing::Length(left) => {
                let some = usize::try_from(*left).unwrap_or(PIECE_MAX).min(PIECE_MAX);
                let piece = self.some(some)?;
                if piece.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *left -= piece.len() as u64;
                Ok(Some(piece))
            }
            Framing::ToTheEnd => {
                let piece = self.some(PIECE_MAX)?;
                if piece.is_empty() {
                    *framing = Framing::Ended(Headers::default());
                    return Ok(None);
                }
                Ok(Some(piece))
            }
            Framing::Chunked => {
                let line = self.line()?;
                let size = line.split(';').next().unwrap_or_default();
                let size = usize::from_str_radix(size, 16)
                    .map_err(|_| wrong(format!("a chunk's size: {line:?}")))?;
                if size == 0 {
                    *framing = Framing::Ended(self.fields()?);
                    return Ok(None);
                }
                let mut piece = vec![0; size];
                self.reader.read_exact(&mut piece)?;
                let mut end = [0; 2];
                self.reader.read_exact(&mut end)?;
                if end != *b"\r\n" {
                    return Err(wrong("a chunk without an end"));
                }
                Ok(Some(piece))
            }
        }
    }

    fn some(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let mut piece = vec![0; most];
        let length = self.reader.read(&mut piece)?;
        piece.truncate(length);
        Ok(piece)
    }
}

impl Framing {
    /// RFC 9112, 6.3; a response with both ways of framing, or with a way that is not
    /// understood, is refused.
    fn of(method: &str, head: &Head) -> io::Result<Self> {
        if method == "HEAD" || head.status == 204 || head.status == 304 {
            return Ok(Self::Length(0));
        }
        let coding = head.headers.get("transfer-encoding");
        let length = head.headers.get("content-length");
        match (coding, length) {
            (Some("chunked"), None) => Ok(Self::Chunked),
            (None, Some(length)) => {
                let length = length.parse();
                length
                    .map(Self::Length)
                    .map_err(|_| wrong("a Content-Length that is none"))
            }
            (None, None) => Ok(Self::ToTheEnd),
            _ => Err(wrong(format!("two framings: {head:?}"))),
        }
    }
}
