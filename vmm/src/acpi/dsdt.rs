//! The differentiated system description: what the machine has, in ACPI's own language.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, PackageBuilder, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

/// Length of a table's header (ACPI 6.5, 5.2.6).
const HEADER_BYTES: u32 = 36;
/// Notification that the power button was pressed (ACPI 6.5, table 5.202).
const BUTTON_PRESSED: u8 = 0x80;
/// Notification of a device that its status changed; the generation id's own meaning.
const GENERATION_CHANGED: u8 = 0x80;

pub(super) fn build(virtio_devices: usize) -> Vec<u8> {
    let mut code = Vec::new();
    sleep_states(&mut code);
    serial_port(&mut code);
    for slot in 0..virtio_devices {
        virtio_device(&mut code, slot);
    }
    generation_id(&mut code);
    event_device(&mut code);
    power_button(&mut code);
    // ACPI 6.5, 5.2.11.1: from revision 2 on integers have 64 bits.
    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        2,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&code);
    table.as_slice().to_vec()
}

/// `\_S5`: the sleep type that powers off (ACPI 6.5, 7.4.2).
fn sleep_states(code: &mut Vec<u8>) {
    let mut package = PackageBuilder::new();
    for element in [layout::SLEEP_TYPE_S5, 0, 0, 0] {
        package.add_element(&element);
    }
    Name::new(Path::new("_S5_"), &package).to_aml_bytes(code);
}

/// A device under `\_SB`, where all of a system's devices are.
fn device(code: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    let device = Device::new(Path::new(name), children);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(code);
}

/// All our lines are edge-triggered, active high, and nobody shares one.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn serial_port(code: &mut Vec<u8>) {
    let port = layout::COM1_PORT;
    let (line, ports) = (line(layout::COM1_GSI), IO::new(port, port, 1, 8));
    device(
        code,
        "COM1",
        vec![
            // 16550A-compatible COM port.
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&line, &ports]),
            ),
        ],
    );
}

/// `LNRO0005` is the id under which Linux looks for virtio-mmio (`drivers/virtio/virtio_mmio.c`).
fn virtio_device(code: &mut Vec<u8>, slot: usize) {
    let Some((base, gsi)) = layout::virtio_slot(slot) else {
        return;
    };
    let (Ok(base), Ok(bytes)) = (
        u32::try_from(base.0),
        u32::try_from(layout::VIRTIO_MMIO_BYTES),
    ) else {
        return;
    };
    let registers = Memory32Fixed::new(true, base, bytes);
    let line = line(gsi);
    let number = u32::try_from(slot).unwrap_or_default();
    device(
        code,
        &format!("V{slot:03}"),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Device accesses are cache coherent (ACPI 6.5, 6.2.17).
            &Name::new(Path::new("_CCA"), &1_u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&registers, &line]),
            ),
        ],
    );
}

/// "Virtual Machine Generation ID" (Microsoft, 2012): where the 16 bytes are.
fn generation_id(code: &mut Vec<u8>) {
    let mut address = PackageBuilder::new();
    let at = layout::GENERATION_ID.0;
    address.add_element(&u32::try_from(at & 0xffff_ffff).unwrap_or_default());
    address.add_element(&u32::try_from(at >> 32).unwrap_or_default());
    device(
        code,
        "VGEN",
        vec![
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &address),
        ],
    );
}

/// Generic event device (ACPI 6.5, 5.6.9): its line means that the generation id has changed.
fn event_device(code: &mut Vec<u8>) {
    let target = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&target, &GENERATION_CHANGED);
    let line = line(layout::EVENT_GSI);
    device(
        code,
        "EVTS",
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&notify]),
        ],
    );
}

/// The control-method power button (ACPI 6.5, 4.8.2.2.1.2), and an event device of its own for it:
/// hardware-reduced ACPI has no fixed one.
fn power_button(code: &mut Vec<u8>) {
    let button = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    device(code, "PWRB", vec![&button]);
    let target = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&target, &BUTTON_PRESSED);
    let line = line(layout::POWER_BUTTON_GSI);
    device(
        code,
        "PWRE",
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &1_u8),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&notify]),
        ],
    );
}
