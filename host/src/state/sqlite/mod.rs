//! The embedded [`Store`]: SQLite, bundled, WAL, `synchronous=FULL`, one connection.
//!
//! Each record has a file of its own below; this one opens the database and says how values are
//! written. The connection is owned by one thread, so that `&mut self` is the only lock.

mod audit;
mod images;
mod machines;
mod schema;
mod services;
mod tenants;
mod tokens;
mod traffic;
mod usage;
mod versions;
mod volumes;

use std::collections::HashSet;
use std::str::FromStr;

use insula_types::{
    Digest, ServiceId, ServiceName, ServiceSpec, TenantId, TenantName, TenantSpec, Traffic,
    VersionNumber, VolumeName,
};
use rusqlite::types::Type;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, Row, Savepoint, Transaction, TransactionBehavior, ffi,
};

use super::{
    AddedVersion, Audit, AuditEntry, Commitments, DataDir, Deleted, Health, Listed, NewToken,
    NewVersion, NewVolume, Page, Precondition, Put, Remembered, Service, Store, StoreError,
    StoredUsage, Switched, TemporaryDir, Tenant, Timestamp, Token, TokenHash, UsageTotals, Version,
    Volume,
};

/// The database's file in the data directory.
const FILE: &str = "state.db";

/// Where a copy of it is made; its name is gone before anybody reads it.
const COPY: &str = "copy.db";

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// SQLite or the file system refused.
    #[error("the state database cannot be opened: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file cannot be made.
    #[error("the state database cannot be created: {0}")]
    Create(#[from] std::io::Error),
    /// It was written by a later insula.
    #[error(
        "the state database has schema {found}, this insula knows schemas up to {known}; \
         run the newer insula that wrote it"
    )]
    Newer {
        /// In the file.
        found: i64,
        /// The last that this program knows.
        known: i64,
    },
}

/// Intent in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    connection: Connection,
    health: Health,
    /// Whether [`Store::atomically`] has begun a transaction.
    within: bool,
}

/// A change: a transaction of its own, or a part of one that can be taken back by itself.
enum Write<'a> {
    Whole(Transaction<'a>),
    Part(Savepoint<'a>),
}

impl Write<'_> {
    fn commit(self) -> Result<(), StoreError> {
        match self {
            Self::Whole(transaction) => transaction.commit()?,
            Self::Part(savepoint) => savepoint.commit()?,
        }
        Ok(())
    }
}

impl std::ops::Deref for Write<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match self {
            Self::Whole(transaction) => transaction,
            Self::Part(savepoint) => savepoint,
        }
    }
}

impl SqliteStore {
    /// Opens the database of a data directory, creating or migrating it as needed.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(data: &DataDir, health: Health) -> Result<Self, OpenError> {
        Self::open_file(data, FILE, health)
    }

    /// Opens a database under another name.
    pub(super) fn open_file(data: &DataDir, name: &str, health: Health) -> Result<Self, OpenError> {
        // Made by us first, so that it and its journal are 0600.
        data.touch(name)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(data.database_path(name), flags)?;
        Self::prepare(connection, health)
    }

    /// Whether the file is what SQLite wrote, and every reference leads somewhere.
    pub(super) fn check(&self) -> Result<(), String> {
        let words = |error: rusqlite::Error| error.to_string();
        let query = "PRAGMA integrity_check(1)";
        let integrity: String = self
            .connection
            .query_row(query, [], |row| row.get(0))
            .map_err(words)?;
        if integrity != "ok" {
            return Err(integrity);
        }
        let query = "SELECT count(*) FROM pragma_foreign_key_check";
        let dangling: i64 = self
            .connection
            .query_row(query, [], |row| row.get(0))
            .map_err(words)?;
        if dangling == 0 {
            Ok(())
        } else {
            Err(format!("{dangling} records refer to nothing"))
        }
    }

    fn prepare(mut connection: Connection, health: Health) -> Result<Self, OpenError> {
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
             PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;",
        )?;
        schema::migrate(&mut connection)?;
        connection.set_prepared_statement_cache_capacity(64);
        Ok(Self {
            connection,
            health,
            within: false,
        })
    }

    /// A transaction that takes the write lock at its beginning.
    fn write(&mut self) -> Result<Write<'_>, StoreError> {
        self.health.check()?;
        if self.within {
            return Ok(Write::Part(self.connection.savepoint()?));
        }
        let behavior = TransactionBehavior::Immediate;
        Ok(Write::Whole(
            self.connection.transaction_with_behavior(behavior)?,
        ))
    }

    fn end(&mut self, result: Result<(), StoreError>) -> Result<(), StoreError> {
        self.within = false;
        let ended = match &result {
            Ok(()) => self.connection.execute_batch("COMMIT"),
            Err(_) => Ok(()),
        };
        // Some errors have ended the transaction already.
        if !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK")?;
        }
        result.and(ended.map_err(Into::into))
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        let rusqlite::Error::SqliteFailure(failure, _) = &error else {
            return Self::Backend(Box::new(error));
        };
        match (failure.code, failure.extended_code) {
            // The shared memory of the log could not grow.
            (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => Self::NoSpace,
            (
                ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase,
                _,
            ) => Self::Disk(error.to_string()),
            _ => Self::Backend(Box::new(error)),
        }
    }
}

