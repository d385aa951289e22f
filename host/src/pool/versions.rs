//! The versions of a service that are kept ready, and which of them gets a request.
//!
//! The choice is one look into a table of a hundred entries that was made when the service last
//! changed: no lock, no search, nothing shared between requests. A request that was decided keeps
//! its version to its end, whatever is published meanwhile.

use std::sync::Arc;

use insula_types::traffic::TRAFFIC_POINTS;
use insula_types::{Digest, Traffic, VersionNumber};

use super::conduct::VersionStats;
use crate::engine::{Program, Shelf};

/// A version that is ready to run.
#[derive(Debug, Clone)]
pub struct Active {
    /// Its number.
    pub number: VersionNumber,
    /// The digest of its component.
    pub digest: Digest,
    /// Its code.
    pub program: Program,
    /// Where its instances wait, if they are used again.
    pub shelf: Option<Arc<Shelf>>,
    /// How it behaves.
    pub stats: Arc<VersionStats>,
}

/// What decides which version a request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<'a> {
    /// The service's own name or a route: by share. Equal keys get equal versions.
    Shared(&'a [u8]),
    /// The preview name of this version.
    Preview(VersionNumber),
}

/// See the module's documentation. Immutable; `T` is [`Active`] but for tests.
#[derive(Debug, Clone)]
pub struct Versions<T = Active> {
    ready: Vec<(VersionNumber, T)>,
    /// The index of each point's version; empty where one version has them all, or none.
    points: Vec<u8>,
    settled: Option<usize>,
}

impl<T> Default for Versions<T> {
    fn default() -> Self {
        Self {
            ready: Vec::new(),
            points: Vec::new(),
            settled: None,
        }
    }
}

impl<T> Versions<T> {
    /// Versions that are ready, and their shares. Points of a version that is not ready are
    /// nobody's; the data plane refuses such an intent before.
    #[must_use]
    pub fn new(ready: Vec<(VersionNumber, T)>, traffic: &Traffic) -> Self {
        let index = |wanted| ready.iter().position(|(number, _)| *number == wanted);
        let settled = traffic.settled().and_then(index);
        let points = match traffic.settled() {
            Some(_) => Vec::new(),
            None => (0..TRAFFIC_POINTS)
                .map_while(|point| traffic.at(point))
                .map(|number| index(number).and_then(|at| u8::try_from(at).ok()))
                .map(|at| at.unwrap_or(u8::MAX))
                .collect(),
        };
        Self {
            ready,
            points,
            settled,
        }
    }

    /// The version that a request gets; `None` where there is none for it.
    #[must_use]
    pub fn choose(&self, service: u64, choice: Choice<'_>) -> Option<&T> {
        let at = match choice {
            Choice::Preview(wanted) => return self.get(wanted),
            Choice::Shared(_) if self.points.is_empty() => self.settled?,
            Choice::Shared(key) => usize::from(*self.points.get(point(service, key))?),
        };
        self.ready.get(at).map(|(_, version)| version)
    }

    /// A version that is ready.
    #[must_use]
    pub fn get(&self, wanted: VersionNumber) -> Option<&T> {
        let found = self.ready.iter().find(|(number, _)| *number == wanted);
        found.map(|(_, version)| version)
    }

    /// Whether a request's key matters.
    #[must_use]
    pub fn is_split(&self) -> bool {
        !self.points.is_empty()
    }

    /// All that are ready.
    pub fn ready(&self) -> impl Iterator<Item = &T> {
        self.ready.iter().map(|(_, version)| version)
    }
}

/// A point from 0 to 99: FNV-1a over the service's id and the key, then the finalizer of
/// `MurmurHash3` (`fmix64`), without which FNV's low digits are poor. The same on every host and in
/// every release, so that a client keeps its version; salted with the service, so that it is not
/// the first to get the news everywhere.
fn point(service: u64, key: &[u8]) -> usize {
    let bytes = service.to_le_bytes();
    let bytes = bytes.iter().chain(key);
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    usize::try_from(hash % u64::from(TRAFFIC_POINTS)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(json: &str, ready: &[u32]) -> Versions<u32> {
        let number = |n: &u32| (VersionNumber::new(*n).unwrap(), *n);
        let traffic = serde_json::from_str(json).unwrap();
        Versions::new(ready.iter().map(number).collect(), &traffic)
    }

    #[test]
    fn one_version_gets_everything() {
        let one = versions(r#"{"2":100,"1":0}"#, &[1, 2, 3]);
        assert!(!one.is_split());
        assert_eq!(one.choose(1, Choice::Shared(b"")), Some(&2));
        let none = Versions::<u32>::default();
        assert_eq!(none.choose(1, Choice::Shared(b"")), None);
    }

    #[test]
    fn previews_reach_what_is_ready_and_nothing_else() {
        let one = versions(r#"{"2":100,"1":0}"#, &[1, 2, 3]);
        for number in 1..=3 {
            let wanted = VersionNumber::new(number).unwrap();
            assert_eq!(one.choose(1, Choice::Preview(wanted)), Some(&number));
        }
        let unknown = Choice::Preview(VersionNumber::new(4).unwrap());
        assert_eq!(one.choose(1, unknown), None);
    }

    #[test]
    fn keys_stick_and_shares_come_out() {
        let split = versions(r#"{"1":90,"2":10}"#, &[1, 2]);
        assert!(split.is_split());
        for service in 1..5 {
            let mut second = 0;
            for user in 0..10_000 {
                let key = format!("user-{user}");
                let chosen = split.choose(service, Choice::Shared(key.as_bytes()));
                assert_eq!(
                    chosen,
                    split.choose(service, Choice::Shared(key.as_bytes()))
                );
                second += u32::from(chosen == Some(&2));
            }
            // Binomial, n = 10,000, p = 0.1: six deviations are 180.
            assert!(
                (820..1_180).contains(&second),
                "{second} of service {service}"
            );
        }
    }

    #[test]
    fn the_point_of_a_key_is_the_same_in_every_release() {
        let points: Vec<usize> = ["", "alice", "bob"]
            .iter()
            .map(|key| point(7, key.as_bytes()))
            .collect();
        assert_eq!(points, POINTS);
    }

    /// Computed once; a change here moves clients between versions at an upgrade of the host.
    const POINTS: [usize; 3] = [1, 45, 57];
}
