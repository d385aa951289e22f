//! Guests that write to a volume and to a store: what was answered is there afterwards.
//!
//! A file is written anew and made durable before the answer; one that was under way is what it was,
//! or as much of the new one as came. A key has its old value or its new one, and a sum counts
//! everything that was answered.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use insula_tests::http::{Broken, Request};
use insula_tests::{Admin, Answer, guests};
use serde_json::json;

use super::random::Random;

const TENANT: &str = "writer";
/// The service with files, and that with keys.
const SERVICES: [&str; 2] = ["files", "counter"];
/// Files and keys, each; few, so that most writes replace something.
const PLACES: u64 = 12;
const FILE_MAX: u64 = 40_000;
const VALUE_MAX: u64 = 4_000;
/// The key that is counted with.
const SUM: &str = "/sum";

/// What is written at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    File(u64),
    Key(u64),
    Sum,
}

/// What a place holds.
#[derive(Debug, Default)]
struct Held {
    /// As it was acknowledged.
    is: Option<Vec<u8>>,
    /// What was written and never answered.
    maybe: Option<Vec<u8>>,
}

/// Tells a writer or a client that it is over, however the test comes to its end.
pub(crate) struct Ending<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Somebody who writes.
pub(crate) struct Writer {
    places: BTreeMap<Place, Held>,
    random: Random,
    serial: u64,
    pub(crate) acknowledged: u64,
    /// Digests of the two components, as files are named by them.
    pub(crate) digests: Vec<String>,
}

/// A data process whose control has died has a moment to cancel what it has: that is as good as no
/// answer.
fn heard(answer: Answer) -> Result<Answer, Broken> {
    if answer.status == 499 {
        return Err(Broken {
            head: None,
            body: answer.body,
            error: std::io::Error::other("cancelled"),
        });
    }
    Ok(answer)
}

impl Place {
    const fn service(self) -> &'static str {
        match self {
            Self::File(_) => SERVICES[0],
            Self::Key(_) | Self::Sum => SERVICES[1],
        }
    }

    fn target(self) -> String {
        match self {
            Self::File(n) => format!("/data/{n}"),
            Self::Key(n) => format!("/{n}"),
            Self::Sum => SUM.to_owned(),
        }
    }

    fn request(self, ingress: SocketAddr, method: &str, target: &str) -> Request {
        let host = format!("{}.{TENANT}.localhost", self.service());
        Request::new(ingress, &host, method, target).patience(Duration::from_secs(60))
    }

    fn write(self, ingress: SocketAddr, content: &[u8]) -> Result<Answer, Broken> {
        let target = self.target();
        let request = match self {
            Self::Sum => self.request(ingress, "POST", &format!("{target}?do=increment")),
            _ => self.request(ingress, "PUT", &target).body(content),
        };
        request.try_send().and_then(heard)
    }

    /// What is there.
    fn read(self, ingress: SocketAddr) -> Result<Option<Vec<u8>>, Broken> {
        // A sum that grows by nothing is read; the guest keeps it in a form of its own.
        let answer = match self {
            Self::Sum => self.request(ingress, "POST", &format!("{SUM}?do=increment&n=0")),
            _ => self.request(ingress, "GET", &self.target()),
        };
        let answer = answer.try_send().and_then(heard)?;
        match (answer.status, answer.text()) {
            // The asking made it.
            (200, text) if self == Self::Sum && sum_of(text.as_bytes()) == 0 => Ok(None),
            (200, _) => Ok(Some(answer.body)),
            (404, _) => Ok(None),
            (409, text) if text.starts_with("NotFound") => Ok(None),
            (status, text) => panic!("{self:?}: {status} {text}"),
        }
    }
}

impl Held {
    /// Whether what was found may be there.
    fn allows(&self, place: Place, found: Option<&[u8]>) -> bool {
        if found == self.is.as_deref() {
            return true;
        }
        match (&self.maybe, found) {
            // What a guest does to a file is several steps.
            (Some(maybe), Some(found)) if matches!(place, Place::File(_)) => {
                maybe.starts_with(found)
            }
            (Some(maybe), Some(found)) => maybe == found,
            _ => false,
        }
    }
}

