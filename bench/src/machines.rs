//! `machines`: publishes what `cargo xtask vm-bench` found in the test bed, where there is KVM.
//!
//! It measures nothing itself: the bed is another system, emulated, and the rows of the table come
//! from there, ready, on the standard input.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{page, peers};

/// Options of `machines`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each was measured
    #[arg(long)]
    rounds: u8,
    /// QEMU's version
    #[arg(long)]
    qemu: String,
    /// Where `benchmarks.md` goes
    #[arg(long, default_value_os_t = peers::repository().join("docs"))]
    out: PathBuf,
}

/// Publishes the rows.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut rows = String::new();
    std::io::stdin().read_to_string(&mut rows)?;
    if !rows.lines().any(|line| line.starts_with('|')) {
        bail!("no row of a table on the standard input");
    }
    page::write_section(&options.out, "machines", &section(options, &rows)?)
}

fn section(options: &Options, rows: &str) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "## What a machine costs\n")?;
    writeln!(
        text,
        "The monitor, jailed, beside {}'s microvm machine, which is not: Debian's unmodified cloud \
         kernel, as bzImage (`vmlinuz`) and as ELF with its PVH entry (`vmlinux`), with the same \
         command line and initial ramdisk, one vCPU, 128 MiB; in turns, in one bed, whose KVM is \
         AMD's on a processor that QEMU emulates, with all of its memory taken before. Emulated \
         times are many times those of hardware, and what KVM does in the kernel weighs more than \
         there. The last row is from this machine itself, where KVM opens: a guest of a few \
         instructions. The monitor is in a program of its own, linked statically; in `insula`, \
         which is larger, it takes 1 to 2 ms of CPU more to load.\n",
        options.qemu
    )?;
    writeln!(
        text,
        "| what | insula | QEMU microvm | ratio | promised | held |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|")?;
    writeln!(text, "{}\n", rows.trim())?;
    writeln!(
        text,
        "- Run: `cargo xtask vm-bench {rounds}`; {rounds} rounds, who goes first changing by one \
         every round; ratios are of medians. The first instruction is by the kernel's trace of \
         `kvm_entry`; CPU outside guest mode is `schedstat` less the guest time in `stat`.",
        rounds = options.rounds
    )?;
    writeln!(text, "{}", page::provenance())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_below_their_heads() {
        let options = Options {
            rounds: 3,
            qemu: "QEMU 7.2".to_owned(),
            out: PathBuf::new(),
        };
        let section = section(&options, "| a | 1 | 2 | 0.50 × | ≤ 1 × | yes |\n").unwrap();
        assert!(section.contains("|---|---|---|---|---|---|\n| a | 1 | 2 |"));
        assert!(section.contains("`cargo xtask vm-bench 3`"));
    }
}
