//! The `insula` program: its verbs.
//!
//! `serve` runs a host: control in this process, and `data-plane` as a child that serves requests;
//! `compile-component` is what a host runs as a child for every component it compiles. Everything
//! else speaks only HTTP to a host.
//!
//! * [`args`]: what can be typed
//! * [`serve`], [`config`]: the host's process and its configuration
//! * [`client`], [`access`]: HTTP to a host, and where its token is found
//! * [`up`], [`new`], [`project`], [`deploy`]: from source to an answer
//! * [`machines`], [`console`]: full guests
//! * [`resources`], [`logs`], [`top`]: looking and changing
//! * [`backup`]: saving and restoring
//! * [`recompile`]: everything compiled for the engine that there is now
//! * [`doctor`]: what this machine has and lacks
//! * [`output`]: tables, JSON, errors
#![forbid(unsafe_code)]

mod access;
mod args;
mod backup;
mod client;
mod config;
mod console;
mod deploy;
mod doctor;
mod logs;
mod machines;
mod new;
mod output;
mod project;
mod recompile;
mod resources;
mod serve;
mod tls;
mod top;
mod up;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use args::{Cli, Verb};

/// Requests allocate on one worker and may free on another; the system's allocator takes a lock
/// for that. Measured: 2 µs less CPU of 27 per request (docs/decisions/0007-allocator.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The problem's title and detail are on stderr.
const FAILED: u8 = 1;
/// What was typed, or stands in a configuration file, cannot be meant.
const BAD_USAGE: u8 = 2;

/// What was typed can be read but not be meant; exit code 2.
#[derive(Debug)]
struct UsageError(String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match &cli.verb {
        Verb::CompileComponent(_) => return insula_host::engine::compile_child_main(),
        // Nothing before it starts a thread: it is jailed while there is one.
        Verb::MachineMonitor(args) => return insula_host::machines::monitor_main(&args.orders),
        // The same.
        Verb::DataPlane(args) => return serve::data_plane(&args.log),
        _ => {}
    }
    match run(cli.verb) {
        Ok(code) => code,
        // Whoever read our output has seen enough, as in `insula logs t/s | head`.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            let usage = error.chain().any(|cause| cause.is::<UsageError>());
            ExitCode::from(if usage { BAD_USAGE } else { FAILED })
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Serve(args) => serve::run(&args)?,
        Verb::New(args) => new::run(&args)?,
        Verb::Build(args) => project::run(&args)?,
        Verb::Restore(args) => backup::restore(&args)?,
        Verb::Doctor(args) => return doctor::run(&args),
        Verb::CompileComponent(_) => return Ok(insula_host::engine::compile_child_main()),
        Verb::DataPlane(args) => return Ok(serve::data_plane(&args.log)),
        verb => block_on(speak(verb))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The verbs that speak to a host.
async fn speak(verb: Verb) -> Result<()> {
    match verb {
        Verb::Up(args) => up::run(args).await,
        Verb::Deploy(args) => deploy::run(args).await,
        Verb::Tenants(verb) => resources::tenants(verb).await,
        Verb::Volumes(verb) => resources::volumes(verb).await,
        Verb::Services(verb) => resources::services(verb).await,
        Verb::Versions(verb) => resources::versions(verb).await,
        Verb::Machines(verb) => machines::machines(verb).await,
        Verb::Images(verb) => machines::images(verb).await,
        Verb::Rollback(args) => resources::rollback(args).await,
        Verb::Traffic(args) => resources::traffic(args).await,
        Verb::Usage(args) => resources::usage(args).await,
        Verb::Tokens(verb) => resources::tokens(verb).await,
        Verb::Backup(args) => backup::backup(args).await,
        Verb::Recompile(args) => recompile::run(args).await,
        Verb::Logs(args) => logs::run(args).await,
        Verb::Top(args) => top::run(args).await,
        Verb::Serve(_)
        | Verb::New(_)
        | Verb::Build(_)
        | Verb::Restore(_)
        | Verb::Doctor(_)
        | Verb::CompileComponent(_)
        | Verb::DataPlane(_)
        | Verb::MachineMonitor(_) => unreachable!("these speak to no host"),
    }
}

/// Runs a future on a runtime that lives as long as it does.
fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(future);
    // A build that still runs in a blocking thread must not hold up Ctrl-C.
    runtime.shutdown_background();
    result
}
