//! What is shown, in an order: later cases go on with the disk that earlier ones leave.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use insula_vmm::Hypervisor;
use insula_vmm::exit::{ExitReason, RebootBy};
use insula_vmm::virtio::block::{Access, BaseId, Disk, Overlay, RawDisk};

use crate::devices::devices;
use crate::guest::{FILES, Guest, file};

type Case = fn(&Hypervisor) -> String;

pub(crate) const ALL: [(&str, Case); 8] = [
    (
        "an unmodified kernel, four vCPUs, devices, ext4 root, pause, reboot",
        first_boot,
    ),
    (
        "what was written is there after the reboot; power off",
        second_boot,
    ),
    (
        "an overlay takes the writes, its base stays as it was",
        overlay_boot,
    ),
    (
        "the overlay is read back on one vCPU; the watchdog of a guest that is silent",
        overlay_again,
    ),
    (
        "network both ways, another's address, vsock both ways, balloon",
        devices,
    ),
    ("the same kernel as ELF, by its PVH entry", pvh_boot),
    (
        "a jailed monitor, its console, a host that dies, the power button",
        crate::jailed::life,
    ),
    (
        "saved, ended, and gone on as two clones side by side",
        crate::jailed::clones,
    ),
];

/// Hash of a file that the guest writes, for the next boot.
const HASH: &str = "/bed/expected";

pub(crate) fn raw() -> Box<dyn Disk> {
    Box::new(RawDisk::new(file("root.ext4"), Access::ReadWrite).expect("a disk"))
}

fn overlay() -> Box<dyn Disk> {
    let base = File::open(Path::new(FILES).join("root.ext4")).expect("the base");
    let path = Path::new(FILES).join("overlay");
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    let overlay = Overlay::open(base, BaseId([1; 32]), file.expect("a file"), None);
    Box::new(overlay.expect("an overlay"))
}

fn first_boot(hypervisor: &Hypervisor) -> String {
    let start = Instant::now();
    let mut guest = Guest::boot(hypervisor, 4, raw());
    let booted = start.elapsed();
    assert_eq!(guest.run("nproc"), "4");
    assert_eq!(guest.run("echo a; echo b | tr b c"), "a\nc");
    assert_eq!(guest.try_run("false").0, 1);
    let root = guest.run("grep ' / ext4 ' /proc/mounts");
    assert!(root.starts_with("/dev/vda / ext4 rw"), "{root}");
    assert_eq!(guest.run("cat /sys/block/vda/serial"), "root-disk");
    assert_eq!(
        guest.run("cat /sys/class/misc/hw_random/rng_current"),
        "virtio_rng.0"
    );
    assert_eq!(guest.run("head -c 32 /dev/hwrng | wc -c"), "32");
    let clock = guest.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    guest.run("head -c 3000000 /dev/urandom > /data && sync");
    let hash = guest.run("sha256sum /data");
    std::fs::write(HASH, &hash).expect("room");
    guest.run("rm -f /gone; head -c 2000000 /dev/urandom > /gone; sync; rm /gone; fstrim /");
    pause(&mut guest);
    let statistics = guest.machine.statistics();
    let reason = guest.end_by("sync; reboot -f");
    assert_eq!(reason, ExitReason::Reboot(RebootBy::Acpi));
    for (device, failures, why) in &statistics.device_failures {
        assert_eq!((failures, why), (&0, &None), "{device}");
    }
    format!(
        "init after {:.1} s, clock {clock}, {:?}",
        booted.as_secs_f64(),
        statistics.exits
    )
}

