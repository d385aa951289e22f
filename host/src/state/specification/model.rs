//! The model: what a [`Store`] does, said in maps and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use insula_types::volume::MountMode;
use insula_types::{
    Bytes, Digest, Millicores, ServiceId, ServiceName, ServiceSpec, TenantId, TenantName,
    TenantSpec, Traffic, VersionNumber, VolumeId, VolumeName,
};

use super::machines::Machines;
use crate::state::{
    AUDIT_KEPT, Access, AddedVersion, Audit, AuditEntry, Commitments, Deleted, Held, Listed,
    NewToken, NewVersion, NewVolume, Page, Precondition, Put, REMEMBERED_FOR, REMEMBERED_MAX,
    Remembered, SERVICES_PER_TENANT_MAX, Scope, Service, Store, StoreError, StoredUsage, Switched,
    TENANTS_MAX, TOKENS_MAX, TemporaryDir, Tenant, Timestamp, Token, TokenHash, UsageTotals,
    VERSIONS_KEPT, VOLUMES_PER_TENANT_MAX, Version, Volume,
};

/// A service without what follows from other records.
#[derive(Debug, Clone)]
struct Row {
    tenant: TenantId,
    name: ServiceName,
    spec: ServiceSpec,
    generation: u64,
    traffic: Traffic,
    previous: Option<VersionNumber>,
    created: Timestamp,
    versions: BTreeMap<VersionNumber, Version>,
    last_version: u32,
}

/// See the module's documentation. Ids count from 1, in the order of creation.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    tenants: BTreeMap<TenantName, Tenant>,
    services: BTreeMap<ServiceId, Row>,
    tokens: BTreeMap<u64, Token>,
    usage: BTreeMap<(TenantId, Option<ServiceId>), UsageTotals>,
    remembered: BTreeMap<[u8; 32], (Timestamp, Remembered)>,
    audits: Vec<AuditEntry>,
    pub(super) kept: Machines,
    last_tenant: u64,
    last_service: u64,
    last_token: u64,
    volumes: BTreeMap<(TenantId, VolumeName), Volume>,
    last_volume: u64,
}

fn reservation(tenant: &Tenant) -> u64 {
    let reservation = tenant.spec.cpu.reservation;
    reservation.map_or(0, Millicores::get)
}

pub(super) fn page_of<T>(
    items: impl Iterator<Item = T>,
    page: &Page,
    key: impl Fn(&T) -> String,
) -> Listed<T> {
    let limit = page.limit as usize;
    let mut items: Vec<T> = items.take(limit + 1).collect();
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().map(key).filter(|_| more);
    Listed { items, next }
}

pub(super) fn full(count: usize, what: &'static str, max: u64) -> Result<(), StoreError> {
    if (count as u64) < max {
        Ok(())
    } else {
        Err(StoreError::Full { what, max })
    }
}

impl Model {
    /// All or nothing: a job that fails has changed nothing.
    fn change<T>(
        &mut self,
        job: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let before = self.clone();
        job(self).inspect_err(|_| *self = before)
    }

    fn row(&self, id: ServiceId) -> Result<&Row, StoreError> {
        self.services
            .get(&id)
            .ok_or(StoreError::NotFound("service"))
    }

    fn row_mut(&mut self, id: ServiceId) -> Result<&mut Row, StoreError> {
        let row = self.services.get_mut(&id);
        row.ok_or(StoreError::NotFound("service"))
    }

    fn tenant_name(&self, id: TenantId) -> Result<TenantName, StoreError> {
        let tenant = self.tenants.values().find(|tenant| tenant.id == id);
        let tenant = tenant.ok_or(StoreError::NotFound("tenant"))?;
        Ok(tenant.name.clone())
    }

    fn id_of(&self, tenant: &TenantName, name: &ServiceName) -> Option<ServiceId> {
        let tenant = self.tenants.get(tenant)?.id;
        let mut rows = self.services.iter();
        rows.find(|(_, row)| row.tenant == tenant && row.name == *name)
            .map(|(id, _)| *id)
    }

