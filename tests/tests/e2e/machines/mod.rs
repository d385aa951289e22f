//! Machines through the API: a real host, real monitors, and a guest of a few instructions, which
//! runs on any KVM that opens. What an ordinary kernel needs is shown in the bed (`cargo xtask
//! vm-test`).

// One kernel for the tests of the monitor and of the host.
#[path = "../../../../vmm/tests/monitor/kernel.rs"]
mod kernel;
mod network;
mod rounds;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use insula_tests::host::Plan;
use insula_tests::wait::holds;
use insula_tests::{TestHost, guests, until};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
const MACHINE: &str = "/v1/tenants/acme/machines/echo";

/// A host whose monitors end with the test, whatever becomes of it.
struct Host(TestHost);

impl std::ops::Deref for Host {
    type Target = TestHost;

    fn deref(&self) -> &TestHost {
        &self.0
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        monitors(self).into_iter().for_each(kill);
    }
}

/// A host with a tenant, the echoing kernel and a disk; `None`, and said so, where there is no KVM.
fn host() -> Option<Host> {
    host_with(&[])
}

fn host_with(settings: &[(&str, &str)]) -> Option<Host> {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(why) = opened {
        eprintln!("skipped: /dev/kvm: {why}");
        return None;
    }
    let plan = TestHost::plan().env("INSULA_MACHINES_ON_EMULATION", "1");
    let set = |plan: Plan, (name, value): &(&str, &str)| plan.env(name, *value);
    let host = settings.iter().fold(plan, set).start();
    let admin = host.admin();
    admin.put("/v1/tenants/acme", &json!({"memory": {"limit": "64MiB"}}));
    for (image, bytes) in [("echo", kernel::image()), ("blank", vec![0; 1 << 20])] {
        let path = format!("/v1/images/{image}");
        let uploaded = admin.image(&path, bytes).send();
        assert_eq!(uploaded.status, 201, "{}", uploaded.text());
    }
    admin.put(MACHINE, &spec());
    Some(Host(host))
}

fn spec() -> Value {
    json!({
        "kernel": "echo",
        "memory": "16MiB",
        "vcpus": 2,
        "disks": [{"image": "blank", "mode": "rw"}],
    })
}

fn act(host: &TestHost, verb: &str) -> Value {
    host.admin().post(&format!("{MACHINE}/{verb}"), &json!({}))
}

/// Each of these was done to a machine, and the audit log says so.
fn assert_audited(host: &TestHost, orders: &[&str]) {
    let log = host.admin().get("/v1/audit?limit=500").to_string();
    for order in orders {
        assert!(log.contains(&format!("{order}Machine")), "{order}: {log}");
    }
}

fn expect_state(host: &TestHost, state: &str) {
    until(PATIENCE, state, || {
        let machine = host.admin().get(MACHINE);
        holds(machine["state"] == state, machine.to_string())
    });
}

fn pid(host: &TestHost) -> u64 {
    let machine = host.admin().get(MACHINE);
    machine["monitor_pid"]
        .as_u64()
        .unwrap_or_else(|| panic!("no monitor: {machine}"))
}

/// Processes that are monitors of this host's machines, by their roots.
fn monitors(host: &TestHost) -> Vec<u64> {
    let place = host.data().join("machines");
    let place = place.to_str().expect("text").to_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if line.contains("machine-monitor") && line.contains(&place) {
            found.push(pid);
        }
    }
    found
}

fn kill(pid: u64) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.expect("kill").success());
}

/// A terminal at the console, by an upgrade of a connection to the API.
struct Console(TcpStream);

impl Console {
    fn open(host: &TestHost) -> Self {
        Self::of(host, MACHINE)
    }

    fn of(host: &TestHost, machine: &str) -> Self {
        let mut stream = TcpStream::connect(host.admin_address()).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let request = format!(
            "GET {machine}/console HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {}\r\n\
             connection: upgrade\r\nupgrade: insula-console\r\n\r\n",
            host.token()
        );
        stream.write_all(request.as_bytes()).expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            head.extend(byte);
        }
        let head = String::from_utf8(head).expect("text");
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        Self(stream)
    }

    fn read(&mut self, length: usize) -> String {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).expect("the guest prints");
        String::from_utf8(bytes).expect("text")
    }

    fn type_in(&mut self, keys: &str) {
        self.0.write_all(keys.as_bytes()).expect("sent");
    }
}

