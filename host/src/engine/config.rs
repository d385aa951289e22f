//! The one wasmtime configuration.
//!
//! Compiler child and host build their `wasmtime::Engine` from [`code_config`], so that what one
//! compiles the other accepts. Figures and reasons for the knobs of the pool are in
//! `docs/decisions/0003-instances.md`.

use std::time::Duration;

use insula_types::quantity::Bytes;
use sha2::{Digest as _, Sha256};
use wasmtime::component::Linker;
use wasmtime::{
    Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails,
};

use super::guest::Guest;

/// The version of wasmtime, as the lock file has it.
const WASMTIME_VERSION: &str = "48.0.8";

/// The version of wasmtime. Read from where it stands in the program: a copy with another one there is
/// a program with another engine, of which tests make use.
#[must_use]
pub fn wasmtime_version() -> &'static str {
    std::hint::black_box(WASMTIME_VERSION)
}

/// How much of a linear memory stays resident in a free slot; what a guest dirtied beyond it is
/// given back to the kernel. Larger than what a small service touches, so that it faults nothing: a
/// Rust guest has its stack in the first MiB and its data behind it.
const MEMORY_KEEP_RESIDENT: usize = 1536 << 10;
/// The same for tables.
const TABLE_KEEP_RESIDENT: usize = 64 << 10;
/// Free slots that stay bound to the image of the service they ran last.
const WARM_SLOTS: u32 = 1_000;
/// Elements of one table: 10,000 function references, 80 KiB.
const TABLE_ELEMENTS: usize = 10_000;
/// Core instances, memories and tables of one component. Python's linker makes the most modules.
const CORE_INSTANCES_PER_COMPONENT: u32 = 32;
const MEMORIES_PER_COMPONENT: u32 = 2;
const TABLES_PER_COMPONENT: u32 = 16;
/// The stack of a guest; deeper recursion traps.
const WASM_STACK: usize = 512 << 10;
/// The fiber's stack: the guest's plus what host calls need.
const FIBER_STACK: usize = 1 << 20;

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// wasmtime refused the configuration or the kernel refused the address space.
    #[error("the engine cannot start with {instances} instances of {memory_bytes} bytes: {source}")]
    Start {
        /// Slots asked for.
        instances: u32,
        /// Largest memory of one.
        memory_bytes: u64,
        /// What wasmtime said.
        source: wasmtime::Error,
    },
    /// A host function could not be defined.
    #[error("the host's functions cannot be linked: {0}")]
    Link(wasmtime::Error),
}

/// How much the pool holds.
#[derive(Debug, Clone, Copy)]
pub struct EngineLimits {
    /// Instances alive at once.
    pub instances: u32,
    /// Largest linear memory of one.
    pub memory: Bytes,
}

/// Everything that decides what code is generated and how it behaves.
fn code_config() -> Config {
    let mut config = Config::new();
    config
        .consume_fuel(true)
        .epoch_interruption(false)
        .concurrency_support(false)
        .wasm_backtrace_max_frames(None)
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        .generate_address_map(false)
        .native_unwind_info(false)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(FIBER_STACK)
        .memory_init_cow(true)
        // A 64-bit index can drive the fuel counter past its limit (wasmtime 48).
        .wasm_memory64(false)
        .wasm_threads(false)
        .wasm_gc(false)
        .wasm_function_references(false)
        .wasm_exceptions(false)
        .wasm_custom_page_sizes(false)
        .wasm_wide_arithmetic(false)
        // Compilers of guests have inlined already: samples run the same with and without. With
        // it, all functions stay in memory until the last: 8.5 GiB for a componentize-py guest of
        // 18 MB, instead of 0.4.
        .compiler_inlining(wasmtime::Inlining::No);
    config
}

