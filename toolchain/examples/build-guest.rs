//! Finds a toolchain and builds the guest, or the workspace of guests, in a
//! folder: `cargo run -p insula-toolchain --example build-guest -- samples --workspace`.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use insula_toolchain::{BuildOptions, LineProgress, Probe, Settings, Toolchain};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().unwrap_or_else(|| ".".to_owned());
    let whole = arguments
        .next()
        .is_some_and(|argument| argument == "--workspace");
    let dir = Path::new(&dir);
    let settings = Settings::from_env(dir);
    let mut progress = LineProgress::new(io::stderr());
    let mut out = io::stdout();
    writeln!(out, "{}", Probe::look(&settings).readiness)?;

    let started = Instant::now();
    let toolchain = Toolchain::find_with(&settings, &mut progress)?;
    writeln!(
        out,
        "toolchain: {} after {:.1?}",
        toolchain.source(),
        started.elapsed()
    )?;

    let started = Instant::now();
    let options = BuildOptions::default();
    let built = if whole {
        toolchain.build_workspace(dir, &options, &mut progress)?
    } else {
        vec![toolchain.build(dir, &options, &mut progress)?]
    };
    for artefact in &built {
        writeln!(
            out,
            "{:>9} {}",
            artefact.size_bytes,
            artefact.path.display()
        )?;
    }
    writeln!(out, "built {} in {:.1?}", built.len(), started.elapsed())?;
    Ok(())
}