#[test]
fn a_machine_from_definition_to_deletion() {
    let Some(host) = host() else { return };
    let admin = host.admin();
    assert_eq!(admin.get(MACHINE)["state"], "defined");
    let started = act(&host, "start");
    assert_eq!(started["state"], "running", "{started}");
    assert_eq!(monitors(&host), [pid(&host)]);
    let refused = admin.json("POST", &format!("{MACHINE}/start"), &json!({}));
    assert_eq!(refused.send().problem(), "machine_state");

    let mut console = Console::open(&host);
    assert_eq!(console.read(1), ">");
    console.type_in("abc");
    assert_eq!(console.read(3), "abc");
    assert_eq!(act(&host, "pause")["state"], "paused");
    console.type_in("d");
    assert_eq!(act(&host, "resume")["state"], "running");
    assert_eq!(console.read(1), "d");

    let before = pid(&host);
    assert_eq!(act(&host, "reset")["state"], "running");
    assert_ne!(pid(&host), before, "a reset machine has a new monitor");
    let mut console = Console::open(&host);
    assert_eq!(console.read(1), ">");

    // The guest turns itself off, and the machine can be started again.
    console.type_in("q");
    expect_state(&host, "stopped");
    assert!(monitors(&host).is_empty());
    act(&host, "start");
    let refused = admin.request("DELETE", MACHINE).send();
    assert_eq!(refused.problem(), "machine_state", "it runs");
    // This guest does not know what a power button is.
    let stopped = admin.post(&format!("{MACHINE}/stop?timeout_seconds=1"), &json!({}));
    assert_eq!(stopped["state"], "stopped");
    assert!(monitors(&host).is_empty());
    admin.delete(MACHINE);
    assert_eq!(admin.request("GET", MACHINE).send().status, 404);
    let left = fs::read_dir(host.data().join("machines")).expect("it is there");
    assert_eq!(left.count(), 0);
    let orders = ["start", "pause", "resume", "reset", "stop", "delete"];
    assert_audited(&host, &orders);
    admin.delete("/v1/tenants/acme");
}

#[test]
fn machines_outlive_their_host_and_are_found_again() {
    let Some(host) = host() else { return };
    act(&host, "start");
    let before = pid(&host);
    let mut console = Console::open(&host);
    console.type_in("remember me");
    // What the host has not yet passed on goes with it.
    assert_eq!(console.read(12), ">remember me");
    host.crash_and_restart();
    expect_state(&host, "running");
    assert_eq!(pid(&host), before, "it is the same process");
    let mut console = Console::open(&host);
    assert_eq!(console.read(12), ">remember me");
    // A host that ends in order leaves them as well, and so does one after it.
    act(&host, "pause");
    host.restart();
    expect_state(&host, "paused");
    assert_eq!(pid(&host), before);
    act(&host, "resume");
    let mut console = Console::open(&host);
    assert_eq!(console.read(12), ">remember me");

    // What ends while no host is there is known to the next one.
    host.kill();
    kill(before);
    host.start_again();
    expect_state(&host, "failed");
    let machine = host.admin().get(MACHINE);
    let reason = machine["reason"].as_str().expect("a reason");
    assert!(reason.contains("without a word"), "{reason}");
    act(&host, "start");
    host.admin()
        .post(&format!("{MACHINE}/stop?force=true"), &json!({}));
}

#[test]
fn a_machine_goes_on_from_its_snapshot_and_so_does_a_clone() {
    let Some(host) = host() else { return };
    let admin = host.admin();
    let restore = format!("{MACHINE}/restore");
    let refused = |path: &str| admin.json("POST", path, &json!({})).send().problem();
    assert_eq!(refused(&restore), "no_snapshot");
    assert_eq!(refused(&format!("{MACHINE}/snapshot")), "machine_state");
    act(&host, "start");
    let mut console = Console::open(&host);
    assert_eq!(console.read(1), ">");
    let saved = act(&host, "snapshot");
    assert_eq!(saved["state"], "running");
    assert!(saved["snapshot_at"].is_string(), "{saved}");
    console.type_in("a");
    assert_eq!(console.read(1), "a", "it runs on");
    assert_eq!(refused(&restore), "machine_state", "while it runs");
    let stop = |machine: &str| admin.post(&format!("{machine}/stop?force=true"), &json!({}));
    stop(MACHINE);

    assert_eq!(act(&host, "restore")["state"], "running");
    let clone = "/v1/tenants/acme/machines/clone";
    admin.put(clone, &spec());
    let cloned = admin.post(&format!("{clone}/restore?from=echo"), &json!({}));
    assert_eq!(cloned["state"], "running");
    for (machine, key) in [(MACHINE, "b"), (clone, "c")] {
        let mut console = Console::of(&host, machine);
        console.type_in(key);
        assert_eq!(console.read(1), key, "no prompt: it does not start anew");
    }
    stop(MACHINE);
    stop(clone);

    assert_audited(&host, &["snapshot", "restore"]);
    let other = "/v1/tenants/acme/machines/other";
    admin.put(other, &json!({"kernel": "echo", "memory": "32MiB"}));
    assert_eq!(
        refused(&format!("{other}/restore?from=echo")),
        "other_machine"
    );
    let memory = host.data().join("machines/1/saved/memory");
    let mut bytes = fs::read(&memory).expect("it was saved");
    bytes[0x10_0000] ^= 1;
    fs::write(&memory, bytes).expect("room");
    assert_eq!(refused(&restore), "snapshot_broken");
    let machine = admin.get(MACHINE);
    assert_eq!(machine["state"], "stopped", "nothing was started");
}

