//! Usage sums in SQLite. Requests are kept by the outcome's word, so that the order of outcomes
//! in the program may change.

use std::collections::BTreeMap;

use insula_types::{Outcome, ServiceId, TenantId};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, json, nat, to_json};
use crate::state::{StoreError, StoredUsage, UsageTotals};

/// Stands for all deleted services of a tenant; real ids count from 1.
const DELETED: ServiceId = ServiceId::new(0);
const BYTE_MS_PER_MIB_SECOND: u128 = (1 << 20) * 1_000;

const COLUMNS: &str = "tenant, service, requests, fuel, cpu_ns, memory_mib_seconds,
    memory_rest_byte_ms, bytes_in, bytes_out";

fn read(row: &Row<'_>) -> rusqlite::Result<StoredUsage> {
    let by_word: BTreeMap<String, u64> = json(row, 2)?;
    let mut requests = [0; Outcome::ALL.len()];
    for outcome in Outcome::ALL {
        requests[outcome.index()] = by_word.get(outcome.as_str()).copied().unwrap_or(0);
    }
    let service = ServiceId::new(nat(row, 1)?);
    Ok(StoredUsage {
        tenant: TenantId::new(nat(row, 0)?),
        service: (service != DELETED).then_some(service),
        totals: UsageTotals {
            requests,
            fuel: nat(row, 3)?,
            cpu_ns: nat(row, 4)?,
            memory_byte_ms: u128::from(nat(row, 5)?) * BYTE_MS_PER_MIB_SECOND
                + u128::from(nat(row, 6)?),
            bytes_in: nat(row, 7)?,
            bytes_out: nat(row, 8)?,
        },
    })
}

pub(super) fn all(connection: &Connection) -> Result<Vec<StoredUsage>, StoreError> {
    let mut statement = connection.prepare(&format!("SELECT {COLUMNS} FROM usage"))?;
    let rows = statement.query_map([], read)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub(super) fn add(
    write: &Write<'_>,
    parts: &[(TenantId, ServiceId, UsageTotals)],
) -> Result<(), StoreError> {
    for (tenant, service, totals) in parts {
        let known: bool = write
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)")?
            .query_row([int(tenant.get())], |row| row.get(0))?;
        if !known {
            continue;
        }
        let alive: bool = write
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM services WHERE id = ?1 AND tenant = ?2)")?
            .query_row([int(service.get()), int(tenant.get())], |row| row.get(0))?;
        add_one(
            write,
            *tenant,
            if alive { *service } else { DELETED },
            totals,
        )?;
    }
    Ok(())
}

/// Moves what a service used to its tenant's deleted services.
pub(super) fn keep_for_tenant(
    write: &Write<'_>,
    tenant: TenantId,
    service: ServiceId,
) -> Result<(), StoreError> {
    if let Some(totals) = find(write, tenant, service)? {
        add_one(write, tenant, DELETED, &totals)?;
        write.execute(
            "DELETE FROM usage WHERE tenant = ?1 AND service = ?2",
            [int(tenant.get()), int(service.get())],
        )?;
    }
    Ok(())
}

fn find(
    connection: &Connection,
    tenant: TenantId,
    service: ServiceId,
) -> Result<Option<UsageTotals>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM usage WHERE tenant = ?1 AND service = ?2"
    ))?;
    let row = statement
        .query_row([int(tenant.get()), int(service.get())], read)
        .optional()?;
    Ok(row.map(|usage| usage.totals))
}

fn add_one(
    write: &Write<'_>,
    tenant: TenantId,
    service: ServiceId,
    part: &UsageTotals,
) -> Result<(), StoreError> {
    let mut sum = find(write, tenant, service)?.unwrap_or_default();
    sum.add(part);
    let requests: BTreeMap<&str, u64> = Outcome::ALL
        .into_iter()
        .map(|outcome| (outcome.as_str(), sum.requests[outcome.index()]))
        .filter(|(_, count)| *count > 0)
        .collect();
    let whole = u64::try_from(sum.memory_byte_ms / BYTE_MS_PER_MIB_SECOND).unwrap_or(u64::MAX);
    let rest = u64::try_from(sum.memory_byte_ms % BYTE_MS_PER_MIB_SECOND).unwrap_or(0);
    write
        .prepare_cached(&format!(
            "INSERT OR REPLACE INTO usage ({COLUMNS})
                VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"
        ))?
        .execute(params![
            int(tenant.get()),
            int(service.get()),
            to_json(&requests)?,
            int(sum.fuel),
            int(sum.cpu_ns),
            int(whole),
            int(rest),
            int(sum.bytes_in),
            int(sum.bytes_out)
        ])?;
    Ok(())
}
