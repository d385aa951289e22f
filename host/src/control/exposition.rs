//! The metrics of machines, and how they join those of services on one page.
//!
//! A family stands on a page once: so what machines add to a family that the data plane shows goes
//! below its samples there, and the families that only machines have come after all others.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use insula_types::TenantName;
use insula_vmm::life::State;
use insula_vmm::monitor::protocol::EXIT_REASONS;

use super::Control;

/// One family and samples of it, each without its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<String>,
}

/// A page, with the samples of `more` in it.
pub(crate) fn merge(page: &str, more: &[Family]) -> String {
    let mut text = String::with_capacity(page.len() + 1_024);
    let mut left: BTreeMap<&str, &Family> = more.iter().map(|one| (one.name, one)).collect();
    let mut current: Option<&Family> = None;
    for line in page.lines() {
        let head = line
            .strip_prefix("# HELP ")
            .or_else(|| line.strip_prefix("# TYPE "));
        if let Some(name) = head.and_then(|head| head.split(' ').next())
            && current.is_none_or(|family| family.name != name)
        {
            samples(&mut text, current);
            current = left.remove(name);
        }
        text.push_str(line);
        text.push('\n');
    }
    samples(&mut text, current);
    for family in left.values().filter(|family| !family.samples.is_empty()) {
        let Family {
            name, kind, help, ..
        } = family;
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        samples(&mut text, Some(family));
    }
    text
}

fn samples(text: &mut String, family: Option<&Family>) {
    let Some(family) = family else { return };
    for sample in &family.samples {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{}{sample}", family.name);
    }
}

impl Control {
    /// What machines add to the page.
    pub(crate) fn machine_families(&self) -> Vec<Family> {
        let book = self.machines.book.borrow();
        let ledger = self.ledger.borrow();
        let mut tenants: BTreeMap<&TenantName, _> = BTreeMap::new();
        for (_, entry) in book.iter() {
            tenants.insert(&entry.tenant_name, entry.tenant);
        }
        let seconds = |ns: u64| std::time::Duration::from_nanos(ns).as_secs_f64();
        let of_tenants = |value: &dyn Fn(insula_types::TenantId) -> String| {
            let lines = tenants
                .iter()
                .map(|(name, id)| format!("{{tenant=\"{name}\",kind=\"vm\"}} {}", value(*id)));
            lines.collect::<Vec<_>>()
        };
        let cpu = of_tenants(&|id| seconds(ledger.machines(id).cpu_ns).to_string());
        let wait = of_tenants(&|id| seconds(ledger.machines(id).wait_ns).to_string());
        let throttled = of_tenants(&|id| seconds(ledger.machines(id).throttled_ns).to_string());
        let memory = of_tenants(&|id| book.committed(Some(id)).to_string());
        let integral = of_tenants(&|id| {
            let bytes = u128::from(ledger.machines(id).memory_kib_ms) * 1_024;
            (bytes / 1_000).to_string()
        });
        let mut families = vec![
            family("insula_cpu_seconds_total", "counter", cpu),
            family("insula_cpu_wait_seconds_total", "counter", wait),
            family("insula_cpu_throttled_seconds_total", "counter", throttled),
            family("insula_memory_bytes", "gauge", memory),
            family("insula_memory_byte_seconds_total", "counter", integral),
        ];
        let (mut states, mut exits, mut disk, mut net) = (vec![], vec![], vec![], vec![]);
        for (_, entry) in book.iter() {
            let who = format!(
                "tenant=\"{}\",machine=\"{}\"",
                entry.tenant_name, entry.name
            );
            let now = entry.state().word();
            for state in State::WORDS {
                let is = u8::from(state == now);
                states.push(format!("{{{who},state=\"{state}\"}} {is}"));
            }
            let counts = entry.last().map(|last| last.statistics.exits);
            for (reason, count) in EXIT_REASONS.iter().zip(counts.iter().flatten()) {
                exits.push(format!("{{{who},reason=\"{reason}\"}} {count}"));
            }
            let used = entry.used();
            for (lines, into, out) in [
                (&mut disk, used.disk_read_bytes, used.disk_written_bytes),
                (&mut net, used.net_received_bytes, used.net_sent_bytes),
            ] {
                lines.push(format!("{{{who},direction=\"in\"}} {into}"));
                lines.push(format!("{{{who},direction=\"out\"}} {out}"));
            }
        }
        families.extend([
            family("insula_machine_state", "gauge", states),
            family("insula_machine_exits_total", "counter", exits),
            family("insula_machine_disk_bytes_total", "counter", disk),
            family("insula_machine_net_bytes_total", "counter", net),
        ]);
        families
    }
}

fn family(name: &'static str, kind: &'static str, samples: Vec<String>) -> Family {
    let help = match name {
        "insula_machine_state" => "1 for the state in which a machine is.",
        "insula_machine_exits_total" => {
            "How often vCPUs left the guest since its monitor started, by reason."
        }
        "insula_machine_disk_bytes_total" => {
            "Bytes read from disks (in) and written to them (out)."
        }
        "insula_machine_net_bytes_total" => "Bytes received by machines (in) and sent (out).",
        _ => "Used by a tenant's machines.",
    };
    Family {
        name,
        kind,
        help,
        samples,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_stands_on_the_page_once() {
        let page = "\
# HELP a_total A.
# TYPE a_total counter
a_total{kind=\"wasm\"} 1
# HELP b B.
# TYPE b gauge
b 2
";
        let more = [
            family("b", "gauge", vec!["{kind=\"vm\"} 3".to_owned()]),
            family("c", "gauge", vec![" 4".to_owned()]),
            family("d", "gauge", Vec::new()),
            family("a_total", "counter", vec!["{kind=\"vm\"} 5".to_owned()]),
        ];
        let expected = "\
# HELP a_total A.
# TYPE a_total counter
a_total{kind=\"wasm\"} 1
a_total{kind=\"vm\"} 5
# HELP b B.
# TYPE b gauge
b 2
b{kind=\"vm\"} 3
# HELP c Used by a tenant's machines.
# TYPE c gauge
c 4
";
        assert_eq!(merge(page, &more), expected);
        assert_eq!(merge(page, &[]), page);
    }
}
