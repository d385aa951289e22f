//! The exposition as Prometheus itself sees it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use insula_tests::http::Request;
use insula_tests::wait::holds;
use insula_tests::{Tenant, TestHost, tools, until};
use serde_json::{Value, json};

/// A host of which every family has something to show.
fn busy() -> (TestHost, Tenant) {
    let host = TestHost::start();
    let spec = json!({"memory": {"limit": "256MiB"}, "cpu": {"reservation": "250m"}});
    let tenant = host.tenant("a").spec(spec).create();
    let echo = tenant
        .service("echo")
        .limits(json!({"fuel": "20M"}))
        .deploy("echo");
    for path in ["/", "/panic", "/burn?n=100000000", "/log?message=x"] {
        let _ = echo.get(path).send();
    }
    let _ = host.request("nobody.example", "GET", "/").send();
    host.when_ended("a", 4);
    (host, tenant)
}

#[test]
fn promtool_accepts_every_line() {
    let Some(promtool) = tools::tool("PROMTOOL") else {
        return;
    };
    let (host, _tenant) = busy();
    let page = host.metrics().text;
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool");
    child
        .stdin
        .take()
        .expect("a pipe")
        .write_all(page.as_bytes())
        .expect("promtool reads");
    let output = child.wait_with_output().expect("promtool");
    assert!(output.status.success(), "{}\n{page}", tools::said(&output));
}

#[test]
fn the_families_of_the_contract_are_there_and_labels_come_from_the_registry_only() {
    let (host, _tenant) = busy();
    let metrics = host.metrics();
    let families: BTreeSet<&str> = metrics.families().into_iter().collect();
    assert_eq!(
        families.len(),
        metrics.families().len(),
        "a family stands twice"
    );
    for family in [
        "insula_build_info",
        "insula_cpu_seconds_total",
        "insula_cpu_throttled_seconds_total",
        "insula_cpu_wait_seconds_total",
        "insula_fuel_consumed_total",
        "insula_host_cpu_capacity_cores",
        "insula_host_cpu_reserved_cores",
        "insula_host_cpu_seconds_total",
        "insula_host_kvm",
        "insula_host_memory_bytes",
        "insula_host_memory_committed_bytes",
        "insula_host_workers",
        "insula_ingress_bytes_total",
        "insula_instance_start_seconds",
        "insula_instances",
        "insula_memory_byte_seconds_total",
        "insula_memory_bytes",
        "insula_memory_limit_bytes",
        "insula_request_duration_seconds",
        "insula_requests_total",
    ] {
        assert!(families.contains(family), "{family} is missing");
    }
    assert_eq!(metrics.sum("insula_host_workers", &[]), 2.0);
    assert_eq!(metrics.sum("insula_host_cpu_reserved_cores", &[]), 0.25);
    assert_eq!(
        metrics.sum("insula_memory_limit_bytes", &[("tenant", "a")]),
        256.0 * 1048576.0
    );
    for (name, value) in [("outcome", "trap"), ("outcome", "out_of_fuel")] {
        assert_eq!(
            metrics.count("insula_requests_total", &[("tenant", "a"), (name, value)]),
            1
        );
    }

    // What clients send is never a label, and makes no series.
    let series = metrics.samples.len();
    for n in 0..50 {
        let host_name = format!("x{n}.y{n}.localhost");
        let _ = host.request(&host_name, "GET", &format!("/{n}")).send();
        let _ = host
            .request("echo.a.localhost", "GET", &format!("/path{n}?q={n}"))
            .header("x-request-id", format!("{n}"))
            .header("user-agent", format!("agent{n}"))
            .send();
    }
    host.when_ended("a", 54);
    let metrics = host.metrics();
    // At most one outcome that was not there before, for nobody and for the service.
    assert!(
        metrics.samples.len() <= series + 2,
        "{series}, then {}",
        metrics.samples.len()
    );
    let known: BTreeSet<&str> = [
        "tenant",
        "service",
        "machine",
        "kind",
        "outcome",
        "reason",
        "state",
        "direction",
        "le",
        "support",
        "version",
        "wasmtime",
        "commit",
    ]
    .into();
    for sample in &metrics.samples {
        for (name, value) in &sample.labels {
            assert!(known.contains(name.as_str()), "{name} of {}", sample.name);
            if name == "tenant" || name == "service" {
                assert!(
                    ["", "a", "echo"].contains(&value.as_str()),
                    "{value} of {}",
                    sample.name
                );
            }
        }
    }
}

/// Ends a child when the test does.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_real_prometheus_scrapes_it() {
    let Some(prometheus) = tools::tool("PROMETHEUS") else {
        return;
    };
    let (host, tenant) = busy();
    let hello = tenant.deploy("hello");
    let sent = 17;
    for _ in 0..sent {
        assert_eq!(hello.get("/").send().status, 200);
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = format!(
        "global:\n  scrape_interval: 500ms\n  scrape_timeout: 500ms\nscrape_configs:\n\
         - job_name: insula\n  authorization:\n    credentials: {}\n  static_configs:\n  \
         - targets: ['{}']\n",
        host.token(),
        host.admin_address()
    );
    let file = dir.path().join("prometheus.yml");
    fs::write(&file, config).expect("a configuration");
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("a port");
    drop(free);
    let log = fs::File::create(dir.path().join("log")).expect("a log");
    let child = Command::new(prometheus)
        .arg(format!("--config.file={}", file.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            dir.path().join("data").display()
        ))
        .arg(format!("--web.listen-address={address}"))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    let mut child = Ends(child.expect("prometheus"));

    let mut query = |query: &str| -> Result<Vec<Value>, String> {
        assert!(
            matches!(child.0.try_wait(), Ok(None)),
            "prometheus has ended"
        );
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let target = format!("/api/v1/query?query={encoded}");
        let answer = Request::new(address, &address.to_string(), "GET", &target).try_send();
        let answer = answer.map_err(|broken| broken.error.to_string())?;
        let json: Value =
            serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
        json["data"]["result"]
            .as_array()
            .cloned()
            .ok_or_else(|| json.to_string())
    };
    let value = |found: &[Value]| found.first().map(|one| one["value"][1].clone());
    let minute = Duration::from_secs(60);
    until(minute, "the scrape is up", || {
        let found = query("up{job=\"insula\"}")?;
        holds(value(&found) == Some(json!("1")), format!("{found:?}"))
    });
    let asked = "insula_requests_total{tenant=\"a\",service=\"hello\",outcome=\"ok\"}";
    until(minute, "all requests are seen", || {
        let found = query(asked)?;
        holds(
            value(&found) == Some(json!(sent.to_string())),
            format!("{found:?}"),
        )
    });
    let found = query(
        "histogram_quantile(0.5, sum by (le) (rate(insula_request_duration_seconds_bucket[1m])))",
    );
    assert!(found.is_ok(), "{found:?}");

    tenant.delete();
    until(minute, "the series of the deleted tenant are stale", || {
        let found = query("{tenant=\"a\"}")?;
        holds(found.is_empty(), format!("{} series", found.len()))
    });
}
