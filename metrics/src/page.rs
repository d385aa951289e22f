//! From cells to the Prometheus text format (version 0.0.4).
//!
//! A family is turned into the `prometheus` crate's model, written and dropped before the next
//! one is built, so that a scrape of many services holds one family at a time besides the text.

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{TEXT_FORMAT, TextEncoder};

use crate::cells::Distribution;

/// The `Content-Type` of a page.
pub const CONTENT_TYPE: &str = TEXT_FORMAT;

/// Names and values of the labels of one series.
pub(crate) type Labels<'a> = &'a [(&'static str, &'a str)];

/// A page being written.
#[derive(Debug, Default)]
pub(crate) struct Page {
    text: String,
}

/// The series of one family.
#[derive(Debug, Default)]
pub(crate) struct Series {
    metrics: Vec<Metric>,
}

/// Whether a family only grows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    Counter,
    Gauge,
    Histogram,
}

impl Page {
    /// Writes one family; nothing at all if it has no series.
    pub(crate) fn family(
        &mut self,
        name: &str,
        family_type: Type,
        help: &str,
        fill: impl FnOnce(&mut Series),
    ) {
        let mut series = Series::default();
        fill(&mut series);
        if series.metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(match family_type {
            Type::Counter => MetricType::COUNTER,
            Type::Gauge => MetricType::GAUGE,
            Type::Histogram => MetricType::HISTOGRAM,
        });
        family.set_metric(series.metrics);
        let written = TextEncoder::new().encode_utf8(&[family], &mut self.text);
        // The encoder refuses only families without a name or without series.
        debug_assert!(written.is_ok(), "{name}: {written:?}");
    }

    pub(crate) fn into_text(self) -> String {
        self.text
    }
}

impl Series {
    pub(crate) fn counter(&mut self, labels: Labels<'_>, value: f64) {
        let mut counter = Counter::default();
        counter.set_value(value);
        self.push(labels).set_counter(counter);
    }

    pub(crate) fn gauge(&mut self, labels: Labels<'_>, value: f64) {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        self.push(labels).set_gauge(gauge);
    }

    pub(crate) fn histogram(&mut self, labels: Labels<'_>, distribution: Distribution) {
        let mut histogram = Histogram::default();
        histogram.set_sample_count(distribution.count);
        histogram.set_sample_sum(distribution.sum_seconds);
        histogram.set_bucket(
            distribution
                .cumulative
                .into_iter()
                .map(|(upper_bound_seconds, count)| {
                    let mut bucket = Bucket::default();
                    bucket.set_upper_bound(upper_bound_seconds);
                    bucket.set_cumulative_count(count);
                    bucket
                })
                .collect(),
        );
        self.push(labels).set_histogram(histogram);
    }

    fn push(&mut self, labels: Labels<'_>) -> &mut Metric {
        let labels = labels
            .iter()
            .map(|(name, value)| {
                let mut pair = LabelPair::default();
                pair.set_name((*name).to_owned());
                pair.set_value((*value).to_owned());
                pair
            })
            .collect();
        self.metrics.push_mut(Metric::from_label(labels))
    }
}

/// An integer as the `f64` that the format has; exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "documented above")]
pub(crate) fn number(value: u64) -> f64 {
    value as f64
}
