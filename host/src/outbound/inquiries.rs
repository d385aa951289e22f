//! What a request needs to know of the system: asked of the other process, which reads its files.
//!
//! ```text
//!  job ── ask ─▶ FromData::Asks ─▶ keeper: a thread that may block ─▶ ToData::Answer ─▶ answer ─▶ job
//! ```
//!
//! On failure: a question that is not answered is given up after [`ANSWER_MAX`]; its place goes when
//! whoever asked has gone. An answer that nobody waits for is dropped.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use insula_types::TenantId;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::messages::{Answer, FromData, Question};

/// For an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// In time.
    #[error("no answer within {} s", ANSWER_MAX.as_secs())]
    Late,
    /// The other process is gone.
    #[error("nobody is there who could answer")]
    Gone,
}

/// Questions that wait for their answers.
#[derive(Debug)]
pub struct Inquiries {
    // Weak: what ends with the last sender must not wait for guests' requests.
    reports: mpsc::WeakSender<FromData>,
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
}

/// Takes a question back when whoever asked goes away.
struct Asked<'a>(&'a Inquiries, u64);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

impl Inquiries {
    /// They go out with the other reports.
    #[must_use]
    pub fn new(reports: mpsc::WeakSender<FromData>) -> Self {
        Self {
            reports,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        // Consistent between any two statements under the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks on behalf of a tenant, and waits.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn ask(&self, tenant: TenantId, question: Question) -> Result<Answer, Unanswered> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting().insert(id, answer);
        let _asked = Asked(self, id);
        let asking = async {
            let reports = self.reports.upgrade().ok_or(Unanswered::Gone)?;
            let asks = FromData::Asks {
                id,
                tenant,
                question,
            };
            reports.send(asks).await.map_err(|_| Unanswered::Gone)?;
            drop(reports);
            answered.await.map_err(|_| Unanswered::Gone)
        };
        let waited = timeout(ANSWER_MAX, asking).await;
        waited.unwrap_or(Err(Unanswered::Late))
    }

    /// Hands an answer over.
    pub fn answer(&self, answer: Answer) {
        let waiting = self.waiting().remove(&answer.id);
        if let Some(waiting) = waiting {
            // Whoever asked may have gone.
            let _ = waiting.send(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::messages::Found;

    fn question() -> Question {
        Question::Addresses {
            name: "example.com".to_owned(),
            port: 443,
        }
    }

    #[tokio::test]
    async fn each_gets_its_own_answer() {
        let (reports, mut asked) = mpsc::channel(4);
        let inquiries = Arc::new(Inquiries::new(reports.downgrade()));
        let tenant = TenantId::new(7);
        let asking = || async { inquiries.ask(tenant, question()).await };
        let answering = async {
            let mut ids = Vec::new();
            for _ in 0..2 {
                let Some(FromData::Asks { id, .. }) = asked.recv().await else {
                    panic!("another report");
                };
                ids.push(id);
            }
            for id in ids.into_iter().rev() {
                let answer = Answer {
                    id,
                    cpu_ns: id,
                    found: Ok(Found::Addresses(Vec::new())),
                };
                inquiries.answer(answer.clone());
                // Once more is once too often, and nothing happens.
                inquiries.answer(answer);
            }
        };
        let (first, second, ()) = tokio::join!(asking(), asking(), answering);
        assert_eq!(first.map(|answer| answer.cpu_ns), Ok(0));
        assert_eq!(second.map(|answer| answer.cpu_ns), Ok(1));
        assert!(inquiries.waiting().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_answered_gives_up_and_leaves_nothing() {
        let (reports, _asked) = mpsc::channel(4);
        let inquiries = Inquiries::new(reports.downgrade());
        let late = inquiries.ask(TenantId::new(7), question()).await;
        assert_eq!(late, Err(Unanswered::Late));
        assert!(inquiries.waiting().is_empty());
        drop(reports);
        let gone = inquiries.ask(TenantId::new(7), question()).await;
        assert_eq!(gone, Err(Unanswered::Gone));
    }
}
