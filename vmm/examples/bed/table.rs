//! Rows of the table that `cargo xtask vm-bench` publishes, and the promises in them.

use crate::say;

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Promise {
    /// So many times the other's.
    Times(f64),
    /// So much of its own unit.
    AtMost(f64),
}

/// The middle one, with the least and the most.
fn spread(figures: &[f64]) -> (f64, String) {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
        return (f64::NAN, "–".to_owned());
    };
    let middle = sorted[sorted.len() / 2];
    (middle, format!("{middle:.1} ({least:.1}–{most:.1})"))
}

/// Says a row, and whether it holds: what, ours, the other's, their ratio, the promise.
pub(crate) fn row(what: &str, ours: &[f64], theirs: &[f64], promise: Promise) -> bool {
    let (our_middle, our_words) = spread(ours);
    let (their_middle, their_words) = spread(theirs);
    let ratio = our_middle / their_middle;
    let (holds, promised) = match promise {
        Promise::Times(most) => (ratio <= most, format!("≤ {most} ×")),
        Promise::AtMost(most) => (our_middle <= most, format!("≤ {most}")),
    };
    let ratio = if ratio.is_nan() {
        "–".to_owned()
    } else {
        format!("{ratio:.2} ×")
    };
    let held = if holds { "yes" } else { "no" };
    say(&format!(
        "row | {what} | **{our_words}** | {their_words} | {ratio} | {promised} | {held} |"
    ));
    holds
}
