//! What a jailed monitor uses until its guest's first instruction, where KVM opens on the machine
//! itself: with a guest of a few instructions, the first of which print a letter.

use std::fs::{self, File};
use std::io::{self, Read};

use rustix::fs::{MemfdFlags, memfd_create};

#[path = "../../tests/monitor/kernel.rs"]
mod kernel;

use crate::compare::{MEMORY_MIB, Running, processor_time};
use crate::table::{Promise, row};

/// Says the row. `false` if the promise does not hold.
pub(crate) fn native(rounds: usize) -> io::Result<bool> {
    let mut figures = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let image = kernel_file()?;
        let mut running = Running::insula(&image, None)?;
        let mut letter = [0];
        running.console()?.read_exact(&mut letter)?;
        figures.push(processor_time(running.pid())?.as_secs_f64() * 1000.0);
    }
    let what = format!(
        "CPU of the monitor and its jail to the first letter of a guest of {MEMORY_MIB} MiB, ms"
    );
    Ok(row(&what, &figures, &[], Promise::AtMost(8.0)))
}

fn kernel_file() -> io::Result<File> {
    let file = memfd_create("kernel", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(file);
    io::Write::write_all(&mut file, &kernel::image())?;
    // As one that the host opens.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    fs::File::open(path)
}
