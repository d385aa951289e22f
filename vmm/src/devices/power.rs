//! The ACPI registers for reset and sleep that our FADT names (ACPI 6.5, 4.8.3.6 and 4.8.3.7).

use crate::exit::{ExitReason, RebootBy};
use crate::layout::{
    RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
};

/// Sleep control register: SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control register: where SLP_TYP starts; it has three bits.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// They hold nothing: a write acts at once, and nothing ever wakes.
pub(super) struct PowerRegisters;

impl PowerRegisters {
    /// `None` if it is none of these ports.
    pub(super) fn read(port: u16) -> Option<u8> {
        matches!(port, RESET_PORT | SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT).then_some(0)
    }

    pub(super) fn write(port: u16, value: u8) -> Option<ExitReason> {
        match port {
            RESET_PORT if value == RESET_VALUE => Some(ExitReason::Reboot(RebootBy::Acpi)),
            SLEEP_CONTROL_PORT => {
                let sleep_type = value >> SLEEP_TYPE_SHIFT & 0b111;
                let enabled = value & SLEEP_ENABLE != 0;
                (enabled && sleep_type == SLEEP_TYPE_S5).then_some(ExitReason::Poweroff)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_values_that_the_tables_name_act() {
        let mut acting = Vec::new();
        for port in [RESET_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, 0x80] {
            for value in 0..=u8::MAX {
                acting
                    .extend(PowerRegisters::write(port, value).map(|reason| (port, value, reason)));
            }
        }
        let resets = acting.iter().filter(|(port, ..)| *port == RESET_PORT);
        assert_eq!(resets.count(), 1);
        let sleeps = acting
            .iter()
            .filter(|(port, ..)| *port == SLEEP_CONTROL_PORT);
        // The four bits beside enable and type are ignored.
        assert_eq!(sleeps.count(), 16);
        assert_eq!(acting.len(), 17);
    }
}
