//! What a page shows, against a model and against `promtool`.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use insula_metrics::{
    BuildInfo, ControlMetrics, DataMetrics, Direction, InstanceState, Kind, ServiceMetrics,
    ShedReason, TenantMetrics,
};
use insula_types::{Outcome, ServiceName, TenantName};
use proptest::prelude::*;

fn tenant(index: usize) -> TenantName {
    format!("t{index}").parse().unwrap()
}

fn service(index: usize) -> ServiceName {
    format!("s{index}").parse().unwrap()
}

/// The samples of a page; a series that occurs twice is an error.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let before = samples.insert(series.to_owned(), value.parse().unwrap());
        assert_eq!(before, None, "{series} twice");
    }
    samples
}

/// One step; the indices name tenants and services, or one of the handles kept so far.
#[derive(Debug, Clone)]
enum Step {
    Tenant(usize),
    Service(usize, usize),
    RemoveTenant(usize),
    RemoveService(usize, usize),
    Charge {
        handle: usize,
        cpu_ns: u64,
    },
    End {
        handle: usize,
        outcome: usize,
        micros: u64,
        fuel: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0..3usize).prop_map(Step::Tenant),
        4 => (0..3usize, 0..4usize).prop_map(|(t, s)| Step::Service(t, s)),
        1 => (0..3usize).prop_map(Step::RemoveTenant),
        2 => (0..3usize, 0..4usize).prop_map(|(t, s)| Step::RemoveService(t, s)),
        4 => (any::<usize>(), 0..10_000_000_000u64)
            .prop_map(|(handle, cpu_ns)| Step::Charge { handle, cpu_ns }),
        8 => (any::<usize>(), 0..Outcome::ALL.len(), 0..100_000_000u64, 0..3u64)
            .prop_map(|(handle, outcome, micros, fuel)| Step::End { handle, outcome, micros, fuel }),
    ]
}

/// What the page should hold. Every creation of a name is a new generation, and a handle counts
/// for its own generation only.
#[derive(Default)]
struct Model {
    generation: u64,
    tenants: BTreeMap<usize, ModelTenant>,
}

#[derive(Default)]
struct ModelTenant {
    generation: u64,
    cpu_ns: u64,
    services: BTreeMap<usize, ModelService>,
}

#[derive(Default)]
struct ModelService {
    generation: u64,
    outcomes: BTreeMap<usize, u64>,
    fuel: u64,
    duration_micros: u64,
}

impl Model {
    fn tenant(&mut self, t: usize) -> &mut ModelTenant {
        self.generation += 1;
        let generation = self.generation;
        self.tenants.entry(t).or_insert_with(|| ModelTenant {
            generation,
            ..Default::default()
        })
    }

    fn service(&mut self, t: usize, s: usize) -> u64 {
        self.generation += 1;
        let generation = self.generation;
        self.tenant(t)
            .services
            .entry(s)
            .or_insert_with(|| ModelService {
                generation,
                ..Default::default()
            })
            .generation
    }

