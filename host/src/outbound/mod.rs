//! HTTP from guests to the world.
//!
//! ```text
//!  request ─▶ destination ─▶ on the list? ─▶ places ─▶ resolve ─▶ every address allowed? ─▶ connect
//!               │ malformed    │ no            │ none     │ error     │ no        to just that one
//!               ▼              ▼               ▼          ▼           ▼                  │
//!         URI-invalid   request-denied  limit-reached  DNS-error  IP-prohibited    TLS ─▶ HTTP/1.1
//! ```
//!
//! Nothing is allowed that a service's list does not name, and no name leads to an address that the
//! [policy](AddressPolicy) closes. The name is resolved once per request, by the other process ([`Inquiries`]);
//! what was checked is what is connected to, so that a second answer of the resolver changes nothing.
//! Where one address of several is closed, the whole name is: it is no name of the Internet's.
//! Addresses of this host itself are closed as well, public or not. Redirects are the guest's
//! business: a request to where one leads is a request like any other.
//!
//! Every request has a connection of its own, without a proxy, a cookie or a session that another
//! tenant could see again. All of it but the look-up runs in the guest's own job (see
//! [`crate::engine::outgoing`]); the look-up's time is charged to the tenant as well.

mod address;
mod body;
mod inquiries;
mod place;
mod send;
mod tls;

use std::sync::Arc;

use insula_types::outbound::{Destination, OutboundRule};

pub(crate) use address::closed_v4;
pub use address::{AddressPolicy, Network, NetworkError};
pub use body::BODY_MAX_BYTES;
pub use inquiries::{Inquiries, Unanswered};
pub use place::Places;
pub use send::{Clerk, Sender};

/// Requests of all guests of a host that are on their way at once; each has a descriptor or two.
const HOST_PLACES: u32 = 1_024;
/// Those of one tenant.
const TENANT_PLACES: u32 = 128;

/// What all guests of a host share on their way out.
pub struct Outbound {
    policy: AddressPolicy,
    tls: tls::ClientTls,
    places: Arc<Places>,
    inquiries: Arc<Inquiries>,
}

impl std::fmt::Debug for Outbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbound")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl Outbound {
    /// A way out to what the policy allows.
    #[must_use]
    pub fn new(policy: AddressPolicy, inquiries: Arc<Inquiries>) -> Arc<Self> {
        Arc::new(Self {
            policy,
            tls: tls::ClientTls::default(),
            places: Arc::new(Places::new(HOST_PLACES)),
            inquiries,
        })
    }

    /// The places of one tenant.
    #[must_use]
    pub fn tenant_places() -> Arc<Places> {
        Arc::new(Places::new(TENANT_PLACES))
    }
}

/// Whether a list allows a destination.
fn allows(rules: &[OutboundRule], to: &Destination) -> bool {
    rules.iter().any(|rule| rule.allows(to))
}
