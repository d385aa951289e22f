//! VM generation id ("Virtual Machine Generation ID", Microsoft, 2012): 16 random bytes in the
//! guest's memory that are others whenever the machine's state was used before.
//!
//! A guest that finds them changed mixes them into its random numbers, so that two clones of one
//! snapshot do not draw the same ones. The firmware tables say where the bytes are, and that an
//! edge on [`layout::EVENT_GSI`] means that they changed.

use std::io;

use vm_memory::Bytes as _;

use crate::layout;
use crate::memory::GuestMemory;
use crate::virtio::InterruptLine;

/// Why there is no new id.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The kernel's generator.
    #[error("getting entropy: {0}")]
    Entropy(io::Error),
    /// Cannot be: every machine has memory there.
    #[error("the generation id's place is not memory")]
    Place,
}

/// The device: it has no registers.
#[derive(Debug)]
pub(crate) struct GenerationId {
    line: InterruptLine,
}

impl GenerationId {
    pub(crate) fn new(line: InterruptLine) -> Self {
        Self { line }
    }

    /// The first id of a new machine; nobody needs to be told.
    pub(crate) fn set(&self, memory: &GuestMemory) -> Result<(), GenerationError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| GenerationError::Entropy(error.into()))?;
        memory
            .write_slice(&id, layout::GENERATION_ID)
            .map_err(|_| GenerationError::Place)
    }

    /// Another id, and the guest is told: for a machine that a snapshot was restored to, before it
    /// runs.
    pub(crate) fn renew(&self, memory: &GuestMemory) -> Result<(), GenerationError> {
        self.set(memory)?;
        self.line.pulse();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use crate::virtio::testing::memory;

    #[test]
    fn every_id_is_another_and_only_renewal_is_told() {
        let told = Event::new().expect("a descriptor");
        let line = InterruptLine::Irqfd(told.try_clone().expect("a descriptor"));
        let (device, memory) = (GenerationId::new(line), memory());
        let id = || {
            let mut id = [0; 16];
            let read = memory.read_slice(&mut id, layout::GENERATION_ID);
            read.map(|()| id).expect("memory")
        };
        device.set(&memory).expect("entropy");
        let first = id();
        assert!(first != [0; 16] && !told.clear());
        device.renew(&memory).expect("entropy");
        assert!(id() != first && told.clear());
    }
}
