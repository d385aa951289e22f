//! The verbs for machines and their images.

use std::fs::File;

use anyhow::{Context, Result};
use insula_types::ImageName;
use serde_json::{Value, json};

use crate::args::{
    ImagesVerb, LimitArg, Look, MachinePatch, MachineRef, MachinesVerb, NetArg, OneMachine, PortArg,
};
use crate::client::Client;
use crate::output::{self, Field, Kind};
use crate::resources::{list, put, show};
use crate::{UsageError, console};

const MACHINES: &[Field] = &[
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("STATE", &["/state"], Kind::Plain),
    Field::new("VCPUS", &["/vcpus"], Kind::Plain),
    Field::new("MEMORY", &["/memory_bytes"], Kind::Bytes),
    Field::new("KERNEL", &["/kernel"], Kind::Plain),
    Field::new("PID", &["/monitor_pid"], Kind::Plain),
];

const MACHINE: &[Field] = &[
    Field::new("name", &["/name"], Kind::Plain),
    Field::new("tenant", &["/tenant"], Kind::Plain),
    Field::new("state", &["/state"], Kind::Plain),
    Field::new("reason", &["/reason"], Kind::Plain),
    Field::new("vcpus", &["/vcpus"], Kind::Plain),
    Field::new("memory", &["/memory_bytes"], Kind::Bytes),
    Field::new("cpu shares", &["/cpu/shares"], Kind::Plain),
    Field::new("cpu limit", &["/cpu/limit_millicores"], Kind::Millicores),
    Field::new("kernel", &["/kernel"], Kind::Plain),
    Field::new("initrd", &["/initrd"], Kind::Plain),
    Field::new("cmdline", &["/cmdline"], Kind::Plain),
    Field::new("address", &["/network/address"], Kind::Plain),
    Field::new("no network", &["/network/missing"], Kind::Plain),
    Field::new("cpu seconds", &["/used/cpu_seconds"], Kind::Plain),
    Field::new("read from disks", &["/used/disk_read_bytes"], Kind::Bytes),
    Field::new(
        "written to disks",
        &["/used/disk_written_bytes"],
        Kind::Bytes,
    ),
    Field::new("resident", &["/used/resident_bytes"], Kind::Bytes),
    Field::new("monitor pid", &["/monitor_pid"], Kind::Plain),
    Field::new("snapshot", &["/snapshot_at"], Kind::Plain),
    Field::new("created", &["/created_at"], Kind::Plain),
];

const IMAGES: &[Field] = &[
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("SIZE", &["/size_bytes"], Kind::Bytes),
    Field::new("DIGEST", &["/digest"], Kind::Plain),
];

const IMAGE: &[Field] = &[
    Field::new("name", &["/name"], Kind::Plain),
    Field::new("size", &["/size_bytes"], Kind::Bytes),
    Field::new("digest", &["/digest"], Kind::Plain),
    Field::new("created", &["/created_at"], Kind::Plain),
];

pub(crate) async fn machines(verb: MachinesVerb) -> Result<()> {
    match verb {
        MachinesVerb::List { tenant, look } => {
            list(&look, &format!("/v1/tenants/{tenant}/machines"), MACHINES).await
        }
        MachinesVerb::Show(OneMachine { machine, look }) => {
            show(&look, &machine.path(), MACHINE).await
        }
        MachinesVerb::Create {
            machine,
            patch,
            start,
            look,
        } => {
            put(&look, &machine.path(), MACHINE, |spec| patch.apply(spec)).await?;
            if start {
                act(&machine, "start", &look).await?;
            }
            Ok(())
        }
        MachinesVerb::Start(OneMachine { machine, look }) => act(&machine, "start", &look).await,
        MachinesVerb::Stop {
            one: OneMachine { machine, look },
            force,
            timeout,
        } => {
            let verb = format!("stop?force={force}&timeout_seconds={timeout}");
            act(&machine, &verb, &look).await
        }
        MachinesVerb::Pause(OneMachine { machine, look }) => act(&machine, "pause", &look).await,
        MachinesVerb::Resume(OneMachine { machine, look }) => act(&machine, "resume", &look).await,
        MachinesVerb::Reset(OneMachine { machine, look }) => act(&machine, "reset", &look).await,
        MachinesVerb::Snapshot(OneMachine { machine, look }) => {
            act(&machine, "snapshot", &look).await
        }
        MachinesVerb::Restore {
            one: OneMachine { machine, look },
            from,
        } => {
            let from = from.map(|name| format!("?from={name}")).unwrap_or_default();
            act(&machine, &format!("restore{from}"), &look).await
        }
        MachinesVerb::Console {
            machine,
            connection,
        } => console::run(&Client::new(&connection)?, &machine).await,
        MachinesVerb::Delete {
            machine,
            force,
            connection,
        } => {
            let path = format!("{}?force={force}", machine.path());
            Client::new(&connection)?.delete(&path).await?;
            output::note(&format!("deleted machine {machine}"));
            Ok(())
        }
    }
}