#[test]
fn a_monitor_that_is_killed_is_seen_at_once_and_leaves_nothing() {
    let Some(host) = host() else { return };
    act(&host, "start");
    let monitor = pid(&host);
    let groups = groups(monitor);
    let missing = host.admin().get("/v1/host")["machines"]["groups_missing"].clone();
    assert_eq!(
        groups.is_empty(),
        missing.as_array().is_some_and(|all| all.len() == 3)
    );
    kill(monitor);
    until(Duration::from_secs(1), "the failure is seen", || {
        let machine = host.admin().get(MACHINE);
        holds(machine["state"] == "failed", machine.to_string())
    });
    let machine = host.admin().get(MACHINE);
    let reason = machine["reason"].as_str().expect("a reason");
    assert!(reason.contains("killed by signal 9"), "{reason}");
    host.admin().delete(MACHINE);
    for group in groups {
        assert!(!group.exists(), "{}", group.display());
    }
}

/// The control groups of its own that a process is in.
fn groups(pid: u64) -> Vec<PathBuf> {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it lives");
    // "number:controllers:path" (cgroups(7)); which mount shows which is not said here.
    let paths = own.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let paths: Vec<_> = paths.filter(|path| path.contains("/insula-")).collect();
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    let mut found = Vec::new();
    for mount in mounts.lines() {
        let mut words = mount.split(' ').skip(1);
        let (Some(point), Some(kind)) = (words.next(), words.next()) else {
            continue;
        };
        if kind.starts_with("cgroup") {
            let below = paths.iter().map(|path| Path::new(point).join(&path[1..]));
            found.extend(below.filter(|path| path.exists()));
        }
    }
    found
}

#[test]
fn what_cannot_start_says_why() {
    let Some(host) = host() else { return };
    let admin = host.admin();
    let unknown = json!({"kernel": "nothing"});
    let path = "/v1/tenants/acme/machines/other";
    let refused = admin.json("PUT", path, &unknown).send();
    assert_eq!(refused.problem(), "unknown_image");
    // Not a kernel at all.
    admin.put(path, &json!({"kernel": "blank", "memory": "16MiB"}));
    let start = format!("{path}/start");
    let refused = admin.json("POST", &start, &json!({})).send();
    assert_eq!(refused.problem(), "machine_failed");
    assert!(
        refused.text().contains("neither a 64-bit bzImage"),
        "{}",
        refused.text()
    );
    let machine = admin.get(path);
    assert_eq!(machine["state"], "failed");
    // More than its tenant may have, beside another machine.
    act(&host, "start");
    admin.put(path, &json!({"kernel": "echo", "memory": "56MiB"}));
    let refused = admin.json("POST", &start, &json!({})).send();
    assert_eq!(refused.problem(), "tenant_memory");
    // More than the host has.
    admin.put("/v1/tenants/acme", &json!({}));
    admin.put(path, &json!({"kernel": "echo", "memory": "900GiB"}));
    let refused = admin.json("POST", &start, &json!({})).send();
    assert_eq!(refused.problem(), "host_memory");
    admin.put(path, &json!({"kernel": "echo", "memory": "48MiB"}));
    admin.post(&start, &json!({}));
    for machine in [MACHINE, path] {
        admin.post(&format!("{machine}/stop?force=true"), &json!({}));
    }
    let refused = admin.request("DELETE", "/v1/tenants/acme").send();
    assert_eq!(refused.problem(), "has_machines");
}