/// The engine and its linker, ready to load programs.
pub struct Engine {
    pub(super) inner: wasmtime::Engine,
    pub(super) linker: Linker<Guest>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine with a pool of instances. Reserves address space, not memory.
    ///
    /// # Errors
    /// [`EngineError`], mostly when the address space is limited.
    pub fn pooled(limits: EngineLimits) -> Result<Self, EngineError> {
        let count = limits.instances;
        let mut pool = PoolingAllocationConfig::default();
        pool.total_component_instances(count)
            .total_core_instances(count.saturating_mul(4))
            .total_memories(count)
            .total_tables(count.saturating_mul(4))
            .total_stacks(count)
            .max_memory_size(usize::try_from(limits.memory.get()).unwrap_or(usize::MAX))
            .max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT)
            .max_memories_per_component(MEMORIES_PER_COMPONENT)
            .max_tables_per_component(TABLES_PER_COMPONENT)
            .table_elements(TABLE_ELEMENTS)
            .linear_memory_keep_resident(MEMORY_KEEP_RESIDENT)
            .table_keep_resident(TABLE_KEEP_RESIDENT)
            .max_unused_warm_slots(WARM_SLOTS.min(count));
        // With swap on, a page that was swapped out can keep the last tenant's bytes.
        pool.pagemap_scan(if swap_is_off() {
            Enabled::Auto
        } else {
            Enabled::No
        });
        let mut config = code_config();
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
        let inner = wasmtime::Engine::new(&config).map_err(|source| EngineError::Start {
            instances: count,
            memory_bytes: limits.memory.get(),
            source,
        })?;
        Self::with(inner)
    }

    /// An engine that only compiles: no pool, so that it fits a small address space.
    ///
    /// # Errors
    /// [`EngineError::Start`] when wasmtime refuses this processor.
    pub fn compiler() -> Result<Self, EngineError> {
        let inner = wasmtime::Engine::new(&code_config()).map_err(|source| EngineError::Start {
            instances: 0,
            memory_bytes: 0,
            source,
        })?;
        Self::with(inner)
    }

    fn with(inner: wasmtime::Engine) -> Result<Self, EngineError> {
        let mut linker = Linker::new(&inner);
        super::guest::link(&mut linker).map_err(EngineError::Link)?;
        Ok(Self { inner, linker })
    }
}

/// Whether the kernel says that no swap is in use. When it cannot be asked, swap may be on.
fn swap_is_off() -> bool {
    std::fs::read_to_string("/proc/swaps").is_ok_and(|table| table.lines().count() <= 1)
}

/// A short text that changes whenever artefacts of this engine stop being loadable: wasmtime's
/// version, its settings and the processor's features.
#[must_use]
pub fn compatibility() -> String {
    use std::hash::{Hash, Hasher};

    /// Feeds what wasmtime hashes into SHA-256, so that the result does not depend on std.
    struct Sha(Sha256);
    impl Hasher for Sha {
        fn finish(&self) -> u64 {
            0
        }
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
    }

    let mut sha = Sha(Sha256::new());
    sha.0.update(wasmtime_version());
    if let Ok(engine) = wasmtime::Engine::new(&code_config()) {
        engine.precompile_compatibility_hash().hash(&mut sha);
    }
    let digest = sha.0.finalize();
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Handles, resources and copies that one instance may hold or make.
pub(super) mod caps {
    /// Entries of the WASI resource table.
    pub(in crate::engine) const RESOURCES: usize = 4_096;
    /// Live component-model handles.
    pub(in crate::engine) const HANDLES: usize = 8_192;
    /// Bytes copied out of the guest by one host call.
    pub(in crate::engine) const HOST_CALL_BYTES: usize = 8 << 20;
    /// Size of one set of header fields.
    pub(in crate::engine) const FIELD_BYTES: usize = 32 << 10;
    /// Bytes of one `get-random-bytes`.
    pub(in crate::engine) const RANDOM_BYTES: u64 = 64 << 10;
    /// Requests to others that are on their way at once.
    pub(in crate::engine) const OUTGOING: u32 = 16;
    /// Core instances of one store.
    pub(in crate::engine) const INSTANCES: usize = 32;
    /// Tables of one store.
    pub(in crate::engine) const TABLES: usize = 32;
    /// Memories of one store.
    pub(in crate::engine) const MEMORIES: usize = 4;
}

/// How long a compile may take, in CPU time of the child: the largest honest guest that we know
/// (Python's interpreter, 18 MB) takes 12 s; 62 kB of loops over many variables take for ever.
pub const COMPILE_CPU: Duration = Duration::from_secs(30);
/// Address space of the compiler child: most of it is threads' stacks and arenas; the largest
/// honest guest that we know (Python's interpreter, 18 MB) has 0.4 GiB resident.
pub const COMPILE_MEMORY: Bytes = Bytes::mib(2048);
/// What of it may be written to. The rest of what is resident is the program's own file, of which
/// 64 MiB are more than is ever read: together less than 1 GiB.
pub const COMPILE_DATA: Bytes = Bytes::mib(960);
/// Threads of the compiler child: each holds a function's intermediate forms, and its stack counts as
/// memory whether it is touched or not.
pub const COMPILE_THREADS: usize = 4;
