//! Horizontal bars, as SVG by hand: readable on light and dark pages, no fonts, no scripts.

use std::fmt::Write as _;

use crate::stats::Spread;

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) figure: Spread,
    /// What is written behind it in the place of its figure.
    pub(crate) words: Option<String>,
    pub(crate) ours: bool,
}

/// Bars under one heading.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) title: String,
    pub(crate) bars: Vec<Bar>,
}

const WIDTH: f64 = 760.0;
const MARGIN: f64 = 16.0;
/// Where bars begin at the earliest, and the room behind the longest for its figure.
const NAMES: f64 = 210.0;
/// No letter of the usual fonts is wider on average.
const LETTER: f64 = 7.0;
const FIGURES: f64 = 90.0;
const BAR: f64 = 20.0;
const STEP: f64 = 28.0;
const HEADING: f64 = 30.0;

const STYLE: &str = "\
text{font:13px system-ui,sans-serif;fill:#24292f}\
.title{font-weight:600;font-size:15px}.heading{fill:#57606a}\
.bar{fill:#9aa4af}.ours{fill:#2f7d5b}.spread{stroke:#24292f;stroke-width:1.5}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.heading{fill:#9198a1}\
.bar{fill:#59636e}.ours{fill:#3fa876}.spread{stroke:#e6edf3}}";

/// All groups on one scale from zero; a thin line shows the spread of each bar.
pub(crate) fn bars(title: &str, unit: &str, groups: &[Group]) -> String {
    let all = groups.iter().flat_map(|group| &group.bars);
    let most = all.map(|bar| bar.figure.most).fold(1.0, f64::max);
    let letters = groups.iter().flat_map(|group| &group.bars).map(|bar| {
        let letters = u16::try_from(bar.name.chars().count()).unwrap_or(u16::MAX);
        f64::from(letters) * LETTER + MARGIN + 10.0
    });
    let names = letters.fold(NAMES, f64::max);
    let scale = (WIDTH - names - FIGURES) / most;
    let mut body = String::new();
    let mut y = MARGIN + 14.0;
    text(&mut body, (MARGIN, y), "title", "start", title);
    for group in groups {
        y += HEADING;
        text(&mut body, (MARGIN, y), "heading", "start", &group.title);
        y += 10.0;
        for bar in &group.bars {
            let middle = y + BAR / 2.0;
            let (least, median, most) = (bar.figure.least, bar.figure.median, bar.figure.most);
            text(
                &mut body,
                (names - 10.0, middle + 4.5),
                "",
                "end",
                &bar.name,
            );
            let class = if bar.ours { "bar ours" } else { "bar" };
            let _ = writeln!(
                body,
                r#"<rect class="{class}" x="{names}" y="{y}" width="{:.1}" height="{BAR}"/>"#,
                median * scale
            );
            let _ = writeln!(
                body,
                r#"<line class="spread" x1="{:.1}" x2="{:.1}" y1="{middle}" y2="{middle}"/>"#,
                names + least * scale,
                names + most * scale
            );
            let figure = bar.words.clone();
            let figure = figure.unwrap_or_else(|| format!("{median:.1} {unit}"));
            let end = names + most * scale + 8.0;
            text(&mut body, (end, middle + 4.5), "", "start", &figure);
            y += STEP;
        }
    }
    let height = y + MARGIN;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>{}</title>\n\
         <style>{STYLE}</style>\n{body}</svg>\n",
        escape(title)
    )
}

fn text(out: &mut String, (x, y): (f64, f64), class: &str, anchor: &str, words: &str) {
    let words = escape(words);
    let _ = writeln!(
        out,
        r#"<text x="{x:.1}" y="{y:.1}" class="{class}" text-anchor="{anchor}">{words}</text>"#
    );
}

fn escape(words: &str) -> String {
    words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_fits_and_words_are_escaped() {
        let bar = |name: &str, median: f64| Bar {
            name: name.to_owned(),
            figure: Spread::of([median]).unwrap(),
            words: (median > 50.0).then(|| "<much>".to_owned()),
            ours: false,
        };
        let group = Group {
            title: "a < b".to_owned(),
            bars: vec![bar("one", 10.0), bar("two", 100.0)],
        };
        let svg = bars("t", "µs", &[group]);
        assert!(svg.contains("a &lt; b"));
        assert!(svg.contains(r#"width="460.0""#) && svg.contains(r#"width="46.0""#));
        assert!(svg.contains("10.0 µs") && svg.contains("&lt;much&gt;"));
        assert!(!svg.contains("100.0 µs"));
        let long = Group {
            title: String::new(),
            bars: vec![bar(&"n".repeat(40), 10.0)],
        };
        assert!(bars("t", "µs", &[long]).contains(r#"x="306" y="#));
    }
}
