//! A control plane with a data plane that only takes notes, and a small HTTP client.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::mpsc;

use crate::config::DEFAULT_CEILING;
use crate::control::{AtEnd, Compiler, ControlConfig, ControlPlane, MachinesConfig, listen, start};
use crate::machines::network::{NetworkConfig, PortRange};
use crate::messages::{
    Collected, Command, DataEvent, FromData, LogRecord, Refusal, ToData, UsageDelta,
};
use crate::state::{DataDir, EngineName};

/// Stands for the compiler child: what the component says decides how it ends.
const COMPILER: &str = r#"
content=$(cat)
case "$content" in
  bad*) echo noise >&2; echo '{"code":"wrong_world","detail":"no handler"}' >&2; exit 3;;
  crash*) kill -9 $$;;
  slow*) exec sleep 60;;
  broken*) echo secret >&2; exit 7;;
  *) printf 'compiled:%s' "$content";;
esac"#;

/// What the fake data plane knows and does.
#[derive(Debug, Default)]
pub(super) struct Fake {
    /// Commands in the order of their coming.
    pub(super) seen: Mutex<Vec<String>>,
    /// Delivered with the next collection.
    pub(super) usage: Mutex<Vec<UsageDelta>>,
    /// Delivered with the next collection, too.
    pub(super) conduct: Mutex<Vec<crate::messages::VersionDelta>>,
    /// Services with an active version are refused.
    pub(super) refuse: std::sync::atomic::AtomicBool,
}

impl Fake {
    fn answer(&self, command: Command) -> FromData {
        let seq = command.seq;
        let mut result = Ok(());
        let note = match command.body {
            ToData::Collect { .. } => {
                let usage = std::mem::take(&mut *self.usage.lock().unwrap());
                let metrics = "# TYPE fake gauge\nfake 1\n".to_owned();
                return FromData::Collected {
                    seq,
                    collected: Box::new(Collected {
                        usage,
                        versions: std::mem::take(&mut *self.conduct.lock().unwrap()),
                        broken: Vec::new(),
                        volumes: Vec::new(),
                        metrics: Some(metrics),
                    }),
                };
            }
            ToData::Tenant { name, .. } => format!("tenant {name}"),
            ToData::DropTenant(id) => format!("drop tenant {id}"),
            ToData::Volume { id, .. } => format!("volume {id}"),
            ToData::DropVolume(id) => format!("drop volume {id}"),
            ToData::Recount => "recount".to_owned(),
            ToData::CopyVolume { from, .. } => format!("copy volume {from}"),
            ToData::DropService(id) => format!("drop service {id}"),
            ToData::Open => "open".to_owned(),
            ToData::Answer(_) => "answer".to_owned(),
            ToData::Certificate(_) => "certificate".to_owned(),
            ToData::Drain { deadline, .. } => format!("drain {deadline:?}"),
            ToData::Service(intent) => {
                let serving = |number| intent.traffic.share(number).unwrap_or(0) > 0;
                let mut note = format!("service {}", intent.name);
                if intent.traffic.is_none() {
                    note.push_str(" dark");
                }
                for version in intent.versions {
                    let shown = match intent.traffic.share(version.number) {
                        Some(100) => String::new(),
                        Some(percent) => format!("={percent}"),
                        None => "=preview".to_owned(),
                    };
                    if serving(version.number) && self.refuse.load(Ordering::SeqCst) {
                        let reason = "on purpose".to_owned();
                        result = Err(Refusal::ArtefactRefused {
                            digest: version.digest,
                            reason,
                        });
                    }
                    let mut artefact = String::new();
                    version
                        .artefact
                        .unwrap()
                        .read_to_string(&mut artefact)
                        .unwrap();
                    note.push_str(&format!(" v{}{shown} {artefact}", version.number));
                }
                note
            }
        };
        self.seen.lock().unwrap().push(note);
        FromData::Done { seq, result }
    }
}

