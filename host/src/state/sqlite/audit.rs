//! The audit log in SQLite. Triggers of the schema refuse every other change of it.

use insula_types::TenantId;
use rusqlite::{Connection, Row, params};
use serde_json::Value;

use super::{Write, int, json, listed, nat, parsed, time, to_json};
use crate::state::{AUDIT_KEPT, Audit, AuditEntry, Listed, Page, StoreError, Timestamp};

fn document(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Value>> {
    match row.get_ref(column)? {
        rusqlite::types::ValueRef::Null => Ok(None),
        _ => json(row, column).map(Some),
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<AuditEntry> {
    let tenant: Option<i64> = row.get(6)?;
    let token: Option<i64> = row.get(2)?;
    Ok(AuditEntry {
        id: nat(row, 0)?,
        time: time(row, 1)?,
        audit: Audit {
            token: token.map(|_| nat(row, 2)).transpose()?,
            actor: row.get(3)?,
            peer: row.get(4)?,
            operation: row.get(5)?,
            tenant: match tenant {
                None => None,
                Some(_) => Some((TenantId::new(nat(row, 6)?), parsed(row, 7)?)),
            },
            subject: row.get(8)?,
            before: document(row, 9)?,
            after: document(row, 10)?,
        },
    })
}

pub(super) fn list(
    connection: &Connection,
    tenant: Option<TenantId>,
    page: &Page,
) -> Result<Listed<AuditEntry>, StoreError> {
    let before = page.after.as_ref().and_then(|text| text.parse().ok());
    let mut statement = connection.prepare_cached(
        "SELECT id, time_ms, token, actor, peer, operation, tenant, tenant_name, subject,
            before, after
        FROM audit WHERE id < ?1 AND (?2 IS NULL OR tenant = ?2) ORDER BY id DESC LIMIT ?3",
    )?;
    let tenant = tenant.map(|id| int(id.get()));
    let rows = statement.query_map(
        params![before.unwrap_or(i64::MAX), tenant, page.limit + 1],
        read,
    )?;
    listed(rows, page, |entry| entry.id.to_string())
}

pub(super) fn add(write: &Write<'_>, audit: &Audit, now: Timestamp) -> Result<(), StoreError> {
    let text = |value: &Option<Value>| value.as_ref().map(to_json).transpose();
    write
        .prepare_cached(
            "INSERT INTO audit (time_ms, token, actor, peer, operation, tenant, tenant_name,
                subject, before, after)
                VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?
        .execute(params![
            int(now.as_millis()),
            audit.token.map(int),
            audit.actor,
            audit.peer,
            audit.operation,
            audit.tenant.as_ref().map(|(id, _)| int(id.get())),
            audit.tenant.as_ref().map(|(_, name)| name.as_str()),
            audit.subject,
            text(&audit.before)?,
            text(&audit.after)?,
        ])?;
    write
        .prepare_cached("DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?1")?
        .execute([int(AUDIT_KEPT)])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::state::{AUDIT_KEPT, Audit, DataDir, Health, SqliteStore, Store, Timestamp};

    #[test]
    fn entries_are_never_changed_and_only_old_ones_go() {
        let path = tempfile::tempdir().unwrap();
        let data = DataDir::open(path.path()).unwrap();
        let mut store = SqliteStore::open(&data, Health::default()).unwrap();
        let audit = Audit {
            token: None,
            actor: "host".to_owned(),
            peer: None,
            operation: "x".to_owned(),
            tenant: None,
            subject: "y".to_owned(),
            before: None,
            after: None,
        };
        let now = Timestamp::from_millis(1);
        store.audit(&audit, now).unwrap();
        for change in ["UPDATE audit SET actor = 'z'", "DELETE FROM audit"] {
            let error = store.connection.execute(change, []).unwrap_err();
            assert!(error.to_string().contains("append-only"), "{error}");
        }
        let far = i64::try_from(AUDIT_KEPT).unwrap() + 1;
        store
            .connection
            .execute(
                "UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'audit'",
                [far - 1],
            )
            .unwrap();
        store.audit(&audit, now).unwrap();
        let ids: Vec<i64> = {
            let mut statement = store.connection.prepare("SELECT id FROM audit").unwrap();
            let rows = statement.query_map([], |row| row.get(0)).unwrap();
            rows.collect::<Result<_, _>>().unwrap()
        };
        assert_eq!(
            ids,
            [far],
            "what is older than the newest hundred thousand is gone"
        );
    }
}
