//! The device status register and its state machine (virtio 1.2, 2.1 and 3.1.1).

/// The bits that the driver has set so far, and NEEDS_RESET, which the device sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status(u32);

/// What a write to the register means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Zero was written: everything back to the start.
    Reset,
    /// The driver asks whether its features are good.
    FeaturesOk,
    /// The driver goes live.
    DriverOk,
    /// A step without consequence: ACKNOWLEDGE, DRIVER, FAILED, or the same again.
    Noted,
    /// Not a step that leads from here; nothing changes.
    Refused,
}

impl Status {
    pub(super) const ACKNOWLEDGE: u32 = 1;
    pub(super) const DRIVER: u32 = 2;
    pub(super) const DRIVER_OK: u32 = 4;
    pub(super) const FEATURES_OK: u32 = 8;
    pub(super) const NEEDS_RESET: u32 = 64;
    pub(super) const FAILED: u32 = 128;

    /// As a snapshot holds it. `None` where no driver can have come to this.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let known = Self::ACKNOWLEDGE
            | Self::DRIVER
            | Self::DRIVER_OK
            | Self::FEATURES_OK
            | Self::NEEDS_RESET
            | Self::FAILED;
        let in_order = [
            Self::ACKNOWLEDGE,
            Self::DRIVER,
            Self::FEATURES_OK,
            Self::DRIVER_OK,
        ]
        .windows(2)
        .all(|pair| bits & pair[1] == 0 || bits & pair[0] != 0);
        (bits & !known == 0 && in_order).then_some(Self(bits))
    }

    /// As the driver reads it.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    pub(super) fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }

    /// Features are being negotiated.
    pub(super) fn negotiating(self) -> bool {
        self.has(Self::ACKNOWLEDGE | Self::DRIVER)
            && self.0 & (Self::FEATURES_OK | Self::FAILED) == 0
    }

    /// Queues may be set up: features are agreed and the driver is not live.
    pub(super) fn configuring(self) -> bool {
        self.has(Self::FEATURES_OK) && self.0 & (Self::DRIVER_OK | Self::FAILED) == 0
    }

    /// The driver is live, and the device works.
    pub(super) fn live(self) -> bool {
        self.has(Self::DRIVER_OK) && self.0 & (Self::FAILED | Self::NEEDS_RESET) == 0
    }

    /// What the driver's write means from here.
    pub(super) fn step(self, written: u32) -> Step {
        if written == 0 {
            return Step::Reset;
        }
        let driver_bits = self.0 & !Self::NEEDS_RESET;
        let written = written & !Self::NEEDS_RESET;
        // 2.1.1: the driver MUST NOT clear a bit; and a device that failed waits for a reset.
        if written & driver_bits != driver_bits || self.has(Self::FAILED) {
            return Step::Refused;
        }
        let new = written & !driver_bits;
        match new {
            0 | Self::FAILED => Step::Noted,
            Self::ACKNOWLEDGE => Step::Noted,
            Self::DRIVER if self.has(Self::ACKNOWLEDGE) => Step::Noted,
            // Some drivers take the first two steps at once.
            both if both == Self::ACKNOWLEDGE | Self::DRIVER => Step::Noted,
            Self::FEATURES_OK if self.negotiating() => Step::FeaturesOk,
            Self::DRIVER_OK if self.configuring() => Step::DriverOk,
            _ => Step::Refused,
        }
    }

    #[must_use]
    pub(super) fn without_needs_reset(self) -> Self {
        Self(self.0 & !Self::NEEDS_RESET)
    }

    #[must_use]
    pub(super) fn with(self, bits: u32) -> Self {
        Self(self.0 | bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks every status that can be reached and every write to it.
    #[test]
    fn every_step_from_everywhere() {
        for bits in 0..=0xff_u32 {
            let Some(status) = Status::from_bits(bits) else {
                continue;
            };
            for written in 0..=0x1ff_u32 {
                let step = status.step(written);
                if written == 0 {
                    assert_eq!(step, Step::Reset);
                    continue;
                }
                let after = status.with(written & !Status::NEEDS_RESET);
                match step {
                    Step::Reset => panic!("{bits:#x} <- {written:#x} is no reset"),
                    Step::Refused => {}
                    Step::FeaturesOk => assert!(status.negotiating() && after.configuring()),
                    Step::DriverOk => assert!(status.configuring()),
                    Step::Noted => assert!(
                        !status.configuring() || !after.has(Status::DRIVER_OK),
                        "{bits:#x} <- {written:#x} goes live unseen"
                    ),
                }
                if step != Step::Refused {
                    assert!(Status::from_bits(after.bits()).is_some());
                    let cleared = bits & !Status::NEEDS_RESET & !written;
                    assert_eq!(cleared, 0, "{bits:#x} <- {written:#x} cleared a bit");
                }
            }
        }
    }

    #[test]
    fn linux_takes_these_steps() {
        let mut status = Status::default();
        for (written, step) in [
            (1, Step::Noted),
            (3, Step::Noted),
            (0xb, Step::FeaturesOk),
            (0xf, Step::DriverOk),
        ] {
            assert_eq!(status.step(written), step);
            status = status.with(written);
        }
        assert!(status.live());
        assert_eq!(status.step(0x8f), Step::Noted);
        assert_eq!(status.with(0x80).step(0x8f), Step::Refused);
    }
}