/// An unsigned number as SQLite keeps it. Everything stored is far below 2^63; usage stops there.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The reverse of [`int`].
fn nat(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

/// A column that holds what `FromStr` reads.
fn parsed<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    row.get_ref(column)?.as_str()?.parse().map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
    })
}

/// A column that holds JSON.
fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(row.get_ref(column)?.as_str()?).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
    })
}

fn to_json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Backend(Box::new(error)))
}

fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    nat(row, column).map(Timestamp::from_millis)
}

fn version_number(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<VersionNumber>> {
    let number: Option<u32> = row.get(column)?;
    Ok(number.and_then(VersionNumber::new))
}

/// Cuts a list that was read one item too far.
fn listed<T>(
    rows: impl Iterator<Item = rusqlite::Result<T>>,
    page: &Page,
    key: impl Fn(&T) -> String,
) -> Result<Listed<T>, StoreError> {
    let mut items = rows.collect::<Result<Vec<_>, _>>()?;
    let limit = page.limit as usize;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = if more { items.last().map(key) } else { None };
    Ok(Listed { items, next })
}

/// The trait, method by method, from the files below.
impl Store for SqliteStore {
    fn atomically(
        &mut self,
        job: &mut dyn FnMut(&mut dyn Store) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.health.check()?;
        self.connection.execute_batch("BEGIN IMMEDIATE")?;
        self.within = true;
        let result = job(self);
        self.end(result)
    }

    fn tenants(&mut self, page: &Page) -> Result<Listed<Tenant>, StoreError> {
        tenants::list(&self.connection, page)
    }

    fn tenant(&mut self, name: &TenantName) -> Result<Tenant, StoreError> {
        tenants::find(&self.connection, name)?.ok_or(StoreError::NotFound("tenant"))
    }

    fn put_tenant(
        &mut self,
        name: &TenantName,
        spec: &TenantSpec,
        precondition: Precondition,
        capacity_millicores: u64,
        now: Timestamp,
    ) -> Result<Put<Tenant>, StoreError> {
        let write = self.write()?;
        let put = tenants::put(&write, name, spec, precondition, capacity_millicores, now)?;
        write.commit()?;
        Ok(put)
    }

    fn delete_tenant(
        &mut self,
        name: &TenantName,
        precondition: Precondition,
    ) -> Result<Deleted<Tenant>, StoreError> {
        let write = self.write()?;
        let deleted = tenants::delete(&write, name, precondition)?;
        write.commit()?;
        Ok(deleted)
    }

    fn commitments(&mut self) -> Result<Commitments, StoreError> {
        tenants::commitments(&self.connection)
    }

    fn services(
        &mut self,
        tenant: &TenantName,
        page: &Page,
    ) -> Result<Listed<Service>, StoreError> {
        let tenant = self.tenant(tenant)?;
        services::list(&self.connection, tenant.id, page)
    }

    fn service(&mut self, tenant: &TenantName, name: &ServiceName) -> Result<Service, StoreError> {
        services::find(&self.connection, tenant, name)?.ok_or(StoreError::NotFound("service"))
    }

    fn service_by_id(&mut self, id: ServiceId) -> Result<Service, StoreError> {
        services::by_id(&self.connection, id)
    }

    fn put_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        spec: &ServiceSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Service>, StoreError> {
        let write = self.write()?;
        let put = services::put(&write, tenant, name, spec, precondition, now)?;
        write.commit()?;
        Ok(put)
    }

    fn delete_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        precondition: Precondition,
    ) -> Result<Deleted<Service>, StoreError> {
        let write = self.write()?;
        let deleted = services::delete(&write, tenant, name, precondition)?;
        write.commit()?;
        Ok(deleted)
    }

    fn volumes(&mut self, tenant: &TenantName, page: &Page) -> Result<Listed<Volume>, StoreError> {
        let owner = self.tenant(tenant)?.id;
        volumes::list(&self.connection, owner, page)
    }

    fn volume(&mut self, tenant: &TenantName, name: &VolumeName) -> Result<Volume, StoreError> {
        let volume = volumes::find(&self.connection, tenant, name)?;
        volume.ok_or(StoreError::NotFound("volume"))
    }

    fn put_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        new: &NewVolume,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Volume>, StoreError> {
        let write = self.write()?;
        let put = volumes::put(&write, tenant, name, new, precondition, now)?;
        write.commit()?;
        Ok(put)
    }

    fn delete_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        precondition: Precondition,
    ) -> Result<Volume, StoreError> {
        let write = self.write()?;
        let deleted = volumes::delete(&write, tenant, name, precondition)?;
        write.commit()?;
        Ok(deleted)
    }

    fn volume_directories(&mut self) -> Result<HashSet<String>, StoreError> {
        volumes::directories(&self.connection)
    }

    fn versions(&mut self, service: ServiceId, page: &Page) -> Result<Listed<Version>, StoreError> {
        versions::list(&self.connection, service, page)
    }

    fn version(
        &mut self,
        service: ServiceId,
        number: VersionNumber,
    ) -> Result<Version, StoreError> {
        versions::find(&self.connection, service, number)?.ok_or(StoreError::NotFound("version"))
    }

    fn add_version(
        &mut self,
        service: ServiceId,
        upload: &NewVersion,
        activate: bool,
        now: Timestamp,
    ) -> Result<AddedVersion, StoreError> {
        let write = self.write()?;
        let added = versions::add(&write, service, upload, activate, now)?;
        write.commit()?;
        Ok(added)
    }

    fn set_traffic(
        &mut self,
        service: ServiceId,
        traffic: &Traffic,
    ) -> Result<Switched, StoreError> {
        let write = self.write()?;
        let switched = traffic::set(&write, service, traffic)?;
        write.commit()?;
        Ok(switched)
    }

    fn restore_traffic(&mut self, before: &Service) -> Result<Service, StoreError> {
        let write = self.write()?;
        let service = traffic::restore(&write, before)?;
        write.commit()?;
        Ok(service)
    }

    fn digests(&mut self) -> Result<HashSet<Digest>, StoreError> {
        versions::digests(&self.connection)
    }

    fn tokens(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<Token>, StoreError> {
        tokens::list(&self.connection, tenant, page)
    }

    fn token_by_hash(&mut self, hash: &TokenHash) -> Result<Option<Token>, StoreError> {
        tokens::by_hash(&self.connection, hash)
    }

    fn token_is_valid(&mut self, id: u64, now: Timestamp) -> Result<bool, StoreError> {
        tokens::is_valid(&self.connection, id, now)
    }

    fn add_token(&mut self, token: &NewToken, now: Timestamp) -> Result<Token, StoreError> {
        let write = self.write()?;
        let token = tokens::add(&write, token, now)?;
        write.commit()?;
        Ok(token)
    }

    fn delete_token(
        &mut self,
        id: u64,
        tenant: Option<TenantId>,
        now: Timestamp,
    ) -> Result<Token, StoreError> {
        let write = self.write()?;
        let token = tokens::delete(&write, id, tenant, now)?;
        write.commit()?;
        Ok(token)
    }

    fn has_admin_token(&mut self, now: Timestamp) -> Result<bool, StoreError> {
        tokens::has_admin(&self.connection, now)
    }

    fn copy(&mut self, temporary: &TemporaryDir) -> Result<std::fs::File, StoreError> {
        let failed = |error: std::io::Error| StoreError::Backend(Box::new(error));
        // Made by us first, so that it is 0600; SQLite takes an empty file.
        let path = temporary.make(COPY).map_err(failed)?;
        let copied = self
            .connection
            .execute("VACUUM INTO ?1", [path.to_string_lossy()]);
        let file = temporary.take(COPY).map_err(failed)?;
        copied?;
        Ok(file)
    }

    fn usage(&mut self) -> Result<Vec<StoredUsage>, StoreError> {
        usage::all(&self.connection)
    }

    fn add_usage(
        &mut self,
        parts: &[(TenantId, ServiceId, UsageTotals)],
    ) -> Result<(), StoreError> {
        let write = self.write()?;
        usage::add(&write, parts)?;
        write.commit()?;
        Ok(())
    }

    fn remembered(
        &mut self,
        key: &[u8; 32],
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        tokens::remembered(&self.connection, key, now)
    }

    fn remember(&mut self, answer: &Remembered, now: Timestamp) -> Result<(), StoreError> {
        let write = self.write()?;
        tokens::remember(&write, answer, now)?;
        write.commit()?;
        Ok(())
    }

    fn forget(&mut self, key: &[u8; 32]) -> Result<(), StoreError> {
        let write = self.write()?;
        write.execute("DELETE FROM remembered WHERE key = ?1", [key])?;
        write.commit()
    }

    fn audit(&mut self, audit: &Audit, now: Timestamp) -> Result<(), StoreError> {
        let write = self.write()?;
        audit::add(&write, audit, now)?;
        write.commit()
    }

    fn audits(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<AuditEntry>, StoreError> {
        audit::list(&self.connection, tenant, page)
    }
}
