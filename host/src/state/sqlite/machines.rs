//! Machines in SQLite.

use std::collections::HashSet;

use insula_types::{Digest, ImageName, MachineId, MachineName, MachineSpec, TenantId, TenantName};
use insula_vmm::life::State;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    SqliteStore, Write, images, int, json, listed, nat, parsed, tenants, time, to_json, versions,
};
use crate::state::machines::{
    Image, MACHINES_PER_TENANT_MAX, Machine, MachineImages, MachineStore, MachineTotals,
    PinnedImage,
};
use crate::state::{Deleted, Listed, Page, Precondition, Put, StoreError, Timestamp};

const SELECT: &str = "SELECT m.id, m.tenant, t.name, m.name, m.spec, m.images, m.life,
        m.generation, m.created_ms
    FROM machines m JOIN tenants t ON t.id = m.tenant";

fn read(row: &Row<'_>) -> rusqlite::Result<Machine> {
    let spec: MachineSpec = json(row, 4)?;
    let digests: Vec<Digest> = json(row, 5)?;
    let images = MachineImages::from_list(&spec, digests)
        .ok_or(rusqlite::Error::IntegralValueOutOfRange(5, 0))?;
    Ok(Machine {
        id: MachineId::new(nat(row, 0)?),
        tenant: TenantId::new(nat(row, 1)?),
        tenant_name: parsed(row, 2)?,
        name: parsed(row, 3)?,
        spec,
        images,
        life: json(row, 6)?,
        generation: nat(row, 7)?,
        created: time(row, 8)?,
    })
}

pub(super) fn list(
    connection: &Connection,
    tenant: TenantId,
    page: &Page,
) -> Result<Listed<Machine>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "{SELECT} WHERE m.tenant = ?1 AND m.name > ?2 ORDER BY m.name LIMIT ?3"
    ))?;
    let after = page.after.as_deref().unwrap_or("");
    let rows = statement.query_map(params![int(tenant.get()), after, page.limit + 1], read)?;
    listed(rows, page, |machine| machine.name.to_string())
}

pub(super) fn all(connection: &Connection) -> Result<Vec<Machine>, StoreError> {
    let mut statement = connection.prepare_cached(SELECT)?;
    let rows = statement.query_map([], read)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub(super) fn find(
    connection: &Connection,
    tenant: &TenantName,
    name: &MachineName,
) -> Result<Option<Machine>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("{SELECT} WHERE t.name = ?1 AND m.name = ?2"))?;
    Ok(statement
        .query_row([tenant.as_str(), name.as_str()], read)
        .optional()?)
}

pub(super) fn by_id(connection: &Connection, id: MachineId) -> Result<Machine, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{SELECT} WHERE m.id = ?1"))?;
    let machine = statement.query_row([int(id.get())], read).optional()?;
    machine.ok_or(StoreError::NotFound("machine"))
}

pub(super) fn put(
    write: &Write<'_>,
    tenant_name: &TenantName,
    name: &MachineName,
    spec: &MachineSpec,
    precondition: Precondition,
    now: Timestamp,
) -> Result<Put<Machine>, StoreError> {
    let tenant = tenants::find(write, tenant_name)?.ok_or(StoreError::NotFound("tenant"))?;
    let before = find(write, tenant_name, name)?;
    precondition.check(before.as_ref().map(|machine| machine.generation))?;
    let resolved = images::resolve(write, spec)?;
    let digests = to_json(&resolved.list())?;
    match before {
        Some(machine) if machine.spec == *spec && machine.images == resolved => {
            Ok(Put::Unchanged(machine))
        }
        Some(machine) => {
            write.execute(
                "UPDATE machines SET spec = ?2, images = ?3, generation = generation + 1
                    WHERE id = ?1",
                params![int(machine.id.get()), to_json(spec)?, digests],
            )?;
            by_id(write, machine.id).map(Put::Changed)
        }
        None => {
            let count: i64 = write.query_row(
                "SELECT count(*) FROM machines WHERE tenant = ?1",
                [int(tenant.id.get())],
                |row| row.get(0),
            )?;
            if count >= int(MACHINES_PER_TENANT_MAX) {
                let max = MACHINES_PER_TENANT_MAX;
                return Err(StoreError::Full {
                    what: "machines of this tenant",
                    max,
                });
            }
            write.execute(
                "INSERT INTO machines (tenant, name, spec, images, life, generation, created_ms)
                    VALUES (?1, ?2, ?3, ?4, ?5, 1, ?6)",
                params![
                    int(tenant.id.get()),
                    name.as_str(),
                    to_json(spec)?,
                    digests,
                    to_json(&State::Defined)?,
                    int(now.as_millis())
                ],
            )?;
            let id = MachineId::new(write.last_insert_rowid().unsigned_abs());
            by_id(write, id).map(Put::Created)
        }
    }
}

pub(super) fn set_life(write: &Write<'_>, id: MachineId, life: &State) -> Result<(), StoreError> {
    let changed = write.execute(
        "UPDATE machines SET life = ?2 WHERE id = ?1",
        params![int(id.get()), to_json(life)?],
    )?;
    if changed == 0 {
        return Err(StoreError::NotFound("machine"));
    }
    Ok(())
}

