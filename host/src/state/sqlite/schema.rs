//! The tables, as an ordered list of migrations. `PRAGMA user_version` counts those applied.

use rusqlite::{Connection, TransactionBehavior};

use super::OpenError;

/// Each is applied once, in order, in a transaction of its own. Never edit one that was released.
const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE tenants (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    -- Copies of what is summed up over all tenants.
    reservation_millicores INTEGER NOT NULL,
    memory_limit_bytes INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE services (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    spec TEXT NOT NULL,
    generation INTEGER NOT NULL,
    active INTEGER,
    previous INTEGER,
    next_version INTEGER NOT NULL DEFAULT 1,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant, name),
    FOREIGN KEY (id, active) REFERENCES versions (service, number) DEFERRABLE INITIALLY DEFERRED,
    FOREIGN KEY (id, previous) REFERENCES versions (service, number) DEFERRABLE INITIALLY DEFERRED
) STRICT;

CREATE TABLE versions (
    service INTEGER NOT NULL REFERENCES services (id) ON DELETE CASCADE,
    number INTEGER NOT NULL CHECK (number > 0),
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    compile_ms INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (service, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);

CREATE TABLE routes (
    route TEXT NOT NULL PRIMARY KEY,
    host TEXT NOT NULL,
    service INTEGER NOT NULL REFERENCES services (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX routes_by_host ON routes (host);
CREATE INDEX routes_by_service ON routes (service);

CREATE TABLE tokens (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    name TEXT NOT NULL,
    scope TEXT NOT NULL CHECK (scope IN ('host', 'tenant')),
    tenant INTEGER REFERENCES tenants (id) ON DELETE CASCADE,
    access TEXT NOT NULL CHECK (access IN ('read', 'write')),
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    CHECK ((scope = 'host') = (tenant IS NULL))
) STRICT;

-- service 0: all deleted services of the tenant together.
CREATE TABLE usage (
    tenant INTEGER NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    service INTEGER NOT NULL,
    requests TEXT NOT NULL,
    fuel INTEGER NOT NULL,
    cpu_ns INTEGER NOT NULL,
    memory_mib_seconds INTEGER NOT NULL,
    memory_rest_byte_ms INTEGER NOT NULL,
    bytes_in INTEGER NOT NULL,
    bytes_out INTEGER NOT NULL,
    PRIMARY KEY (tenant, service)
) STRICT, WITHOUT ROWID;

CREATE TABLE remembered (
    key BLOB NOT NULL PRIMARY KEY,
    body BLOB NOT NULL,
    status INTEGER NOT NULL,
    answer TEXT NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX remembered_by_age ON remembered (created_ms);
",
    "
-- Percentages by version, 0 for one that is only kept ready; services.active is not used any more.
CREATE TABLE traffic (
    service INTEGER NOT NULL REFERENCES services (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    percent INTEGER NOT NULL CHECK (percent BETWEEN 0 AND 100),
    PRIMARY KEY (service, number),
    FOREIGN KEY (service, number) REFERENCES versions (service, number)
        DEFERRABLE INITIALLY DEFERRED
) STRICT, WITHOUT ROWID;
INSERT INTO traffic SELECT id, active, 100 FROM services WHERE active IS NOT NULL;
UPDATE services SET active = NULL;
",
    "
CREATE TABLE audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL,
    token INTEGER,
    actor TEXT NOT NULL,
    peer TEXT,
    operation TEXT NOT NULL,
    -- No reference: entries outlive their tenant.
    tenant INTEGER,
    tenant_name TEXT,
    subject TEXT NOT NULL,
    before TEXT,
    after TEXT
) STRICT;
CREATE INDEX audit_by_tenant ON audit (tenant, id);
CREATE TRIGGER audit_is_never_changed BEFORE UPDATE ON audit
    BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit
    WHEN old.id > (SELECT max(id) FROM audit) - 100000
    BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
",
    "
CREATE TABLE images (
    name TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX images_by_digest ON images (digest);

CREATE TABLE machines (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- No cascade: a machine has a process and files, which are removed first.
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    spec TEXT NOT NULL,
    -- The digests of kernel, initrd if there is one, and disks, as a list.
    images TEXT NOT NULL,
    life TEXT NOT NULL,
    generation INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant, name)
) STRICT;

CREATE TABLE machine_usage (
    tenant INTEGER NOT NULL PRIMARY KEY REFERENCES tenants (id) ON DELETE CASCADE,
    cpu_ns INTEGER NOT NULL,
    wait_ns INTEGER NOT NULL,
    throttled_ns INTEGER NOT NULL,
    memory_kib_ms INTEGER NOT NULL,
    disk_read_bytes INTEGER NOT NULL,
    disk_written_bytes INTEGER NOT NULL,
    net_received_bytes INTEGER NOT NULL,
    net_sent_bytes INTEGER NOT NULL
) STRICT;
",
    "
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant INTEGER NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    spec TEXT NOT NULL,
    directory TEXT NOT NULL UNIQUE,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    -- The name, at that time, of the volume that it was copied from.
    origin TEXT,
    generation INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant, name)
) STRICT;
CREATE TABLE mounts (
    service INTEGER NOT NULL REFERENCES services (id) ON DELETE CASCADE,
    volume INTEGER NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
    PRIMARY KEY (service, volume)
) STRICT, WITHOUT ROWID;
CREATE INDEX mounts_by_volume ON mounts (volume);
",
];

/// Applies what is missing.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), OpenError> {
    migrate_with(connection, MIGRATIONS)
}

