//! One small error per operation, carrying the numbers.

use std::fmt;

use crate::units::{Millicores, TenantId, WorkerId};

/// There is no such tenant (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownTenant(pub TenantId);

impl fmt::Display for UnknownTenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no tenant {}", self.0.get())
    }
}

impl std::error::Error for UnknownTenant {}

/// Parameters that this host cannot promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamsError {
    /// A reservation above the same tenant's limit can never be met.
    ReservationAboveLimit {
        /// The reservation asked for.
        reservation: Millicores,
        /// The limit asked for.
        limit: Millicores,
    },
    /// The reservations of all tenants would exceed the workers.
    Overcommitted {
        /// The reservation asked for.
        asked: Millicores,
        /// What other tenants left, in millicores.
        free_millicores: u32,
    },
}

impl fmt::Display for ParamsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservationAboveLimit { reservation, limit } => {
                write!(
                    f,
                    "reservation {}m is above the limit {}m",
                    reservation.get(),
                    limit.get()
                )
            }
            Self::Overcommitted {
                asked,
                free_millicores,
            } => {
                write!(
                    f,
                    "reservation {}m asked, {free_millicores}m free",
                    asked.get()
                )
            }
        }
    }
}

impl std::error::Error for ParamsError {}

/// Why a tenant was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddError {
    /// The id is in use.
    Exists(TenantId),
    /// [`Config::tenants_max`](crate::Config::tenants_max) is reached.
    TooMany {
        /// That limit.
        limit: u32,
    },
    /// The parameters cannot be promised.
    Params(ParamsError),
}

impl fmt::Display for AddError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists(tenant) => write!(f, "tenant {} exists", tenant.get()),
            Self::TooMany { limit } => write!(f, "{limit} tenants, the limit"),
            Self::Params(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for AddError {}

/// Why a tenant's parameters were not changed; the old ones stay in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetError {
    /// There is no such tenant.
    Unknown(UnknownTenant),
    /// The parameters cannot be promised.
    Params(ParamsError),
}

impl fmt::Display for SetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(error) => error.fmt(f),
            Self::Params(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SetError {}

/// Why a job was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnqueueError {
    /// There is no such tenant.
    Unknown(UnknownTenant),
    /// The home is not one of the workers.
    NoSuchWorker(NoSuchWorker),
    /// [`Config::queued_max`](crate::Config::queued_max) is reached.
    Full {
        /// That limit.
        limit: u32,
    },
}

impl fmt::Display for EnqueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(error) => error.fmt(f),
            Self::NoSuchWorker(error) => error.fmt(f),
            Self::Full { limit } => write!(f, "{limit} jobs queued, the limit"),
        }
    }
}

impl std::error::Error for EnqueueError {}

/// An index that is not one of the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSuchWorker {
    /// The worker named.
    pub worker: WorkerId,
    /// How many there are.
    pub workers: usize,
}

impl fmt::Display for NoSuchWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "worker {} of {}", self.worker.index(), self.workers)
    }
}

impl std::error::Error for NoSuchWorker {}

/// Why nothing was picked although there may be work: a caller's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PickError {
    /// Not one of the workers.
    NoSuchWorker(NoSuchWorker),
    /// The worker's last slice has not been charged yet.
    SliceOpen(WorkerId),
}

impl fmt::Display for PickError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchWorker(error) => error.fmt(f),
            Self::SliceOpen(worker) => {
                write!(f, "worker {} picked before it charged", worker.index())
            }
        }
    }
}

impl std::error::Error for PickError {}

/// Why nothing was charged: a caller's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChargeError {
    /// Not one of the workers.
    NoSuchWorker(NoSuchWorker),
    /// The worker has no slice.
    NoSlice(WorkerId),
}

impl fmt::Display for ChargeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchWorker(error) => error.fmt(f),
            Self::NoSlice(worker) => write!(f, "worker {} charged twice", worker.index()),
        }
    }
}

impl std::error::Error for ChargeError {}
