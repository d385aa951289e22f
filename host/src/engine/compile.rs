//! The child process that compiles one component.
//!
//! Reads the component from standard input, writes the raw artefact to standard output and exits
//! with 0; or writes one line of JSON, `{"code":…,"detail":…}`, to standard error and exits with
//! [`REFUSED`]. Anything else (a signal, another code) means that a limit ended it.
//!
//! ```text
//!  started ─▶ limits itself ─▶ becomes the same program anew ─▶ shuts itself in ─▶ reads the component ─▶ …
//!                               │ its allocator meets the limits from its first page on
//! ```
//!
//! The allocator reserves its first gigabyte before `main`, as memory that may be written to. That
//! alone would be all that the limit of such memory allows, so the limit has to be there first.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use insula_types::quantity::Bytes;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use wasmtime::component::Component;

use super::config::{COMPILE_CPU, COMPILE_DATA, COMPILE_MEMORY, COMPILE_THREADS, Engine};
use super::scan::{ScanError, scan};
use crate::config::{ARTEFACT_MAX, COMPONENT_MAX};
use crate::process::compiler;

/// The exit code of the child when the component is at fault.
pub const REFUSED: u8 = 3;

/// Why a component was refused, as the child reports it.
struct Refusal {
    code: &'static str,
    detail: String,
}

impl From<ScanError> for Refusal {
    fn from(error: ScanError) -> Self {
        let code = match error {
            ScanError::TooComplex { .. } => "too_complex",
            _ => "invalid_component",
        };
        Self {
            code,
            detail: error.to_string(),
        }
    }
}

/// The whole life of the compiler child.
#[must_use]
pub fn compile_child_main() -> ExitCode {
    let began_limited = is_at_most(Resource::Data, COMPILE_DATA.get());
    if let Err(error) = limit_self() {
        return fail(&format!("cannot limit the compiler: {error}"));
    }
    if !began_limited {
        let error = again();
        return fail(&format!("cannot begin the compiler anew: {error}"));
    }
    if let Err(error) = compiler::shut_in(ARTEFACT_MAX.get()) {
        return fail(&format!("cannot shut the compiler in: {error}"));
    }
    let mut component = Vec::new();
    let input = std::io::stdin().lock();
    if let Err(error) = input
        .take(COMPONENT_MAX.get() + 1)
        .read_to_end(&mut component)
    {
        return fail(&format!("cannot read the component: {error}"));
    }
    match compile(&component) {
        Ok(artefact) => match std::io::stdout().lock().write_all(&artefact) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("cannot write the artefact: {error}")),
        },
        Err(refusal) => {
            let report = serde_json::json!({"code": refusal.code, "detail": refusal.detail});
            // Nobody listens any more if this fails; the exit code still tells.
            let _ = writeln!(std::io::stderr(), "{report}");
            ExitCode::from(REFUSED)
        }
    }
}

fn fail(message: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{message}");
    ExitCode::FAILURE
}

/// Becomes the same program with the same input; the limits stay.
fn again() -> std::io::Error {
    Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env_clear()
        .env("RAYON_NUM_THREADS", COMPILE_THREADS.to_string())
        .exec()
}

/// Whether a limit holds that can never be raised above `limit`.
fn is_at_most(resource: Resource, limit: u64) -> bool {
    getrlimit(resource)
        .maximum
        .is_some_and(|maximum| maximum <= limit)
}

fn limit_self() -> rustix::io::Result<()> {
    let limit = |resource, limit| {
        if is_at_most(resource, limit) {
            return Ok(());
        }
        let limit = Some(limit);
        setrlimit(
            resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )
    };
    limit(Resource::As, COMPILE_MEMORY.get())?;
    limit(Resource::Data, COMPILE_DATA.get())?;
    limit(Resource::Cpu, COMPILE_CPU.as_secs())?;
    limit(Resource::Core, 0)?;
    limit(Resource::Nproc, PROCESSES_MAX).or_else(|error| {
        // Root is not bound by it; for others a failure is no reason to refuse work.
        if error == rustix::io::Errno::INVAL {
            Ok(())
        } else {
            Err(error)
        }
    })
}

/// Threads of the compiler's user, where that is control's own. Counted over all processes of that user,
/// hence generous.
const PROCESSES_MAX: u64 = 4_096;

fn compile(bytes: &[u8]) -> Result<Vec<u8>, Refusal> {
    let refuse = |code: &'static str| {
        move |error: wasmtime::Error| Refusal {
            code,
            detail: format!("{error:#}"),
        }
    };
    if bytes.len() as u64 > COMPONENT_MAX.get() {
        return Err(Refusal {
            code: "too_large",
            detail: format!("larger than {} bytes", Bytes::get(COMPONENT_MAX)),
        });
    }
    scan(bytes)?;
    let engine = Engine::compiler().map_err(|error| Refusal {
        code: "host_error",
        detail: error.to_string(),
    })?;
    let component = Component::new(&engine.inner, bytes).map_err(refuse("invalid_component"))?;
    exports_handler(&engine, &component)?;
    engine
        .link(&component)
        .map_err(refuse("unsupported_import"))?;
    component.serialize().map_err(refuse("invalid_component"))
}

/// The component must export `wasi:http/incoming-handler@0.2.x`.
fn exports_handler(engine: &Engine, component: &Component) -> Result<(), Refusal> {
    let ty = component.component_type();
    let names: Vec<String> = ty
        .exports(&engine.inner)
        .map(|(name, _)| name.to_owned())
        .take(16)
        .collect();
    if names
        .iter()
        .any(|name| name.starts_with("wasi:http/incoming-handler@0.2."))
    {
        return Ok(());
    }
    let found = if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(", ")
    };
    Err(Refusal {
        code: "wrong_world",
        detail: format!(
            "a service exports wasi:http/incoming-handler@0.2.x; this component exports {found}"
        ),
    })
}
