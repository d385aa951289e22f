//! `insula top`: what the tenants use, as a live table.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use crate::args::{Format, TopArgs};
use crate::client::Client;
use crate::output::{self, Style};
use crate::resources;

/// Cursor home, and clear from there on.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// A tenant's totals at one moment.
#[derive(Debug, Clone, PartialEq)]
struct Totals {
    tenant: String,
    cpu_seconds: f64,
    fuel: f64,
    requests: f64,
    memory_byte_seconds: f64,
}

/// What a tenant used per second between two moments.
#[derive(Debug, Clone, PartialEq)]
struct Rates {
    tenant: String,
    cpu_cores: f64,
    fuel_per_second: f64,
    requests_per_second: f64,
    /// The mean over the interval.
    memory_bytes: f64,
}

pub(crate) async fn run(args: TopArgs) -> Result<()> {
    let client = Client::new(&args.look.connection)?;
    let json = args.look.output == Format::Json;
    let once = args.once || json || !io::stdout().is_terminal();
    let interval = Duration::from(args.interval);
    let mut before = totals(&client).await?;
    let mut since = Instant::now();
    loop {
        // Nothing is held while we wait: Ctrl-C is an end like any other.
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
        let now = totals(&client).await?;
        let elapsed = since.elapsed();
        since = Instant::now();
        let rates = rates(&before, &now, elapsed);
        before = now;
        if json {
            return output::json(&as_json(&rates));
        }
        let table = table(&rates);
        if once {
            output::print(&table)?;
            return Ok(());
        }
        let (head, rows) = table.split_once('\n').unwrap_or((&table, ""));
        let head = Style::of(&io::stdout()).bold(head);
        output::print(&format!("{CLEAR}{head}\n{rows}"))?;
    }
}

async fn totals(client: &Client) -> Result<Vec<Totals>> {
    let tenants = resources::all(client, "/v1/tenants").await?;
    let names = tenants["items"].as_array().into_iter().flatten();
    let mut all = Vec::new();
    for name in names.filter_map(|tenant| tenant["name"].as_str()) {
        // A tenant deleted since the list was made is no reason to stop.
        let path = format!("/v1/tenants/{name}/usage");
        if let Some(usage) = client.find(&path).await? {
            all.push(Totals::read(name, &usage.json()?));
        }
    }
    Ok(all)
}

impl Totals {
    fn read(tenant: &str, usage: &Value) -> Self {
        let number = |pointer: &str| {
            let found = usage.pointer(pointer).and_then(Value::as_f64);
            found.unwrap_or_default()
        };
        Self {
            tenant: tenant.to_owned(),
            cpu_seconds: number("/cpu_seconds"),
            fuel: number("/fuel"),
            requests: number("/requests/total"),
            memory_byte_seconds: number("/memory_byte_seconds"),
        }
    }
}

fn rates(before: &[Totals], now: &[Totals], elapsed: Duration) -> Vec<Rates> {
    let seconds = elapsed.as_secs_f64().max(f64::EPSILON);
    let mut rates: Vec<Rates> = now
        .iter()
        .map(|now| {
            let before = before.iter().find(|before| before.tenant == now.tenant);
            // A tenant made anew under the same name begins at zero again.
            let rate = |of: fn(&Totals) -> f64| {
                let earlier = before.map_or(0.0, of);
                (of(now) - earlier).max(0.0) / seconds
            };
            Rates {
                tenant: now.tenant.clone(),
                cpu_cores: rate(|totals| totals.cpu_seconds),
                fuel_per_second: rate(|totals| totals.fuel),
                requests_per_second: rate(|totals| totals.requests),
                memory_bytes: rate(|totals| totals.memory_byte_seconds),
            }
        })
        .collect();
    rates.sort_by(|a, b| b.cpu_cores.total_cmp(&a.cpu_cores));
    rates
}

fn table(rates: &[Rates]) -> String {
    let head = ["TENANT", "CPU", "REQUESTS/S", "FUEL/S", "MEMORY"];
    let rows = rates.iter().map(|rates| {
        vec![
            output::plain(&rates.tenant),
            format!("{:.0}m", rates.cpu_cores * 1000.0),
            format!("{:.1}", rates.requests_per_second),
            si(rates.fuel_per_second),
            output::bytes_text(whole(rates.memory_bytes)),
        ]
    });
    let head = head.map(str::to_owned).to_vec();
    output::columns(std::iter::once(head).chain(rows).collect())
}

fn as_json(rates: &[Rates]) -> Value {
    let items = rates.iter().map(|rates| {
        json!({
            "name": rates.tenant,
            "cpu_cores": rates.cpu_cores,
            "requests_per_second": rates.requests_per_second,
            "fuel_per_second": rates.fuel_per_second,
            "memory_bytes": whole(rates.memory_bytes),
        })
    });
    json!({ "items": items.collect::<Vec<_>>(), "next": null })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, which is right for a size that was an integer before"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

fn si(number: f64) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{:.1}{unit}", number / size),
        None => format!("{number:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(tenant: &str, cpu_seconds: f64, fuel: f64) -> Totals {
        Totals {
            tenant: tenant.to_owned(),
            cpu_seconds,
            fuel,
            requests: 10.0,
            memory_byte_seconds: 0.0,
        }
    }

    #[test]
    fn rates_are_differences_over_time_and_the_busiest_comes_first() {
        let before = [totals("a", 1.0, 0.0), totals("b", 1.0, 0.0)];
        let now = [
            totals("a", 1.5, 4e6),
            totals("b", 3.0, 0.0),
            totals("new", 0.2, 0.0),
        ];
        let rates = rates(&before, &now, Duration::from_secs(2));
        let names: Vec<&str> = rates.iter().map(|rates| rates.tenant.as_str()).collect();
        assert_eq!(names, ["b", "a", "new"]);
        let table = table(&rates);
        assert!(table.contains("a       250m   0.0         2.0M"), "{table}");
    }
}
