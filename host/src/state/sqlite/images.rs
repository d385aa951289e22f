//! Images in SQLite.

use insula_types::{Digest, ImageName, MachineSpec};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{Write, int, listed, nat, parsed, time, versions};
use crate::state::machines::{IMAGES_MAX, Image, MachineImages, PinnedImage};
use crate::state::{Deleted, Listed, Page, Precondition, Put, StoreError, Timestamp};

const SELECT: &str = "SELECT name, digest, size_bytes, generation, created_ms FROM images";

fn read(row: &Row<'_>) -> rusqlite::Result<Image> {
    Ok(Image {
        name: parsed(row, 0)?,
        digest: parsed(row, 1)?,
        size_bytes: nat(row, 2)?,
        generation: nat(row, 3)?,
        created: time(row, 4)?,
    })
}

pub(super) fn list(connection: &Connection, page: &Page) -> Result<Listed<Image>, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("{SELECT} WHERE name > ?1 ORDER BY name LIMIT ?2"))?;
    let after = page.after.as_deref().unwrap_or("");
    let rows = statement.query_map(params![after, page.limit + 1], read)?;
    listed(rows, page, |image| image.name.to_string())
}

pub(super) fn find(connection: &Connection, name: &ImageName) -> Result<Option<Image>, StoreError> {
    let mut statement = connection.prepare_cached(&format!("{SELECT} WHERE name = ?1"))?;
    Ok(statement.query_row([name.as_str()], read).optional()?)
}

fn get(connection: &Connection, name: &ImageName) -> Result<Image, StoreError> {
    find(connection, name)?.ok_or(StoreError::NotFound("image"))
}

/// The digests that a spec's names stand for now.
pub(super) fn resolve(
    connection: &Connection,
    spec: &MachineSpec,
) -> Result<MachineImages, StoreError> {
    let digest = |name: &ImageName| {
        let image = find(connection, name)?;
        let image = image.ok_or_else(|| StoreError::NoImage(name.clone()))?;
        Ok::<_, StoreError>(image.digest)
    };
    Ok(MachineImages {
        kernel: digest(&spec.kernel)?,
        initrd: spec.initrd.as_ref().map(digest).transpose()?,
        disks: spec
            .disks
            .iter()
            .map(|disk| digest(&disk.image))
            .collect::<Result<_, _>>()?,
    })
}

/// Returns the record, and the blob that it no longer refers to.
pub(super) fn put(
    write: &Write<'_>,
    name: &ImageName,
    image: PinnedImage,
    precondition: Precondition,
    now: Timestamp,
) -> Result<(Put<Image>, Vec<Digest>), StoreError> {
    let before = find(write, name)?;
    precondition.check(before.as_ref().map(|image| image.generation))?;
    match before {
        Some(before) if before.digest == image.digest => Ok((Put::Unchanged(before), Vec::new())),
        Some(before) => {
            write.execute(
                "UPDATE images SET digest = ?2, size_bytes = ?3, generation = generation + 1
                    WHERE name = ?1",
                params![
                    name.as_str(),
                    image.digest.to_string(),
                    int(image.size_bytes)
                ],
            )?;
            let unreferenced = versions::unreferenced(write, vec![before.digest])?;
            Ok((Put::Changed(get(write, name)?), unreferenced))
        }
        None => {
            let count: i64 =
                write.query_row("SELECT count(*) FROM images", [], |row| row.get(0))?;
            if count >= int(IMAGES_MAX) {
                let max = IMAGES_MAX;
                return Err(StoreError::Full {
                    what: "images",
                    max,
                });
            }
            write.execute(
                "INSERT INTO images (name, digest, size_bytes, generation, created_ms)
                    VALUES (?1, ?2, ?3, 1, ?4)",
                params![
                    name.as_str(),
                    image.digest.to_string(),
                    int(image.size_bytes),
                    int(now.as_millis())
                ],
            )?;
            Ok((Put::Created(get(write, name)?), Vec::new()))
        }
    }
}

pub(super) fn delete(
    write: &Write<'_>,
    name: &ImageName,
    precondition: Precondition,
) -> Result<Deleted<Image>, StoreError> {
    let image = get(write, name)?;
    precondition.check(Some(image.generation))?;
    write.execute("DELETE FROM images WHERE name = ?1", [name.as_str()])?;
    let unreferenced = versions::unreferenced(write, vec![image.digest])?;
    Ok(Deleted {
        record: image,
        unreferenced,
    })
}