pub(super) fn delete(
    write: &Write<'_>,
    tenant: &TenantName,
    name: &MachineName,
    precondition: Precondition,
) -> Result<Deleted<Machine>, StoreError> {
    let machine = find(write, tenant, name)?.ok_or(StoreError::NotFound("machine"))?;
    precondition.check(Some(machine.generation))?;
    write.execute(
        "DELETE FROM machines WHERE id = ?1",
        [int(machine.id.get())],
    )?;
    let images: HashSet<_> = machine.images.list().into_iter().collect();
    let unreferenced = versions::unreferenced(write, images)?;
    Ok(Deleted {
        record: machine,
        unreferenced,
    })
}

/// In the order of [`MachineTotals::numbers`].
const SUMS: [&str; 8] = [
    "cpu_ns",
    "wait_ns",
    "throttled_ns",
    "memory_kib_ms",
    "disk_read_bytes",
    "disk_written_bytes",
    "net_received_bytes",
    "net_sent_bytes",
];

pub(super) fn usage(connection: &Connection) -> Result<Vec<(TenantId, MachineTotals)>, StoreError> {
    let columns = SUMS.join(", ");
    let mut statement =
        connection.prepare_cached(&format!("SELECT tenant, {columns} FROM machine_usage"))?;
    let rows = statement.query_map([], |row| {
        let mut numbers = [0; SUMS.len()];
        for (index, number) in numbers.iter_mut().enumerate() {
            *number = nat(row, index + 1)?;
        }
        let tenant = TenantId::new(nat(row, 0)?);
        Ok((tenant, MachineTotals::from_numbers(numbers)))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What a deleted tenant's machines used is forgotten.
pub(super) fn add_usage(
    write: &Write<'_>,
    parts: &[(TenantId, MachineTotals)],
) -> Result<(), StoreError> {
    let columns = SUMS.join(", ");
    // No sum comes near 2^62, from where on two of them would not fit.
    let adds = SUMS.map(|name| format!("{name} = {name} + excluded.{name}"));
    let mut statement = write.prepare_cached(&format!(
        "INSERT INTO machine_usage (tenant, {columns})
            SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9
            WHERE EXISTS (SELECT 1 FROM tenants WHERE id = ?1)
            ON CONFLICT (tenant) DO UPDATE SET {}",
        adds.join(", ")
    ))?;
    for (tenant, totals) in parts {
        let [cpu, wait, throttled, memory, read, written, received, sent] =
            totals.numbers().map(int);
        statement.execute(params![
            int(tenant.get()),
            cpu,
            wait,
            throttled,
            memory,
            read,
            written,
            received,
            sent
        ])?;
    }
    Ok(())
}

/// The trait, method by method, from here and from [`images`].
impl MachineStore for SqliteStore {
    fn images(&mut self, page: &Page) -> Result<Listed<Image>, StoreError> {
        images::list(&self.connection, page)
    }

    fn image(&mut self, name: &ImageName) -> Result<Image, StoreError> {
        images::find(&self.connection, name)?.ok_or(StoreError::NotFound("image"))
    }

    fn put_image(
        &mut self,
        name: &ImageName,
        image: PinnedImage,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<(Put<Image>, Vec<Digest>), StoreError> {
        let write = self.write()?;
        let put = images::put(&write, name, image, precondition, now)?;
        write.commit()?;
        Ok(put)
    }

    fn delete_image(
        &mut self,
        name: &ImageName,
        precondition: Precondition,
    ) -> Result<Deleted<Image>, StoreError> {
        let write = self.write()?;
        let deleted = images::delete(&write, name, precondition)?;
        write.commit()?;
        Ok(deleted)
    }

    fn machines(
        &mut self,
        tenant: &TenantName,
        page: &Page,
    ) -> Result<Listed<Machine>, StoreError> {
        let tenant = tenants::find(&self.connection, tenant)?;
        let tenant = tenant.ok_or(StoreError::NotFound("tenant"))?;
        list(&self.connection, tenant.id, page)
    }

    fn all_machines(&mut self) -> Result<Vec<Machine>, StoreError> {
        all(&self.connection)
    }

    fn machine(&mut self, tenant: &TenantName, name: &MachineName) -> Result<Machine, StoreError> {
        find(&self.connection, tenant, name)?.ok_or(StoreError::NotFound("machine"))
    }

    fn machine_by_id(&mut self, id: MachineId) -> Result<Machine, StoreError> {
        by_id(&self.connection, id)
    }

    fn put_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        spec: &MachineSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Machine>, StoreError> {
        let write = self.write()?;
        let put = put(&write, tenant, name, spec, precondition, now)?;
        write.commit()?;
        Ok(put)
    }

    fn set_machine_life(&mut self, id: MachineId, life: &State) -> Result<(), StoreError> {
        let write = self.write()?;
        set_life(&write, id, life)?;
        write.commit()
    }

    fn delete_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        precondition: Precondition,
    ) -> Result<Deleted<Machine>, StoreError> {
        let write = self.write()?;
        let deleted = delete(&write, tenant, name, precondition)?;
        write.commit()?;
        Ok(deleted)
    }

    fn machine_usage(&mut self) -> Result<Vec<(TenantId, MachineTotals)>, StoreError> {
        usage(&self.connection)
    }

    fn add_machine_usage(&mut self, parts: &[(TenantId, MachineTotals)]) -> Result<(), StoreError> {
        let write = self.write()?;
        add_usage(&write, parts)?;
        write.commit()
    }
}
