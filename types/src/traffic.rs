//! How a service's requests are divided among its versions.
//!
//! A [`Traffic`] is a list of versions with percentages that add up to 100. Every request has a
//! *point* from 0 to 99: a hash of its sticky key, or a random one. Versions lie side by side in
//! the order of their numbers, each as wide as its share, and the point falls into one of them.
//! When the share of the newest version grows, it only takes over points of older ones: whoever
//! has the new version keeps it.
//!
//! A version with a share of 0 gets no request under the service's own name; it is kept ready
//! under its preview name.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::VersionNumber;

/// Versions that can share the traffic of one service, those with a share of 0 included.
pub const TRAFFIC_MAX: usize = 10;
/// What all shares add up to, and how many points there are.
pub const TRAFFIC_POINTS: u8 = 100;

/// Why shares of traffic were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrafficError {
    /// They do not add up.
    #[error("the shares add up to {0}, not to 100")]
    Sum(u64),
    /// More versions than can be kept ready.
    #[error("traffic is divided among {TRAFFIC_MAX} versions at most, {0} given")]
    TooMany(usize),
    /// Versions count from 1.
    #[error("{0:?} is not a version; versions count from 1")]
    Version(String),
}

/// See the module's documentation. Empty before the first activation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, u64>", into = "BTreeMap<String, u64>")]
pub struct Traffic(BTreeMap<VersionNumber, u8>);

impl Traffic {
    /// No version serves.
    #[must_use]
    pub const fn none() -> Self {
        Self(BTreeMap::new())
    }

    /// One version gets all of it.
    #[must_use]
    pub fn whole(version: VersionNumber) -> Self {
        Self(BTreeMap::from([(version, TRAFFIC_POINTS)]))
    }

    /// These shares.
    ///
    /// # Errors
    /// [`TrafficError`] when they do not add up to 100 or are too many. Nothing at all is not an
    /// error but [`Traffic::none`].
    pub fn new(shares: BTreeMap<VersionNumber, u8>) -> Result<Self, TrafficError> {
        if shares.len() > TRAFFIC_MAX {
            return Err(TrafficError::TooMany(shares.len()));
        }
        let sum = shares.values().copied().map(u64::from).sum();
        if sum != u64::from(TRAFFIC_POINTS) && !shares.is_empty() {
            return Err(TrafficError::Sum(sum));
        }
        Ok(Self(shares))
    }

    /// Versions and their percentages, by number.
    pub fn shares(&self) -> impl Iterator<Item = (VersionNumber, u8)> + '_ {
        self.0.iter().map(|(version, percent)| (*version, *percent))
    }

    /// A version's percentage; `None` when it is not listed.
    #[must_use]
    pub fn share(&self, version: VersionNumber) -> Option<u8> {
        self.0.get(&version).copied()
    }

    /// Whether nothing serves.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0.is_empty()
    }

    /// The version that gets all of it, if one does.
    #[must_use]
    pub fn settled(&self) -> Option<VersionNumber> {
        let mut serving = self.shares().filter(|(_, percent)| *percent > 0);
        let (version, _) = serving.next()?;
        serving.next().is_none().then_some(version)
    }

    /// The version with the largest share, the newest of equals.
    #[must_use]
    pub fn leading(&self) -> Option<VersionNumber> {
        let largest = self
            .shares()
            .max_by_key(|(version, percent)| (*percent, *version));
        largest.map(|(version, _)| version)
    }

    /// The version whose range holds a point; points beyond the last are taken modulo 100.
    #[must_use]
    pub fn at(&self, point: u8) -> Option<VersionNumber> {
        let mut left = point % TRAFFIC_POINTS;
        for (version, percent) in self.shares() {
            if left < percent {
                return Some(version);
            }
            left -= percent;
        }
        None
    }

    /// What a rollback goes back to after a change from `self` to `next`, when it was `previous`
    /// before: the last version that had all of the traffic and is not the one that has it now.
    #[must_use]
    pub fn previous_after(
        &self,
        next: &Self,
        previous: Option<VersionNumber>,
    ) -> Option<VersionNumber> {
        let now = next.settled();
        let other = |version: &VersionNumber| Some(*version) != now;
        let largest_other = || {
            let others = self.shares().filter(|(version, _)| other(version));
            others.max_by_key(|(version, percent)| (*percent, *version))
        };
        self.settled()
            .filter(other)
            .or(previous.filter(other))
            .or_else(|| largest_other().map(|(version, _)| version))
    }
}

impl TryFrom<BTreeMap<String, u64>> for Traffic {
    type Error = TrafficError;

    fn try_from(raw: BTreeMap<String, u64>) -> Result<Self, TrafficError> {
        let sum = raw
            .values()
            .fold(0u64, |sum, share| sum.saturating_add(*share));
        let mut shares = BTreeMap::new();
        for (text, percent) in raw {
            // One way to write a number: "+3" and "03" are not versions.
            let version = text.parse().ok().and_then(VersionNumber::new);
            let version = version.filter(|version| version.to_string() == text);
            let version =
                version.ok_or_else(|| TrafficError::Version(text.chars().take(20).collect()))?;
            let percent = u8::try_from(percent).map_err(|_| TrafficError::Sum(sum))?;
            shares.insert(version, percent);
        }
        if shares.is_empty() {
            return Err(TrafficError::Sum(0));
        }
        Self::new(shares)
    }
}

