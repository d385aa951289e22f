//! Counting a request allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use insula_metrics::{DataMetrics, Direction, InstanceState, Kind, ShedReason};
use insula_types::Outcome;

/// The system's allocator, counting what this thread asks for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract;
// the counter is a const-initialised thread local without a destructor, so it never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise about `layout` is the one that `System` needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System.alloc` above with the same `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn counting_a_request_allocates_nothing() {
    let metrics = DataMetrics::new();
    let tenant_name = "acme".parse().unwrap();
    let service_name = "hello".parse().unwrap();
    let tenant = metrics.tenant(&tenant_name);
    let service = metrics.service(&tenant_name, &service_name);

    let before = ALLOCATIONS.get();
    for outcome in Outcome::ALL {
        let mut instance = service.instance(InstanceState::Starting);
        service.instance_started(Duration::from_micros(6));
        instance.set(InstanceState::Running);
        tenant.memory_grew(Kind::Wasm, 65_536);
        tenant.add_cpu_ns(Kind::Wasm, 25_000);
        tenant.add_cpu_wait_ns(Kind::Wasm, 10);
        tenant.add_memory_held(Kind::Wasm, 65_536, Duration::from_micros(25));
        tenant.memory_shrank(Kind::Wasm, 65_536);
        tenant.add_ingress_bytes(Direction::In, 150);
        tenant.add_ingress_bytes(Direction::Out, 300);
        tenant.shed(ShedReason::Rate);
        service.add_fuel(1_000);
        service.request_ended(outcome, Duration::from_micros(40));
        metrics.add_host_cpu_ns(8_000);
    }
    // Looking a present handle up again does not allocate either.
    assert!(std::sync::Arc::ptr_eq(
        &service,
        &metrics.service(&tenant_name, &service_name)
    ));
    assert_eq!(ALLOCATIONS.get() - before, 0);
}

#[test]
fn a_service_costs_less_than_a_kibibyte() {
    assert!(size_of::<insula_metrics::ServiceMetrics>() <= 768);
}