    fn record(&self, id: ServiceId) -> Result<Service, StoreError> {
        let row = self.row(id)?;
        let newest = row.versions.keys().next_back();
        let kept_ready = row
            .versions
            .values()
            .filter(|version| {
                row.traffic.share(version.number).is_some() || newest == Some(&version.number)
            })
            .map(|version| Held {
                number: version.number,
                digest: version.digest,
            });
        Ok(Service {
            id,
            tenant: row.tenant,
            tenant_name: self.tenant_name(row.tenant)?,
            name: row.name.clone(),
            spec: row.spec.clone(),
            generation: row.generation,
            traffic: row.traffic.clone(),
            held: kept_ready.collect(),
            previous: row.previous,
            created: row.created,
        })
    }

    fn check_mounts(&self, tenant: TenantId, spec: &ServiceSpec) -> Result<(), StoreError> {
        for (name, kind, mode) in spec.used_volumes() {
            let volume = self.volumes.get(&(tenant, name.clone()));
            let volume = volume.ok_or_else(|| StoreError::UnknownVolume(name.to_string()))?;
            if volume.spec.kind != kind {
                let (name, is) = (name.to_string(), volume.spec.kind);
                return Err(StoreError::WrongKind { name, is });
            }
            if volume.read_only && mode == MountMode::Rw {
                return Err(StoreError::VolumeReadOnly(name.to_string()));
            }
        }
        Ok(())
    }

    /// A host belongs to one tenant, a route to one service.
    fn check_routes(
        &self,
        tenant: TenantId,
        own: Option<ServiceId>,
        spec: &ServiceSpec,
    ) -> Result<(), StoreError> {
        let mut seen = BTreeSet::new();
        for route in &spec.routes {
            let text = String::from(route.clone());
            let others = self.services.iter().filter(|(id, _)| Some(**id) != own);
            let taken = others.into_iter().any(|(_, other)| {
                other.spec.routes.iter().any(|held| {
                    held.host() == route.host() && (other.tenant != tenant || held == route)
                })
            });
            if taken || !seen.insert(text.clone()) {
                return Err(StoreError::RouteTaken(text));
            }
        }
        Ok(())
    }

    fn used(&self) -> HashSet<Digest> {
        let rows = self.services.values();
        let versions = rows.flat_map(|row| row.versions.values().map(|version| version.digest));
        versions.chain(self.kept.used()).collect()
    }

    pub(super) fn tenant_id(&self, name: &TenantName) -> Result<TenantId, StoreError> {
        let tenant = self.tenants.get(name);
        tenant
            .map(|tenant| tenant.id)
            .ok_or(StoreError::NotFound("tenant"))
    }

    pub(super) fn has_tenant(&self, id: TenantId) -> bool {
        self.tenants.values().any(|tenant| tenant.id == id)
    }

    pub(super) fn unreferenced(&self, before: &HashSet<Digest>) -> Vec<Digest> {
        let used = self.used();
        let gone = before.iter().filter(|digest| !used.contains(*digest));
        gone.copied().collect()
    }

    fn switch(&mut self, id: ServiceId, traffic: &Traffic) -> Result<(), StoreError> {
        let row = self.row_mut(id)?;
        for (number, _) in traffic.shares() {
            if !row.versions.contains_key(&number) {
                return Err(StoreError::NotFound("version"));
            }
        }
        row.previous = row.traffic.previous_after(traffic, row.previous);
        row.traffic = traffic.clone();
        Ok(())
    }

    fn prune(&mut self, id: ServiceId) -> Result<(), StoreError> {
        let row = self.row_mut(id)?;
        let unused = row.versions.keys().rev().filter(|number| {
            row.previous != Some(**number) && row.traffic.share(**number).is_none()
        });
        let kept = usize::try_from(VERSIONS_KEPT).unwrap();
        let old: Vec<VersionNumber> = unused.skip(kept).copied().collect();
        row.versions.retain(|number, _| !old.contains(number));
        Ok(())
    }

    fn add_used(&mut self, tenant: TenantId, service: Option<ServiceId>, part: &UsageTotals) {
        self.usage.entry((tenant, service)).or_default().add(part);
    }
}

impl Store for Model {
    fn atomically(
        &mut self,
        job: &mut dyn FnMut(&mut dyn Store) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.change(|model| job(model))
    }

    fn tenants(&mut self, page: &Page) -> Result<Listed<Tenant>, StoreError> {
        let after = page.after.as_deref().unwrap_or("");
        let tenants = self.tenants.values();
        let tenants = tenants.filter(|tenant| tenant.name.as_str() > after);
        Ok(page_of(tenants.cloned(), page, |one| one.name.to_string()))
    }

