//! Networks of machines, with a host that lives in a network namespace of the test's: the test runs
//! itself again in there. What passes and what does not is shown with packets beside the rules
//! (`insula-host`, `machines::network`), and with a guest's own in the bed.

use std::io;

use super::*;

/// Set where the test is in a network of its own.
const INSIDE: &str = "INSULA_TEST_INSIDE";

/// Where a test is that wants a network of its own.
pub(super) enum Inside {
    /// In one: it goes on.
    Here,
    /// It has been run again in one, and has held.
    Shown,
    /// There is none to be had.
    Missing(String),
}

/// Runs the test, named in full, again in a network of its own, unless it is in one.
pub(super) fn inside(test: &str) -> Inside {
    if std::env::var_os(INSIDE).is_some() {
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.expect("ip, of iproute2").success());
        return Inside::Here;
    }
    for (program, package) in [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("unshare", "util-linux"),
    ] {
        let there = Command::new(program).arg("--version").output();
        if there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            let why = format!("{program} is not installed; apt-get install {package}");
            return Inside::Missing(why);
        }
    }
    let allowed = Command::new("unshare").args(["--net", "true"]).output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        return Inside::Missing("no network namespace may be made here".to_owned());
    }
    let again = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().expect("a test has a program"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("it runs again");
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    let out = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(again.status.success(), "{out}{said}");
    assert!(out.contains("1 passed"), "{out}");
    eprint!("{said}");
    Inside::Shown
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Interfaces, rules and forwarding of this network.
pub(super) fn network() -> (String, String, String) {
    let forwarding = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("it is there");
    let interfaces = output("ip", &["-o", "-4", "address"]);
    // One without an address is not among those.
    let all = fs::read_to_string("/proc/thread-self/net/dev").expect("it is there");
    let interfaces = format!("{interfaces}{}", names_of_interfaces(&all, "").join(" "));
    (interfaces, output("nft", &["list", "ruleset"]), forwarding)
}

/// Those in `net/dev` (proc(5)) that begin so: two lines of headings, then `name: numbers`.
pub(super) fn names_of_interfaces(text: &str, prefix: &str) -> Vec<String> {
    let names = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let names = names.map(|(name, _)| name.trim().to_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

pub(super) fn connected(port: u16) -> Value {
    let mut spec = spec();
    spec["net"] = json!({"ports": [{"host": port, "machine": 22}]});
    spec
}

#[test]
fn a_machine_has_an_address_while_it_runs_and_leaves_nothing() {
    const TEST: &str =
        "machines::network::a_machine_has_an_address_while_it_runs_and_leaves_nothing";
    match inside(TEST) {
        Inside::Here => {}
        Inside::Shown => return,
        Inside::Missing(why) => {
            eprintln!("skipped: {why}");
            return;
        }
    }
    let Some(host) = host() else { return };
    let admin = host.admin();
    let described = admin.get("/v1/host");
    assert_eq!(
        described["machines"]["network"], "10.199.0.0/16",
        "{described}"
    );
    let before = network();
    admin.put(MACHINE, &connected(20_022));
    assert_eq!(
        network(),
        before,
        "nothing is there before a machine needs it"
    );
    let started = act(&host, "start");
    assert_eq!(started["network"]["address"], "10.199.0.2", "{started}");
    let (interfaces, rules, forwarding) = network();
    assert!(interfaces.contains("10.199.0.1/30"), "{interfaces}");
    assert!(rules.contains("20022 : 10.199.0.2 . 22"), "{rules}");
    assert_eq!(forwarding.trim(), "1");

    // Its port is its own, and the operator's ports are the operator's.
    let second = "/v1/tenants/acme/machines/second";
    for (port, why) in [(20_022, "another machine"), (22, "20000-29999")] {
        admin.put(second, &connected(port));
        let refused = admin.json("POST", &format!("{second}/start"), &json!({}));
        let refused = refused.send();
        assert_eq!(refused.problem(), "port_taken");
        assert!(refused.text().contains(why), "{}", refused.text());
    }
    admin.put(second, &connected(20_023));
    let also = admin.post(&format!("{second}/start"), &json!({}));
    assert_eq!(also["network"]["address"], "10.199.0.6", "{also}");

    // The host dies, and one of its machines with it: the other one's network goes on.
    let first = pid(&host);
    host.kill();
    kill(first);
    host.start_again();
    let admin = host.admin();
    expect_state(&host, "failed");
    let (interfaces, rules, _) = network();
    assert!(!interfaces.contains("10.199.0.1/30"), "{interfaces}");
    assert!(interfaces.contains("10.199.0.5/30"), "{interfaces}");
    assert!(
        !rules.contains("20022") && rules.contains("20023"),
        "{rules}"
    );
    let again = act(&host, "start");
    assert_eq!(again["network"]["address"], "10.199.0.2", "it is its own");

    // A reset is a new monitor, with a new interface of the same name.
    act(&host, "reset");
    assert!(network().0.contains("10.199.0.1/30"));
    kill(pid(&host));
    expect_state(&host, "failed");
    let (interfaces, rules, _) = network();
    assert!(!interfaces.contains("10.199.0.1/30"), "{interfaces}");
    assert!(!rules.contains("20022"), "{rules}");
    admin.delete(MACHINE);
    admin.delete(&format!("{second}?force=true"));
    assert_eq!(network(), before, "nothing is left");
}

#[test]
fn without_the_means_a_machine_runs_without_network_and_says_so() {
    let Some(host) = host_with(&[("INSULA_MACHINE_NETWORK", "none")]) else {
        return;
    };
    let described = host.admin().get("/v1/host");
    assert_eq!(described["machines"]["network"], Value::Null);
    host.admin().put(MACHINE, &connected(20_022));
    let started = act(&host, "start");
    assert_eq!(started["state"], "running", "{started}");
    let missing = started["network"]["missing"].as_str();
    assert!(missing.expect("it says so").contains("none"), "{started}");
    host.admin()
        .post(&format!("{MACHINE}/stop?force=true"), &json!({}));
}
