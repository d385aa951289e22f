//! Texts by chance against every parser here: briefly with the other tests, and for as long as one
//! wants with `cargo xtask fuzz types --seconds N`. A failure prints the smallest text that has it.

use std::fmt::{Debug, Display};
use std::str::FromStr;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::quantity::QuantityError;
use crate::{
    Bytes, Digest, Fuel, MachineSpec, Millicores, Millis, ServiceName, ServiceSpec, Shares,
    TenantName, TenantSpec, Traffic,
};

const BRIEFLY: Duration = Duration::from_millis(300);

/// Runs a test on values of a strategy until the time is over.
fn for_a_while<S: Strategy>(strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let seconds = std::env::var("INSULA_FUZZ_SECONDS").ok();
    let time = seconds.map_or(BRIEFLY, |text| {
        Duration::from_secs(text.parse().expect("a number"))
    });
    let end = Instant::now() + time;
    let mut config = ProptestConfig::with_cases(512);
    config.failure_persistence = None;
    let mut runs = 0;
    while runs == 0 || Instant::now() < end {
        let mut runner = TestRunner::new(config.clone());
        if let Err(error) = runner.run(strategy, &test) {
            panic!("{error}");
        }
        runs += 1;
    }
}

/// Nearly a value, or anything.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[0-9]{0,22}(\\.[0-9]{0,12})?(e[+-]?[0-9]{1,3})?[ ]?([kKMGTPEnum]?i?[Bs]?|ms|us|h|d)",
        2 => "[a-z0-9A-Z._-]{0,66}",
        1 => "(sha256:)?[0-9a-fA-F]{60,66}",
        1 => any::<String>(),
    ]
}

/// A text that is taken is printed as a text that is taken for the same.
fn returns<T>(text: &str) -> Result<(), TestCaseError>
where
    T: FromStr + Display + Debug + PartialEq,
    T::Err: Display,
{
    match text.parse::<T>() {
        Ok(value) => {
            let again = value.to_string().parse::<T>();
            let again = again.map_err(|error| TestCaseError::fail(format!("{value}: {error}")))?;
            prop_assert_eq!(again, value);
        }
        // It is told, in a line that can be shown.
        Err(error) => prop_assert!(error.to_string().len() < 1_000 + 6 * text.len()),
    }
    Ok(())
}

/// A text that is taken is a number in its range.
fn stays<T>(
    text: &str,
    get: fn(T) -> u64,
    new: fn(u64) -> Result<T, QuantityError>,
) -> Result<(), TestCaseError>
where
    T: FromStr<Err = QuantityError> + Debug + Copy + PartialEq,
{
    match text.parse::<T>() {
        Ok(value) => {
            let again = new(get(value));
            prop_assert_eq!(again, Ok(value));
        }
        // It is told, in a line that can be shown.
        Err(error) => prop_assert!(error.to_string().len() < 1_000 + 6 * text.len()),
    }
    Ok(())
}

#[test]
fn names() {
    for_a_while(&text(), |text| {
        let bytes = text.as_bytes();
        let edge = |byte: Option<&u8>| {
            byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        let inside =
            |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
        let good = bytes.len() <= 63
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(inside);
        prop_assert_eq!(text.parse::<TenantName>().is_ok(), good);
        prop_assert_eq!(text.parse::<ServiceName>().is_ok(), good);
        returns::<TenantName>(&text)?;
        returns::<Digest>(&text)
    });
}

#[test]
fn quantities() {
    for_a_while(&text(), |text| {
        stays(&text, Bytes::get, Bytes::new)?;
        stays(&text, Fuel::get, Fuel::new)?;
        stays(&text, Millicores::get, Millicores::new)?;
        stays(&text, Millis::get, Millis::new)?;
        stays(&text, |shares: Shares| shares.get().into(), Shares::new)
    });
}

/// A document with the fields that specs have, and values that may be theirs.
fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        text().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
    ];
    let name = proptest::sample::select(vec![
        "cpu",
        "shares",
        "reservation",
        "limit",
        "memory",
        "storage",
        "requests",
        "in_flight",
        "queued",
        "per_second",
        "limits",
        "fuel",
        "timeout",
        "request_body",
        "env",
        "routes",
        "outbound",
        "usage_header",
        "sticky_header",
        "auto_rollback",
        "vcpus",
        "kernel",
        "initrd",
        "cmdline",
        "disks",
        "image",
        "mode",
        "net",
        "1",
        "2",
        "unknown",
    ]);
    leaf.prop_recursive(4, 24, 6, move |inner| {
        prop_oneof![
            3 => proptest::collection::btree_map(name.clone().prop_map(str::to_owned), inner.clone(), 0..6)
                .prop_map(|fields| fields.into_iter().collect::<serde_json::Map<_, _>>().into()),
            1 => proptest::collection::vec(inner, 0..5).prop_map(Value::from),
        ]
    })
}

/// A document that is taken is written as one that is taken for the same.
fn returns_as_document<T>(document: &Value) -> Result<(), TestCaseError>
where
    T: Serialize + DeserializeOwned + Debug + PartialEq,
{
    if let Ok(value) = serde_json::from_value::<T>(document.clone()) {
        let written = serde_json::to_value(&value);
        let written = written.map_err(|error| TestCaseError::fail(error.to_string()))?;
        let again = serde_json::from_value::<T>(written);
        let again = again.map_err(|error| TestCaseError::fail(format!("{value:?}: {error}")))?;
        prop_assert_eq!(again, value);
    }
    Ok(())
}

#[test]
fn specs() {
    for_a_while(&document(), |document| {
        returns_as_document::<TenantSpec>(&document)?;
        returns_as_document::<ServiceSpec>(&document)?;
        returns_as_document::<Traffic>(&document)?;
        let _ = serde_json::from_value::<MachineSpec>(document);
        Ok(())
    });
}
