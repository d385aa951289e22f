//! Tenants in SQLite.

use insula_types::{TenantId, TenantName, TenantSpec};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, json, listed, nat, parsed, time, to_json, versions};
use crate::state::{
    Commitments, Deleted, Listed, Page, Precondition, Put, StoreError, TENANTS_MAX, Tenant,
    Timestamp,
};

const COLUMNS: &str = "id, name, spec, generation, created_ms";

fn read(row: &Row<'_>) -> rusqlite::Result<Tenant> {
    Ok(Tenant {
        id: TenantId::new(nat(row, 0)?),
        name: parsed(row, 1)?,
        spec: json(row, 2)?,
        generation: nat(row, 3)?,
        created: time(row, 4)?,
    })
}

pub(super) fn list(connection: &Connection, page: &Page) -> Result<Listed<Tenant>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM tenants WHERE name > ?1 ORDER BY name LIMIT ?2"
    ))?;
    let after = page.after.as_deref().unwrap_or("");
    let rows = statement.query_map(params![after, page.limit + 1], read)?;
    listed(rows, page, |tenant| tenant.name.to_string())
}

pub(super) fn find(
    connection: &Connection,
    name: &TenantName,
) -> Result<Option<Tenant>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("SELECT {COLUMNS} FROM tenants WHERE name = ?1"))?;
    Ok(statement.query_row([name.as_str()], read).optional()?)
}

pub(super) fn commitments(connection: &Connection) -> Result<Commitments, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT count(*), (SELECT count(*) FROM services),
            coalesce(sum(reservation_millicores), 0), total(memory_limit_bytes) FROM tenants",
    )?;
    Ok(statement.query_row([], |row| {
        // Limits may be set to 2^63 - 1 each, so that their sum is taken in floating point.
        let memory: f64 = row.get(3)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float becomes the nearest u64"
        )]
        Ok(Commitments {
            tenants: nat(row, 0)?,
            services: nat(row, 1)?,
            reserved_millicores: nat(row, 2)?,
            memory_bytes: memory as u64,
        })
    })?)
}

pub(super) fn put(
    write: &Write<'_>,
    name: &TenantName,
    spec: &TenantSpec,
    precondition: Precondition,
    capacity_millicores: u64,
    now: Timestamp,
) -> Result<Put<Tenant>, StoreError> {
    let before = find(write, name)?;
    precondition.check(before.as_ref().map(|tenant| tenant.generation))?;
    if let Some(tenant) = before.as_ref().filter(|tenant| tenant.spec == *spec) {
        return Ok(Put::Unchanged(tenant.clone()));
    }
    let asked = reservation(spec);
    let reserved = commitments(write)?.reserved_millicores;
    let others = reserved
        - before
            .as_ref()
            .map_or(0, |tenant| reservation(&tenant.spec));
    // A host that was restarted with fewer workers may be beyond its capacity already; asking
    // for nothing is always granted.
    if asked > 0 && others + asked > capacity_millicores {
        return Err(StoreError::Reservation {
            asked_millicores: asked,
            free_millicores: capacity_millicores.saturating_sub(others),
            capacity_millicores,
        });
    }
    let memory = spec.memory_limit.map_or(0, insula_types::Bytes::get);
    match before {
        Some(tenant) => {
            write.execute(
                "UPDATE tenants SET spec = ?2, reservation_millicores = ?3,
                    memory_limit_bytes = ?4, generation = generation + 1 WHERE id = ?1",
                params![
                    int(tenant.id.get()),
                    to_json(spec)?,
                    int(asked),
                    int(memory)
                ],
            )?;
            let (spec, generation) = (spec.clone(), tenant.generation + 1);
            Ok(Put::Changed(Tenant {
                spec,
                generation,
                ..tenant
            }))
        }
        None => {
            if commitments(write)?.tenants >= TENANTS_MAX {
                return Err(StoreError::Full {
                    what: "tenants",
                    max: TENANTS_MAX,
                });
            }
            write.execute(
                "INSERT INTO tenants (name, spec, reservation_millicores, memory_limit_bytes,
                    generation, created_ms) VALUES (?1, ?2, ?3, ?4, 1, ?5)",
                params![
                    name.as_str(),
                    to_json(spec)?,
                    int(asked),
                    int(memory),
                    int(now.as_millis())
                ],
            )?;
            find(write, name)?
                .map(Put::Created)
                .ok_or(StoreError::NotFound("tenant"))
        }
    }
}

fn reservation(spec: &TenantSpec) -> u64 {
    spec.cpu
        .reservation
        .map_or(0, insula_types::Millicores::get)
}

pub(super) fn delete(
    write: &Write<'_>,
    name: &TenantName,
    precondition: Precondition,
) -> Result<Deleted<Tenant>, StoreError> {
    let tenant = find(write, name)?.ok_or(StoreError::NotFound("tenant"))?;
    precondition.check(Some(tenant.generation))?;
    let machines: i64 = write.query_row(
        "SELECT count(*) FROM machines WHERE tenant = ?1",
        [int(tenant.id.get())],
        |row| row.get(0),
    )?;
    if machines > 0 {
        let count = machines.unsigned_abs();
        return Err(StoreError::HasMachines { count });
    }
    let digests = versions::digests_where(
        write,
        "service IN (SELECT id FROM services WHERE tenant = ?1)",
        int(tenant.id.get()),
    )?;
    write.execute("DELETE FROM tenants WHERE id = ?1", [int(tenant.id.get())])?;
    let unreferenced = versions::unreferenced(write, digests)?;
    Ok(Deleted {
        record: tenant,
        unreferenced,
    })
}
