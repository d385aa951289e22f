//! The measures one by one: take it, then look whether it holds.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount,
    unmount,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags};

use super::sys::{self, Alone};
use super::{Identity, Limits, Missing};

fn refused(call: &'static str) -> impl Fn(Errno) -> Missing {
    move |errno| Missing::refused(call)(errno.into())
}

/// Moves the process into `groups`; `cgroup.procs` takes 0 as "myself", in v1 and v2.
pub(super) fn cgroup(groups: &[PathBuf]) -> Result<(), Missing> {
    if groups.is_empty() {
        return Err(Missing::NotAsked);
    }
    for group in groups {
        // Opened for writing without `create`: a directory that is no cgroup must not get a file.
        let procs = fs::OpenOptions::new()
            .write(true)
            .open(group.join("cgroup.procs"))
            .map_err(Missing::refused("open cgroup.procs"))?;
        rustix::io::write(&procs, b"0").map_err(refused("write cgroup.procs"))?;
    }
    Ok(())
}

/// Closes everything but `keep`.
pub(super) fn close_descriptors(alone: &Alone, keep: &[RawFd]) -> Result<(), Missing> {
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    keep.dedup();
    let mut first = 0;
    for kept in keep {
        if kept < 0 {
            return Err(Missing::NotSo("a descriptor to keep is negative"));
        }
        if first < kept {
            sys::close_range(alone, first, kept - 1).map_err(Missing::refused("close_range"))?;
        }
        first = kept.saturating_add(1);
    }
    sys::close_range(alone, first, RawFd::MAX).map_err(Missing::refused("close_range"))
}

/// Rights over namespaces for a process that has none over the host's.
pub(super) fn user_namespace(alone: &Alone) -> io::Result<()> {
    sys::unshare(alone, UnshareFlags::NEWUSER)
}

/// Mounts of its own, from which nothing propagates back.
pub(super) fn mount_namespace(alone: &Alone) -> Result<(), Missing> {
    sys::unshare(alone, UnshareFlags::NEWNS).map_err(Missing::refused("unshare"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(refused("mount MS_PRIVATE"))
}

/// Makes `root` the root and lets go of the old one.
///
/// A bind mount because `pivot_root` wants a mount point; `pivot_root(".", ".")` because it stacks
/// the old root over the new one, where it can be unmounted without a directory to put it
/// (`pivot_root(2)`, notes).
pub(super) fn change_root(root: &Path) -> Result<(), Missing> {
    let made = fs::metadata(root).map_err(Missing::refused("stat root"))?;
    mount_bind(root, root).map_err(refused("mount MS_BIND"))?;
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    mount_remount(root, flags, c"").map_err(refused("mount MS_REMOUNT"))?;
    rustix::process::chdir(root).map_err(refused("chdir"))?;
    rustix::process::pivot_root(".", ".").map_err(refused("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(refused("umount2"))?;
    rustix::process::chdir("/").map_err(refused("chdir"))?;

    let is = fs::metadata("/").map_err(Missing::refused("stat /"))?;
    if (is.dev(), is.ino()) != (made.dev(), made.ino()) {
        return Err(Missing::NotSo("the root is not the directory made for it"));
    }
    Ok(())
}

/// Whether the spawner made one ([`super::spawn`]): its first process is 1.
pub(super) fn pid_namespace() -> Result<(), Missing> {
    if rustix::process::getpid().is_init() {
        Ok(())
    } else {
        Err(Missing::NotSo("not the first process of its namespace"))
    }
}

/// A new one of the kind in `flag`.
pub(super) fn namespace(alone: &Alone, flag: UnshareFlags) -> Result<(), Missing> {
    sys::unshare(alone, flag).map_err(Missing::refused("unshare"))
}

/// The hard and soft limits. Threads are counted per user: of a user that is shared with others,
/// the limit would count theirs, so it is set with `own_user` only.
pub(super) fn limits(limits: Limits, own_user: bool) -> Result<(), Missing> {
    let mut wanted = vec![
        (Resource::Nofile, limits.descriptors),
        (Resource::Fsize, limits.file_bytes),
        (Resource::Core, 0),
    ];
    if own_user {
        wanted.push((Resource::Nproc, limits.threads));
    }
    for (resource, limit) in wanted {
        let both = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        rustix::process::setrlimit(resource, both).map_err(refused("setrlimit"))?;
        if rustix::process::getrlimit(resource) != both {
            return Err(Missing::NotSo("a limit is not as it was set"));
        }
    }
    Ok(())
}

/// Real, effective and saved; groups first, since the user is what permits to change them.
/// Leaves the capabilities that are to be kept permitted, and none effective.
pub(super) fn become_user(identity: Identity, keep: CapabilitySet) -> Result<(), Missing> {
    let group = Gid::from_raw(identity.group.get());
    let user = Uid::from_raw(identity.user.get());
    rustix::thread::set_thread_groups(&[]).map_err(refused("setgroups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(refused("setresgid"))?;
    // The kernel forgets that at the next change of program (`prctl(2)`, PR_SET_KEEPCAPS).
    rustix::thread::set_keep_capabilities(!keep.is_empty())
        .map_err(refused("prctl PR_SET_KEEPCAPS"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(refused("setresuid"))?;
    if rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).is_ok() {
        return Err(Missing::NotSo("it could become root again"));
    }
    Ok(())
}

/// Empties the sets that count; the bounding set only bounds programs that it could execute, which
/// no new privileges makes moot.
pub(super) fn drop_capabilities(keep: CapabilitySet) -> Result<(), Missing> {
    let had = rustix::thread::capabilities(None).map_err(refused("capget"))?;
    let kept = had.permitted & keep;
    let only = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::clear_ambient_capability_set().map_err(refused("prctl PR_CAP_AMBIENT"))?;
    rustix::thread::set_capabilities(None, only).map_err(refused("capset"))?;
    let left = rustix::thread::capabilities(None).map_err(refused("capget"))?;
    if left == only {
        Ok(())
    } else {
        Err(Missing::NotSo("capabilities are left"))
    }
}

pub(super) fn no_new_privileges() -> Result<(), Missing> {
    rustix::thread::set_no_new_privs(true).map_err(refused("prctl PR_SET_NO_NEW_PRIVS"))
}

pub(super) fn not_dumpable() -> Result<(), Missing> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(refused("prctl PR_SET_DUMPABLE"))
}
