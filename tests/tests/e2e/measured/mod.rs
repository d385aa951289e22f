//! Tests that measure CPU time or latency, and therefore run alone (`.config/nextest.toml`).

mod endings;
mod ledger;
mod neighbours;
mod recovery;