#[test]
fn what_a_machine_uses_is_on_the_books() {
    let Some(host) = host() else { return };
    act(&host, "start");
    // Its guest polls the console for ever.
    until(PATIENCE, "a second of CPU", || {
        let usage = host.usage("acme");
        let cpu = usage["machines"]["cpu_seconds"].as_f64().unwrap_or(0.0);
        holds(cpu > 1.0, usage.to_string())
    });
    let metrics = host.admin().request("GET", "/metrics").send().text();
    for family in [
        "insula_cpu_seconds_total{tenant=\"acme\",kind=\"vm\"}",
        "insula_memory_bytes{tenant=\"acme\",kind=\"vm\"} 16777216",
        "insula_machine_state{tenant=\"acme\",machine=\"echo\",state=\"running\"} 1",
        "insula_machine_exits_total{tenant=\"acme\",machine=\"echo\",reason=\"port_read\"}",
    ] {
        assert!(metrics.contains(family), "{family}");
    }
    let typed = metrics
        .lines()
        .filter(|line| *line == "# TYPE insula_cpu_seconds_total counter");
    assert_eq!(typed.count(), 1, "a family stands on the page once");
    host.admin()
        .post(&format!("{MACHINE}/stop?force=true"), &json!({}));
    let before = host.usage("acme")["machines"]["cpu_seconds"].as_f64();
    host.restart();
    let after = host.usage("acme")["machines"]["cpu_seconds"].as_f64();
    assert!(
        after >= before.map(|before| before * 0.9),
        "{before:?}, then {after:?}"
    );
}

#[test]
fn what_a_machine_was_promised_its_tenants_services_do_not_have() {
    let Some(host) = host() else { return };
    let admin = host.admin();
    let service = "/v1/tenants/acme/services/web";
    admin.put(service, &json!({}));
    let uploaded = admin.upload(&format!("{service}/versions"), guests::bytes("hello"));
    assert_eq!(uploaded.send().status, 201);
    let status = || host.request("web.acme.localhost", "GET", "/").send().status;
    assert_eq!(status(), 200);
    // All of the tenant's 64 MiB.
    admin.put(MACHINE, &json!({"kernel": "echo", "memory": "64MiB"}));
    act(&host, "start");
    assert_ne!(status(), 200);
    host.crash_and_restart();
    expect_state(&host, "running");
    assert_ne!(status(), 200, "nor after a restart");
    act(&host, "stop?force=true");
    until(PATIENCE, "the memory is given back", || {
        let status = status();
        holds(status == 200, status.to_string())
    });
}

/// Two machines that never rest, under a limit of their tenant's, have no more than that together.
#[test]
fn a_tenants_limit_holds_its_machines() {
    const SPAN: Duration = Duration::from_secs(6);
    let Some(host) = host() else { return };
    let admin = host.admin();
    let missing = admin.get("/v1/host")["machines"]["groups_missing"].to_string();
    if missing.contains("cpu") {
        eprintln!("skipped: no control group for CPU: {missing}");
        return;
    }
    admin.put("/v1/tenants/acme", &json!({"cpu": {"limit": "500m"}}));
    let other = "/v1/tenants/acme/machines/other";
    admin.put(other, &json!({"kernel": "echo", "memory": "16MiB"}));
    act(&host, "start");
    admin.post(&format!("{other}/start"), &json!({}));
    let used = || {
        let usage = host.usage("acme");
        let number = |key: &str| usage["machines"][key].as_f64().expect("a number");
        (number("cpu_seconds"), number("cpu_throttled_seconds"))
    };
    until(PATIENCE, "both are on the books", || {
        let (cpu, _) = used();
        holds(cpu > 0.5, cpu.to_string())
    });
    let ((cpu, throttled), start) = (used(), std::time::Instant::now());
    std::thread::sleep(SPAN);
    let ((cpu_after, throttled_after), span) = (used(), start.elapsed().as_secs_f64());
    let cores = (cpu_after - cpu) / span;
    // The books are a second old at both ends.
    assert!(cores < 0.5 * (1.0 + 1.5 / span), "{cores} cores");
    // On a busy machine they may not even get so far.
    assert!(
        cores < 0.4 || throttled_after > throttled,
        "they were held back"
    );
    for machine in [MACHINE, other] {
        admin.post(&format!("{machine}/stop?force=true"), &json!({}));
    }
}