    fn tenant(&mut self, name: &TenantName) -> Result<Tenant, StoreError> {
        let tenant = self.tenants.get(name).cloned();
        tenant.ok_or(StoreError::NotFound("tenant"))
    }

    fn put_tenant(
        &mut self,
        name: &TenantName,
        spec: &TenantSpec,
        precondition: Precondition,
        capacity_millicores: u64,
        now: Timestamp,
    ) -> Result<Put<Tenant>, StoreError> {
        let before = self.tenants.get(name).cloned();
        precondition.check(before.as_ref().map(|tenant| tenant.generation))?;
        if let Some(tenant) = before.as_ref().filter(|tenant| tenant.spec == *spec) {
            return Ok(Put::Unchanged(tenant.clone()));
        }
        let after = Tenant {
            id: before
                .as_ref()
                .map_or(TenantId::new(self.last_tenant + 1), |tenant| tenant.id),
            name: name.clone(),
            spec: spec.clone(),
            generation: before.as_ref().map_or(1, |tenant| tenant.generation + 1),
            created: before.as_ref().map_or(now, |tenant| tenant.created),
        };
        let others = self.tenants.values().filter(|other| other.name != *name);
        let others: u64 = others.map(reservation).sum();
        let asked = reservation(&after);
        if asked > 0 && others + asked > capacity_millicores {
            return Err(StoreError::Reservation {
                asked_millicores: asked,
                free_millicores: capacity_millicores.saturating_sub(others),
                capacity_millicores,
            });
        }
        if before.is_none() {
            full(self.tenants.len(), "tenants", TENANTS_MAX)?;
            self.last_tenant += 1;
        }
        self.tenants.insert(name.clone(), after.clone());
        Ok(match before {
            None => Put::Created(after),
            Some(_) => Put::Changed(after),
        })
    }

    fn delete_tenant(
        &mut self,
        name: &TenantName,
        precondition: Precondition,
    ) -> Result<Deleted<Tenant>, StoreError> {
        let record = self.tenant(name)?;
        precondition.check(Some(record.generation))?;
        let machines = self.kept.machines.values();
        let count = machines.filter(|one| one.tenant == record.id).count() as u64;
        if count > 0 {
            return Err(StoreError::HasMachines { count });
        }
        let used = self.used();
        self.kept.usage.remove(&record.id);
        self.tenants.remove(name);
        self.services.retain(|_, row| row.tenant != record.id);
        self.usage.retain(|(tenant, _), _| *tenant != record.id);
        self.volumes.retain(|(tenant, _), _| *tenant != record.id);
        self.tokens.retain(
            |_, token| !matches!(&token.scope, Scope::Tenant(tenant, _) if *tenant == record.id),
        );
        Ok(Deleted {
            unreferenced: self.unreferenced(&used),
            record,
        })
    }

    fn commitments(&mut self) -> Result<Commitments, StoreError> {
        let memory = self.tenants.values().filter_map(|t| t.spec.memory_limit);
        Ok(Commitments {
            tenants: self.tenants.len() as u64,
            services: self.services.len() as u64,
            reserved_millicores: self.tenants.values().map(reservation).sum(),
            memory_bytes: memory.map(Bytes::get).sum(),
        })
    }

