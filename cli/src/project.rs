//! From a project's folder to a component.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use insula_toolchain::{Artefact, BuildError, BuildOptions, LineProgress, Settings, Toolchain};
use insula_types::ServiceName;

use crate::args::BuildArgs;
use crate::output::{self, Style};

/// Builds the project in `dir`; what goes on is told on stderr.
pub(crate) fn build(dir: &Path) -> Result<Artefact> {
    let colour = Style::of(&io::stderr()) == Style::Colour;
    let mut progress = LineProgress::new(io::stderr()).with_colour(colour);
    if !dir.is_dir() {
        bail!("{} is not a folder", dir.display());
    }
    let dir = dir
        .canonicalize()
        .with_context(|| dir.display().to_string())?;
    let toolchain = Toolchain::find_with(&Settings::from_env(&dir), &mut progress)?;
    match toolchain.build(&dir, &BuildOptions::default(), &mut progress) {
        // The compiler's words were passed on while they came.
        Err(BuildError::Cargo { status, .. }) => bail!("cargo build failed ({status})"),
        built => Ok(built?),
    }
}

/// [`build`] beside other tasks: on a thread where it may block.
pub(crate) async fn build_aside(dir: PathBuf) -> Result<Artefact> {
    tokio::task::spawn_blocking(move || build(&dir)).await?
}

/// A package's name as that of a service.
pub(crate) fn service_name(package: &str) -> Result<ServiceName> {
    let name = package.to_ascii_lowercase().replace('_', "-");
    name.parse().with_context(|| {
        format!("the package's name {package:?} is no name for a service; give one with --service")
    })
}

/// `insula build`: prints the component's path.
pub(crate) fn run(args: &BuildArgs) -> Result<()> {
    let artefact = build(&args.dir)?;
    let size = output::bytes_text(artefact.size_bytes);
    output::note(&format!("{} is {size}", artefact.package));
    output::line(&artefact.path.display().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_become_services() {
        assert_eq!(service_name("My_Shop").unwrap().as_str(), "my-shop");
        assert!(service_name("-").is_err());
    }
}