impl From<Traffic> for BTreeMap<String, u64> {
    fn from(traffic: Traffic) -> Self {
        let shares = traffic.0.into_iter();
        shares
            .map(|(version, percent)| (version.to_string(), u64::from(percent)))
            .collect()
    }
}

/// Longest name of a sticky header.
const HEADER_MAX_BYTES: usize = 64;

/// The request header whose value decides which version a client gets: lower case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StickyHeader(String);

/// A text that is not the name of a header that a client could be known by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a header that a client could be known by, such as \"x-user-id\"")]
pub struct StickyHeaderError(String);

impl StickyHeader {
    /// The name, lower case.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for StickyHeader {
    type Error = StickyHeaderError;

    fn try_from(text: String) -> Result<Self, StickyHeaderError> {
        // RFC 9110, 5.6.2: what a token is made of.
        let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
        // The host makes this one, a new one for each request.
        let own = text.eq_ignore_ascii_case("x-request-id");
        if text.is_empty() || text.len() > HEADER_MAX_BYTES || own || !text.bytes().all(token) {
            return Err(StickyHeaderError(text.chars().take(80).collect()));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl From<StickyHeader> for String {
    fn from(header: StickyHeader) -> Self {
        header.0
    }
}

impl fmt::Display for StickyHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u32) -> VersionNumber {
        VersionNumber::new(number).unwrap()
    }

    fn traffic(shares: &[(u32, u8)]) -> Traffic {
        let shares = shares
            .iter()
            .map(|(number, share)| (version(*number), *share));
        Traffic::new(shares.collect()).unwrap()
    }

    #[test]
    fn shares_add_up_to_a_hundred() {
        let read = |text: &str| serde_json::from_str::<Traffic>(text);
        assert_eq!(
            read(r#"{"3":90,"4":10}"#).unwrap(),
            traffic(&[(3, 90), (4, 10)])
        );
        assert_eq!(
            read(r#"{"3":100,"4":0}"#).unwrap().settled(),
            Some(version(3))
        );
        let eleven: Vec<String> = (1..12)
            .map(|n| format!("\"{n}\":{}", if n == 1 { 100 } else { 0 }))
            .collect();
        for bad in [
            "{}",
            r#"{"3":99}"#,
            r#"{"3":101}"#,
            r#"{"3":356}"#,
            r#"{"0":100}"#,
            r#"{"x":100}"#,
            r#"{"03":100}"#,
            r#"{"+3":100}"#,
            r#"{"3":"100"}"#,
            r#"{"3":-1,"4":101}"#,
            r#"{"3":18446744073709551615,"4":101}"#,
            r#"{"3":99.5,"4":0.5}"#,
            &format!("{{{}}}", eleven.join(",")),
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let text = serde_json::to_string(&traffic(&[(3, 90), (10, 10)])).unwrap();
        assert_eq!(read(&text).unwrap(), traffic(&[(3, 90), (10, 10)]));
    }

    #[test]
    fn every_point_has_a_version_and_shares_are_exact() {
        for shares in [
            &[(1, 100)][..],
            &[(1, 90), (2, 10)],
            &[(1, 1), (2, 0), (3, 99)],
        ] {
            let traffic = traffic(shares);
            for (number, share) in shares {
                let points = (0..100).filter(|point| traffic.at(*point) == Some(version(*number)));
                assert_eq!(points.count(), usize::from(*share), "{shares:?}");
            }
        }
        assert_eq!(Traffic::none().at(0), None);
    }

    #[test]
    fn who_has_the_new_version_keeps_it_while_its_share_grows() {
        for (before, after) in (0..100).flat_map(|a| (a..=100).map(move |b| (a, b))) {
            let (old, new) = (
                traffic(&[(1, 100 - before), (2, before)]),
                traffic(&[(1, 100 - after), (2, after)]),
            );
            let lost =
                (0..100).find(|p| old.at(*p) == Some(version(2)) && new.at(*p) != Some(version(2)));
            assert_eq!(lost, None, "{before} to {after}");
        }
    }

    #[test]
    fn a_rollback_goes_to_the_last_version_that_had_everything() {
        let v = |number| Some(version(number));
        let (one, two) = (traffic(&[(1, 100)]), traffic(&[(2, 100)]));
        let split = traffic(&[(1, 90), (2, 10)]);
        let half = traffic(&[(1, 50), (2, 50)]);
        assert_eq!(Traffic::none().previous_after(&one, None), None);
        assert_eq!(one.previous_after(&two, None), v(1));
        assert_eq!(two.previous_after(&one, v(1)), v(2), "there and back");
        assert_eq!(one.previous_after(&split, None), v(1));
        assert_eq!(
            split.previous_after(&half, v(1)),
            v(1),
            "a canary that grows"
        );
        assert_eq!(half.previous_after(&two, v(1)), v(1), "and has arrived");
        assert_eq!(split.previous_after(&one, v(1)), v(2), "or was given up");
        assert_eq!(one.previous_after(&one, v(2)), v(2), "nothing changed");
    }

    #[test]
    fn sticky_headers() {
        let read = |text: &str| StickyHeader::try_from(text.to_owned());
        assert_eq!(read("X-User-Id").unwrap().as_str(), "x-user-id");
        let long = "a".repeat(65);
        for bad in ["", "a b", "a:b", "ä", "a\r\n", "X-Request-Id", &long] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