impl Writer {
    /// Makes the tenant with its volume, its store, and the services that write there.
    pub(crate) fn new(admin: &Admin, random: Random) -> Self {
        let of = |rest: &str| format!("/v1/tenants/{TENANT}{rest}");
        admin.put(&of(""), &json!({}));
        admin.put(&of("/volumes/data"), &json!({"size": "4MiB"}));
        let store = json!({"size": "4MiB", "kind": "store"});
        admin.put(&of("/volumes/counters"), &store);
        let [files, counter] = SERVICES.map(|name| of(&format!("/services/{name}")));
        let limits = json!({"fuel": "100G", "timeout": "60s"});
        let volumes = json!([{"name": "data", "path": "/data"}]);
        admin.put(&files, &json!({"volumes": volumes, "limits": limits}));
        let stores = json!([{"name": "counters"}]);
        admin.put(&counter, &json!({"stores": stores, "limits": limits}));
        let upload = |(path, sample): (&String, &str)| {
            let answer = admin.upload(&format!("{path}/versions"), guests::bytes(sample));
            let answer = answer.patience(Duration::from_secs(120)).send();
            let digest = answer.json()["digest"].as_str().map(str::to_owned);
            digest.unwrap_or_else(|| panic!("{answer:?}"))
        };
        let digests = [(&files, "files"), (&counter, "counter")].map(upload);
        Self {
            places: BTreeMap::new(),
            random,
            serial: 0,
            acknowledged: 0,
            digests: digests.into(),
        }
    }

    fn content(&mut self, place: Place) -> Vec<u8> {
        self.serial += 1;
        let most = match place {
            Place::File(_) => FILE_MAX,
            Place::Key(_) => VALUE_MAX,
            Place::Sum => {
                let held = self.places.get(&place).and_then(|held| held.is.as_deref());
                let sum = held.map_or(0, sum_of);
                return format!("{}\n", sum + 1).into_bytes();
            }
        };
        // Different in every piece from all others, so that a mixture is seen.
        let word = format!("{}.", self.serial);
        let times = 1 + self.random.below(most) / word.len();
        word.repeat(times).into_bytes()
    }

    /// Writes until the host is gone, for which `ended` stands once it is known.
    pub(crate) fn work(&mut self, ingress: SocketAddr, ended: &AtomicBool) {
        while !ended.load(Ordering::Relaxed) {
            let place = match self.random.below(3) {
                0 => Place::File(self.random.below(PLACES) as u64),
                1 => Place::Key(self.random.below(PLACES) as u64),
                _ => Place::Sum,
            };
            let content = self.content(place);
            self.places.entry(place).or_default().maybe = Some(content.clone());
            match place.write(ingress, &content) {
                Ok(answer) => {
                    assert_eq!(answer.status, 200, "{place:?}: {}", answer.text());
                    let held = self.places.entry(place).or_default();
                    (held.is, held.maybe) = (held.maybe.take(), None);
                    self.acknowledged += 1;
                }
                // The data process died, and there is another soon; or the host did.
                Err(_) => self.settle(place, ingress, ended),
            }
        }
    }

    /// Finds out what became of a write that was not answered.
    fn settle(&mut self, place: Place, ingress: SocketAddr, ended: &AtomicBool) {
        while !ended.load(Ordering::Relaxed) {
            if let Ok(found) = place.read(ingress) {
                self.found(place, found);
                return;
            }
        }
    }

    fn found(&mut self, place: Place, found: Option<Vec<u8>>) {
        let held = self.places.entry(place).or_default();
        let text = |bytes: &[u8]| {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
            format!("{} bytes {start:?}", bytes.len())
        };
        assert!(
            held.allows(place, found.as_deref()),
            "{place:?} has {:?}, acknowledged was {:?}, under way {:?}",
            found.as_deref().map(text),
            held.is.as_deref().map(text),
            held.maybe.as_deref().map(text),
        );
        (held.is, held.maybe) = (found, None);
    }

    /// Compares all that was written with what there is.
    pub(crate) fn compare(&mut self, ingress: SocketAddr) {
        let places: Vec<Place> = self.places.keys().copied().collect();
        for place in places {
            let found = place.read(ingress);
            let found = found.unwrap_or_else(|broken| panic!("{place:?}: {broken:?}"));
            self.found(place, found);
        }
    }
}

fn sum_of(text: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(text);
    text.trim().parse().unwrap_or_else(|_| panic!("{text:?}"))
}
