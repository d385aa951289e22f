//! Micro-guests: a few instructions each, run wherever `/dev/kvm` opens, by software KVM as well.
//! They show what the run loop does with a guest that behaves, and with one that does not.

mod devices;
mod guest;
mod hostile;
mod life;
mod saved;
