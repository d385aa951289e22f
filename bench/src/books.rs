//! The server's books beside the kernel's: what was charged, and what was used.

use std::time::Duration;

use anyhow::Result;

use crate::insula::Desk;
use crate::process::tree_cpu;

/// Both at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Books {
    charged: f64,
    used: Duration,
}

impl Books {
    /// `None` for a server that has no books.
    pub(crate) fn open(desk: Option<&Desk>, server: u32) -> Result<Option<Self>> {
        let Some(desk) = desk else {
            return Ok(None);
        };
        // Under pressure the answer takes its time: it belongs to the middle of it.
        let before = tree_cpu(server)?.total();
        let charged = desk.charged()?.all();
        let after = tree_cpu(server)?.total();
        let used = (before + after) / 2;
        Ok(Some(Self { charged, used }))
    }

    /// What was charged between two moments, to tenants and to the host, as a part of what was
    /// used.
    pub(crate) fn ratio(&self, later: &Self) -> f64 {
        let used = later.used.saturating_sub(self.used);
        (later.charged - self.charged) / used.as_secs_f64()
    }
}
