//! workerd, the runtime of Cloudflare Workers, from npm: V8 isolates, reused, many workers in one
//! process.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::peers::{Missing, repository};
use crate::process::Running;
use crate::servers::{Bed, free_address};

pub(crate) const VERSION: &str = "1.20261117.1";
const VARIABLE: &str = "INSULA_BENCH_WORKERD";
/// The package for each kind of machine that brings the program itself (npm's naming).
const PROGRAM: &str = "node_modules/@cloudflare/workerd-linux-64/bin/workerd";

/// Answers what `hello` answers.
const VICTIM: &str =
    "export default { fetch() { return new Response(\"Hello from Insula\\n\"); } };\n";
const HOG: &str = "export default { fetch() { for (;;) {} } };\n";

/// The `workerd` to measure.
pub(crate) fn find(missing: Missing) -> Result<PathBuf> {
    let program = match env::var_os(VARIABLE) {
        Some(path) => PathBuf::from(path),
        None => {
            let root = repository().join("target/peers/workerd");
            let program = root.join(PROGRAM);
            if !program.exists() && missing == Missing::Installed {
                install(&root)?;
            }
            program
        }
    };
    let answers = Command::new(&program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !answers.is_ok_and(|status| status.success()) {
        let program = program.display();
        bail!("{program}: --install-peers fetches it with npm, {VARIABLE} names another");
    }
    Ok(program)
}

fn install(root: &Path) -> Result<()> {
    crate::say(&format!(
        "fetching workerd {VERSION} into {}",
        root.display()
    ));
    fs::create_dir_all(root)?;
    let status = Command::new("npm")
        .args(["install", "--no-audit", "--no-fund", "--prefix"])
        .arg(root)
        .arg(format!("workerd@{VERSION}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("starting npm")?;
    if !status.success() {
        bail!("npm install workerd@{VERSION}: {status}");
    }
    Ok(())
}

/// Two workers in one process, each with a socket of its own.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) running: Running,
    pub(crate) victim: SocketAddr,
    pub(crate) hog: SocketAddr,
}

/// Starts it.
pub(crate) fn start(bed: &Bed, program: &Path) -> Result<Pair> {
    let (victim, hog) = (free_address()?, free_address()?);
    let folder = bed.scratch.join("workerd");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("victim.js"), VICTIM)?;
    fs::write(folder.join("hog.js"), HOG)?;
    let config = folder.join("config.capnp");
    fs::write(&config, configuration(victim, hog))?;
    let mut command = Command::new(program);
    command.arg("serve").arg(&config);
    let running = Running::start(command, &bed.places.server, &bed.log("workerd"))?;
    Ok(Pair {
        running,
        victim,
        hog,
    })
}

fn configuration(victim: SocketAddr, hog: SocketAddr) -> String {
    let worker = |name: &str| {
        format!(
            "const {name} :Workerd.Worker = (\n  modules = [(name = \"main\", esModule = embed \
             \"{name}.js\")],\n  compatibilityDate = \"2025-01-01\",\n);\n"
        )
    };
    format!(
        "using Workerd = import \"/workerd/workerd.capnp\";\n\
         const config :Workerd.Config = (\n  services = [\n    (name = \"victim\", worker = \
         .victim),\n    (name = \"hog\", worker = .hog),\n  ],\n  sockets = [\n    (name = \
         \"victim\", address = \"{victim}\", http = (), service = \"victim\"),\n    (name = \
         \"hog\", address = \"{hog}\", http = (), service = \"hog\"),\n  ],\n);\n{}{}",
        worker("victim"),
        worker("hog"),
    )
}
