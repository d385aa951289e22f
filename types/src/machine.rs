//! What a caller asks of a machine: processors, memory, what it boots, its disks.

use std::collections::BTreeSet;
use std::num::{NonZeroU16, NonZeroU64};

use serde::{Deserialize, Serialize};

use crate::name::ImageName;
use crate::quantity::Bytes;
use crate::spec::{CpuEnvelope, RawCpu, SpecErrors};

/// Processors of one machine, at most.
pub const VCPUS_MAX: u8 = 32;
/// Disks of one machine, at most: what interrupt lines are left beside the other devices.
pub const DISKS_MAX: usize = 12;
/// Ports that lead to one machine, at most.
pub const PORTS_MAX: usize = 64;
/// Memory comes in whole pages.
const PAGE_BYTES: u64 = 4096;
/// Smaller than any kernel that boots.
const MEMORY_LEAST: Bytes = Bytes::mib(2);
const MEMORY_MOST: Bytes = Bytes::mib(1 << 20);
/// What an x86 kernel takes, its end mark left out.
const COMMAND_LINE_MAX_BYTES: usize = 2047;
/// A distribution's kernel then speaks on the console, and a panic ends the machine.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// Whether a guest may write to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Only read: all machines with this image share its bytes.
    Ro,
    /// What it writes is kept for this machine, and the image stays as it is.
    Rw,
}

/// How much a disk may read and write, or a network receive and, apart from that, send: in the long
/// run, and a second's worth at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Throughput {
    /// Bytes of what is read, written, received or sent, in a second.
    #[serde(default)]
    pub bytes_per_second: Option<Bytes>,
    /// Requests or packets in a second.
    #[serde(default)]
    pub operations_per_second: Option<NonZeroU64>,
}

impl Throughput {
    fn check(self, path: &str, errors: &mut SpecErrors) {
        if self.bytes_per_second.is_some_and(|bytes| bytes.get() == 0) {
            let path = format!("{path}.bytes_per_second");
            errors.push(&path, "is more than nothing");
        }
    }
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineDisk {
    /// Its content at first.
    pub image: ImageName,
    /// Whether the guest may write.
    pub mode: DiskMode,
    /// Its size, where that is to be more than the image's.
    #[serde(rename = "size_bytes")]
    pub size: Option<Bytes>,
    /// Its limits; none when left out.
    pub limits: Option<Throughput>,
}

/// What a forwarded port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host's that leads to one of the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// What is spoken there.
    #[serde(default)]
    pub protocol: Protocol,
    /// The host's port.
    pub host: NonZeroU16,
    /// The machine's port.
    pub machine: NonZeroU16,
}

/// A machine's network: an address of its own, the way out, and the ports that lead in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineNet {
    /// Ports that lead in.
    #[serde(default)]
    pub ports: Vec<PortForward>,
    /// Its limits, each way; none when left out.
    #[serde(default)]
    pub limits: Option<Throughput>,
}

impl MachineNet {
    fn check(&self, errors: &mut SpecErrors) {
        if self.ports.len() > PORTS_MAX {
            errors.push("net.ports", format_args!("are at most {PORTS_MAX}"));
        }
        if let Some(limits) = self.limits {
            limits.check("net.limits", errors);
        }
        let mut seen = BTreeSet::new();
        for (number, port) in self.ports.iter().enumerate() {
            if !seen.insert((port.protocol, port.host)) {
                let path = format!("net.ports[{number}].host");
                errors.push(&path, "leads in already, by another entry");
            }
        }
    }
}

/// A machine as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawMachineSpec")]
pub struct MachineSpec {
    /// Processors.
    pub vcpus: u8,
    /// Memory, in whole pages.
    #[serde(rename = "memory_bytes")]
    pub memory: Bytes,
    /// CPU shares, reservation, limit, within the tenant's.
    pub cpu: CpuEnvelope,
    /// What it boots.
    pub kernel: ImageName,
    /// Its initial ramdisk.
    pub initrd: Option<ImageName>,
    /// What the kernel is told.
    pub cmdline: String,
    /// In the order in which the guest finds them.
    pub disks: Vec<MachineDisk>,
    /// Its network; none when left out.
    pub net: Option<MachineNet>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    image: ImageName,
    mode: Option<DiskMode>,
    #[serde(alias = "size_bytes")]
    size: Option<Bytes>,
    limits: Option<Throughput>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMachineSpec {
    vcpus: Option<u8>,
    #[serde(alias = "memory_bytes")]
    memory: Option<Bytes>,
    #[serde(default)]
    cpu: RawCpu,
    kernel: ImageName,
    initrd: Option<ImageName>,
    cmdline: Option<String>,
    #[serde(default)]
    disks: Vec<RawDisk>,
    net: Option<MachineNet>,
}

impl TryFrom<RawMachineSpec> for MachineSpec {
    type Error = SpecErrors;

