//! TLS on both listeners: who is answered, by which certificate, and what is refused.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use insula_tests::wait::holds;
use insula_tests::{Connection, TestHost, guests, tools, until};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, version};
use tempfile::TempDir;

const WEB: &str = "web.a.localhost";

/// An authority, and the directory with what it signed.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority");
        let dir = TempDir::with_prefix("insula-test-").expect("a directory");
        fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("a file");
        Self { issuer, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A certificate and its key in PEM, and the former as it goes over the wire.
    fn sign(&self, names: &[&str]) -> (String, String, CertificateDer<'static>) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).expect("parameters");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (
            certificate.pem(),
            key.serialize_pem(),
            certificate.der().clone(),
        )
    }

    /// Puts a new certificate where a host looks for it.
    fn issue(&self, name: &str, names: &[&str]) -> CertificateDer<'static> {
        let (certificate, key, der) = self.sign(names);
        replace(&self.path(&format!("{name}.pem")), &certificate);
        replace(&self.path(&format!("{name}.key")), &key);
        der
    }

    fn client(&self, versions: &[&'static rustls::SupportedProtocolVersion]) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a root");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth()
    }

    /// A connection for a name, after its handshake.
    fn connect(&self, to: SocketAddr, name: &str) -> io::Result<Secure> {
        Secure::open(to, name, self.client(&[&version::TLS13]))
    }
}

/// As certificates should be replaced: at once.
fn replace(path: &Path, content: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, content).expect("a file");
    fs::rename(&beside, path).expect("a file");
}

/// A connection over TLS that speaks HTTP/1.1.
struct Secure(StreamOwned<ClientConnection, TcpStream>);

impl Secure {
    fn open(to: SocketAddr, name: &str, config: ClientConfig) -> io::Result<Self> {
        let tcp = TcpStream::connect(to)?;
        tcp.set_read_timeout(Some(Duration::from_secs(20)))?;
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let tls = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(tls, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self(stream))
    }

    fn certificate(&self) -> CertificateDer<'static> {
        let chain = self.0.conn.peer_certificates().expect("a certificate");
        chain[0].clone().into_owned()
    }

    /// The status and the whole answer.
    fn get(&mut self, host: &str, target: &str) -> io::Result<(u16, String)> {
        write!(self.0, "GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n")?;
        self.0.flush()?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n\r\n") {
            self.0.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&answer).to_lowercase();
        let length = head.split("content-length: ").nth(1).expect("a length");
        let length = length.lines().next().and_then(|text| text.parse().ok());
        let mut body = vec![0; length.expect("a length")];
        self.0.read_exact(&mut body)?;
        answer.extend(body);
        let status = head
            .split_whitespace()
            .nth(1)
            .and_then(|text| text.parse().ok());
        Ok((
            status.expect("a status"),
            String::from_utf8_lossy(&answer).into_owned(),
        ))
    }
}

/// A host whose services answer over TLS, with the service `web` of two tenants.
fn host(authority: &Authority) -> TestHost {
    authority.issue("web", &["*.a.localhost", "*.b.localhost"]);
    let host = TestHost::plan()
        .arg("--tls-cert", authority.path("web.pem").display())
        .arg("--tls-key", authority.path("web.key").display())
        .start();
    for tenant in ["a", "b"] {
        let _ = host.tenant(tenant).create().service("web").deploy("echo");
    }
    host
}