    fn services(
        &mut self,
        tenant: &TenantName,
        page: &Page,
    ) -> Result<Listed<Service>, StoreError> {
        let tenant = self.tenant(tenant)?.id;
        let after = page.after.as_deref().unwrap_or("");
        let rows = self.services.iter();
        let rows = rows.filter(|(_, row)| row.tenant == tenant && row.name.as_str() > after);
        let mut records = Vec::new();
        for (id, _) in rows {
            records.push(self.record(*id)?);
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(page_of(records.into_iter(), page, |one| {
            one.name.to_string()
        }))
    }

    fn service(&mut self, tenant: &TenantName, name: &ServiceName) -> Result<Service, StoreError> {
        let id = self.id_of(tenant, name);
        self.record(id.ok_or(StoreError::NotFound("service"))?)
    }

    fn service_by_id(&mut self, id: ServiceId) -> Result<Service, StoreError> {
        self.record(id)
    }

    fn put_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        spec: &ServiceSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Service>, StoreError> {
        let owner = self.tenant(tenant)?.id;
        let before = self.id_of(tenant, name);
        let generation = before.map(|id| self.services[&id].generation);
        precondition.check(generation)?;
        if let Some(id) = before.filter(|id| self.services[id].spec == *spec) {
            return self.record(id).map(Put::Unchanged);
        }
        if before.is_none() {
            let own = self.services.values().filter(|row| row.tenant == owner);
            full(
                own.count(),
                "services of this tenant",
                SERVICES_PER_TENANT_MAX,
            )?;
        }
        self.check_routes(owner, before, spec)?;
        self.check_mounts(owner, spec)?;
        if let Some(id) = before {
            let row = self.row_mut(id)?;
            row.spec = spec.clone();
            row.generation += 1;
            return self.record(id).map(Put::Changed);
        }
        self.last_service += 1;
        let id = ServiceId::new(self.last_service);
        let row = Row {
            tenant: owner,
            name: name.clone(),
            spec: spec.clone(),
            generation: 1,
            traffic: Traffic::none(),
            previous: None,
            created: now,
            versions: BTreeMap::new(),
            last_version: 0,
        };
        self.services.insert(id, row);
        self.record(id).map(Put::Created)
    }

    fn delete_service(
        &mut self,
        tenant: &TenantName,
        name: &ServiceName,
        precondition: Precondition,
    ) -> Result<Deleted<Service>, StoreError> {
        let record = self.service(tenant, name)?;
        precondition.check(Some(record.generation))?;
        let used = self.used();
        self.services.remove(&record.id);
        if let Some(totals) = self.usage.remove(&(record.tenant, Some(record.id))) {
            self.add_used(record.tenant, None, &totals);
        }
        Ok(Deleted {
            unreferenced: self.unreferenced(&used),
            record,
        })
    }

    fn volumes(&mut self, tenant: &TenantName, page: &Page) -> Result<Listed<Volume>, StoreError> {
        let owner = self.tenant(tenant)?.id;
        let after = page.after.as_deref().unwrap_or("");
        let own = self
            .volumes
            .values()
            .filter(|volume| volume.tenant == owner);
        let own = own.filter(|volume| volume.name.as_str() > after).cloned();
        Ok(page_of(own, page, |volume| volume.name.to_string()))
    }

    fn volume(&mut self, tenant: &TenantName, name: &VolumeName) -> Result<Volume, StoreError> {
        let owner = self.tenants.get(tenant).map(|tenant| tenant.id);
        let found = owner.and_then(|owner| self.volumes.get(&(owner, name.clone())));
        found.cloned().ok_or(StoreError::NotFound("volume"))
    }

    fn put_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        new: &NewVolume,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Volume>, StoreError> {
        let owner = self.tenant(tenant)?.id;
        let key = (owner, name.clone());
        let before = self.volumes.get_mut(&key);
        precondition.check(before.as_ref().map(|volume| volume.generation))?;
        if let Some(volume) = before {
            if volume.spec == new.spec {
                return Ok(Put::Unchanged(volume.clone()));
            }
            if volume.spec.kind != new.spec.kind {
                return Err(StoreError::KindStays);
            }
            volume.spec = new.spec;
            volume.generation += 1;
            return Ok(Put::Changed(volume.clone()));
        }
        let own = self
            .volumes
            .values()
            .filter(|volume| volume.tenant == owner);
        full(
            own.count(),
            "volumes of this tenant",
            VOLUMES_PER_TENANT_MAX,
        )?;
        self.last_volume += 1;
        let volume = Volume {
            id: VolumeId::new(self.last_volume),
            tenant: owner,
            tenant_name: tenant.clone(),
            name: name.clone(),
            spec: new.spec,
            directory: new.directory.clone(),
            read_only: new.read_only,
            origin: new.origin.clone(),
            generation: 1,
            created: now,
        };
        self.volumes.insert(key, volume.clone());
        Ok(Put::Created(volume))
    }

    fn delete_volume(
        &mut self,
        tenant: &TenantName,
        name: &VolumeName,
        precondition: Precondition,
    ) -> Result<Volume, StoreError> {
        let volume = self.volume(tenant, name)?;
        precondition.check(Some(volume.generation))?;
        let users = self.services.values().filter(|row| {
            row.tenant == volume.tenant && row.spec.used_volumes().any(|(used, ..)| used == name)
        });
        if let Some(service) = users.map(|row| row.name.to_string()).min() {
            return Err(StoreError::VolumeInUse { service });
        }
        self.volumes.remove(&(volume.tenant, name.clone()));
        Ok(volume)
    }

    fn volume_directories(&mut self) -> Result<HashSet<String>, StoreError> {
        let directories = self.volumes.values();
        Ok(directories
            .map(|volume| volume.directory.to_string())
            .collect())
    }

    fn versions(&mut self, service: ServiceId, page: &Page) -> Result<Listed<Version>, StoreError> {
        let before: u32 = page.after.as_ref().map_or(u32::MAX, |n| n.parse().unwrap());
        let versions = self.services.get(&service).into_iter();
        let versions = versions.flat_map(|row| row.versions.values().rev());
        let versions = versions.filter(|version| version.number.get() < before);
        let versions = versions.cloned();
        Ok(page_of(versions, page, |one| one.number.to_string()))
    }

    fn version(
        &mut self,
        service: ServiceId,
        number: VersionNumber,
    ) -> Result<Version, StoreError> {
        let versions = self.services.get(&service).map(|row| &row.versions);
        let found = versions.and_then(|versions| versions.get(&number));
        found.cloned().ok_or(StoreError::NotFound("version"))
    }

    fn add_version(
        &mut self,
        service: ServiceId,
        upload: &NewVersion,
        activate: bool,
        now: Timestamp,
    ) -> Result<AddedVersion, StoreError> {
        let before = self.record(service)?;
        let row = self.row_mut(service)?;
        row.last_version += 1;
        let number = VersionNumber::new(row.last_version).unwrap();
        let version = Version {
            number,
            digest: upload.digest,
            size: upload.size,
            compile_ms: upload.compile_ms,
            created: now,
        };
        row.versions.insert(number, version.clone());
        if activate {
            self.switch(service, &Traffic::whole(number))?;
        }
        let used = self.used();
        self.prune(service)?;
        Ok(AddedVersion {
            before,
            service: self.record(service)?,
            version,
            unreferenced: self.unreferenced(&used),
        })
    }

    fn set_traffic(
        &mut self,
        service: ServiceId,
        traffic: &Traffic,
    ) -> Result<Switched, StoreError> {
        let before = self.record(service)?;
        self.switch(service, traffic)?;
        Ok(Switched {
            before,
            service: self.record(service)?,
        })
    }

    fn restore_traffic(&mut self, before: &Service) -> Result<Service, StoreError> {
        let row = self.row_mut(before.id)?;
        row.traffic = before.traffic.clone();
        row.previous = before.previous;
        self.record(before.id)
    }

    fn digests(&mut self) -> Result<HashSet<Digest>, StoreError> {
        Ok(self.used())
    }

    fn tokens(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<Token>, StoreError> {
        let after: u64 = page.after.as_ref().map_or(0, |id| id.parse().unwrap());
        let tokens = self.tokens.values().filter(|token| {
            let own = match &token.scope {
                Scope::Host => tenant.is_none(),
                Scope::Tenant(owner, _) => tenant.is_none_or(|tenant| tenant == *owner),
            };
            own && token.id > after
        });
        Ok(page_of(tokens.cloned(), page, |one| one.id.to_string()))
    }

    fn token_by_hash(&mut self, hash: &TokenHash) -> Result<Option<Token>, StoreError> {
        let mut tokens = self.tokens.values();
        Ok(tokens.find(|token| token.hash == *hash).cloned())
    }

    fn token_is_valid(&mut self, id: u64, now: Timestamp) -> Result<bool, StoreError> {
        let token = self.tokens.get(&id);
        Ok(token.is_some_and(|token| token.expires.is_none_or(|end| end > now)))
    }

    fn add_token(&mut self, token: &NewToken, now: Timestamp) -> Result<Token, StoreError> {
        full(self.tokens.len(), "tokens", TOKENS_MAX)?;
        let scope = match &token.tenant {
            None => Scope::Host,
            Some(name) => Scope::Tenant(self.tenant(name)?.id, name.clone()),
        };
        self.last_token += 1;
        let token = Token {
            id: self.last_token,
            hash: token.hash,
            name: token.name.clone(),
            scope,
            access: token.access,
            created: now,
            expires: token.expires,
        };
        self.tokens.insert(token.id, token.clone());
        Ok(token)
    }

    fn delete_token(
        &mut self,
        id: u64,
        tenant: Option<TenantId>,
        now: Timestamp,
    ) -> Result<Token, StoreError> {
        let token = self.tokens.get(&id).filter(|token| match &token.scope {
            Scope::Host => tenant.is_none(),
            Scope::Tenant(owner, _) => tenant.is_none_or(|tenant| tenant == *owner),
        });
        let token = token.cloned().ok_or(StoreError::NotFound("token"))?;
        self.change(|model| {
            model.tokens.remove(&id);
            if token.scope == Scope::Host && !model.has_admin_token(now)? {
                return Err(StoreError::LastAdminToken);
            }
            Ok(token)
        })
    }

    fn has_admin_token(&mut self, now: Timestamp) -> Result<bool, StoreError> {
        let mut tokens = self.tokens.values();
        Ok(tokens.any(|token| {
            token.scope == Scope::Host
                && token.access == Access::Write
                && token.expires.is_none_or(|end| end > now)
        }))
    }

    /// Not a part of what is compared: a copy is a file of SQLite's, which [`backup`] tests.
    ///
    /// [`backup`]: crate::state::backup
    fn copy(&mut self, _: &TemporaryDir) -> Result<std::fs::File, StoreError> {
        Err(StoreError::Backend("a model has no file".into()))
    }

    fn usage(&mut self) -> Result<Vec<StoredUsage>, StoreError> {
        let usage = self.usage.iter();
        let usage = usage.map(|((tenant, service), totals)| StoredUsage {
            tenant: *tenant,
            service: *service,
            totals: *totals,
        });
        Ok(usage.collect())
    }

    fn add_usage(
        &mut self,
        parts: &[(TenantId, ServiceId, UsageTotals)],
    ) -> Result<(), StoreError> {
        for (tenant, service, totals) in parts {
            if self.tenant_name(*tenant).is_err() {
                continue;
            }
            let row = self.services.get(service);
            let alive = row.is_some_and(|row| row.tenant == *tenant);
            self.add_used(*tenant, alive.then_some(*service), totals);
        }
        Ok(())
    }

    fn remembered(
        &mut self,
        key: &[u8; 32],
        now: Timestamp,
    ) -> Result<Option<Remembered>, StoreError> {
        let found = self.remembered.get(key);
        let young = found.filter(|(since, _)| *since > now.before(REMEMBERED_FOR));
        Ok(young.map(|(_, answer)| answer.clone()))
    }

    fn remember(&mut self, answer: &Remembered, now: Timestamp) -> Result<(), StoreError> {
        let oldest = now.before(REMEMBERED_FOR);
        self.remembered.retain(|_, (since, _)| *since > oldest);
        self.remembered.insert(answer.key, (now, answer.clone()));
        assert!(
            (self.remembered.len() as u64) < REMEMBERED_MAX,
            "the bound on remembered answers has a test of its own"
        );
        Ok(())
    }

    fn forget(&mut self, key: &[u8; 32]) -> Result<(), StoreError> {
        self.remembered.remove(key);
        Ok(())
    }

    fn audit(&mut self, audit: &Audit, now: Timestamp) -> Result<(), StoreError> {
        let id = self.audits.len() as u64 + 1;
        assert!(
            id < AUDIT_KEPT,
            "the bound on the audit log has a test of its own"
        );
        self.audits.push(AuditEntry {
            id,
            time: now,
            audit: audit.clone(),
        });
        Ok(())
    }

    fn audits(
        &mut self,
        tenant: Option<TenantId>,
        page: &Page,
    ) -> Result<Listed<AuditEntry>, StoreError> {
        let before: u64 = page
            .after
            .as_ref()
            .map_or(u64::MAX, |id| id.parse().unwrap());
        let entries = self.audits.iter().rev().filter(|entry| {
            let owner = entry.audit.tenant.as_ref().map(|(id, _)| *id);
            entry.id < before && (tenant.is_none() || owner == tenant)
        });
        Ok(page_of(entries.cloned(), page, |one| one.id.to_string()))
    }
}
