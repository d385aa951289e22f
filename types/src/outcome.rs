//! How a request can end.

use std::fmt;

/// The end of one request, in the words that metrics, logs and problem bodies share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest answered and the answer went out whole.
    Ok,
    /// The guest trapped, before or after its answer began.
    Trap,
    /// The guest burned the fuel of its request.
    OutOfFuel,
    /// The wall-clock limit of the request passed.
    Timeout,
    /// The guest ended because memory was refused to it.
    OutOfMemory,
    /// The guest answered nothing, or something that is not a valid HTTP answer.
    BadResponse,
    /// Refused before any guest code ran: the tenant is at its own bounds.
    TenantOverloaded,
    /// Refused before any guest code ran: the host is at its bounds.
    HostOverloaded,
    /// No service, or no active version of it.
    NotFound,
    /// The request broke a limit of its service (body too large) or was cut short by its sender.
    BadRequest,
    /// The client went away first.
    Canceled,
    /// Our own fault.
    HostError,
}

impl Outcome {
    /// Every outcome, in the order of the documentation.
    pub const ALL: [Self; 12] = [
        Self::Ok,
        Self::Trap,
        Self::OutOfFuel,
        Self::Timeout,
        Self::OutOfMemory,
        Self::BadResponse,
        Self::TenantOverloaded,
        Self::HostOverloaded,
        Self::NotFound,
        Self::BadRequest,
        Self::Canceled,
        Self::HostError,
    ];

    /// The word used as a metric label, a log field and a problem code.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Trap => "trap",
            Self::OutOfFuel => "out_of_fuel",
            Self::Timeout => "timeout",
            Self::OutOfMemory => "out_of_memory",
            Self::BadResponse => "bad_response",
            Self::TenantOverloaded => "tenant_overloaded",
            Self::HostOverloaded => "host_overloaded",
            Self::NotFound => "not_found",
            Self::BadRequest => "bad_request",
            Self::Canceled => "canceled",
            Self::HostError => "host_error",
        }
    }

    /// The position in [`Outcome::ALL`], for tables indexed by outcome.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_is_the_position_in_all() {
        for (position, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome.index(), position);
        }
    }
}