/// The guest prints its uptime ten times a second: while it is paused nothing comes, and after it
/// the clock goes on where it was.
fn pause(guest: &mut Guest) {
    let start = guest.screen.len();
    guest.run("(while :; do cut -d ' ' -f 1 /proc/uptime; sleep 0.1; done) & true");
    let ticks = |text: &str| -> Vec<f64> {
        let (complete, _) = text.rsplit_once('\n').unwrap_or_default();
        complete
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect()
    };
    let enough = |count: usize| move |text: &str| (ticks(text).len() >= count).then_some(());
    guest.screen.wait(start, "ticks", enough(5));
    guest.machine.pause().expect("it runs");
    let frozen = guest.screen.len();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(guest.screen.len(), frozen, "a paused guest prints");
    let before = ticks(&guest.screen.since(start)).len();
    guest.machine.resume().expect("it is paused");
    guest
        .screen
        .wait(start, "ticks after the pause", enough(before + 5));
    let all = ticks(&guest.screen.since(start));
    let step = all[before] - all[before - 1];
    assert!(
        step < 3.0,
        "the clock went on by {step} s over a pause of 4 s"
    );
    // Its output may still come between; the command's end is what counts.
    guest.try_run("kill $!");
}

fn second_boot(hypervisor: &Hypervisor) -> String {
    let mut guest = Guest::boot(hypervisor, 2, raw());
    let expected = std::fs::read_to_string(HASH).expect("the first boot's");
    assert_eq!(guest.run("sha256sum /data"), expected);
    assert_eq!(guest.run("test ! -e /gone; echo $?"), "0");
    assert_eq!(guest.end_by("sync; poweroff -f"), ExitReason::Poweroff);
    String::new()
}

fn hash_of_base() -> Vec<u8> {
    std::fs::read(Path::new(FILES).join("root.ext4")).expect("the base")
}

fn overlay_boot(hypervisor: &Hypervisor) -> String {
    let before = hash_of_base();
    let mut guest = Guest::boot(hypervisor, 2, overlay());
    let expected = std::fs::read_to_string(HASH).expect("the first boot's");
    assert_eq!(guest.run("sha256sum /data"), expected);
    guest.run("head -c 1000000 /dev/urandom > /data2 && sync");
    let hash = guest.run("sha256sum /data /data2");
    std::fs::write(HASH, &hash).expect("room");
    assert_eq!(
        guest.end_by("sync; reboot -f"),
        ExitReason::Reboot(RebootBy::Acpi)
    );
    assert!(hash_of_base() == before, "the base has changed");
    String::new()
}

fn overlay_again(hypervisor: &Hypervisor) -> String {
    let mut guest = Guest::boot(hypervisor, 1, overlay());
    assert_eq!(guest.run("nproc"), "1");
    let expected = std::fs::read_to_string(HASH).expect("the boot before");
    assert_eq!(guest.run("sha256sum /data /data2"), expected);
    guest.run("insmod /modules/watchdog.ko; insmod /modules/wdat_wdt.ko timeout=3");
    let identity = guest.run("cat /sys/class/watchdog/watchdog0/identity");
    assert_eq!(guest.run("cat /sys/class/watchdog/watchdog0/timeout"), "3");
    // It says for longer than that that it is well, and takes leave of the watchdog by its letter.
    guest.run("(for i in 1 2 3 4 5; do echo; sleep 1; done; printf V) > /dev/watchdog");
    let state = "cat /sys/class/watchdog/watchdog0/state";
    assert_eq!(guest.run(state), "inactive");
    // Without that letter it stays on.
    let start = Instant::now();
    let reason = guest.end_by("sync; echo > /dev/watchdog");
    assert_eq!(reason, ExitReason::Reboot(RebootBy::Watchdog));
    let seconds = start.elapsed().as_secs_f64();
    format!("{identity}, started anew after {seconds:.1} s of silence")
}

/// Without the decompressor, and so without its address-space randomisation as well.
fn pvh_boot(hypervisor: &Hypervisor) -> String {
    let start = Instant::now();
    let mut guest = Guest::boot_with(hypervisor, "vmlinux", 2, raw(), Vec::new());
    let booted = start.elapsed().as_secs_f64();
    assert_eq!(guest.run("nproc"), "2");
    let command_line = guest.run("cat /proc/cmdline");
    assert!(command_line.contains("console=ttyS0"), "{command_line}");
    // What the PVH entry puts there (kernel, `arch/x86/platform/pvh/enlighten.c`): 0xb0.
    let loader = guest.run("cat /proc/sys/kernel/bootloader_type");
    assert_eq!(loader, "176");
    assert_eq!(guest.end_by("sync; poweroff -f"), ExitReason::Poweroff);
    format!("init after {booted:.1} s")
}
