//! What `docs/operations` gives to operators is accepted by the programs that it is for, and speaks
//! of metrics that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use insula_tests::wait::holds;
use insula_tests::{TestHost, guests, load, tools, until};
use serde_json::{Value, json};

fn file(name: &str) -> PathBuf {
    guests::repository().join("docs/operations").join(name)
}

fn dashboard() -> Value {
    let text = fs::read_to_string(file("grafana-dashboard.json")).expect("the dashboard");
    serde_json::from_str(&text).expect("JSON")
}

/// The queries of all panels, with what Grafana would put in.
fn queries(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().expect("targets"));
    targets
        .map(|target| {
            let query = target["expr"].as_str().expect("a query");
            query
                .replace("$__rate_interval", "5m")
                .replace("$tenant", ".*")
        })
        .collect()
}

/// The families that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let families = words.filter(|word| word.starts_with("insula_"));
    families
        .map(|name| name.trim_end_matches("_bucket").to_owned())
        .collect()
}

#[test]
fn dashboard_and_alerts_name_families_that_there_are() {
    let host = TestHost::start();
    let spec = json!({"memory": {"limit": "256MiB"}, "requests": {"per_second": 1}});
    let tenant = host.tenant("a").spec(spec).create();
    let flood = tenant
        .service("flood")
        .limits(json!({"fuel": "1G"}))
        .deploy("log-flood");
    // Too many lines for a log, and too many requests for the tenant.
    let _ = flood.get("/").send();
    let hello = tenant.deploy("hello");
    let answers = load::answers(40, 4, &hello.get("/"));
    assert!(answers.iter().any(|answer| answer.status == 429));
    let mut wanted = named(&queries(&dashboard()).join("\n"));
    wanted.extend(named(
        &fs::read_to_string(file("alerts.yml")).expect("the alerts"),
    ));
    assert!(wanted.len() > 15, "{wanted:?}");
    until(Duration::from_secs(20), "all of them are there", || {
        let metrics = host.metrics();
        let families: BTreeSet<&str> = metrics.families().into_iter().collect();
        let missing: Vec<_> = wanted
            .iter()
            .filter(|name| !families.contains(name.as_str()))
            .collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("{missing:?}"))
        }
    });
}

#[test]
fn prometheus_understands_every_alert_and_every_query_of_the_dashboard() {
    let Some(promtool) = tools::tool("PROMTOOL") else {
        return;
    };
    let check =
        |path: &Path| tools::run(Command::new(&promtool).args(["check", "rules"]).arg(path));
    let alerts = check(&file("alerts.yml"));
    assert!(alerts.status.success(), "{}", tools::said(&alerts));
    let mut rules = "groups:\n- name: dashboard\n  rules:\n".to_owned();
    for (number, query) in queries(&dashboard()).iter().enumerate() {
        let query = json!(query);
        rules.push_str(&format!("  - record: query:{number}\n    expr: {query}\n"));
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("rules.yml");
    fs::write(&path, rules).expect("a file");
    let checked = check(&path);
    assert!(checked.status.success(), "{}", tools::said(&checked));
}

/// Reads the dashboard into the types that Grafana publishes, writes it again, and says what
/// got lost: what Grafana does not know.
const ROUND_TRIP: &str = r#"
import json, sys
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

def lost(before, after, path):
    if isinstance(before, dict):
        for key, value in before.items():
            if not isinstance(after, dict) or key not in after:
                yield path + "." + key
            else:
                yield from lost(value, after[key], path + "." + key)
    elif isinstance(before, list):
        if not isinstance(after, list) or len(before) != len(after):
            yield path
        else:
            for index, pair in enumerate(zip(before, after)):
                yield from lost(*pair, f"{path}[{index}]")
    elif before != after:
        yield path

plugins.register_default_plugins()
before = json.load(open(sys.argv[1]))
after = json.loads(JSONEncoder().encode(Dashboard.from_json(before)))
print("\n".join(lost(before, after, "dashboard")))
"#;

#[test]
fn the_dashboard_is_what_grafana_calls_one() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in panels {
        assert!(
            ids.insert(panel["id"].as_u64()),
            "{} has an id of its own",
            panel["title"]
        );
        let place = |name: &str| panel["gridPos"][name].as_u64().expect("a place");
        assert!(place("x") + place("w") <= 24, "{} fits", panel["title"]);
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(cells.insert((x, y)), "{} lies on another", panel["title"]);
            }
        }
    }
    let Some(venv) = tools::tool("VENV") else {
        return;
    };
    let round_trip = |dashboard: &Value| {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("dashboard.json");
        fs::write(&path, dashboard.to_string()).expect("a file");
        let mut python = Command::new(venv.join("bin/python"));
        let output = tools::run(python.args(["-c", ROUND_TRIP]).arg(&path));
        assert!(output.status.success(), "{}", tools::said(&output));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(round_trip(&dashboard), "");
    let mut wrong = dashboard;
    wrong["panels"][0]["gridPos"]["depth"] = json!(1);
    assert_eq!(round_trip(&wrong), "dashboard.panels[0].gridPos.depth");
}