/// A data plane that lives until control lets go of it.
pub(super) fn live(fake: &Arc<Fake>, events: &mpsc::Sender<DataEvent>) {
    let (commands, mut commands_in) = mpsc::channel::<Command>(8);
    let (answers, noting) = (events.clone(), Arc::clone(fake));
    std::thread::spawn(move || {
        let _ = answers.blocking_send(DataEvent::Up {
            commands,
            walls: Vec::new(),
        });
        while let Some(command) = commands_in.blocking_recv() {
            let answer = noting.answer(command);
            let _ = answers.blocking_send(DataEvent::Says(answer));
        }
    });
}

pub(super) struct Rig {
    pub(super) control: Option<ControlPlane>,
    pub(super) fake: Arc<Fake>,
    pub(super) reports: Option<mpsc::Sender<DataEvent>>,
    pub(super) compiled: Arc<AtomicUsize>,
    pub(super) path: PathBuf,
    pub(super) token: String,
}

impl Rig {
    pub(super) fn start(path: &Path) -> Self {
        let data = DataDir::open(path).unwrap();
        let (reports, reports_in) = mpsc::channel(8);
        let fake = Arc::new(Fake::default());
        let compiled = Arc::new(AtomicUsize::new(0));
        live(&fake, &reports);
        let counting = Arc::clone(&compiled);
        let config = ControlConfig {
            certificate: None,
            ingress: SocketAddr::from(([127, 0, 0, 1], 8080)),
            ingress_certificate: None,
            ingress_scheme: crate::config::UrlScheme::Http,
            domain: "localhost".to_owned(),
            workers: 2,
            instances: 10,
            ceiling: DEFAULT_CEILING,
            engine_version: "0".to_owned(),
            engine: EngineName::try_from("c0ffee".to_owned()).unwrap(),
            inherits: false,
            compiler: Compiler {
                program: "/bin/sh".into(),
                arguments: vec!["-c".into(), COMPILER.into()],
                timeout: Duration::from_millis(1_500),
            },
            machines: MachinesConfig {
                program: "/nonexistent".into(),
                memory_percent: 80,
                on_emulation: false,
                network: NetworkConfig {
                    pool: None,
                    ports: PortRange::DEFAULT,
                    opened: Vec::new(),
                },
                at_end: AtEnd::Stop,
            },
            seal: Arc::new(move |_, _, artefact| {
                counting.fetch_add(1, Ordering::SeqCst);
                std::io::copy(artefact, &mut std::io::sink())?;
                Ok(b"sealed:".to_vec())
            }),
        };
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)), None).unwrap();
        let control = start(config, data, reports_in, listener).unwrap();
        let token = std::fs::read_to_string(path.join("admin.token"))
            .unwrap()
            .trim()
            .to_owned();
        Self {
            control: Some(control),
            fake,
            reports: Some(reports),
            compiled,
            path: path.to_owned(),
            token,
        }
    }

    pub(super) fn stop(mut self) -> Arc<Fake> {
        self.control
            .take()
            .unwrap()
            .shutdown(Duration::from_millis(10));
        Arc::clone(&self.fake)
    }

    /// A tenant `acme` with a service `web`.
    pub(super) fn with_service(path: &Path) -> Self {
        let rig = Self::start(path);
        assert_eq!(rig.put("/v1/tenants/acme", "{}").status, 201);
        assert_eq!(rig.put("/v1/tenants/acme/services/web", "{}").status, 201);
        rig
    }

    pub(super) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.control.as_ref().unwrap().admin()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }

    /// Sends a request with the admin's token and any further head lines.
    pub(super) fn send(&self, method: &str, path: &str, head: &[&str], body: &[u8]) -> Answer {
        let auth = format!("authorization: Bearer {}", self.token);
        self.raw(method, path, &[&[auth.as_str()], head].concat(), body)
    }

    pub(super) fn raw(&self, method: &str, path: &str, head: &[&str], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let mut lines = head.join("\r\n");
        if !head.is_empty() {
            lines.push_str("\r\n");
        }
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\
             content-length: {}\r\n{lines}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The host may answer and close before it has read all of it.
        let _ = stream.write_all(body);
        Answer::read(stream)
    }

    pub(super) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub(super) fn put(&self, path: &str, json: &str) -> Answer {
        self.send(
            "PUT",
            path,
            &["content-type: application/json"],
            json.as_bytes(),
        )
    }

    pub(super) fn post(&self, path: &str, json: &str) -> Answer {
        self.send(
            "POST",
            path,
            &["content-type: application/json"],
            json.as_bytes(),
        )
    }

    pub(super) fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], b"")
    }

    pub(super) fn upload(&self, component: &str) -> Answer {
        let path = "/v1/tenants/acme/services/web/versions";
        self.send(
            "POST",
            path,
            &["content-type: application/wasm"],
            component.as_bytes(),
        )
    }

    /// An answer that goes on.
    pub(super) fn follow(&self, path: &str) -> Follower {
        let mut stream = self.connect();
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
            self.token
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut follower = Follower {
            stream,
            seen: String::new(),
        };
        follower.until("\r\n\r\n");
        follower
    }

    /// Reports lines as the data plane does.
    pub(super) fn log(&self, record: LogRecord) {
        let reports = self.reports.as_ref().unwrap();
        let logs = DataEvent::Says(FromData::Logs(vec![record]));
        reports.blocking_send(logs).unwrap();
    }

    pub(super) fn seen(&self) -> Vec<String> {
        self.fake.seen.lock().unwrap().clone()
    }

    /// Files below a directory of the data directory.
    pub(super) fn files(&self, below: &str) -> usize {
        fn count(path: &Path) -> usize {
            let entries = std::fs::read_dir(path).unwrap();
            entries
                .map(|entry| entry.unwrap().path())
                .map(|path| if path.is_dir() { count(&path) } else { 1 })
                .sum()
        }
        count(&self.path.join(below))
    }
}