async fn act(machine: &MachineRef, verb: &str, look: &Look) -> Result<()> {
    let client = Client::new(&look.connection)?;
    let path = format!("{}/{verb}", machine.path());
    let answer = client.post(&path, &json!({})).await?.json()?;
    output::object(look.output, MACHINE, &answer)
}

impl MachinePatch {
    fn apply(&self, mut spec: Value) -> Result<Value> {
        let mut set = |key: &str, canonical: &str, value: Option<Value>| {
            if let (Some(value), Some(object)) = (value, spec.as_object_mut()) {
                object.remove(canonical);
                object.insert(key.to_owned(), value);
            }
        };
        set("kernel", "kernel", self.kernel.as_ref().map(|it| json!(it)));
        set("initrd", "initrd", self.initrd.as_ref().map(|it| json!(it)));
        let cmdline = self.cmdline.as_ref().map(|text| json!(text));
        set("cmdline", "cmdline", cmdline);
        set("vcpus", "vcpus", self.vcpus.map(|count| json!(count)));
        let memory = self.memory.map(|memory| json!(memory));
        set("memory", "memory_bytes", memory);
        let disks = self.disks.iter().map(|disk| {
            let mode = if disk.writable { "rw" } else { "ro" };
            json!({"image": disk.image, "mode": mode, "size": disk.size})
        });
        let disks: Vec<Value> = disks.collect();
        set("disks", "disks", (!disks.is_empty()).then(|| disks.into()));
        if let Some(LimitArg(limits)) = self.disk_limit {
            let disks = spec["disks"].as_array_mut();
            let disks = disks.filter(|disks| !disks.is_empty());
            let disks = disks.ok_or_else(|| usage("there is no disk to limit: see --disk"))?;
            for disk in disks {
                disk["limits"] = json!(limits);
            }
        }
        self.apply_network(&mut spec)?;
        if let Some(shares) = self.cpu_shares {
            spec["cpu"]["shares"] = json!(shares);
        }
        if let Some(limit) = self.cpu_limit {
            spec["cpu"]["limit_millicores"] = json!(limit.get());
        }
        if spec["kernel"].is_null() {
            return Err(usage(
                "a machine boots a kernel: say which image with --kernel",
            ));
        }
        Ok(spec)
    }

    fn apply_network(&self, spec: &mut Value) -> Result<()> {
        let ports: Vec<_> = self.ports.iter().map(|PortArg(port)| port).collect();
        let wanted = !ports.is_empty() || self.net_limit.is_some();
        match self.net {
            Some(NetArg::Off) if wanted => {
                return Err(usage(
                    "ports and limits are of a network: not with --net off",
                ));
            }
            Some(NetArg::Off) => spec["net"] = Value::Null,
            Some(NetArg::On) if spec["net"].is_null() => spec["net"] = json!({}),
            None if wanted && spec["net"].is_null() => spec["net"] = json!({}),
            _ => {}
        }
        if !ports.is_empty() {
            spec["net"]["ports"] = json!(ports);
        }
        if let Some(LimitArg(limits)) = self.net_limit {
            spec["net"]["limits"] = json!(limits);
        }
        Ok(())
    }
}

