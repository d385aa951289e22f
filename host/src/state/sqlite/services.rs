//! Services and their routes in SQLite.

use insula_types::{
    Digest, ServiceId, ServiceName, ServiceSpec, TenantId, TenantName, Traffic, VersionNumber,
};
use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::versions;
use super::volumes;
use super::{Write, int, json, listed, nat, parsed, tenants, time, to_json, usage, version_number};
use crate::state::{
    Deleted, Held, Listed, Page, Precondition, Put, SERVICES_PER_TENANT_MAX, Service, StoreError,
    Timestamp,
};

/// The sub-query gives the versions to keep ready as `[[number, digest, percent or null], …]`.
const SELECT: &str = "SELECT s.id, s.tenant, t.name, s.name, s.spec, s.generation, s.previous,
        s.created_ms,
        (SELECT json_group_array(json_array(v.number, v.digest, f.percent) ORDER BY v.number)
            FROM versions v LEFT JOIN traffic f ON f.service = v.service AND f.number = v.number
            WHERE v.service = s.id AND (f.percent IS NOT NULL
                OR v.number = (SELECT max(number) FROM versions WHERE service = s.id)))
    FROM services s JOIN tenants t ON t.id = s.tenant";

fn read(row: &Row<'_>) -> rusqlite::Result<Service> {
    let rows: Vec<(VersionNumber, Digest, Option<u8>)> = json(row, 8)?;
    let listed = rows
        .iter()
        .filter_map(|(number, _, percent)| Some((*number, (*percent)?)));
    let traffic = Traffic::new(listed.collect()).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(8, Type::Text, Box::new(error))
    })?;
    let held = rows
        .into_iter()
        .map(|(number, digest, _)| Held { number, digest });
    Ok(Service {
        id: ServiceId::new(nat(row, 0)?),
        tenant: TenantId::new(nat(row, 1)?),
        tenant_name: parsed(row, 2)?,
        name: parsed(row, 3)?,
        spec: json(row, 4)?,
        generation: nat(row, 5)?,
        traffic,
        held: held.collect(),
        previous: version_number(row, 6)?,
        created: time(row, 7)?,
    })
}

pub(super) fn list(
    connection: &Connection,
    tenant: TenantId,
    page: &Page,
) -> Result<Listed<Service>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "{SELECT} WHERE s.tenant = ?1 AND s.name > ?2 ORDER BY s.name LIMIT ?3"
    ))?;
    let after = page.after.as_deref().unwrap_or("");
    let rows = statement.query_map(params![int(tenant.get()), after, page.limit + 1], read)?;
    listed(rows, page, |service| service.name.to_string())
}

pub(super) fn find(
    connection: &Connection,
    tenant: &TenantName,
    name: &ServiceName,
) -> Result<Option<Service>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("{SELECT} WHERE t.name = ?1 AND s.name = ?2"))?;
    Ok(statement
        .query_row([tenant.as_str(), name.as_str()], read)
        .optional()?)
}

pub(super) fn by_id(connection: &Connection, id: ServiceId) -> Result<Service, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{SELECT} WHERE s.id = ?1"))?;
    let service = statement.query_row([int(id.get())], read).optional()?;
    service.ok_or(StoreError::NotFound("service"))
}

pub(super) fn put(
    write: &Write<'_>,
    tenant_name: &TenantName,
    name: &ServiceName,
    spec: &ServiceSpec,
    precondition: Precondition,
    now: Timestamp,
) -> Result<Put<Service>, StoreError> {
    let tenant = tenants::find(write, tenant_name)?.ok_or(StoreError::NotFound("tenant"))?;
    let before = find(write, tenant_name, name)?;
    precondition.check(before.as_ref().map(|service| service.generation))?;
    if let Some(service) = before.as_ref().filter(|service| service.spec == *spec) {
        return Ok(Put::Unchanged(service.clone()));
    }
    match before {
        Some(service) => {
            write.execute(
                "UPDATE services SET spec = ?2, generation = generation + 1 WHERE id = ?1",
                params![int(service.id.get()), to_json(spec)?],
            )?;
            set_routes(write, tenant.id, service.id, spec)?;
            volumes::set_mounts(write, tenant_name, service.id, spec)?;
            by_id(write, service.id).map(Put::Changed)
        }
        None => {
            let count: i64 = write.query_row(
                "SELECT count(*) FROM services WHERE tenant = ?1",
                [int(tenant.id.get())],
                |row| row.get(0),
            )?;
            if count >= int(SERVICES_PER_TENANT_MAX) {
                let max = SERVICES_PER_TENANT_MAX;
                return Err(StoreError::Full {
                    what: "services of this tenant",
                    max,
                });
            }
            write.execute(
                "INSERT INTO services (tenant, name, spec, generation, created_ms)
                    VALUES (?1, ?2, ?3, 1, ?4)",
                params![
                    int(tenant.id.get()),
                    name.as_str(),
                    to_json(spec)?,
                    int(now.as_millis())
                ],
            )?;
            let id = ServiceId::new(write.last_insert_rowid().unsigned_abs());
            set_routes(write, tenant.id, id, spec)?;
            volumes::set_mounts(write, tenant_name, id, spec)?;
            by_id(write, id).map(Put::Created)
        }
    }
}

/// A host belongs to one tenant, a route to one service.
fn set_routes(
    write: &Write<'_>,
    tenant: TenantId,
    service: ServiceId,
    spec: &ServiceSpec,
) -> Result<(), StoreError> {
    write.execute(
        "DELETE FROM routes WHERE service = ?1",
        [int(service.get())],
    )?;
    for route in &spec.routes {
        let text = String::from(route.clone());
        let taken: bool = write
            .prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM routes r JOIN services s ON s.id = r.service
                    WHERE r.host = ?1 AND (s.tenant != ?2 OR r.route = ?3))",
            )?
            .query_row(params![route.host(), int(tenant.get()), text], |row| {
                row.get(0)
            })?;
        if taken {
            return Err(StoreError::RouteTaken(text));
        }
        write.execute(
            "INSERT INTO routes (route, host, service) VALUES (?1, ?2, ?3)",
            params![text, route.host(), int(service.get())],
        )?;
    }
    Ok(())
}

pub(super) fn delete(
    write: &Write<'_>,
    tenant: &TenantName,
    name: &ServiceName,
    precondition: Precondition,
) -> Result<Deleted<Service>, StoreError> {
    let service = find(write, tenant, name)?.ok_or(StoreError::NotFound("service"))?;
    precondition.check(Some(service.generation))?;
    let id = int(service.id.get());
    let digests = versions::digests_where(write, "service = ?1", id)?;
    usage::keep_for_tenant(write, service.tenant, service.id)?;
    write.execute("DELETE FROM services WHERE id = ?1", [id])?;
    let unreferenced = versions::unreferenced(write, digests)?;
    Ok(Deleted {
        record: service,
        unreferenced,
    })
}
