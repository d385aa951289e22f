//! The host itself: health, capacity, metrics, the API's description.

use std::fmt::Write as _;
use std::rc::Rc;

use serde_json::json;

use crate::control::http_types::{Call, Reply};
use crate::control::problem::{Answer, Code, Problem};
use crate::control::{Control, Readiness, ceiling, exposition, openapi, recompile};

/// The commit that this program was built from, where the build said so.
const COMMIT: &str = match option_env!("INSULA_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// The process answers.
pub(crate) async fn health(_: Rc<Control>, _: Call) -> Answer {
    Ok(Reply::text("text/plain; charset=utf-8", "ok\n".to_owned()))
}

/// Everything that is intended is served.
pub(crate) async fn ready(control: Rc<Control>, _: Call) -> Answer {
    if let Some(reason) = control.health.stopped() {
        return Err(Problem::state_stopped(reason));
    }
    let waiting = match control.readiness.get() {
        Readiness::Ready => return Ok(Reply::text("text/plain", "ready\n".to_owned())),
        Readiness::Reconciling => "services are being started",
        Readiness::DataGone => "the data plane has died and is started again",
        Readiness::Stopping => "the host is stopping",
    };
    Err(Problem::new(Code::NotReady, waiting).retry_after(1))
}

pub(crate) async fn describe(_: Rc<Control>, _: Call) -> Answer {
    Ok(Reply::ok(&openapi::document()))
}

pub(crate) async fn host(control: Rc<Control>, _: Call) -> Answer {
    let commitments = control.store(|store| store.commitments()).await?;
    let config = &control.config;
    Ok(Reply::ok(&json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": COMMIT,
        "wasmtime": config.engine_version,
        "kvm": {
            "support": control.machines.support.word(),
            "detail": control.machines.support.to_string(),
        },
        "machines": {
            "memory_percent": control.machines.config.memory_percent,
            "memory_capacity_bytes": control.machine_memory_bytes(),
            "memory_committed_bytes": control.machines.book.borrow().committed(None),
            "groups_missing": control.machines.groups.missing(),
            "network": control.machines.network.pool().map(|pool| pool.to_string()),
            "network_missing": control.machines.network.missing(),
        },
        "domain": config.domain,
        "ingress": config.ingress,
        "admin": control.admin,
        "started_at": control.started,
        "data_plane": {
            "restarts": control.link.restarts(),
            "walls": *control.walls.borrow(),
        },
        "workers": config.workers,
        "capacity": {
            "cpu_millicores": config.capacity_millicores(),
            "memory_bytes": control.machine.memory_bytes,
            "instances": config.instances,
        },
        "committed": {
            "cpu_reservation_millicores": commitments.reserved_millicores,
            "memory_limit_bytes": commitments.memory_bytes,
        },
        "tenants": commitments.tenants,
        "services": commitments.services,
        "ceiling": ceiling(&config.ceiling),
    })))
}

pub(crate) async fn recompilation(control: Rc<Control>, _: Call) -> Answer {
    Ok(Reply::ok(&json!(control.recompilation.get())))
}

pub(crate) async fn recompile(control: Rc<Control>, call: Call) -> Answer {
    let actor = call.actor()?;
    control
        .change(move |_, _| Ok(((), Some(actor.recompilation()))))
        .await?;
    Ok(Reply::ok(&json!(recompile::begin(&control).await?)))
}

/// Control's families, then data's.
pub(crate) async fn metrics(control: Rc<Control>, _: Call) -> Answer {
    let mut text = own_families(&control).await?;
    let machines = control.machine_families();
    match control.link.families().await {
        Ok(families) => text.push_str(&exposition::merge(&families, &machines)),
        // The host's own numbers are worth having when data is in trouble.
        Err(error) => tracing::warn!(%error, "metrics without the data plane's"),
    }
    Ok(Reply::text(
        "text/plain; version=0.0.4; charset=utf-8",
        text,
    ))
}

async fn own_families(control: &Control) -> Result<String, Problem> {
    let commitments = control.store(|store| store.commitments()).await?;
    let cores = |millicores: u64| format!("{}.{:03}", millicores / 1_000, millicores % 1_000);
    let families = [
        (
            "insula_build_info",
            "What this host was built from.",
            format!(
                "{{version=\"{}\",wasmtime=\"{}\",commit=\"{COMMIT}\"}} 1",
                env!("CARGO_PKG_VERSION"),
                control.config.engine_version
            ),
        ),
        (
            "insula_host_cpu_capacity_cores",
            "CPU that is divided among tenants: one core per worker.",
            format!(" {}", cores(control.config.capacity_millicores())),
        ),
        (
            "insula_host_cpu_reserved_cores",
            "Sum of the tenants' CPU reservations.",
            format!(" {}", cores(commitments.reserved_millicores)),
        ),
        (
            "insula_host_memory_bytes",
            "Memory of this machine, or of the cgroup where that is less.",
            format!(" {}", control.machine.memory_bytes),
        ),
        (
            "insula_host_memory_committed_bytes",
            "Sum of the tenants' memory limits.",
            format!(" {}", commitments.memory_bytes),
        ),
        (
            "insula_state_stopped",
            "Whether the state takes no more changes since the disk failed: 1 needs an operator.",
            format!(" {}", u8::from(control.health.stopped().is_some())),
        ),
        (
            "insula_host_kvm",
            "Whether full guests could run here.",
            format!("{{support=\"{}\"}} 1", control.machines.support.word()),
        ),
    ];
    let mut text = String::new();
    for (name, help, sample) in families {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{sample}"
        );
    }
    Ok(text)
}
