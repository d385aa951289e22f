//! Which service a request belongs to.
//!
//! The table is immutable; a change makes a new one and swaps it in whole, so that a request sees
//! either the old state or the new one. A host belongs to one tenant.

use std::collections::HashMap;
use std::sync::Arc;

use insula_types::spec::Route;
use insula_types::{ServiceId, TenantId};

use crate::pool::entries::ServiceEntry;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct RouteTable {
    hosts: HashMap<Box<str>, Host>,
}

#[derive(Debug)]
struct Host {
    tenant: TenantId,
    /// Longest prefix first.
    routes: Vec<(Route, Arc<ServiceEntry>)>,
    /// The service whose own name this host is: takes what no route takes.
    own: Option<Arc<ServiceEntry>>,
}

impl RouteTable {
    /// Builds the table. Where two tenants claim one host, the older tenant keeps it and the
    /// claim of the other is left out; control refuses such a claim when it is made.
    #[must_use]
    pub fn build<'a>(
        domain: &str,
        services: impl Iterator<Item = (&'a Arc<ServiceEntry>, &'a [Route])>,
    ) -> Self {
        let mut all: Vec<_> = services.collect();
        all.sort_by_key(|(service, _)| (service.tenant.id, service.id));
        let mut hosts: HashMap<Box<str>, Host> = HashMap::with_capacity(all.len());
        for (service, _) in &all {
            let name = format!("{}.{}.{domain}", service.name, service.tenant.name);
            let host = Host {
                tenant: service.tenant.id,
                routes: Vec::new(),
                own: Some(Arc::clone(service)),
            };
            hosts.insert(name.into(), host);
        }
        for (service, routes) in &all {
            for route in *routes {
                let host = hosts.entry(route.host().into()).or_insert_with(|| Host {
                    tenant: service.tenant.id,
                    routes: Vec::new(),
                    own: None,
                });
                if host.tenant == service.tenant.id {
                    host.routes.push((route.clone(), Arc::clone(service)));
                }
            }
        }
        for host in hosts.values_mut() {
            // Stable: of two equal prefixes the older service's comes first.
            host.routes
                .sort_by_key(|(route, _)| std::cmp::Reverse(route.prefix().len()));
        }
        Self { hosts }
    }

    /// The service for a canonical host and a path.
    #[must_use]
    pub fn find(&self, host: &str, path: &str) -> Option<&Arc<ServiceEntry>> {
        let host = self.hosts.get(host)?;
        host.routes
            .iter()
            .find(|(route, _)| route.matches(path))
            .map(|(_, service)| service)
            .or(host.own.as_ref())
    }

    /// Every service with a name of its own in the table.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceEntry>> {
        self.hosts.values().filter_map(|host| host.own.as_ref())
    }

    /// A service by id; for the control path, linear.
    #[must_use]
    pub fn by_id(&self, id: ServiceId) -> Option<&Arc<ServiceEntry>> {
        self.services().find(|service| service.id == id)
    }
}

/// The form in which hosts are compared: lower case, without port and final dot. `None` for what
/// is not a host at all. Borrows where nothing has to change, which is nearly always.
#[must_use]
pub fn canonical_host(authority: &str) -> Option<std::borrow::Cow<'_, str>> {
    use std::borrow::Cow;
    let host = match authority.rsplit_once(':') {
        // A colon inside brackets belongs to an IPv6 literal.
        Some((_, port)) if port.ends_with(']') => authority,
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) && port.len() <= 5 => host,
        Some(_) => return None,
        None => authority,
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let plain =
        |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'[' | b']' | b':');
    if host.is_empty() || host.len() > 253 || !host.bytes().all(plain) {
        return None;
    }
    if host.bytes().any(|c| c.is_ascii_uppercase()) {
        return Some(Cow::Owned(host.to_ascii_lowercase()));
    }
    Some(Cow::Borrowed(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_one_form() {
        let same = [
            "a.b.localhost",
            "A.b.LOCALHOST",
            "a.b.localhost.",
            "a.b.localhost:8080",
            "a.b.localhost:",
        ];
        for authority in same {
            assert_eq!(
                canonical_host(authority).as_deref(),
                Some("a.b.localhost"),
                "{authority}"
            );
        }
        assert_eq!(canonical_host("[::1]:80").as_deref(), Some("[::1]"));
        assert_eq!(canonical_host("[::1]").as_deref(), Some("[::1]"));
        let long = "a".repeat(254);
        for bad in [
            "",
            ":80",
            "user@a.b",
            "a.b:x",
            "a.b:123456",
            "a/b",
            "a b",
            "ä.b",
            ".",
            long.as_str(),
        ] {
            assert_eq!(canonical_host(bad), None, "{bad:?}");
        }
    }
}
