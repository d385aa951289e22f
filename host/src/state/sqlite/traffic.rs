//! Which versions serve, in SQLite.

use insula_types::{ServiceId, Traffic, VersionNumber};
use rusqlite::params;

use super::{Write, int, services, versions};
use crate::state::{Service, StoreError, Switched};

pub(super) fn set(
    write: &Write<'_>,
    service: ServiceId,
    traffic: &Traffic,
) -> Result<Switched, StoreError> {
    let before = services::by_id(write, service)?;
    for (number, _) in traffic.shares() {
        versions::find(write, service, number)?.ok_or(StoreError::NotFound("version"))?;
    }
    let previous = before.traffic.previous_after(traffic, before.previous);
    let service = put(write, service, traffic, previous)?;
    Ok(Switched { before, service })
}

pub(super) fn restore(write: &Write<'_>, before: &Service) -> Result<Service, StoreError> {
    services::by_id(write, before.id)?;
    put(write, before.id, &before.traffic, before.previous)
}

fn put(
    write: &Write<'_>,
    service: ServiceId,
    traffic: &Traffic,
    previous: Option<VersionNumber>,
) -> Result<Service, StoreError> {
    let id = int(service.get());
    write.execute("DELETE FROM traffic WHERE service = ?1", [id])?;
    let mut insert = write
        .prepare_cached("INSERT INTO traffic (service, number, percent) VALUES (?1, ?2, ?3)")?;
    for (number, percent) in traffic.shares() {
        insert.execute(params![id, number.get(), percent])?;
    }
    write.execute(
        "UPDATE services SET previous = ?2 WHERE id = ?1",
        params![id, previous.map(VersionNumber::get)],
    )?;
    services::by_id(write, service)
}
