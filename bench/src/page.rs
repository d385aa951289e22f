//! `docs/benchmarks.md`: a section per subcommand, each replaced by the run that made it and left
//! alone by all others. And what all sections say alike: figures, machine, commit, disturbance.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{peers, say};

const PAGE: &str = "benchmarks.md";
/// Above this part of the cores, figures are those of a machine that did other things as well.
pub(crate) const DISTURBED: f64 = 0.05;

/// What stands above all sections of a new page.
const PREAMBLE: &str = "\
# Benchmarks

Every section is written by the command that it names, from one run in which all servers take \
turns on the same cores with the same client. Figures are medians of the rounds, with the least \
and the largest in brackets. Times differ between machines, and between a quiet and a busy hour of \
one; the ratios are what to look at.
";

/// Puts a section into the page.
pub(crate) fn write_section(folder: &Path, name: &str, section: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let page = folder.join(PAGE);
    let before = fs::read_to_string(&page).unwrap_or_else(|_| PREAMBLE.to_owned());
    fs::write(&page, replace_section(&before, name, section))
        .with_context(|| page.display().to_string())?;
    say(&format!("written: {}", page.display()));
    Ok(())
}

/// Puts a plot beside the page.
pub(crate) fn write_plot(folder: &Path, name: &str, picture: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let file = folder.join(name);
    fs::write(&file, picture).with_context(|| file.display().to_string())?;
    say(&format!("written: {}", file.display()));
    Ok(())
}

/// The lines of a section that say where its figures come from.
pub(crate) fn provenance() -> String {
    let date = said("date", &["-u", "+%F"]);
    let (machine, commit) = (machine(), commit());
    format!("- Machine: {machine}.\n- Commit: {commit}. Date: {date}.")
}

/// What other processes took of the cores, for a column of its own.
pub(crate) fn elsewhere(part: f64) -> String {
    if part > DISTURBED {
        format!("**{:.0} %, disturbed**", part * 100.0)
    } else {
        format!("{:.0} %", part.max(0.0) * 100.0)
    }
}

/// 41,200
pub(crate) fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", figure / 100.0) + "00";
    let head = digits.len() % 3;
    let mut text = digits[..head].to_owned();
    for (index, three) in digits.as_bytes()[head..].chunks(3).enumerate() {
        if head > 0 || index > 0 {
            text.push(',');
        }
        text.push_str(&String::from_utf8_lossy(three));
    }
    text
}

/// A time in microseconds, readable.
pub(crate) fn time(us: f64) -> String {
    if us < 1000.0 {
        format!("{us:.0} µs")
    } else if us < 1e6 {
        format!("{:.1} ms", us / 1e3)
    } else {
        format!("{:.2} s", us / 1e6)
    }
}

/// Puts a section in its place, or at the end of a page that has none.
pub(crate) fn replace_section(page: &str, name: &str, section: &str) -> String {
    let (begin, end) = (
        format!("<!-- {name}: begin -->"),
        format!("<!-- {name}: end -->"),
    );
    let section = format!("{begin}\n{}\n{end}", section.trim_end());
    if let Some((before, rest)) = page.split_once(&begin)
        && let Some((_, after)) = rest.split_once(&end)
    {
        return format!("{before}{section}{after}");
    }
    format!("{}\n\n{section}\n", page.trim_end())
}

/// Whether a promise was kept, for a column of its own; a disturbed run does not tell.
pub(crate) const fn held(is_held: bool, elsewhere: f64) -> &'static str {
    match is_held {
        _ if elsewhere > DISTURBED => "?",
        true => "yes",
        false => "no",
    }
}

/// What a program says, on one line.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(peers::repository())
        .output();
    output.map_or("unknown".to_owned(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}

fn commit() -> String {
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"]);
    if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        format!("`{commit}`")
    } else {
        format!("`{commit}` with changes")
    }
}

fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = field(
        &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        "MemTotal",
    );
    let kib: u64 = memory
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let flags = field(&cpus, "flags");
    let virtual_machine = if flags.split(' ').any(|flag| flag == "hypervisor") {
        ", a virtual machine"
    } else {
        ""
    };
    format!(
        "{} ({cores} cores), {} GiB{virtual_machine}; Linux {}",
        field(&cpus, "model name"),
        (kib + (1 << 19)) >> 20,
        kernel.trim(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let page = replace_section("# Page\n", "a", "one\n");
        let page = replace_section(&page, "b", "two\n");
        let page = replace_section(&page, "a", "three\n");
        let expected = "# Page\n\n<!-- a: begin -->\nthree\n<!-- a: end -->\n\n\
                        <!-- b: begin -->\ntwo\n<!-- b: end -->\n";
        assert_eq!(page, expected);
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(thousands(41_234.0), "41,200");
        assert_eq!(thousands(141_234.0), "141,200");
        assert_eq!(thousands(949.0), "900");
        assert_eq!(thousands(1_250_000.0), "1,250,000");
        assert_eq!(
            (time(12.3), time(1250.0)),
            ("12 µs".into(), "1.2 ms".into())
        );
        assert_eq!(time(1.5e6), "1.50 s");
    }
}
