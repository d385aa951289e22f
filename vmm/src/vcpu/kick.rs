//! Getting a vCPU thread out of the guest.
//!
//! A signal alone would be lost if it came between the look at the commands and the call that
//! enters the guest. Its handler therefore also sets `immediate_exit` in the page that the thread
//! shares with KVM: then that call returns at once (KVM API, 5, `immediate_exit`).
#![allow(
    unsafe_code,
    reason = "a signal handler that writes to the page shared with KVM"
)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::raw::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::kvm::{KvmError, failed};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs. Has neither initializer nor
    /// destructor to run, so that the handler may look at it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal: one that nothing else uses.
pub(super) fn signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    let immediate_exit = IMMEDIATE_EXIT.with(Cell::get);
    if !immediate_exit.is_null() {
        // SAFETY: not null means that a `Kickable` of this very thread lives, and with it the
        // shared page. One byte, written atomically, is all that happens here: no lock, no
        // allocation, no errno.
        unsafe { AtomicU8::from_ptr(immediate_exit) }.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler, once for the process.
pub(super) fn install() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED
        .get_or_init(|| register_signal_handler(signal(), on_kick).map_err(|error| error.errno()));
    installed.map_err(|number| failed("sigaction")(kvm_ioctls::Error::new(number)))
}

/// A vCPU whose thread can be kicked. Stays on the thread that made it.
#[derive(Debug)]
pub(super) struct Kickable {
    vcpu: VcpuFd,
    /// Not `Send`: the pointer is this thread's.
    stays: PhantomData<*const ()>,
}

impl Kickable {
    pub(super) fn new(mut vcpu: VcpuFd) -> Self {
        let immediate_exit = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(immediate_exit);
        Self {
            vcpu,
            stays: PhantomData,
        }
    }

    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// From here on a kick counts: what was sent before it is seen by a look at the commands
    /// after this call.
    pub(super) fn arm(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// What KVM says of an internal error: sub-error and its data (KVM API, 5,
    /// `KVM_EXIT_INTERNAL_ERROR`).
    pub(super) fn internal_error(&mut self) -> (u32, Vec<u64>) {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: every member of the union is plain numbers, for which any bytes are valid. That
        // this member is meant is the caller's to know; otherwise the numbers are wrong, and only
        // printed.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(0);
        let data = internal.data.iter().take(count).copied();
        (internal.suberror, data.collect())
    }
}

impl Drop for Kickable {
    /// A kick that comes after this finds nothing to write to.
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
