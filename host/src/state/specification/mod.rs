//! The executable specification of a [`Store`]: random operations on the model and on the store,
//! and after each of them both must have answered the same and hold the same.
//!
//! ```text
//!             ┌─▶ Model (maps)   ── answers, content ──┐
//!  steps ─────┤                                        ├─ equal?
//!             └─▶ the store      ── answers, content ──┘
//!                  │ closed and opened again; killed between two changes;
//!                  ▼ killed within one: only what was committed is there
//! ```
//!
//! A store that is to take the place of the embedded one implements [`Subject`] and is handed to
//! [`conforms`]. A failing run prints the steps that it shrank to; `PROPTEST_CASES` asks for more
//! runs, `PROPTEST_RNG_SEED` for the same ones again.

mod embedded;
mod machines;
mod model;
mod operations;

use std::time::Duration;

use insula_types::TenantId;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use self::model::Model;
use self::operations::{Change, Keep, Step};
use super::{Listed, Page, Store, StoreError, Timestamp};

/// A store that can be closed and killed.
trait Subject {
    /// The store as it runs.
    fn store(&mut self) -> &mut dyn Store;
    /// Closes it in order and opens it again.
    fn reopen(&mut self);
    /// Goes on with what its process leaves behind when it is killed now.
    fn kill(&mut self);
    /// As [`Subject::kill`], after a job whose changes are not committed yet.
    fn kill_within(&mut self, job: &mut dyn FnMut(&mut dyn Store));
}

/// Runs steps on a store and on the model.
fn conforms(subject: &mut impl Subject, steps: &[Step]) -> TestCaseResult {
    let mut model = Model::default();
    let mut now = Timestamp::from_millis(1_700_000_000_000);
    for (serial, step) in (0..).step_by(100).zip(steps) {
        match step {
            Step::One(change) => {
                let wanted = change.make(&mut model, now, serial);
                prop_assert_eq!(change.make(subject.store(), now, serial), wanted);
            }
            Step::Together(changes, keep) => {
                let wanted = together(&mut model, changes, *keep, now, serial);
                let found = together(subject.store(), changes, *keep, now, serial);
                prop_assert_eq!(found, wanted);
            }
            Step::Hours(hours) => now = now.after(Duration::from_secs(hours * 3_600)),
            Step::Reopen => subject.reopen(),
            Step::Crash => subject.kill(),
            Step::CrashWithin(changes) => subject.kill_within(&mut |store| {
                for (serial, change) in (serial..).zip(changes) {
                    change.make(store, now, serial);
                }
            }),
        }
        let (wanted, found) = (content(&mut model, now), content(subject.store(), now));
        for (wanted, found) in wanted.iter().zip(&found) {
            prop_assert_eq!(found, wanted, "after {:?}", step);
        }
        prop_assert_eq!(found.len(), wanted.len());
    }
    Ok(())
}

/// Several changes as one. One that fails takes nothing else back: that is up to the job.
fn together(
    store: &mut dyn Store,
    changes: &[Change],
    keep: Keep,
    now: Timestamp,
    serial: u64,
) -> Vec<String> {
    let mut told = Vec::new();
    let result = store.atomically(&mut |store| {
        let each = (serial..).zip(changes);
        told.extend(each.map(|(serial, change)| change.make(store, now, serial)));
        match keep {
            Keep::Kept => Ok(()),
            Keep::Dropped => Err(StoreError::NotFound("reason to keep it")),
        }
    });
    told.push(format!("{result:?}"));
    told
}

/// All parts of a list, read two items at a time.
fn all<T>(mut read: impl FnMut(&Page) -> Result<Listed<T>, StoreError>) -> Vec<T> {
    let mut items = Vec::new();
    let mut page = Page {
        after: None,
        limit: 2,
    };
    loop {
        let part = read(&page).expect("a list");
        assert!(part.items.len() <= 2);
        items.extend(part.items);
        page.after = part.next;
        if page.after.is_none() {
            return items;
        }
    }
}

/// Everything that a store holds, read by every method there is, a line each.
fn content(store: &mut dyn Store, now: Timestamp) -> Vec<String> {
    let mut lines = vec![format!("{:?}", store.commitments().expect("sums"))];
    for tenant in all(|page| store.tenants(page)) {
        assert_eq!(store.tenant(&tenant.name).expect("a tenant"), tenant);
        for service in all(|page| store.services(&tenant.name, page)) {
            let by_name = store.service(&tenant.name, &service.name);
            assert_eq!(by_name.expect("a service"), service);
            let by_id = store.service_by_id(service.id);
            assert_eq!(by_id.expect("a service"), service);
            for version in all(|page| store.versions(service.id, page)) {
                let found = store.version(service.id, version.number);
                assert_eq!(found.expect("a version"), version);
                lines.push(format!("{}: {version:?}", service.id));
            }
            lines.push(format!("{service:?}"));
        }
        lines.push(format!("{tenant:?}"));
    }
    for owner in [None, Some(1), Some(2), Some(3)] {
        let owner = owner.map(TenantId::new);
        for token in all(|page| store.tokens(owner, page)) {
            let by_hash = store.token_by_hash(&token.hash).expect("an answer");
            assert_eq!(by_hash.as_ref(), Some(&token));
            let valid = store.token_is_valid(token.id, now).expect("an answer");
            lines.push(format!("{owner:?}: {token:?} valid {valid}"));
        }
        for entry in all(|page| store.audits(owner, page)) {
            lines.push(format!("{owner:?}: {entry:?}"));
        }
    }
    let admin = store.has_admin_token(now).expect("an answer");
    lines.push(format!("administered: {admin}"));
    for key in 0..3 {
        let answer = store.remembered(&[key; 32], now).expect("an answer");
        lines.push(format!("{answer:?}"));
    }
    let mut usage = store.usage().expect("sums");
    usage.sort_by_key(|sum| (sum.tenant, sum.service));
    lines.extend(usage.iter().map(|sum| format!("{sum:?}")));
    let mut digests: Vec<_> = store.digests().expect("digests").into_iter().collect();
    digests.sort_unstable();
    lines.push(format!("{digests:?}"));
    lines
}