    fn samples(&self) -> BTreeMap<String, f64> {
        let mut samples = BTreeMap::new();
        let mut put = |series: String, value: f64| samples.insert(series, value);
        put("insula_host_cpu_seconds_total".into(), 0.0);
        put("insula_host_guest_memory_budget_bytes".into(), 0.0);
        put("insula_host_guest_memory_bytes".into(), 0.0);
        put("insula_host_workers".into(), 0.0);
        for (t, tenant) in &self.tenants {
            let wasm = |family: &str| format!(r#"insula_{family}{{tenant="t{t}",kind="wasm"}}"#);
            put(wasm("cpu_seconds_total"), tenant.cpu_ns as f64 / 1e9);
            put(wasm("cpu_wait_seconds_total"), 0.0);
            put(wasm("cpu_throttled_seconds_total"), 0.0);
            put(wasm("memory_bytes"), 0.0);
            put(wasm("memory_byte_seconds_total"), 0.0);
            for (s, service) in &tenant.services {
                let labels = format!(r#"tenant="t{t}",service="s{s}""#);
                for (outcome, count) in &service.outcomes {
                    let outcome = Outcome::ALL[*outcome];
                    let series =
                        format!(r#"insula_requests_total{{{labels},outcome="{outcome}"}}"#);
                    put(series, *count as f64);
                }
                if service.fuel > 0 {
                    put(
                        format!("insula_fuel_consumed_total{{{labels}}}"),
                        service.fuel as f64,
                    );
                }
                let ended: u64 = service.outcomes.values().sum();
                if ended > 0 {
                    let duration = "insula_request_duration_seconds";
                    put(format!("{duration}_count{{{labels}}}"), ended as f64);
                    let seconds = (service.duration_micros * 1_000) as f64 / 1e9;
                    put(format!("{duration}_sum{{{labels}}}"), seconds);
                    put(
                        format!(r#"{duration}_bucket{{{labels},le="+Inf"}}"#),
                        ended as f64,
                    );
                }
            }
        }
        samples
    }
}

/// Handles that are kept over removals, with the generation that they count for.
#[derive(Default)]
struct Handles {
    tenants: Vec<(usize, u64, Arc<TenantMetrics>)>,
    services: Vec<(usize, usize, u64, Arc<ServiceMetrics>)>,
}

fn run(step: Step, metrics: &DataMetrics, model: &mut Model, handles: &mut Handles) {
    match step {
        Step::Tenant(t) => {
            let generation = model.tenant(t).generation;
            handles
                .tenants
                .push((t, generation, metrics.tenant(&tenant(t))));
        }
        Step::Service(t, s) => {
            let generation = model.service(t, s);
            let handle = metrics.service(&tenant(t), &service(s));
            handles.services.push((t, s, generation, handle));
        }
        Step::RemoveTenant(t) => {
            model.tenants.remove(&t);
            metrics.remove_tenant(&tenant(t));
        }
        Step::RemoveService(t, s) => {
            if let Some(tenant) = model.tenants.get_mut(&t) {
                tenant.services.remove(&s);
            }
            metrics.remove_service(&tenant(t), &service(s));
        }
        Step::Charge { handle, cpu_ns } => {
            let Some(count) = std::num::NonZero::new(handles.tenants.len()) else {
                return;
            };
            let (t, generation, handle) = &handles.tenants[handle % count];
            handle.add_cpu_ns(Kind::Wasm, cpu_ns);
            if let Some(tenant) = model.tenants.get_mut(t)
                && tenant.generation == *generation
            {
                tenant.cpu_ns += cpu_ns;
            }
        }
        Step::End {
            handle,
            outcome,
            micros,
            fuel,
        } => {
            let Some(count) = std::num::NonZero::new(handles.services.len()) else {
                return;
            };
            let (t, s, generation, handle) = &handles.services[handle % count];
            handle.request_ended(Outcome::ALL[outcome], Duration::from_micros(micros));
            handle.add_fuel(fuel);
            let service = model
                .tenants
                .get_mut(t)
                .and_then(|tenant| tenant.services.get_mut(s));
            if let Some(service) = service
                && service.generation == *generation
            {
                *service.outcomes.entry(outcome).or_default() += 1;
                service.duration_micros += micros;
                service.fuel += fuel;
            }
        }
    }
}

proptest! {
    #[test]
    fn the_page_is_what_the_model_says(steps in prop::collection::vec(step(), 0..80)) {
        let metrics = DataMetrics::new();
        let mut model = Model::default();
        let mut handles = Handles::default();
        for step in steps {
            run(step, &metrics, &mut model, &mut handles);
        }
        let mut shown = samples(&metrics.expose());
        shown.retain(|series, _| !series.contains("_bucket") || series.contains("+Inf"));
        prop_assert_eq!(shown, model.samples());
    }
}

/// Metrics in which everything moved.
fn busy() -> DataMetrics {
    let metrics = DataMetrics::new();
    metrics.set_host_workers(2);
    metrics.add_host_cpu_ns(1_500_000_000);
    metrics.unrouted().request_ended(Outcome::NotFound);
    metrics.unrouted().shed(ShedReason::Connections);
    metrics.unrouted().add_ingress_bytes(Direction::In, 150);
    let acme = metrics.tenant(&"acme".parse().unwrap());
    for kind in Kind::ALL {
        acme.add_cpu_ns(kind, 2_000_000_001);
        acme.add_cpu_wait_ns(kind, 5);
        acme.add_cpu_throttled_ns(kind, 6);
        acme.memory_grew(kind, 1 << 20);
        acme.add_memory_held(kind, 1 << 20, Duration::from_millis(1_500));
    }
    acme.set_memory_limit(Some(512 << 20));
    acme.shed(ShedReason::QueueFull);
    acme.add_ingress_bytes(Direction::Out, 1_000);
    acme.log_lines_dropped(3);
    let hello = metrics.service(&"acme".parse().unwrap(), &"hello".parse().unwrap());
    for outcome in Outcome::ALL {
        hello.request_ended(outcome, Duration::from_micros(130));
    }
    hello.instance_started(Duration::from_micros(7));
    hello.add_fuel(12_345);
    let mut instance = hello.instance(InstanceState::Starting);
    instance.set(InstanceState::Running);
    metrics
}

#[test]
fn families_are_sorted_and_all_there() {
    let page = busy().expose();
    let families: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.split_once(' ').unwrap().0)
        .collect();
    assert!(families.is_sorted(), "{families:?}");
    assert_eq!(families.len(), 18, "{families:?}");
    let helps = page
        .lines()
        .filter(|line| line.starts_with("# HELP "))
        .count();
    assert_eq!(helps, families.len());
}

#[test]
fn values_are_in_base_units() {
    let shown = samples(&busy().expose());
    for (series, value) in [
        (
            r#"insula_cpu_seconds_total{tenant="acme",kind="wasm"}"#,
            2.000_000_001,
        ),
        (
            r#"insula_cpu_seconds_total{tenant="acme",kind="vm"}"#,
            2.000_000_001,
        ),
        (
            r#"insula_memory_byte_seconds_total{tenant="acme",kind="wasm"}"#,
            1_572_864.0,
        ),
        (r#"insula_memory_limit_bytes{tenant="acme"}"#, 536_870_912.0),
        (r#"insula_host_cpu_seconds_total"#, 1.5),
        (
            r#"insula_requests_total{tenant="",service="",outcome="not_found"}"#,
            1.0,
        ),
        (
            r#"insula_instances{tenant="acme",service="hello",state="running"}"#,
            0.0,
        ),
        (
            r#"insula_request_duration_seconds_bucket{tenant="acme",service="hello",le="0.0001"}"#,
            0.0,
        ),
        (
            r#"insula_request_duration_seconds_bucket{tenant="acme",service="hello",le="0.00025"}"#,
            12.0,
        ),
        (
            r#"insula_instance_start_seconds_bucket{tenant="acme",service="hello",le="0.000005"}"#,
            0.0,
        ),
        (
            r#"insula_instance_start_seconds_bucket{tenant="acme",service="hello",le="0.00001"}"#,
            1.0,
        ),
    ] {
        assert_eq!(shown.get(series), Some(&value), "{series}");
    }
}

#[test]
fn instances_are_counted_while_their_guard_lives() {
    let metrics = DataMetrics::new();
    let hello = metrics.service(&tenant(0), &service(0));
    let shown = |state: &str| {
        samples(&metrics.expose())
            .get(&format!(
                r#"insula_instances{{tenant="t0",service="s0",state="{state}"}}"#
            ))
            .copied()
    };
    assert_eq!(shown("running"), None);
    let mut first = hello.instance(InstanceState::Starting);
    let second = hello.instance(InstanceState::Running);
    first.set(InstanceState::Running);
    assert_eq!(
        (shown("starting"), shown("running"), shown("idle")),
        (Some(0.0), Some(2.0), None)
    );
    drop(second);
    first.set(InstanceState::Idle);
    assert_eq!((shown("running"), shown("idle")), (Some(0.0), Some(1.0)));
    drop(first);
    assert_eq!(shown("idle"), Some(0.0));
}

#[test]
fn services_beyond_the_cap_share_a_series() {
    let metrics = DataMetrics::with_services_max(2);
    for s in 0..5 {
        metrics.service(&tenant(0), &service(s)).add_fuel(1);
    }
    let shown = samples(&metrics.expose());
    let fuel = |service: &str| {
        shown
            .get(&format!(
                r#"insula_fuel_consumed_total{{tenant="t0",service="{service}"}}"#
            ))
            .copied()
    };
    assert_eq!(
        (fuel("s0"), fuel("s1"), fuel("s2"), fuel("_other")),
        (Some(1.0), Some(1.0), None, Some(3.0))
    );
    metrics.remove_tenant(&tenant(0));
    assert!(!metrics.expose().contains("tenant="));
}

#[test]
fn ten_thousand_services_that_never_served_show_nothing() {
    let metrics = DataMetrics::new();
    for t in 0..10 {
        for s in 0..1_000 {
            let _handle = metrics.service(&tenant(t), &service(s));
        }
    }
    assert!(!metrics.expose().contains("service="));
}

#[test]
fn promtool_accepts_both_pages() {
    let control = ControlMetrics::new(BuildInfo {
        version: "0.1.0".into(),
        wasmtime: "48.0.8".into(),
        commit: "unknown".into(),
    });
    control.set_kvm_support("absent");
    let page = control.expose() + &busy().expose();
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("skipped: promtool cannot be run: {error}");
            return;
        }
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(page.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.trim().is_empty(),
        "{said}\n{page}"
    );
}
