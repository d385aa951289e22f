//! The embedded store against its specification, on real files.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::operations::step;
use super::{Subject, conforms};
use crate::state::{DataDir, Health, SqliteStore, Store, StoreError};

/// A store and the directory that it lies in; `None` only between two lives.
struct Embedded {
    open: Option<(SqliteStore, DataDir)>,
    path: TempDir,
}

fn directory() -> TempDir {
    // In memory where there is room: SQLite syncs each change, and what that is worth is shown
    // by cutting the power, not here.
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new()
        .prefix("insula-test-")
        .tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir()).expect("a directory")
}

fn open(path: &Path) -> (SqliteStore, DataDir) {
    let data = DataDir::open(path).expect("a data directory");
    let store = SqliteStore::open(&data, Health::default()).expect("a database");
    (store, data)
}

impl Embedded {
    fn new() -> Self {
        let path = directory();
        Self {
            open: Some(open(path.path())),
            path,
        }
    }

    /// Lets the old store go only after the new one has the directory as it was at the kill.
    fn revive(&mut self, remains: TempDir) {
        self.open = Some(open(remains.path()));
        self.path = remains;
    }
}

/// What a killed process leaves: the files as the kernel has them. The index in shared memory
/// goes with its last user and is built again from the log.
fn remains(path: &Path) -> TempDir {
    let to = directory();
    for name in ["state.db", "state.db-wal"] {
        let (from, to) = (path.join(name), to.path().join(name));
        if from.exists() {
            fs::copy(from, to).expect("a copy");
        }
    }
    to
}

impl Subject for Embedded {
    fn store(&mut self) -> &mut dyn Store {
        &mut self.open.as_mut().expect("a store").0
    }

    fn reopen(&mut self) {
        self.open = None;
        self.open = Some(open(self.path.path()));
        let (store, _) = self.open.as_ref().expect("a store");
        store.check().expect("a sound database");
    }

    fn kill(&mut self) {
        let remains = remains(self.path.path());
        self.revive(remains);
    }

    fn kill_within(&mut self, job: &mut dyn FnMut(&mut dyn Store)) {
        let path = self.path.path().to_owned();
        let mut left = None;
        let undone = self.store().atomically(&mut |store| {
            job(store);
            left = Some(remains(&path));
            Err(StoreError::NotFound("life after that"))
        });
        assert!(undone.is_err());
        self.revive(left.expect("what is left"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // 256 runs unless `PROPTEST_CASES` says otherwise.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_embedded_store_does_what_the_model_does(
        steps in proptest::collection::vec(step(), 1..40)
    ) {
        conforms(&mut Embedded::new(), &steps)?;
    }
}
