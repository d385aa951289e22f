//! Which service a request belongs to.
//!
//! The table is immutable; a change makes a new one and swaps it in whole, so that a request sees
//! either the old state or the new one. A host belongs to one tenant.

use std::collections::HashMap;
use std::sync::Arc;

use insula_types::spec::Route;
use insula_types::{ServiceId, TenantId, VersionNumber};

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
    ///
    /// `v3.<a service's own name>` is the preview name of its version 3, unless that very name is
    /// in the table for another reason.
    #[must_use]
    pub fn find(&self, host: &str, path: &str) -> Option<Found<'_>> {
        let Some(known) = self.hosts.get(host) else {
            let (preview, own) = preview_name(host)?;
            let service = self.hosts.get(own)?.own.as_ref()?;
            return Some(Found {
                service,
                preview: Some(preview),
            });
        };
        let routes = &mut known.routes.iter();
        let service = routes
            .find(|(route, _)| route.matches(path))
            .map(|(_, service)| service)
            .or(known.own.as_ref())?;
        Some(Found {
            service,
            preview: None,
        })
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

/// What a request is for.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// The service.
    pub service: &'a Arc<ServiceEntry>,
    /// The version, where its preview name was used.
    pub preview: Option<VersionNumber>,
}

/// Takes `v3.` off a host. Numbers are written in one way only.
fn preview_name(host: &str) -> Option<(VersionNumber, &str)> {
    let (label, own) = host.strip_prefix('v')?.split_once('.')?;
    let plain = label.bytes().all(|c| c.is_ascii_digit()) && !label.starts_with('0');
    let number = plain.then(|| label.parse().ok()).flatten()?;
    Some((VersionNumber::new(number)?, own))
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

    fn service(id: u64, tenant: (u64, &str), name: &str) -> Arc<ServiceEntry> {
        let registry = insula_metrics::DataMetrics::new();
        let name_of_tenant: insula_types::TenantName = tenant.1.parse().unwrap();
        let tenant = Arc::new(crate::pool::entries::TenantEntry {
            owed: Default::default(),
            id: TenantId::new(tenant.0),
            metrics: registry.tenant(&name_of_tenant),
            name: name_of_tenant,
            memory: Arc::new(crate::engine::TenantMemory::new(Arc::new(
                crate::engine::HostMemory::new(insula_types::Bytes::MAX),
            ))),
            offload: Arc::default(),
            storage: Arc::default(),
            places: crate::outbound::Outbound::tenant_places(),
        });
        let log = super::super::logs::ServiceLog::new(
            ServiceId::new(id),
            Arc::default(),
            Arc::clone(&tenant.metrics),
        );
        Arc::new(ServiceEntry {
            id: ServiceId::new(id),
            name: name.parse().unwrap(),
            tenant,
            limits: insula_types::spec::RequestLimits::default(),
            env: Arc::default(),
            mounts: Arc::default(),
            outbound: crate::outbound::Outbound::new(
                Default::default(),
                Arc::new(crate::outbound::Inquiries::new(
                    tokio::sync::mpsc::channel(1).0.downgrade(),
                )),
            ),
            outbound_rules: Arc::default(),
            usage_header: false,
            versions: Default::default(),
            awaited: Arc::default(),
            sticky_header: None,
            stats: Arc::new(crate::pool::entries::ServiceStats::new(
                registry,
                Arc::new(log),
            )),
        })
    }

    #[test]
    fn a_preview_name_never_takes_what_another_service_holds() {
        let web = service(1, (1, "a"), "web");
        let other = service(2, (2, "b"), "other");
        // As it may be stored when the host's domain was another one.
        let held = ["v2.web.a.localhost/api/*".to_owned().try_into().unwrap()];
        let none: &[Route] = &[];
        let table = RouteTable::build("localhost", [(&web, none), (&other, &held[..])].into_iter());
        let find = |host, path| {
            let found = table.find(host, path);
            found.map(|found| {
                (
                    found.service.id.get(),
                    found.preview.map(VersionNumber::get),
                )
            })
        };
        assert_eq!(find("web.a.localhost", "/"), Some((1, None)));
        assert_eq!(find("v1.web.a.localhost", "/"), Some((1, Some(1))));
        assert_eq!(find("v2.web.a.localhost", "/api/x"), Some((2, None)));
        assert_eq!(
            find("v2.web.a.localhost", "/"),
            None,
            "not even what its holder leaves"
        );
        assert_eq!(find("v1.v1.web.a.localhost", "/"), None);
    }

    #[test]
    fn preview_names() {
        let parsed = |host| preview_name(host).map(|(number, own)| (number.get(), own));
        assert_eq!(
            parsed("v3.hello.acme.localhost"),
            Some((3, "hello.acme.localhost"))
        );
        assert_eq!(parsed("v4294967295.a.b.c"), Some((u32::MAX, "a.b.c")));
        for other in [
            "hello.acme.localhost",
            "v.a.b.c",
            "v0.a.b.c",
            "v03.a.b.c",
            "v+3.a.b.c",
            "v3",
            "3.a.b.c",
            "v4294967296.a.b.c",
            "v3x.a.b.c",
        ] {
            assert_eq!(parsed(other), None, "{other}");
        }
    }

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