fn migrate_with(connection: &mut Connection, migrations: &[&str]) -> Result<(), OpenError> {
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    loop {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let next = usize::try_from(found)
            .ok()
            .and_then(|applied| migrations.get(applied));
        match next {
            Some(migration) => {
                transaction.execute_batch(migration)?;
                transaction.pragma_update(None, "user_version", found + 1)?;
                transaction.commit()?;
                tracing::info!(schema = found + 1, "migrated the state database");
            }
            None if found == known => return Ok(()),
            None => return Err(OpenError::Newer { found, known }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Health, Precondition, Store};

    #[test]
    fn migrations_are_applied_once_and_in_order() {
        let mut connection = Connection::open_in_memory().unwrap();
        let first = ["CREATE TABLE a (x)"];
        migrate_with(&mut connection, &first).unwrap();
        migrate_with(&mut connection, &first).unwrap();
        let both = [
            first[0],
            "ALTER TABLE a ADD COLUMN y; INSERT INTO a VALUES (1, 2)",
        ];
        migrate_with(&mut connection, &both).unwrap();
        migrate_with(&mut connection, &both).unwrap();
        let rows: i64 = connection
            .query_row("SELECT count(y) FROM a", [], |r| r.get(0))
            .unwrap();
        assert_eq!(rows, 1);
    }

    /// What the first schema held is all there in the newest.
    #[test]
    fn the_first_schema_is_migrated() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate_with(&mut connection, &MIGRATIONS[..1]).unwrap();
        let digest = format!("sha256:{}", "ab".repeat(32));
        connection
            .execute_batch(&format!(
                r#"
INSERT INTO tenants VALUES (3, 'acme', '{{}}', 250, 0, 4, 1000);
INSERT INTO services VALUES (7, 3, 'web', '{{"usage_header":true}}', 2, NULL, NULL, 3, 2000);
INSERT INTO services VALUES (8, 3, 'dark', '{{}}', 1, NULL, NULL, 1, 2000);
INSERT INTO versions VALUES (7, 1, '{digest}', 10, 5, 3000), (7, 2, '{digest}', 10, 0, 4000);
UPDATE services SET active = 2, previous = 1 WHERE id = 7;
INSERT INTO tokens VALUES (1, x'{hash}', 'admin', 'host', NULL, 'write', 1, NULL);
INSERT INTO usage VALUES (3, 7, '{{"ok":5}}', 1, 2, 3, 4, 5, 6);
"#,
                hash = "00".repeat(32)
            ))
            .unwrap();
        let mut store = super::super::SqliteStore::prepare(connection, Health::default()).unwrap();
        let service = store
            .service(&"acme".parse().unwrap(), &"web".parse().unwrap())
            .unwrap();
        let two = insula_types::VersionNumber::new(2).unwrap();
        assert_eq!(service.traffic, insula_types::Traffic::whole(two));
        assert_eq!(service.previous, insula_types::VersionNumber::new(1));
        assert!(service.spec.usage_header && service.spec.auto_rollback.enabled);
        assert_eq!((service.id.get(), service.generation), (7, 2));
        let dark = store
            .service(&"acme".parse().unwrap(), &"dark".parse().unwrap())
            .unwrap();
        assert!(dark.traffic.is_none() && dark.held.is_empty());
        assert!(store.token_by_hash(&[0; 32]).unwrap().is_some());
        assert_eq!(store.usage().unwrap()[0].totals.requests_total(), 5);
        store
            .delete_tenant(&"acme".parse().unwrap(), Precondition::None)
            .unwrap();
    }

    #[test]
    fn a_failed_migration_changes_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        let broken = ["CREATE TABLE a (x); CREATE TABLE a (x)"];
        assert!(migrate_with(&mut connection, &broken).is_err());
        migrate_with(&mut connection, &["CREATE TABLE a (x)"]).unwrap();
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        let error = migrate(&mut connection).unwrap_err();
        assert!(
            matches!(error, OpenError::Newer { found: 99, .. }),
            "{error}"
        );
    }
}
