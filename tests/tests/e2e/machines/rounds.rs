//! Machines come and go, with a network where one can be made, and nothing of them stays.

use std::collections::BTreeSet;

use super::network::{self, Inside, connected, names_of_interfaces, network};
use super::*;

const ROUNDS: usize = 200;
/// The first rounds open and make what stays: the log, the probe, the tenant's groups.
const FIRST_ROUNDS: usize = 3;
/// What interfaces of machines are called, on every host.
const INTERFACES: &str = "ins";

/// What machines might leave behind.
#[derive(Debug, PartialEq, Eq)]
struct There {
    monitors: Vec<u64>,
    groups: BTreeSet<PathBuf>,
    /// Interfaces, rules and forwarding; nothing where there is no network.
    network: Option<(String, String, String)>,
    /// In the first process's network, where a tap might end up whose namespace is gone.
    outside: Vec<String>,
    mounts: String,
    files: BTreeSet<PathBuf>,
}

impl There {
    fn of(host: &TestHost, bases: &BTreeSet<PathBuf>, connected: bool) -> Self {
        let groups = bases.iter().flat_map(|base| below(base));
        // Only root may look, and only root has machines with networks.
        let outside = fs::read_to_string("/proc/1/net/dev").unwrap_or_default();
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", host.pid()));
        Self {
            monitors: monitors(host),
            groups: groups.filter(|path| path.is_dir()).collect(),
            network: connected.then(network),
            outside: names_of_interfaces(&outside, INTERFACES),
            mounts: mounts.expect("it lives"),
            files: below(&host.data()).into_iter().collect(),
        }
    }
}

/// All that a directory holds.
fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        // What is gone in between is not there.
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn many_rounds_leave_nothing() {
    let with_network = match network::inside("machines::rounds::many_rounds_leave_nothing") {
        Inside::Here => true,
        Inside::Shown => return,
        Inside::Missing(why) => {
            eprintln!("skipped: what rounds leave of a network: {why}");
            false
        }
    };
    let Some(host) = host() else { return };
    let admin = host.admin();
    admin.delete(MACHINE);
    let (mut bases, mut before) = (BTreeSet::new(), None);
    for round in 0..ROUNDS {
        admin.put(MACHINE, &connected(20_022));
        let started = act(&host, "start");
        assert_eq!(started["state"], "running", "{started}");
        // <base>/t<tenant>/m<machine>
        bases.extend(groups(pid(&host)).iter().filter_map(|group| {
            let base = group.parent()?.parent()?;
            Some(base.to_owned())
        }));
        if with_network {
            let (interfaces, rules, _) = network();
            assert!(interfaces.contains("10.199.0.1/30"), "{interfaces}");
            assert!(rules.contains("20022"), "{rules}");
        }
        admin.post(&format!("{MACHINE}/stop?force=true"), &json!({}));
        admin.delete(MACHINE);
        if round + 1 == FIRST_ROUNDS {
            let there = There::of(&host, &bases, with_network);
            assert!(there.monitors.is_empty(), "{there:?}");
            before = Some((host.open_files(), there));
        }
    }
    let (files, before) = before.expect("more rounds than the first ones");
    until(PATIENCE, "descriptors are as before", || {
        let now = host.open_files();
        holds(now <= files, format!("{files} before, {now} now"))
    });
    assert_eq!(There::of(&host, &bases, with_network), before);
    let left = fs::read_dir(host.data().join("machines")).expect("it is there");
    assert_eq!(left.count(), 0);
}
