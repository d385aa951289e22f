//! The model's machines and images.

use std::collections::{BTreeMap, HashSet};

use insula_types::{Digest, ImageName, MachineId, MachineName, MachineSpec, TenantId, TenantName};
use insula_vmm::life::State;

use super::model::{Model, full, page_of};
use crate::state::machines::{
    IMAGES_MAX, Image, MACHINES_PER_TENANT_MAX, Machine, MachineImages, MachineStore,
    MachineTotals, PinnedImage,
};
use crate::state::{Deleted, Listed, Page, Precondition, Put, StoreError, Timestamp};

/// Ids count from 1, in the order of creation.
#[derive(Debug, Clone, Default)]
pub(super) struct Machines {
    images: BTreeMap<ImageName, Image>,
    pub(super) machines: BTreeMap<MachineId, Machine>,
    pub(super) usage: BTreeMap<TenantId, MachineTotals>,
    last: u64,
}

impl Machines {
    pub(super) fn used(&self) -> HashSet<Digest> {
        let images = self.images.values().map(|image| image.digest);
        let pinned = self.machines.values();
        let pinned = pinned.flat_map(|machine| machine.images.list());
        images.chain(pinned).collect()
    }

    fn find(&self, tenant: &TenantName, name: &MachineName) -> Option<&Machine> {
        let mut machines = self.machines.values();
        machines.find(|machine| machine.tenant_name == *tenant && machine.name == *name)
    }

    fn resolve(&self, spec: &MachineSpec) -> Result<MachineImages, StoreError> {
        let digest = |name: &ImageName| {
            let image = self.images.get(name);
            let image = image.ok_or_else(|| StoreError::NoImage(name.clone()));
            image.map(|image| image.digest)
        };
        let disks = spec.disks.iter().map(|disk| digest(&disk.image));
        Ok(MachineImages {
            kernel: digest(&spec.kernel)?,
            initrd: spec.initrd.as_ref().map(digest).transpose()?,
            disks: disks.collect::<Result<_, _>>()?,
        })
    }
}

impl MachineStore for Model {
    fn images(&mut self, page: &Page) -> Result<Listed<Image>, StoreError> {
        let after = page.after.as_deref().unwrap_or("");
        let images = self.kept.images.values();
        let images = images.filter(|image| image.name.as_str() > after);
        Ok(page_of(images.cloned(), page, |one| one.name.to_string()))
    }

    fn image(&mut self, name: &ImageName) -> Result<Image, StoreError> {
        let image = self.kept.images.get(name);
        image.cloned().ok_or(StoreError::NotFound("image"))
    }