#[test]
fn services_answer_over_tls_and_to_the_name_that_was_asked_for() {
    let authority = Authority::new();
    let host = host(&authority);
    let mut connection = authority.connect(host.ingress(), WEB).expect("TLS 1.3");
    let (status, text) = connection.get(WEB, "/info").expect("an answer");
    assert_eq!(status, 200, "{text}");
    assert!(text.contains(r#""x-forwarded-proto":["https"]"#), "{text}");
    assert!(
        text.contains("https://web.a.localhost"),
        "the guest knows: {text}"
    );
    let (status, text) = connection.get("web.b.localhost", "/").expect("an answer");
    assert_eq!(
        status, 421,
        "another tenant's host on this connection: {text}"
    );
    let (status, _) = connection
        .get("WEB.A.localhost:8443", "/info")
        .expect("an answer");
    assert_eq!(status, 200, "the same name, written otherwise");

    let older = authority.client(&[&version::TLS12]);
    let mut older = Secure::open(host.ingress(), WEB, older).expect("TLS 1.2");
    assert_eq!(older.get(WEB, "/info").expect("an answer").0, 200);

    let url = host.admin().get("/v1/tenants/a/services/web")["url"].clone();
    let port = host.ingress().port();
    assert_eq!(url, format!("https://{WEB}:{port}/"));

    // Whoever speaks no TLS gets no answer of a service.
    let mut plain = Connection::open(host.ingress()).expect("a connection");
    plain
        .raw(b"GET / HTTP/1.1\r\nhost: web.a.localhost\r\n\r\n")
        .expect("sent");
    let rest = plain.rest();
    assert!(
        !rest.starts_with(b"HTTP/"),
        "{}",
        String::from_utf8_lossy(&rest)
    );
}

#[test]
fn http_2_is_agreed_on_in_the_handshake() {
    let authority = Authority::new();
    let host = host(&authority);
    let mut config = authority.client(&[&version::TLS13]);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let statuses = runtime.expect("a runtime").block_on(async {
        let tcp = tokio::net::TcpStream::connect(host.ingress())
            .await
            .expect("a connection");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from(WEB).expect("a name");
        let stream = connector.connect(name, tcp).await.expect("TLS");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = hyper_util::rt::TokioExecutor::new();
        let handshake = hyper::client::conn::http2::handshake(executor, io).await;
        let (mut sender, connection) = handshake.expect("HTTP/2");
        let connection = tokio::spawn(connection);
        let mut statuses = Vec::new();
        for host in [WEB, "web.b.localhost", WEB] {
            let request = hyper::Request::get(format!("https://{host}/info"))
                .body(http_body_util::Empty::<bytes::Bytes>::new())
                .expect("a request");
            let answer = sender.send_request(request).await.expect("an answer");
            statuses.push(answer.status().as_u16());
            let _ = answer.into_body().collect().await.expect("a body");
        }
        connection.abort();
        statuses
    });
    assert_eq!(
        statuses,
        [200, 421, 200],
        "a client may open another connection for the second"
    );
}

#[test]
fn a_new_certificate_is_used_without_a_restart_and_a_bad_one_is_not() {
    let authority = Authority::new();
    let host = host(&authority);
    let now = || {
        let connection = authority.connect(host.ingress(), WEB);
        connection.expect("a handshake").certificate()
    };
    let first = now();
    let mut standing = authority.connect(host.ingress(), WEB).expect("a handshake");
    let wanted = authority.issue("web", &["*.a.localhost"]);
    until(
        Duration::from_secs(10),
        "the new certificate is used",
        || holds(now() == wanted, "it is the old one"),
    );
    assert_ne!(first, wanted);
    let answer = standing.get(WEB, "/info").expect("an answer");
    assert_eq!(answer.0, 200, "connections go on");

    // A key that belongs to another certificate, and a file that is none.
    let (_, other_key, _) = authority.sign(&["*.a.localhost"]);
    for (file, content) in [("web.key", other_key.as_str()), ("web.pem", "nonsense")] {
        let told = host.said().matches("stays the old one").count();
        replace(&authority.path(file), content);
        until(Duration::from_secs(10), "it is refused", || {
            let now = host.said().matches("stays the old one").count();
            holds(now > told, host.said())
        });
        assert_eq!(now(), wanted, "{file}");
    }
    let mended = authority.issue("web", &["*.a.localhost"]);
    until(Duration::from_secs(10), "the mended one is used", || {
        holds(now() == mended, "it is the old one")
    });
}

fn insula(args: &[&str]) -> Command {
    let mut command = Command::new(guests::insula());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("INSULA_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

#[test]
fn the_admin_api_speaks_tls_1_3_and_the_program_checks_its_certificate() {
    let authority = Authority::new();
    authority.issue("admin", &["127.0.0.1", "localhost"]);
    let host = TestHost::plan()
        .arg("--admin", "0.0.0.0:0")
        .arg("--admin-tls-cert", authority.path("admin.pem").display())
        .arg("--admin-tls-key", authority.path("admin.key").display())
        .start();
    let address = SocketAddr::from(([127, 0, 0, 1], host.admin_address().port()));
    let connect = |version| Secure::open(address, "127.0.0.1", authority.client(&[version]));
    let mut connection = connect(&version::TLS13).expect("TLS 1.3");
    assert_eq!(connection.get("x", "/healthz").expect("an answer").0, 200);
    assert_eq!(connection.get("x", "/v1/host").expect("an answer").0, 401);
    // They name every tenant, and this listener is not for this machine alone.
    assert_eq!(connection.get("x", "/metrics").expect("an answer").0, 401);
    let known = format!("x\r\nauthorization: Bearer {}", host.token());
    assert_eq!(
        connection.get(&known, "/metrics").expect("an answer").0,
        200
    );
    assert!(
        connect(&version::TLS12).is_err(),
        "TLS 1.2 is for clients of services"
    );

    let url = format!("https://{address}");
    let token = host.token();
    let (right, wrong) = (authority.path("ca.pem"), Authority::new());
    let list = |ca: &Path| {
        let ca = ca.display().to_string();
        let args = [
            "tenants",
            "list",
            "--admin",
            &url,
            "--token",
            &token,
            "--ca-cert",
            &ca,
        ];
        tools::run(&mut insula(&args))
    };
    let done = list(&right);
    assert!(done.status.success(), "{}", tools::said(&done));
    let refused = list(&wrong.path("ca.pem"));
    assert_eq!(refused.status.code(), Some(1), "{}", tools::said(&refused));
    let other_name = format!("https://[::1]:{}", address.port());
    let args = ["tenants", "list", "--admin", &other_name, "--token", &token];
    let refused = tools::run(&mut insula(&args));
    assert_eq!(refused.status.code(), Some(1), "{}", tools::said(&refused));
}

#[test]
fn without_a_certificate_the_admin_api_stays_on_loopback() {
    let dir = TempDir::with_prefix("insula-test-").expect("a directory");
    let data = dir.path().join("data").display().to_string();
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8081"] {
        let args = [
            "serve",
            "--data",
            &data,
            "--listen",
            "127.0.0.1:0",
            "--admin",
            address,
        ];
        let refused = tools::run(&mut insula(&args));
        let said = tools::said(&refused);
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("needs a certificate"), "{said}");
    }
    assert!(!Path::new(&data).exists(), "nothing was begun");
}
