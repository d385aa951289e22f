//! CPU, bytes, fuel and durations.
//!
//! All are unsigned integers of one fixed unit inside; the notations of Kubernetes (`"250m"`,
//! `"64MiB"`, `"100ms"`) are accepted at the door. A number that has no exact value in the unit
//! is refused, never rounded.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Why a quantity was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a number followed by a known unit.
    #[error("{given:?} is not a quantity of {what}; write it as {example}")]
    Syntax {
        /// What was given, shortened.
        given: String,
        /// What kind of quantity was expected.
        what: &'static str,
        /// How to write one.
        example: &'static str,
    },
    /// Finer than the unit kept inside.
    #[error("{given:?} is finer than {unit}, the smallest unit of {what}")]
    TooFine {
        /// What was given.
        given: String,
        /// What kind of quantity was expected.
        what: &'static str,
        /// The smallest unit.
        unit: &'static str,
    },
    /// Beyond what the type holds.
    #[error("{given:?} is out of range: {what} goes from {min} to {max}")]
    Range {
        /// What was given.
        given: String,
        /// What kind of quantity was expected.
        what: &'static str,
        /// Smallest value, in the type's own unit.
        min: u64,
        /// Largest value, in the type's own unit.
        max: u64,
    },
}

/// One kind of quantity: its words, units (suffix, numerator in base units) and range.
struct Kind {
    what: &'static str,
    example: &'static str,
    unit: &'static str,
    /// Suffix and how many base units it stands for. The empty suffix is that of a bare number.
    suffixes: &'static [(&'static str, u64)],
    min: u64,
    max: u64,
}

/// Longest text of a quantity that is looked at.
const QUANTITY_MAX_BYTES: usize = 40;

impl Kind {
    fn syntax(&self, given: &str) -> QuantityError {
        QuantityError::Syntax {
            given: given.chars().take(QUANTITY_MAX_BYTES).collect(),
            what: self.what,
            example: self.example,
        }
    }

    fn range(&self, given: &str) -> QuantityError {
        QuantityError::Range {
            given: given.to_owned(),
            what: self.what,
            min: self.min,
            max: self.max,
        }
    }

    fn check(&self, value: u64) -> Result<u64, QuantityError> {
        if (self.min..=self.max).contains(&value) {
            Ok(value)
        } else {
            Err(self.range(&value.to_string()))
        }
    }

    /// Parses `digits[.digits]suffix` exactly, without floating point.
    fn parse(&self, text: &str) -> Result<u64, QuantityError> {
        if text.len() > QUANTITY_MAX_BYTES {
            return Err(self.syntax(text));
        }
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let scale = self
            .suffixes
            .iter()
            .find(|(known, _)| *known == suffix.trim_start_matches(' '))
            .map(|(_, scale)| u128::from(*scale))
            .ok_or_else(|| self.syntax(text))?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = format!("{whole}{fraction}");
        let dangling = number.contains('.') && fraction.is_empty();
        if whole.is_empty() || dangling || digits.contains('.') {
            return Err(self.syntax(text));
        }
        let mantissa: u128 = digits.parse().map_err(|_| self.range(text))?;
        let places = u32::try_from(fraction.len()).map_err(|_| self.syntax(text))?;
        let divisor = 10u128.checked_pow(places).ok_or_else(|| self.range(text))?;
        let scaled = mantissa
            .checked_mul(scale)
            .ok_or_else(|| self.range(text))?;
        if scaled % divisor != 0 {
            return Err(QuantityError::TooFine {
                given: text.to_owned(),
                what: self.what,
                unit: self.unit,
            });
        }
        let value = u64::try_from(scaled / divisor).map_err(|_| self.range(text))?;
        self.check(value).map_err(|_| self.range(text))
    }
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $kind:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The smallest value.
            pub const MIN: Self = Self($kind.min);
            /// The largest value.
            pub const MAX: Self = Self($kind.max);

            /// A value in the type's own unit.
            ///
            /// # Errors
            /// [`QuantityError::Range`] outside [`Self::MIN`]..=[`Self::MAX`].
            pub fn new(value: u64) -> Result<Self, QuantityError> {
                $kind.check(value).map(Self)
            }