#[test]
fn systemd_accepts_the_unit() {
    let dir = tempfile::tempdir().expect("a directory");
    let unit = fs::read_to_string(file("insula.service")).expect("the unit");
    let path = dir.path().join("insula.service");
    let program = guests::insula().display().to_string();
    // The program is where it is, not where it would be installed.
    let here = unit.replace("/usr/local/bin/insula", &program);
    assert!(here.contains(&program));
    fs::write(&path, here).expect("a file");
    let verify = Command::new("systemd-analyze")
        .arg("verify")
        .arg(&path)
        .output();
    match verify {
        Ok(output) => assert!(output.status.success(), "{}", tools::said(&output)),
        Err(error) => tools::skipped(&format!("systemd-analyze: {error}")),
    }
}

/// A program that becomes what it is given, with the capabilities that the unit leaves.
fn as_the_unit_starts_it(dir: &Path) -> PathBuf {
    let unit = fs::read_to_string(file("insula.service")).expect("the unit");
    let mut lines = unit.lines();
    let set = lines.find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let set = set.expect("capabilities").to_lowercase();
    let set = set.replace("cap_", "+").replace(' ', ",");
    let setpriv = format!("setpriv --bounding-set=-all,{set} --inh-caps=-all --no-new-privs");
    let script = dir.join("unit");
    tools::executable(&script, format!("#!/bin/sh\nexec {setpriv} \"$@\"\n"));
    script
}

#[test]
fn the_units_capabilities_are_enough_for_every_wall_and_for_volumes() {
    let dir = tempfile::tempdir().expect("a directory");
    let unit = as_the_unit_starts_it(dir.path());
    let probed = Command::new(&unit).arg("true").output();
    if !probed.is_ok_and(|output| output.status.success()) {
        tools::skipped("not root, or no setpriv");
        return;
    }
    let host = TestHost::plan().through(unit).start();
    let missing = |host: &TestHost| {
        let mut walls = host.admin().get("/v1/host")["data_plane"]["walls"].take();
        let walls = walls.as_array_mut().expect("a list");
        walls.retain(|wall| !wall["missing"].is_null());
        walls.clone()
    };
    // Whatever the kernel refuses here, it refuses to root as well.
    assert_eq!(missing(&host), missing(&TestHost::start()));
    let admin = host.admin();
    let tenant = host.tenant("a").create();
    admin.put("/v1/tenants/a/volumes/data", &json!({"size": "1MiB"}));
    let mounts = json!({"volumes": [{"name": "data", "path": "/data"}]});
    let files = tenant.service("files").spec(mounts).deploy("files");
    let write = |text: &str| files.request("PUT", "/data/d/a").body(text).send().status;
    assert_eq!(files.post("/data/d?do=mkdir", "").send().status, 200);
    assert_eq!(write("before"), 200);
    // What guests wrote belongs to the process that serves, and is read, copied and deleted by control.
    admin.post("/v1/tenants/a/volumes/data/clone", &json!({"name": "copy"}));
    assert_eq!(admin.request("GET", "/v1/backup").send().status, 200);
    let deleted = admin.request("DELETE", "/v1/tenants/a/volumes/copy").send();
    assert_eq!(deleted.status, 204);
    host.crash_and_restart();
    until(Duration::from_secs(20), "it serves again", || {
        let answer = files.get("/data/d/a").send();
        let is = answer.status == 200 && answer.text() == "before";
        holds(is, answer.status.to_string())
    });
    assert_eq!(write("after"), 200);
}