fn usage(why: &str) -> anyhow::Error {
    UsageError(why.to_owned()).into()
}

pub(crate) async fn images(verb: ImagesVerb) -> Result<()> {
    let path = |image: &ImageName| format!("/v1/images/{image}");
    match verb {
        ImagesVerb::List(look) => list(&look, "/v1/images", IMAGES).await,
        ImagesVerb::Show { image, look } => show(&look, &path(&image), IMAGE).await,
        ImagesVerb::Put { image, file, look } => {
            let opened = File::open(&file).with_context(|| file.display().to_string())?;
            let client = Client::new(&look.connection)?;
            let answer = client.put_file(&path(&image), opened).await?.json()?;
            output::object(look.output, IMAGE, &answer)
        }
        ImagesVerb::Delete { image, connection } => {
            Client::new(&connection)?.delete(&path(&image)).await?;
            output::note(&format!("deleted image {image}"));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch() -> MachinePatch {
        MachinePatch {
            kernel: Some("debian-6.1".parse().unwrap()),
            initrd: None,
            cmdline: None,
            disks: vec!["root:rw".parse().unwrap()],
            vcpus: Some(2),
            memory: Some(insula_types::Bytes::mib(512)),
            net: None,
            ports: vec!["20022:22".parse().unwrap()],
            disk_limit: Some("10MB,200".parse().unwrap()),
            net_limit: Some("5MB".parse().unwrap()),
            cpu_shares: None,
            cpu_limit: Some("1500m".parse().unwrap()),
        }
    }

    #[test]
    fn a_patch_of_nothing_is_a_spec() {
        let spec = patch().apply(json!({})).unwrap();
        let spec: insula_types::MachineSpec = serde_json::from_value(spec).unwrap();
        assert_eq!((spec.vcpus, spec.memory.get()), (2, 512 << 20));
        assert_eq!(spec.disks.len(), 1);
        let limits = spec.disks[0].limits.unwrap();
        let bytes = limits.bytes_per_second.map(insula_types::Bytes::get);
        let operations = limits.operations_per_second.map(u64::from);
        assert_eq!((bytes, operations), (Some(10_000_000), Some(200)));
        let net = spec.net.unwrap();
        assert_eq!(net.ports.len(), 1);
        assert_eq!(net.limits.unwrap().operations_per_second, None);
        assert_eq!(spec.cpu.limit.map(|limit| limit.get()), Some(1_500));
    }

    #[test]
    fn a_patch_keeps_what_it_does_not_name() {
        let spec = patch().apply(json!({})).unwrap();
        let spec: insula_types::MachineSpec = serde_json::from_value(spec).unwrap();
        let shown = serde_json::to_value(&spec).unwrap();
        let change = MachinePatch {
            kernel: None,
            disks: Vec::new(),
            net: Some(NetArg::On),
            ports: Vec::new(),
            disk_limit: None,
            net_limit: None,
            vcpus: None,
            memory: Some(insula_types::Bytes::mib(64)),
            cpu_limit: None,
            ..patch()
        };
        let changed = change.apply(shown).unwrap();
        let changed: insula_types::MachineSpec = serde_json::from_value(changed).unwrap();
        assert_eq!((changed.vcpus, changed.memory.get()), (2, 64 << 20));
        assert_eq!((&changed.disks, changed.cpu), (&spec.disks, spec.cpu));
        assert_eq!(changed.net, spec.net);
        let off = MachinePatch {
            net: Some(NetArg::Off),
            ports: Vec::new(),
            net_limit: None,
            ..patch()
        };
        let changed = off.apply(serde_json::to_value(&changed).unwrap()).unwrap();
        let changed: insula_types::MachineSpec = serde_json::from_value(changed).unwrap();
        assert_eq!(changed.net, None);
    }

    #[test]
    fn without_a_kernel_it_is_no_machine() {
        let nothing = MachinePatch {
            kernel: None,
            ..patch()
        };
        assert!(nothing.apply(json!({})).is_err());
    }
}
