//! What neighbours do, and how many of them there are.

use serde_json::{Value, json};

use crate::crowd::Answers;

/// One way of being a bad neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Attack {
    EndlessLoop,
    TinyLoop,
    Recursion,
    FaultStorm,
    Fill,
    TrapLoop,
    HostCalls,
    Connections,
    SlowBodies,
    LogFlood,
}

const MIB: u64 = 1 << 20;
/// An instance of a small guest, with what the pool keeps for it.
const SMALL_BYTES: u64 = 2 * MIB;
/// What [`Attack::Connections`] holds, however many tenants it is.
const FLOOD_CONNECTIONS: usize = 1_000;

impl Attack {
    pub(crate) const ALL: [Self; 10] = [
        Self::EndlessLoop,
        Self::TinyLoop,
        Self::Recursion,
        Self::FaultStorm,
        Self::Fill,
        Self::TrapLoop,
        Self::HostCalls,
        Self::Connections,
        Self::SlowBodies,
        Self::LogFlood,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::EndlessLoop => "endless loop",
            Self::TinyLoop => "tiny loop",
            Self::Recursion => "recursion",
            Self::FaultStorm => "page-fault storm",
            Self::Fill => "64 MiB fill loop",
            Self::TrapLoop => "trap loop",
            Self::HostCalls => "host-call storm",
            Self::Connections => "1,000 connections",
            Self::SlowBodies => "slow bodies",
            Self::LogFlood => "log flood",
        }
    }

    /// What it is, for who reads the table.
    pub(crate) const fn description(self) -> &'static str {
        match self {
            Self::EndlessLoop => "a request that never ends, in a loop",
            Self::TinyLoop => "requests of some microseconds of loop each, without pause",
            Self::Recursion => "requests that recurse until their stack is full",
            Self::FaultStorm => "requests that touch 48 MiB of fresh memory, a byte a page",
            Self::Fill => "a request that never ends, 64 MiB at a time in one instruction",
            Self::TrapLoop => "requests that trap at once",
            Self::HostCalls => "a request that never ends, calling the host",
            Self::Connections => "1,000 connections in all, each asking for `hello` without pause",
            Self::SlowBodies => "an answer that never ends, a byte every 100 ms",
            Self::LogFlood => "a request that never ends, writing log lines",
        }
    }

    /// The sample that does it.
    pub(crate) const fn guest(self) -> &'static str {
        match self {
            Self::EndlessLoop => "spin",
            Self::TinyLoop => "kernels",
            Self::Recursion => "recursion",
            Self::FaultStorm => "fault-storm",
            Self::Fill => "fill",
            Self::TrapLoop => "trap",
            Self::HostCalls => "host-calls",
            Self::Connections => "hello",
            Self::SlowBodies => "slow-body",
            Self::LogFlood => "log-flood",
        }
    }

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::TinyLoop => "/fib?n=2",
            _ => "/",
        }
    }

    pub(crate) const fn answers(self) -> Answers {
        match self {
            Self::SlowBodies => Answers::Endless,
            _ => Answers::Counted,
        }
    }

    /// The most that a host grants by itself: an attack shall not end before its time.
    pub(crate) fn service(self) -> Value {
        json!({"limits": {"memory": "80MiB", "fuel": "1T", "timeout": "300s"}})
    }

    /// What an instance may hold, at most.
    const fn instance_bytes(self) -> u64 {
        match self {
            Self::FaultStorm => 50 * MIB,
            Self::Fill => 66 * MIB,
            _ => SMALL_BYTES,
        }
    }
}

/// How many tenants attack, and on how many connections in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Strength {
    pub(crate) tenants: usize,
    pub(crate) connections: usize,
    /// Instances that each tenant may have at once.
    pub(crate) in_flight: usize,
}

impl Strength {
    /// So many aggressors: each a connection of a tenant of its own, unless their instances would
    /// take more memory together than there is for them. Then there are fewer tenants, and the
    /// rest of the requests wait in the queues of these.
    pub(crate) fn of(attack: Attack, aggressors: usize, memory_bytes: u64) -> Self {
        let fit = usize::try_from(memory_bytes / attack.instance_bytes()).unwrap_or(usize::MAX);
        let fit = fit.max(1);
        let tenants = aggressors.min(fit);
        let connections = match attack {
            Attack::Connections => FLOOD_CONNECTIONS.max(aggressors),
            _ => aggressors,
        };
        let in_flight = connections.div_ceil(tenants).min(fit / tenants).max(1);
        Self {
            tenants,
            connections,
            in_flight,
        }
    }

    /// What each of the tenants is given.
    pub(crate) fn tenant(self) -> Value {
        let queued = self.connections.div_ceil(self.tenants);
        json!({"requests": {"in_flight": self.in_flight, "queued": queued}})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strength_is_bounded_by_memory() {
        let of = |attack, aggressors| Strength::of(attack, aggressors, 4 << 30);
        let all = of(Attack::EndlessLoop, 1_000);
        assert_eq!(
            (all.tenants, all.connections, all.in_flight),
            (1_000, 1_000, 1)
        );
        let fill = of(Attack::Fill, 1_000);
        assert_eq!(
            (fill.tenants, fill.connections, fill.in_flight),
            (62, 1_000, 1)
        );
        let few = of(Attack::Fill, 10);
        assert_eq!((few.tenants, few.connections, few.in_flight), (10, 10, 1));
        let flood = of(Attack::Connections, 10);
        assert_eq!(
            (flood.tenants, flood.connections, flood.in_flight),
            (10, 1_000, 100)
        );
        for attack in Attack::ALL {
            for aggressors in [1, 10, 1_000] {
                let strength = of(attack, aggressors);
                let held = (strength.tenants * strength.in_flight) as u64;
                assert!(
                    held * attack.instance_bytes() <= 4 << 30,
                    "{attack:?} {strength:?}"
                );
            }
        }
    }
}