    fn try_from(raw: RawMachineSpec) -> Result<Self, SpecErrors> {
        let mut errors = SpecErrors::default();
        let vcpus = raw.vcpus.unwrap_or(1);
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            errors.push("vcpus", format_args!("goes from 1 to {VCPUS_MAX}"));
        }
        let memory = raw.memory.unwrap_or(Bytes::mib(256));
        let whole = memory.get().is_multiple_of(PAGE_BYTES);
        if !whole || !(MEMORY_LEAST..=MEMORY_MOST).contains(&memory) {
            let (least, most) = (MEMORY_LEAST.get(), MEMORY_MOST.get());
            errors.push(
                "memory",
                format_args!("goes from {least} to {most} bytes, in whole pages of {PAGE_BYTES}"),
            );
        }
        let cmdline = raw.cmdline.unwrap_or_else(|| COMMAND_LINE.to_owned());
        if cmdline.len() > COMMAND_LINE_MAX_BYTES {
            let bytes = cmdline.len();
            errors.push(
                "cmdline",
                format_args!("has {bytes} bytes, and a kernel takes {COMMAND_LINE_MAX_BYTES}"),
            );
        }
        if !cmdline.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            errors.push("cmdline", "holds printable ASCII only");
        }
        if raw.disks.len() > DISKS_MAX {
            errors.push("disks", format_args!("are at most {DISKS_MAX}"));
        }
        let mut disks = Vec::with_capacity(raw.disks.len());
        for (number, disk) in raw.disks.into_iter().enumerate() {
            let mode = disk.mode.unwrap_or(DiskMode::Ro);
            if disk.size.is_some() && mode == DiskMode::Ro {
                let path = format!("disks[{number}].size");
                errors.push(&path, "a disk that is only read is as large as its image");
            }
            if let Some(limits) = disk.limits {
                limits.check(&format!("disks[{number}].limits"), &mut errors);
            }
            disks.push(MachineDisk {
                image: disk.image,
                mode,
                size: disk.size,
                limits: disk.limits,
            });
        }
        let cpu = raw.cpu.check(&mut errors);
        if let Some(net) = &raw.net {
            net.check(&mut errors);
        }
        errors.into_result(Self {
            vcpus,
            memory,
            cpu,
            kernel: raw.kernel,
            initrd: raw.initrd,
            cmdline,
            disks,
            net: raw.net,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MachineSpec, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let spec = parse(r#"{"kernel":"debian"}"#).expect("enough");
        assert_eq!((spec.vcpus, spec.memory), (1, Bytes::mib(256)));
        assert_eq!(spec.cmdline, COMMAND_LINE);
        assert!(spec.disks.is_empty() && spec.initrd.is_none());
        assert_eq!(spec.net, None);
    }

    #[test]
    fn limits_are_more_than_nothing() {
        let with = |disk: &str, net: &str| {
            parse(&format!(
                r#"{{"kernel":"debian","disks":[{{"image":"root","limits":{disk}}}],
                "net":{{"limits":{net}}}}}"#
            ))
        };
        let bytes = r#"{"bytes_per_second":"10MB"}"#;
        let spec = with(bytes, r#"{"operations_per_second":7}"#).expect("limits");
        let disk = spec.disks[0].limits.expect("one");
        assert_eq!(disk.bytes_per_second.map(Bytes::get), Some(10_000_000));
        let net = spec.net.and_then(|net| net.limits).expect("one");
        assert_eq!(net.operations_per_second.map(NonZeroU64::get), Some(7));
        assert_eq!(with("null", "null").expect("none").disks[0].limits, None);
        let none = r#"{"bytes_per_second":0}"#;
        let refused = with(none, none)
            .expect_err("a disk that never moves")
            .to_string();
        for path in ["disks[0].limits.bytes", "net.limits.bytes"] {
            assert!(refused.contains(path), "{refused}");
        }
        with(r#"{"operations_per_second":0}"#, "null").expect_err("the same");
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let text = r#"{"vcpus":4,"memory":"1GiB","cpu":{"limit":"1500m","shares":"low"},
            "kernel":"debian-6-1","initrd":"ramdisk","cmdline":"root=/dev/vda",
            "disks":[{"image":"root","mode":"rw","size":"4GiB"},{"image":"tools"}],
            "net":{"ports":[{"host":20022,"machine":22},
                            {"protocol":"udp","host":20022,"machine":53}]}}"#;
        let spec = parse(text).expect("a spec");
        let printed = serde_json::to_string(&spec).expect("prints");
        assert!(
            printed.contains(r#""memory_bytes":1073741824"#),
            "{printed}"
        );
        assert_eq!(parse(&printed).expect("its own"), spec);
    }

    #[test]
    fn all_mistakes_are_named_at_once() {
        let disks = r#"{"image":"a","size":"1GiB"},"#.repeat(13);
        let text = format!(
            r#"{{"vcpus":33,"memory":4097,"kernel":"k","cmdline":"\u0007",
               "cpu":{{"reservation":2,"limit":1}},"disks":[{}],
               "net":{{"ports":[{{"host":9,"machine":1}},{{"host":9,"machine":2}}]}}}}"#,
            disks.trim_end_matches(',')
        );
        let mistakes = parse(&text).expect_err("wrong").to_string();
        for word in [
            "vcpus",
            "memory",
            "cmdline",
            "cpu.reservation",
            "disks:",
            "disks[3]",
            "net.ports[1].host",
        ] {
            assert!(mistakes.contains(word), "{word}: {mistakes}");
        }
        assert!(parse(r#"{"kernel":"k","colour":"blue"}"#).is_err());
        assert!(parse(r#"{"vcpus":1}"#).is_err());
        let port = |port: &str| parse(&format!(r#"{{"kernel":"k","net":{{"ports":[{port}]}}}}"#));
        assert!(port(r#"{"host":1,"machine":1}"#).is_ok());
        assert!(port(r#"{"host":0,"machine":1}"#).is_err());
        assert!(port(r#"{"host":65536,"machine":1}"#).is_err());
        assert!(port(r#"{"host":1,"machine":1,"protocol":"sctp"}"#).is_err());
    }
}
