//! Answers what the data process asks of the system ([`FromData::Asks`]): names and root certificates,
//! for which files are read that it does not reach.
//!
//! A tenant has a few threads at once and no more ([`Offload`]). What a thread used is told with the
//! answer, and paid for there; it is no time of the host's.
//!
//! On failure: a data process that asks more than [`WAITING_MAX`] questions at once is none of ours, and
//! is ended. It can have any name looked up, and guests can ask for those
//! of their lists only: that list is kept there.
//!
//! [`FromData::Asks`]: crate::messages::FromData::Asks

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use insula_types::TenantId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::messages::{Answer, Found, Question};
use crate::pool::clock::{self, thread_cpu_ns};
use crate::pool::offload::Offload;

/// Questions that are being answered or wait for it.
const WAITING_MAX: usize = 2_048;
/// Longest name: of a longer one there is no address (RFC 1035, 2.3.4).
const NAME_MAX_BYTES: usize = 255;

/// An answer on its way, and its place.
type Ready = (Answer, OwnedSemaphorePermit);

/// See the module's documentation. One for each data process.
pub(super) struct Inquest {
    offload: Arc<Offload>,
    places: Arc<Semaphore>,
    ready: mpsc::UnboundedSender<Ready>,
}

impl Inquest {
    /// And where the answers come out: never more than have a place.
    pub(super) fn new(offload: Arc<Offload>) -> (Self, mpsc::UnboundedReceiver<Ready>) {
        let (ready, answers) = mpsc::unbounded_channel();
        let inquest = Self {
            offload,
            places: Arc::new(Semaphore::new(WAITING_MAX)),
            ready,
        };
        (inquest, answers)
    }

    /// Begins to answer. `false` when the data process asks for more than one that is sound would.
    pub(super) fn begin(&self, id: u64, tenant: TenantId, question: Question) -> bool {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return false;
        };
        let ready = self.ready.clone();
        let piece = move || {
            let began_ns = thread_cpu_ns();
            let found = find(question);
            let cpu_ns = thread_cpu_ns().saturating_sub(began_ns);
            clock::paid_by_others(cpu_ns);
            let answer = Answer { id, cpu_ns, found };
            // The data process may be gone.
            let _ = ready.send((answer, place));
        };
        self.offload.submit(tenant, None, Box::new(piece));
        true
    }
}

fn find(question: Question) -> Result<Found, String> {
    match question {
        Question::Addresses { name, port } => look_up(&name, port).map(Found::Addresses),
        Question::Roots => Ok(Found::Roots(roots())),
    }
}

/// The addresses of a name, as the system resolves it.
fn look_up(name: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    if name.len() > NAME_MAX_BYTES {
        return Err(format!("a name of {} bytes", name.len()));
    }
    let mut addresses = Vec::new();
    let found = (name, port).to_socket_addrs();
    for address in found.map_err(|error| error.to_string())? {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// The system's, or where `SSL_CERT_FILE` and `SSL_CERT_DIR` say.
fn roots() -> Vec<Vec<u8>> {
    let found = rustls_native_certs::load_native_certs();
    if !found.errors.is_empty() {
        let errors = found.errors;
        tracing::warn!(?errors, "not all root certificates could be read");
    }
    let certs = found.certs.iter();
    certs.map(|cert| cert.as_ref().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_and_what_is_none_is_refused() {
        let found = look_up("127.0.0.1", 80);
        assert_eq!(found, Ok(vec![SocketAddr::from(([127, 0, 0, 1], 80))]));
        assert!(look_up(&"a".repeat(NAME_MAX_BYTES + 1), 80).is_err());
    }

    #[tokio::test]
    async fn answers_come_with_their_number_and_questions_have_a_bound() {
        let (inquest, mut answers) = Inquest::new(Arc::default());
        let question = || Question::Addresses {
            name: "127.0.0.1".to_owned(),
            port: 1,
        };
        assert!(inquest.begin(9, TenantId::new(1), question()));
        let (answer, place) = answers.recv().await.expect("an answer");
        assert_eq!(answer.id, 9);
        assert!(answer.found.is_ok());
        // Its place is taken until it was sent.
        let others = inquest.places.clone().try_acquire_many_owned(2_047);
        assert!(others.is_ok());
        assert!(!inquest.begin(10, TenantId::new(1), question()));
        drop(place);
        assert!(inquest.begin(10, TenantId::new(1), question()));
    }
}
