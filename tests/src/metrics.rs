//! The Prometheus text format 0.0.4, read.

use std::collections::BTreeMap;

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The series' name; for a histogram with `_bucket`, `_sum` or `_count`.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// A page of `/metrics`.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// The page as it came.
    pub text: String,
    /// Its samples, in their order.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Reads a page.
    ///
    /// # Panics
    /// When a line is not of the format.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| sample(line).unwrap_or_else(|| panic!("a sample: {line}")));
        Self {
            text: text.to_owned(),
            samples: samples.collect(),
        }
    }

    /// The samples of a name that have all these labels.
    pub fn of<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        let matches = move |sample: &&Sample| {
            let has = |(name, value): &(&str, &str)| {
                sample.labels.get(*name).is_some_and(|is| is == value)
            };
            sample.name == name && labels.iter().all(has)
        };
        self.samples.iter().filter(matches)
    }

    /// The sum of the samples of a name that have all these labels; 0 where there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // An empty sum of floats is -0.
        self.of(name, labels)
            .map(|sample| sample.value)
            .sum::<f64>()
            + 0.0
    }

    /// The same for a counter of whole things.
    ///
    /// # Panics
    /// When the sum is not a whole number.
    #[must_use]
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let sum = self.sum(name, labels);
        let text = format!("{sum:.0}");
        let count: u64 = text.parse().unwrap_or_else(|_| panic!("{name} is {sum}"));
        assert!((sum - count as f64).abs() < f64::EPSILON, "{name} is {sum}");
        count
    }

    /// Requests of a tenant that ended so; of all tenants that ended so with `""`.
    #[must_use]
    pub fn requests(&self, tenant: &str, outcome: &str) -> u64 {
        self.count(
            "insula_requests_total",
            &[("tenant", tenant), ("outcome", outcome)],
        )
    }

    /// Requests of a tenant by outcome, for a message or a comparison.
    #[must_use]
    pub fn outcomes(&self, tenant: &str) -> BTreeMap<String, u64> {
        let mut outcomes = BTreeMap::new();
        for sample in self.of("insula_requests_total", &[("tenant", tenant)]) {
            let outcome = sample.labels["outcome"].clone();
            let count = self.requests(tenant, &outcome);
            outcomes.insert(outcome, count);
        }
        outcomes
    }

    /// CPU seconds charged to a tenant.
    #[must_use]
    pub fn cpu_seconds(&self, tenant: &str) -> f64 {
        self.sum("insula_cpu_seconds_total", &[("tenant", tenant)])
    }

    /// Fuel that a tenant consumed.
    #[must_use]
    pub fn fuel(&self, tenant: &str) -> u64 {
        self.count("insula_fuel_consumed_total", &[("tenant", tenant)])
    }

    /// Names of all families that have samples, without the suffixes of histograms.
    #[must_use]
    pub fn families(&self) -> Vec<&str> {
        let types = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "));
        types.filter_map(|rest| rest.split(' ').next()).collect()
    }
}

fn sample(line: &str) -> Option<Sample> {
    let (name, rest) = line.split_at(line.find(['{', ' '])?);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inner) => labels(inner)?,
        None => (BTreeMap::new(), rest),
    };
    let value = match rest.trim() {
        "+Inf" => f64::INFINITY,
        number => number.parse().ok()?,
    };
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// `a="b",c="d"} rest`.
fn labels(mut text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        text = text.trim_start_matches(',');
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.to_owned(), value);
        text = &rest[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read() {
        let page = Metrics::parse(
            "# HELP a b\n# TYPE a counter\na{t=\"x\",o=\"q\\\"}\\\\\"} 2\na{t=\"y\"} 3\nb 1.5\n\
             h_bucket{le=\"+Inf\"} 4\n",
        );
        assert_eq!(page.count("a", &[]), 5);
        assert_eq!(page.count("a", &[("t", "x")]), 2);
        assert_eq!(page.samples[0].labels["o"], "q\"}\\");
        assert!((page.sum("b", &[]) - 1.5).abs() < f64::EPSILON);
        assert_eq!(page.count("h_bucket", &[("le", "+Inf")]), 4);
        assert_eq!(page.families(), ["a"]);
    }
}