    fn put_image(
        &mut self,
        name: &ImageName,
        image: PinnedImage,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<(Put<Image>, Vec<Digest>), StoreError> {
        let before = self.kept.images.get(name).cloned();
        precondition.check(before.as_ref().map(|image| image.generation))?;
        if let Some(before) = before.as_ref().filter(|old| old.digest == image.digest) {
            return Ok((Put::Unchanged(before.clone()), Vec::new()));
        }
        if before.is_none() {
            full(self.kept.images.len(), "images", IMAGES_MAX)?;
        }
        let put = Image {
            name: name.clone(),
            digest: image.digest,
            size_bytes: image.size_bytes,
            generation: before.as_ref().map_or(1, |before| before.generation + 1),
            created: before.as_ref().map_or(now, |before| before.created),
        };
        self.kept.images.insert(name.clone(), put.clone());
        Ok(match before {
            None => (Put::Created(put), Vec::new()),
            Some(before) => {
                let lonely = self.unreferenced(&HashSet::from([before.digest]));
                (Put::Changed(put), lonely)
            }
        })
    }

    fn delete_image(
        &mut self,
        name: &ImageName,
        precondition: Precondition,
    ) -> Result<Deleted<Image>, StoreError> {
        let record = self.image(name)?;
        precondition.check(Some(record.generation))?;
        self.kept.images.remove(name);
        let unreferenced = self.unreferenced(&HashSet::from([record.digest]));
        Ok(Deleted {
            record,
            unreferenced,
        })
    }

    fn machines(
        &mut self,
        tenant: &TenantName,
        page: &Page,
    ) -> Result<Listed<Machine>, StoreError> {
        self.tenant_id(tenant)?;
        let after = page.after.as_deref().unwrap_or("");
        let machines = self.kept.machines.values();
        let mut machines: Vec<_> = machines
            .filter(|machine| machine.tenant_name == *tenant && machine.name.as_str() > after)
            .cloned()
            .collect();
        machines.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(page_of(machines.into_iter(), page, |one| {
            one.name.to_string()
        }))
    }

    fn all_machines(&mut self) -> Result<Vec<Machine>, StoreError> {
        Ok(self.kept.machines.values().cloned().collect())
    }

    fn machine(&mut self, tenant: &TenantName, name: &MachineName) -> Result<Machine, StoreError> {
        let machine = self.kept.find(tenant, name);
        machine.cloned().ok_or(StoreError::NotFound("machine"))
    }

    fn machine_by_id(&mut self, id: MachineId) -> Result<Machine, StoreError> {
        let machine = self.kept.machines.get(&id);
        machine.cloned().ok_or(StoreError::NotFound("machine"))
    }

    fn put_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        spec: &MachineSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Machine>, StoreError> {
        let owner = self.tenant_id(tenant)?;
        let before = self.kept.find(tenant, name).cloned();
        precondition.check(before.as_ref().map(|machine| machine.generation))?;
        let images = self.kept.resolve(spec)?;
        let put = match &before {
            Some(old) if old.spec == *spec && old.images == images => {
                return Ok(Put::Unchanged(old.clone()));
            }
            Some(old) => Machine {
                spec: spec.clone(),
                images,
                generation: old.generation + 1,
                ..old.clone()
            },
            None => {
                let own = self.kept.machines.values();
                let own = own.filter(|machine| machine.tenant == owner).count();
                full(own, "machines of this tenant", MACHINES_PER_TENANT_MAX)?;
                self.kept.last += 1;
                Machine {
                    id: MachineId::new(self.kept.last),
                    tenant: owner,
                    tenant_name: tenant.clone(),
                    name: name.clone(),
                    spec: spec.clone(),
                    images,
                    life: State::Defined,
                    generation: 1,
                    created: now,
                }
            }
        };
        self.kept.machines.insert(put.id, put.clone());
        Ok(match before {
            None => Put::Created(put),
            Some(_) => Put::Changed(put),
        })
    }

    fn set_machine_life(&mut self, id: MachineId, life: &State) -> Result<(), StoreError> {
        let machine = self.kept.machines.get_mut(&id);
        machine.ok_or(StoreError::NotFound("machine"))?.life = life.clone();
        Ok(())
    }

    fn delete_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        precondition: Precondition,
    ) -> Result<Deleted<Machine>, StoreError> {
        let record = self.machine(tenant, name)?;
        precondition.check(Some(record.generation))?;
        self.kept.machines.remove(&record.id);
        let images = record.images.list().into_iter().collect();
        let unreferenced = self.unreferenced(&images);
        Ok(Deleted {
            record,
            unreferenced,
        })
    }

    fn machine_usage(&mut self) -> Result<Vec<(TenantId, MachineTotals)>, StoreError> {
        let usage = self.kept.usage.iter();
        Ok(usage.map(|(tenant, totals)| (*tenant, *totals)).collect())
    }

    fn add_machine_usage(&mut self, parts: &[(TenantId, MachineTotals)]) -> Result<(), StoreError> {
        for (tenant, part) in parts {
            if self.has_tenant(*tenant) {
                self.kept.usage.entry(*tenant).or_default().add(part);
            }
        }
        Ok(())
    }
}

mod against_the_store {
    use insula_types::MachineName;
    use proptest::prelude::*;

    use super::*;
    use crate::state::{DataDir, Health, SqliteStore, Store};

    /// Every change of machines and images, on few enough names that they meet.
    #[derive(Debug, Clone)]
    enum Step {
        PutTenant(u8),
        DeleteTenant(u8),
        PutImage(u8, u8),
        DeleteImage(u8),
        PutMachine(u8, u8, u8, Option<u8>),
        Live(u64, bool),
        DeleteMachine(u8, u8),
        Use(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let few = 0..3_u8;
        let step = prop_oneof![
            few.clone().prop_map(Step::PutTenant),
            few.clone().prop_map(Step::DeleteTenant),
            (few.clone(), few.clone()).prop_map(|(name, content)| Step::PutImage(name, content)),
            few.clone().prop_map(Step::DeleteImage),
            (
                few.clone(),
                few.clone(),
                few.clone(),
                prop::option::of(few.clone())
            )
                .prop_map(|(t, m, k, d)| Step::PutMachine(t, m, k, d)),
            (1..6_u64, any::<bool>()).prop_map(|(id, on)| Step::Live(id, on)),
            (few.clone(), few).prop_map(|(tenant, name)| Step::DeleteMachine(tenant, name)),
            (1..5_u64, 0..1_000_u64).prop_map(|(tenant, amount)| Step::Use(tenant, amount)),
        ];
        prop::collection::vec(step, 1..60)
    }

    fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(word: &str, number: u8) -> T {
        format!("{word}-{number}").parse().expect("a name")
    }

    fn spec(kernel: u8, disk: Option<u8>) -> MachineSpec {
        let disks = disk.map(|disk| serde_json::json!({"image": format!("image-{disk}")}));
        let disks: Vec<_> = disks.into_iter().collect();
        let spec = serde_json::json!({"kernel": format!("image-{kernel}"), "disks": disks});
        serde_json::from_value(spec).expect("a spec")
    }

    /// What it answers, without the order in which digests are told.
    fn make(store: &mut dyn Store, step: &Step) -> String {
        let (any, now) = (Precondition::None, Timestamp::from_millis(1_000));
        let sorted = |mut digests: Vec<Digest>| {
            digests.sort_unstable();
            digests
        };
        match step {
            Step::PutTenant(tenant) => {
                let spec = Default::default();
                let put = store.put_tenant(&name("tenant", *tenant), &spec, any, 1_000, now);
                format!("{:?}", put.is_ok())
            }
            Step::DeleteTenant(tenant) => {
                let gone = store.delete_tenant(&name("tenant", *tenant), any);
                format!("{gone:?}")
            }
            Step::PutImage(image, content) => {
                let pinned = PinnedImage {
                    digest: Digest::new([*content; 32]),
                    size_bytes: u64::from(*content) + 1,
                };
                let put = store.put_image(&name("image", *image), pinned, any, now);
                format!("{:?}", put.map(|(put, lonely)| (put, sorted(lonely))))
            }
            Step::DeleteImage(image) => {
                let gone = store.delete_image(&name("image", *image), any);
                format!("{gone:?}")
            }
            Step::PutMachine(tenant, machine, kernel, disk) => {
                let machine: MachineName = name("machine", *machine);
                let spec = spec(*kernel, *disk);
                let put = store.put_machine(&name("tenant", *tenant), &machine, &spec, any, now);
                format!("{put:?}")
            }
            Step::Live(id, on) => {
                let life = if *on { State::Deleting } else { State::Defined };
                format!("{:?}", store.set_machine_life(MachineId::new(*id), &life))
            }
            Step::DeleteMachine(tenant, machine) => {
                let machine = name("machine", *machine);
                let gone = store.delete_machine(&name("tenant", *tenant), &machine, any);
                let gone = gone.map(|gone| (gone.record, sorted(gone.unreferenced)));
                format!("{gone:?}")
            }
            Step::Use(tenant, amount) => {
                let totals = MachineTotals::from_numbers([*amount; 8]);
                let added = store.add_machine_usage(&[(TenantId::new(*tenant), totals)]);
                format!("{added:?}")
            }
        }
    }

    fn content(store: &mut dyn Store) -> String {
        let mut machines = store.all_machines().expect("machines");
        machines.sort_by_key(|machine| machine.id);
        for machine in &machines {
            let found = store.machine(&machine.tenant_name, &machine.name);
            assert_eq!(found.expect("a machine"), *machine);
            assert_eq!(
                store.machine_by_id(machine.id).expect("a machine"),
                *machine
            );
        }
        let page = Page {
            after: None,
            limit: 2,
        };
        let images = store.images(&page).expect("images");
        let listed: Vec<_> = (0..3)
            .map(|tenant| format!("{:?}", store.machines(&name("tenant", tenant), &page)))
            .collect();
        let mut digests: Vec<_> = store.digests().expect("digests").into_iter().collect();
        digests.sort_unstable();
        let mut usage = store.machine_usage().expect("sums");
        usage.sort_by_key(|(tenant, _)| *tenant);
        format!("{machines:?} {images:?} {listed:?} {digests:?} {usage:?}")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn it_does_what_the_model_does(steps in steps()) {
            let memory = std::path::Path::new("/dev/shm");
            let path = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir());
            let path = path.expect("a directory");
            let data = DataDir::open(path.path()).expect("a data directory");
            let mut store = SqliteStore::open(&data, Health::default()).expect("a database");
            let mut model = Model::default();
            for step in &steps {
                let (wanted, found) = (make(&mut model, step), make(&mut store, step));
                prop_assert_eq!(found, wanted, "{:?}", step);
            }
            prop_assert_eq!(content(&mut store), content(&mut model));
        }
    }
}