/// Reads an answer that goes on.
#[derive(Debug)]
pub(super) struct Follower {
    stream: TcpStream,
    seen: String,
}

impl Follower {
    /// Reads until something has come; all that came up to then.
    pub(super) fn until(&mut self, wanted: &str) -> &str {
        let mut chunk = [0; 4096];
        while !self.seen.contains(wanted) {
            let count = self.stream.read(&mut chunk).unwrap();
            assert!(count > 0, "ended before {wanted:?}: {}", self.seen);
            let chunk = String::from_utf8_lossy(&chunk[..count]);
            self.seen.push_str(&chunk);
        }
        &self.seen
    }
}

/// Polls until something holds.
pub(super) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no head: {text:?}"));
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers: BTreeMap<_, _> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let chunked = headers
            .get("transfer-encoding")
            .is_some_and(|value| value == "chunked");
        let body = if chunked {
            dechunk(body)
        } else {
            body.to_owned()
        };
        Self {
            status,
            headers,
            body,
        }
    }

    #[track_caller]
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The problem's code, after checking its form.
    #[track_caller]
    pub(super) fn code(&self) -> String {
        assert_eq!(
            self.headers["content-type"], "application/problem+json",
            "{self:?}"
        );
        let problem = self.json();
        assert_eq!(problem["status"], self.status);
        for field in ["type", "title", "detail"] {
            assert!(problem[field].is_string(), "{problem}");
        }
        problem["code"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(super) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{self:?}");
        self
    }

    #[track_caller]
    pub(super) fn refused(&self, status: u16, code: &str) {
        assert_eq!(
            (self.status, self.code().as_str()),
            (status, code),
            "{self:?}"
        );
    }
}

fn dechunk(mut text: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 || rest.len() < size {
            break;
        }
        whole.push_str(&rest[..size]);
        text = rest[size..].trim_start_matches("\r\n");
    }
    whole
}
