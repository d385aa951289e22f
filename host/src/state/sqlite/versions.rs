//! Versions in SQLite.

use std::collections::HashSet;

use insula_types::{Bytes, Digest, ServiceId, Traffic, VersionNumber};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, listed, nat, parsed, services, time, traffic, version_number};
use crate::state::{
    AddedVersion, Listed, NewVersion, Page, StoreError, Timestamp, VERSIONS_KEPT, Version,
};

const COLUMNS: &str = "number, digest, size_bytes, compile_ms, created_ms";

fn read(row: &Row<'_>) -> rusqlite::Result<Version> {
    let out_of_range = |_| rusqlite::Error::IntegralValueOutOfRange(2, 0);
    Ok(Version {
        number: version_number(row, 0)?.ok_or(rusqlite::Error::IntegralValueOutOfRange(0, 0))?,
        digest: parsed(row, 1)?,
        size: Bytes::new(nat(row, 2)?).map_err(out_of_range)?,
        compile_ms: nat(row, 3)?,
        created: time(row, 4)?,
    })
}

pub(super) fn list(
    connection: &Connection,
    service: ServiceId,
    page: &Page,
) -> Result<Listed<Version>, StoreError> {
    let before = page
        .after
        .as_ref()
        .and_then(|text| text.parse::<u32>().ok());
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM versions WHERE service = ?1 AND number < ?2
            ORDER BY number DESC LIMIT ?3"
    ))?;
    let before = before.map_or(i64::MAX, i64::from);
    let rows = statement.query_map(params![int(service.get()), before, page.limit + 1], read)?;
    listed(rows, page, |version| version.number.to_string())
}

pub(super) fn find(
    connection: &Connection,
    service: ServiceId,
    number: VersionNumber,
) -> Result<Option<Version>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM versions WHERE service = ?1 AND number = ?2"
    ))?;
    Ok(statement
        .query_row(params![int(service.get()), number.get()], read)
        .optional()?)
}

pub(super) fn add(
    write: &Write<'_>,
    service: ServiceId,
    upload: &NewVersion,
    activate: bool,
    now: Timestamp,
) -> Result<AddedVersion, StoreError> {
    let before = services::by_id(write, service)?;
    let id = int(service.get());
    let number: u32 = write.query_row(
        "UPDATE services SET next_version = next_version + 1 WHERE id = ?1
            RETURNING next_version - 1",
        [id],
        |row| row.get(0),
    )?;
    write.execute(
        "INSERT INTO versions (service, number, digest, size_bytes, compile_ms, created_ms)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            id,
            number,
            upload.digest.to_string(),
            int(upload.size.get()),
            int(upload.compile_ms),
            int(now.as_millis())
        ],
    )?;
    let number = VersionNumber::new(number).ok_or(StoreError::NotFound("version"))?;
    if activate {
        traffic::set(write, service, &Traffic::whole(number))?;
    }
    let unreferenced = prune(write, service)?;
    Ok(AddedVersion {
        before,
        service: services::by_id(write, service)?,
        version: find(write, service, number)?.ok_or(StoreError::NotFound("version"))?,
        unreferenced,
    })
}

/// Removes the oldest versions beyond [`VERSIONS_KEPT`] that are not in use.
fn prune(write: &Write<'_>, service: ServiceId) -> Result<Vec<Digest>, StoreError> {
    let mut statement = write.prepare_cached(
        "DELETE FROM versions WHERE service = ?1 AND number IN (
            SELECT v.number FROM versions v JOIN services s ON s.id = v.service
            WHERE v.service = ?1 AND v.number IS NOT s.previous
                AND v.number NOT IN (SELECT number FROM traffic WHERE service = ?1)
            ORDER BY v.number DESC LIMIT -1 OFFSET ?2) RETURNING digest",
    )?;
    let rows = statement.query_map(params![int(service.get()), int(VERSIONS_KEPT)], |row| {
        parsed(row, 0)
    })?;
    let digests = rows.collect::<Result<HashSet<Digest>, _>>()?;
    unreferenced(write, digests)
}

pub(super) fn digests(connection: &Connection) -> Result<HashSet<Digest>, StoreError> {
    let mut statement = connection.prepare(
        "SELECT digest FROM versions UNION SELECT digest FROM images
            UNION SELECT i.value FROM machines m, json_each(m.images) i",
    )?;
    let rows = statement.query_map([], |row| parsed(row, 0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The digests of the versions that a condition on one number selects.
pub(super) fn digests_where(
    connection: &Connection,
    condition: &'static str,
    number: i64,
) -> Result<HashSet<Digest>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT DISTINCT digest FROM versions WHERE {condition}"
    ))?;
    let rows = statement.query_map([number], |row| parsed(row, 0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Those of some digests that no version has, no image, and no machine.
pub(super) fn unreferenced(
    connection: &Connection,
    digests: impl IntoIterator<Item = Digest>,
) -> Result<Vec<Digest>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?1)
            OR EXISTS (SELECT 1 FROM images WHERE digest = ?1)
            OR EXISTS (SELECT 1 FROM machines m, json_each(m.images) i WHERE i.value = ?1)",
    )?;
    let mut lonely = Vec::new();
    for digest in digests {
        let used: bool = statement.query_row([digest.to_string()], |row| row.get(0))?;
        if !used {
            lonely.push(digest);
        }
    }
    Ok(lonely)
}
