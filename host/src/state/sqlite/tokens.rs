//! Tokens and remembered answers in SQLite.

use insula_types::{TenantId, TenantName};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, listed, nat, parsed, tenants, time};
use crate::state::{
    Access, Listed, NewToken, Page, REMEMBERED_FOR, REMEMBERED_MAX, Remembered, Scope, StoreError,
    TOKENS_MAX, Timestamp, Token, TokenHash,
};

const SELECT: &str = "SELECT k.id, k.hash, k.name, k.tenant, t.name, k.access, k.created_ms,
        k.expires_ms
    FROM tokens k LEFT JOIN tenants t ON t.id = k.tenant";

fn read(row: &Row<'_>) -> rusqlite::Result<Token> {
    let tenant: Option<i64> = row.get(3)?;
    let scope = match tenant {
        None => Scope::Host,
        Some(_) => {
            let name: TenantName = parsed(row, 4)?;
            Scope::Tenant(TenantId::new(nat(row, 3)?), name)
        }
    };
    let access: String = row.get(5)?;
    let expires: Option<i64> = row.get(7)?;
    Ok(Token {
        id: nat(row, 0)?,
        hash: row.get(1)?,
        name: row.get(2)?,
        scope,
        access: if access == "write" {
            Access::Write
        } else {
            Access::Read
        },
        created: time(row, 6)?,
        expires: expires.map(|_| time(row, 7)).transpose()?,
    })
}

pub(super) fn list(
    connection: &Connection,
    tenant: Option<TenantId>,
    page: &Page,
) -> Result<Listed<Token>, StoreError> {
    let after = page
        .after
        .as_ref()
        .and_then(|text| text.parse::<u64>().ok())
        .unwrap_or(0);
    let mut statement = connection.prepare_cached(&format!(
        "{SELECT} WHERE k.id > ?1 AND (?2 IS NULL OR k.tenant = ?2) ORDER BY k.id LIMIT ?3"
    ))?;
    let tenant = tenant.map(|id| int(id.get()));
    let rows = statement.query_map(params![int(after), tenant, page.limit + 1], read)?;
    listed(rows, page, |token| token.id.to_string())
}

pub(super) fn by_hash(
    connection: &Connection,
    hash: &TokenHash,
) -> Result<Option<Token>, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{SELECT} WHERE k.hash = ?1"))?;
    Ok(statement.query_row([hash], read).optional()?)
}

pub(super) fn is_valid(
    connection: &Connection,
    id: u64,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM tokens WHERE id = ?1
            AND (expires_ms IS NULL OR expires_ms > ?2))",
    )?;
    Ok(statement.query_row([int(id), int(now.as_millis())], |row| row.get(0))?)
}

pub(super) fn add(
    write: &Write<'_>,
    token: &NewToken,
    now: Timestamp,
) -> Result<Token, StoreError> {
    let count: i64 = write.query_row("SELECT count(*) FROM tokens", [], |row| row.get(0))?;
    if count >= int(TOKENS_MAX) {
        return Err(StoreError::Full {
            what: "tokens",
            max: TOKENS_MAX,
        });
    }
    let tenant = match &token.tenant {
        Some(name) => Some(
            tenants::find(write, name)?
                .ok_or(StoreError::NotFound("tenant"))?
                .id,
        ),
        None => None,
    };
    write.execute(
        "INSERT INTO tokens (hash, name, scope, tenant, access, created_ms, expires_ms)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![
            token.hash,
            token.name,
            if tenant.is_some() { "tenant" } else { "host" },
            tenant.map(|id| int(id.get())),
            match token.access {
                Access::Read => "read",
                Access::Write => "write",
            },
            int(now.as_millis()),
            token.expires.map(|at| int(at.as_millis()))
        ],
    )?;
    by_hash(write, &token.hash)?.ok_or(StoreError::NotFound("token"))
}

pub(super) fn delete(
    write: &Write<'_>,
    id: u64,
    tenant: Option<TenantId>,
    now: Timestamp,
) -> Result<Token, StoreError> {
    let mut statement = write.prepare_cached(&format!(
        "{SELECT} WHERE k.id = ?1 AND (?2 IS NULL OR k.tenant = ?2)"
    ))?;
    let tenant = tenant.map(|id| int(id.get()));
    let token = statement
        .query_row(params![int(id), tenant], read)
        .optional()?;
    let token = token.ok_or(StoreError::NotFound("token"))?;
    write.execute("DELETE FROM tokens WHERE id = ?1", [int(id)])?;
    // Answering the error drops the transaction, and the deletion with it.
    if token.scope == Scope::Host && !has_admin(write, now)? {
        return Err(StoreError::LastAdminToken);
    }
    Ok(token)
}

pub(super) fn has_admin(connection: &Connection, now: Timestamp) -> Result<bool, StoreError> {
    Ok(connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM tokens WHERE scope = 'host' AND access = 'write'
            AND (expires_ms IS NULL OR expires_ms > ?1))",
        [int(now.as_millis())],
        |row| row.get(0),
    )?)
}

pub(super) fn remembered(
    connection: &Connection,
    key: &[u8; 32],
    now: Timestamp,
) -> Result<Option<Remembered>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT key, body, status, answer FROM remembered WHERE key = ?1 AND created_ms > ?2",
    )?;
    let oldest = int(now.before(REMEMBERED_FOR).as_millis());
    let found = statement.query_row(params![key, oldest], |row| {
        Ok(Remembered {
            key: row.get(0)?,
            body: row.get(1)?,
            status: row.get(2)?,
            answer: row.get(3)?,
        })
    });
    Ok(found.optional()?)
}

pub(super) fn remember(
    write: &Write<'_>,
    answer: &Remembered,
    now: Timestamp,
) -> Result<(), StoreError> {
    write.execute(
        "DELETE FROM remembered WHERE created_ms <= ?1",
        [int(now.before(REMEMBERED_FOR).as_millis())],
    )?;
    write.execute(
        "INSERT OR REPLACE INTO remembered (key, body, status, answer, created_ms)
            VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            answer.key,
            answer.body,
            answer.status,
            answer.answer,
            int(now.as_millis())
        ],
    )?;
    write.execute(
        "DELETE FROM remembered WHERE key IN (
            SELECT key FROM remembered ORDER BY created_ms DESC LIMIT -1 OFFSET ?1)",
        [int(REMEMBERED_MAX)],
    )?;
    Ok(())
}