            /// A value known to be in range when it was written down.
            ///
            /// # Panics
            /// When it is not; meant for `const` items, where that is a compile error.
            #[must_use]
            pub const fn constant(value: u64) -> Self {
                assert!(value >= $kind.min && value <= $kind.max);
                Self(value)
            }

            /// The bare number, in the type's own unit.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = QuantityError;
            fn from_str(text: &str) -> Result<Self, QuantityError> {
                $kind.parse(text).map(Self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(QuantityVisitor(&$kind)).map(Self)
            }
        }
    };
}

/// Accepts a number or a text and parses both through the text form, so that both mean the same.
struct QuantityVisitor(&'static Kind);

impl Visitor<'_> for QuantityVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a quantity of {}, such as {}",
            self.0.what, self.0.example
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
        self.0.parse(text).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<u64, E> {
        self.visit_str(&value.to_string())
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<u64, E> {
        self.visit_str(&value.to_string())
    }
}

/// 1024 cores: more than any machine that this is meant for.
const MILLICORES_MAX: u64 = 1_024_000;

const CPU: Kind = Kind {
    what: "CPU",
    example: "\"250m\", \"1.5\" or 2 (cores)",
    unit: "1m (a thousandth of a core)",
    suffixes: &[("", 1000), ("m", 1)],
    min: 1,
    max: MILLICORES_MAX,
};

const BYTES: Kind = Kind {
    what: "bytes",
    example: "\"64MiB\", \"1GB\" or an integer of bytes",
    unit: "one byte",
    suffixes: &[
        ("", 1),
        ("B", 1),
        ("k", 1_000),
        ("kB", 1_000),
        ("KB", 1_000),
        ("M", 1_000_000),
        ("MB", 1_000_000),
        ("G", 1_000_000_000),
        ("GB", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("TB", 1_000_000_000_000),
        ("Ki", 1 << 10),
        ("KiB", 1 << 10),
        ("Mi", 1 << 20),
        ("MiB", 1 << 20),
        ("Gi", 1 << 30),
        ("GiB", 1 << 30),
        ("Ti", 1 << 40),
        ("TiB", 1 << 40),
    ],
    min: 0,
    max: i64::MAX.unsigned_abs(),
};

const FUEL: Kind = Kind {
    what: "fuel",
    example: "an integer such as 1000000000, or \"1G\"",
    unit: "one unit of fuel",
    suffixes: &[
        ("", 1),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ],
    min: 1,
    max: i64::MAX.unsigned_abs(),
};

/// A day: a request that takes longer is a job for something else.
const MILLIS_MAX: u64 = 24 * 3_600_000;

const DURATION: Kind = Kind {
    what: "time",
    example: "\"100ms\", \"2s\" or \"1m\"",
    unit: "one millisecond",
    suffixes: &[("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)],
    min: 1,
    max: MILLIS_MAX,
};

const SHARES: Kind = Kind {
    what: "shares",
    example: "an integer from 1 to 1000000, or \"low\", \"normal\", \"high\"",
    unit: "one share",
    suffixes: &[("", 1)],
    min: 1,
    max: 1_000_000,
};

quantity!(
    /// CPU in thousandths of a core.
    Millicores,
    CPU
);
quantity!(
    /// A size in bytes.
    Bytes,
    BYTES
);
quantity!(
    /// Deterministic units of guest execution (one per simple Wasm instruction).
    Fuel,
    FUEL
);
quantity!(
    /// A duration in milliseconds.
    Millis,
    DURATION
);

impl Bytes {
    /// A whole number of MiB.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self::constant(mib << 20)
    }
}

impl From<Millis> for std::time::Duration {
    fn from(millis: Millis) -> Self {
        Self::from_millis(millis.0)
    }
}

/// The weight of a tenant against its siblings when CPU is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Shares(u32);

impl Shares {
    /// `"low"`, half of normal.
    pub const LOW: Self = Self(500);
    /// `"normal"`, the default.
    pub const NORMAL: Self = Self(1000);
    /// `"high"`, twice normal.
    pub const HIGH: Self = Self(2000);

    /// A weight from 1 to 1,000,000.
    ///
    /// # Errors
    /// [`QuantityError::Range`] outside of that.
    pub fn new(shares: u64) -> Result<Self, QuantityError> {
        let shares = SHARES.check(shares)?;
        u32::try_from(shares)
            .map(Self)
            .map_err(|_| SHARES.range(&shares.to_string()))
    }

    /// The bare number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl FromStr for Shares {
    type Err = QuantityError;
    fn from_str(text: &str) -> Result<Self, QuantityError> {
        match text {
            "low" => Ok(Self::LOW),
            "normal" => Ok(Self::NORMAL),
            "high" => Ok(Self::HIGH),
            other => Self::new(SHARES.parse(other)?),
        }
    }
}

impl<'de> Deserialize<'de> for Shares {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SharesVisitor;
        impl Visitor<'_> for SharesVisitor {
            type Value = Shares;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "shares, {}", SHARES.example)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Shares, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Shares, E> {
                Shares::new(value).map_err(E::custom)
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Shares, E> {
                self.visit_str(&value.to_string())
            }
        }
        deserializer.deserialize_any(SharesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_notations_of_the_contract() {
        let cpu = |text: &str| text.parse::<Millicores>().map(Millicores::get);
        assert_eq!(cpu("250m"), Ok(250));
        assert_eq!(cpu("1.5"), Ok(1500));
        assert_eq!(cpu("2"), Ok(2000));
        assert_eq!(cpu("0.001"), Ok(1));
        let bytes = |text: &str| text.parse::<Bytes>().map(Bytes::get);
        assert_eq!(bytes("64MiB"), Ok(64 << 20));
        assert_eq!(bytes("64Mi"), Ok(64 << 20));
        assert_eq!(bytes("1GB"), Ok(1_000_000_000));
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("0"), Ok(0));
        let time = |text: &str| text.parse::<Millis>().map(Millis::get);
        assert_eq!(time("100ms"), Ok(100));
        assert_eq!(time("2s"), Ok(2000));
        assert_eq!(time("1.5s"), Ok(1500));
        assert_eq!("high".parse::<Shares>(), Ok(Shares::HIGH));
        assert_eq!("750".parse::<Shares>().map(Shares::get), Ok(750));
    }

    #[test]
    fn what_is_refused() {
        for bad in [
            "", "m", "1.", ".5", "1..2", "1.2.3", "-1", "1e3", "0", "0.0005", "1025", "NaN",
        ] {
            assert!(bad.parse::<Millicores>().is_err(), "{bad:?}");
        }
        for bad in [
            "64 XiB",
            "0.5",
            "MiB",
            "-1",
            "9223372036854775808",
            "99999999999999999TiB",
        ] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?}");
        }
        for bad in ["30", "0ms", "25h", "1.0001s", "ms"] {
            assert!(bad.parse::<Millis>().is_err(), "{bad:?}");
        }
        for bad in ["0", "1000001", "LOW", "1.5"] {
            assert!(bad.parse::<Shares>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn json_numbers_and_texts_mean_the_same() {
        let from = |json: &str| serde_json::from_str::<Millicores>(json).map(Millicores::get);
        assert_eq!(from("2").unwrap(), 2000);
        assert_eq!(from("1.5").unwrap(), 1500);
        assert_eq!(from("\"1.5\"").unwrap(), 1500);
        assert!(from("-1").is_err());
        assert!(from("null").is_err());
        assert!(
            serde_json::from_str::<Millis>("30").is_err(),
            "a duration needs its unit"
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = text.parse::<Millicores>();
            let _ = text.parse::<Bytes>();
            let _ = text.parse::<Fuel>();
            let _ = text.parse::<Millis>();
            let _ = text.parse::<Shares>();
        }

        #[test]
        fn millicores_round_trip(value in 1..=MILLICORES_MAX) {
            let text = format!("{value}m");
            prop_assert_eq!(text.parse::<Millicores>().unwrap().get(), value);
            let cores = format!("{}.{:03}", value / 1000, value % 1000);
            prop_assert_eq!(cores.parse::<Millicores>().unwrap().get(), value);
        }

        #[test]
        fn bytes_scale_exactly(value in 0u64..1 << 40) {
            prop_assert_eq!(format!("{value}Ki").parse::<Bytes>().unwrap().get(), value << 10);
        }
    }
}
