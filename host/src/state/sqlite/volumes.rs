//! Volumes in SQLite, and which services mount them.

use std::collections::HashSet;

use insula_types::volume::MountMode;
use insula_types::{ServiceId, ServiceSpec, TenantId, TenantName, VolumeId, VolumeName};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, json, listed, nat, parsed, tenants, time, to_json};
use crate::state::{
    Listed, NewVolume, Page, Precondition, Put, StoreError, Timestamp, VOLUMES_PER_TENANT_MAX,
    Volume,
};

const SELECT: &str = "SELECT v.id, v.tenant, t.name, v.name, v.spec, v.directory, v.read_only,
        v.origin, v.generation, v.created_ms
    FROM volumes v JOIN tenants t ON t.id = v.tenant";

fn read(row: &Row<'_>) -> rusqlite::Result<Volume> {
    let origin: Option<String> = row.get(7)?;
    Ok(Volume {
        id: VolumeId::new(nat(row, 0)?),
        tenant: TenantId::new(nat(row, 1)?),
        tenant_name: parsed(row, 2)?,
        name: parsed(row, 3)?,
        spec: json(row, 4)?,
        directory: parsed(row, 5)?,
        read_only: row.get(6)?,
        origin: origin.map(|_| parsed(row, 7)).transpose()?,
        generation: nat(row, 8)?,
        created: time(row, 9)?,
    })
}

pub(super) fn list(
    connection: &Connection,
    tenant: TenantId,
    page: &Page,
) -> Result<Listed<Volume>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "{SELECT} WHERE v.tenant = ?1 AND v.name > ?2 ORDER BY v.name LIMIT ?3"
    ))?;
    let after = page.after.as_deref().unwrap_or("");
    let rows = statement.query_map(params![int(tenant.get()), after, page.limit + 1], read)?;
    listed(rows, page, |volume| volume.name.to_string())
}

pub(super) fn find(
    connection: &Connection,
    tenant: &TenantName,
    name: &VolumeName,
) -> Result<Option<Volume>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("{SELECT} WHERE t.name = ?1 AND v.name = ?2"))?;
    Ok(statement
        .query_row([tenant.as_str(), name.as_str()], read)
        .optional()?)
}

pub(super) fn put(
    write: &Write<'_>,
    tenant_name: &TenantName,
    name: &VolumeName,
    new: &NewVolume,
    precondition: Precondition,
    now: Timestamp,
) -> Result<Put<Volume>, StoreError> {
    let tenant = tenants::find(write, tenant_name)?.ok_or(StoreError::NotFound("tenant"))?;
    let before = find(write, tenant_name, name)?;
    precondition.check(before.as_ref().map(|volume| volume.generation))?;
    if let Some(volume) = before {
        if volume.spec == new.spec {
            return Ok(Put::Unchanged(volume));
        }
        if volume.spec.kind != new.spec.kind {
            return Err(StoreError::KindStays);
        }
        write.execute(
            "UPDATE volumes SET spec = ?2, generation = generation + 1 WHERE id = ?1",
            params![int(volume.id.get()), to_json(&new.spec)?],
        )?;
        return Ok(Put::Changed(Volume {
            spec: new.spec,
            generation: volume.generation + 1,
            ..volume
        }));
    }
    let count: i64 = write.query_row(
        "SELECT count(*) FROM volumes WHERE tenant = ?1",
        [int(tenant.id.get())],
        |row| row.get(0),
    )?;
    if count >= int(VOLUMES_PER_TENANT_MAX) {
        let (what, max) = ("volumes of this tenant", VOLUMES_PER_TENANT_MAX);
        return Err(StoreError::Full { what, max });
    }
    write.execute(
        "INSERT INTO volumes (tenant, name, spec, directory, read_only, origin, generation,
            created_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7)",
        params![
            int(tenant.id.get()),
            name.as_str(),
            to_json(&new.spec)?,
            new.directory.as_str(),
            new.read_only,
            new.origin.as_ref().map(VolumeName::as_str),
            int(now.as_millis())
        ],
    )?;
    let made = find(write, tenant_name, name)?;
    made.map(Put::Created).ok_or(StoreError::NotFound("volume"))
}

pub(super) fn delete(
    write: &Write<'_>,
    tenant: &TenantName,
    name: &VolumeName,
    precondition: Precondition,
) -> Result<Volume, StoreError> {
    let volume = find(write, tenant, name)?.ok_or(StoreError::NotFound("volume"))?;
    precondition.check(Some(volume.generation))?;
    let id = int(volume.id.get());
    let user: Option<String> = write
        .query_row(
            "SELECT s.name FROM mounts m JOIN services s ON s.id = m.service
                WHERE m.volume = ?1 ORDER BY s.name LIMIT 1",
            [id],
            |row| row.get(0),
        )
        .optional()?;
    if let Some(service) = user {
        return Err(StoreError::VolumeInUse { service });
    }
    write.execute("DELETE FROM volumes WHERE id = ?1", [id])?;
    Ok(volume)
}

/// Writes down what a service mounts: volumes of its own tenant, and to read only where they can
/// only be read.
pub(super) fn set_mounts(
    write: &Write<'_>,
    tenant: &TenantName,
    service: ServiceId,
    spec: &ServiceSpec,
) -> Result<(), StoreError> {
    let id = int(service.get());
    write.execute("DELETE FROM mounts WHERE service = ?1", [id])?;
    for (name, kind, mode) in spec.used_volumes() {
        let unknown = || StoreError::UnknownVolume(name.to_string());
        let volume = find(write, tenant, name)?.ok_or_else(unknown)?;
        if volume.spec.kind != kind {
            let (name, is) = (name.to_string(), volume.spec.kind);
            return Err(StoreError::WrongKind { name, is });
        }
        if volume.read_only && mode == MountMode::Rw {
            return Err(StoreError::VolumeReadOnly(name.to_string()));
        }
        write.execute(
            "INSERT INTO mounts (service, volume) VALUES (?1, ?2)",
            [id, int(volume.id.get())],
        )?;
    }
    Ok(())
}

pub(super) fn directories(connection: &Connection) -> Result<HashSet<String>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT directory FROM volumes")?;
    let rows = statement.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
