//! One request in one instance.
//!
//! [`run`] is a plain future: whoever polls it decides when and on which thread the guest runs,
//! and measures it. It returns `Pending` when the guest waits for input or output, and also
//! after every [`Grant::quantum`] units of fuel, having woken itself.
//!
//! Whatever the ending (done, trap, or the future dropped half-way), what the instance used is in
//! the [`Ledger`] once the future is gone.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body;
use insula_types::Outcome;
use insula_types::quantity::{Bytes as ByteQuantity, Fuel};
use wasmtime::component::Resource;
use wasmtime::{PoolConcurrencyLimitError, Store, Trap};
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types::{ErrorCode, Scheme};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::p2::types::{HostIncomingRequest, HostResponseOutparam};

use super::config::caps;
use super::files::Mounted;
use super::guest::Guest;
use super::load::Code;
use super::memory::{MemoryMeter, Refused, TenantMemory};
use super::outgoing::{Patron, beside};
use super::program::Program;
use super::shelf::Shelf;
use crate::config::UrlScheme;

/// The body of a guest's answer.
pub type ResponseBody = HyperOutgoingBody;
/// What can go wrong in a body.
pub type BodyError = wasmtime_wasi_http::Error;
/// The answer's head and body, or the guest's word that it has none.
pub type Head = Result<http::Response<ResponseBody>, String>;

/// What one instance may use.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// Fuel for instantiation and handler together.
    pub fuel: Fuel,
    /// Memory of all its linear memories and tables.
    pub memory: ByteQuantity,
    /// Fuel between two yields.
    pub quantum: u64,
}

/// What one instance used; complete when its future is gone.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Fuel consumed. After a trap it is rounded up by one quantum: what the guest burned since
    /// its last yield is not known then.
    pub fuel: AtomicU64,
    /// Most bytes of memory at once.
    pub memory_peak: AtomicU64,
    /// Integral of memory over time, in byte-milliseconds.
    pub memory_byte_ms: AtomicU64,
}

/// How the guest ended.
#[derive(Debug)]
pub struct Verdict {
    /// In the words of metrics and problems.
    pub outcome: Outcome,
    /// For the service's log: what happened. Never shown to a client.
    pub detail: Option<String>,
}

/// Threads for what blocks.
pub trait Offload: Send + Sync {
    /// Has it done by one of them, at the tenant's expense. What it captured is dropped with it when
    /// it cannot be done.
    fn offload(self: Arc<Self>, piece: Box<dyn FnOnce() + Send>);
}

/// Whom a run tells of itself, in this order: start, head, end. Each comes at most once.
pub trait RunEvents: Patron + 'static {
    /// The guest's handler is entered; this is how long it took until then.
    fn started(&self, took: Duration);
    /// The guest has set the head of its answer.
    fn head(&self, head: Head);
    /// The guest has ended. The instance is still there: its side of the response body is dropped
    /// after this.
    fn ended(&self, verdict: &Verdict);
    /// Where the use is written down.
    fn ledger(&self) -> &Ledger;
}

/// Everything that one run needs.
pub struct Invocation<B, R> {
    /// What runs.
    pub program: Program,
    /// The request; its body is read when the guest reads it.
    pub request: http::Request<B>,
    /// How the client reached the host.
    pub scheme: UrlScheme,
    /// Where instances wait that its service uses again.
    pub shelf: Option<Arc<Shelf>>,
    /// What it may use.
    pub grant: Grant,
    /// Its tenant's memory.
    pub tenant_memory: Arc<TenantMemory>,
    /// Its environment.
    pub env: Arc<[(String, String)]>,
    /// Its volumes.
    pub mounts: Arc<[Mounted]>,
    /// Who is told.
    pub events: Arc<R>,
}

impl<B, R> std::fmt::Debug for Invocation<B, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invocation")
            .field("grant", &self.grant)
            .finish_non_exhaustive()
    }
}

/// Writes down what was used of a store when it goes, whichever way it goes.
struct Metered<'a, R: RunEvents> {
    store: &'a mut Store<Guest>,
    events: Arc<R>,
    quantum: u64,
    trapped: bool,
}

impl<R: RunEvents> Drop for Metered<'_, R> {
    fn drop(&mut self) {
        let granted = self.store.data().fuel_granted();
        let left = self.store.get_fuel().unwrap_or(0);
        let mut fuel = granted.saturating_sub(left);
        if self.trapped {
            fuel = fuel.saturating_add(self.quantum).min(granted);
        }
        let guest = self.store.data_mut();
        let byte_ms = guest.memory_byte_ms(Instant::now());
        let ledger = self.events.ledger();
        ledger.fuel.store(fuel, Ordering::Relaxed);
        let peak = guest.memory.peak_bytes();
        ledger.memory_peak.store(peak, Ordering::Relaxed);
        ledger.memory_byte_ms.store(byte_ms, Ordering::Relaxed);
    }
}

/// Runs one request, in a fresh instance or in one that waited for it. When it is over, the ledger
/// is complete.
pub async fn run<B, R>(invocation: Invocation<B, R>)
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
    R: RunEvents,
{
    let Invocation {
        program,
        request,
        scheme,
        shelf,
        grant,
        tenant_memory,
        env,
        mounts,
        events,
    } = invocation;
    let began = Instant::now();
    let fuel = grant.fuel.get();
    let waiting = shelf.as_ref().and_then(|shelf| shelf.take());
    let (mut store, ground, served) = match waiting {
        Some(idle) => {
            let mut store = idle.store;
            store.data_mut().begin(fuel, events.clone());
            (store, Ground::Instance(idle.proxy), idle.served)
        }
        None => match program.code(began).await {
            Ok(code) => {
                let memory = MemoryMeter::new(tenant_memory, grant.memory, began);
                let guest = Guest::new(memory, fuel, env, mounts, events.clone());
                (new_store(&code, guest), Ground::Code(code), 0)
            }
            Err(error) => {
                events.ended(&Verdict {
                    outcome: Outcome::HostError,
                    detail: Some(format!("the compiled code cannot be loaded: {error}")),
                });
                return;
            }
        },
    };
    store.set_hostcall_fuel(caps::HOST_CALL_BYTES);
    let armed = store
        .set_fuel(fuel)
        .and_then(|()| store.fuel_async_yield_interval(Some(grant.quantum)));
    let mut metered = Metered {
        store: &mut store,
        events,
        quantum: grant.quantum,
        trapped: false,
    };
    let ready = armed.and_then(|()| arguments(metered.store, (scheme, request), &metered.events));
    let result = match ready {
        Ok(arguments) => {
            let (store, events) = (&mut *metered.store, &*metered.events);
            let errands = store.data().errands();
            let call = pin!(call(store, ground, arguments, events, began));
            beside(&errands, call).await
        }
        Err(error) => Err(error),
    };
    let (verdict, proxy) = match result {
        Ok(proxy) => {
            let (outcome, detail) = (Outcome::Ok, None);
            (Verdict { outcome, detail }, Some(proxy))
        }
        Err(error) => {
            metered.trapped = true;
            let refused = metered.store.data().memory.refused();
            (classify(&error, refused), None)
        }
    };
    metered.events.ended(&verdict);
    drop(metered);
    if let (Some(shelf), Some(proxy)) = (shelf, proxy) {
        shelf.put(store, proxy, served + 1);
    }
}

/// What a request is called in.
enum Ground {
    /// A fresh instance of this.
    Code(Arc<Code>),
    /// The instance that is in the store already.
    Instance(Proxy),
}

fn new_store(code: &Code, guest: Guest) -> Store<Guest> {
    let mut store = Store::new(code.pre.engine(), guest);
    store.limiter(|guest| &mut guest.memory);
    store.set_max_component_handles(caps::HANDLES);
    store
}

/// What the handler is called with.
type Arguments = (
    Resource<HostIncomingRequest>,
    Resource<HostResponseOutparam>,
);

/// Makes the guest's view of a request, and the place where it puts its answer.
fn arguments<B, R>(
    store: &mut Store<Guest>,
    (scheme, request): (UrlScheme, http::Request<B>),
    events: &Arc<R>,
) -> Result<Arguments, wasmtime::Error>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BodyError>,
    R: RunEvents,
{
    let mut http = store.data_mut().http();
    let scheme = match scheme {
        UrlScheme::Http => Scheme::Http,
        UrlScheme::Https => Scheme::Https,
    };
    let request = http.new_incoming_request(scheme, request)?;
    let answers = events.clone();
    let out = http.new_response_outparam_from_callback(move |head| {
        answers.head(head.map_err(|code: ErrorCode| format!("{code:?}")));
    })?;
    Ok((request, out))
}

/// Instantiates, unless that was done before, and calls the handler; answers the instance.
async fn call(
    store: &mut Store<Guest>,
    ground: Ground,
    (request, out): Arguments,
    events: &impl RunEvents,
    began: Instant,
) -> Result<Proxy, wasmtime::Error> {
    let proxy = match ground {
        Ground::Code(code) => code.pre.instantiate_async(&mut *store).await?,
        Ground::Instance(proxy) => proxy,
    };
    events.started(began.elapsed());
    proxy
        .wasi_http_incoming_handler()
        .call_handle(store, request, out)
        .await?;
    Ok(proxy)
}

/// One error of the engine in the words of metrics and problems.
fn classify(error: &wasmtime::Error, memory_refused: Option<Refused>) -> Verdict {
    let outcome = if error.is::<PoolConcurrencyLimitError>() {
        Outcome::HostOverloaded
    } else if matches!(error.downcast_ref::<Trap>(), Some(Trap::OutOfFuel)) {
        Outcome::OutOfFuel
    } else if let Some(by) = memory_refused {
        match by {
            Refused::Limit => Outcome::OutOfMemory,
            Refused::Host => Outcome::HostOverloaded,
        }
    } else {
        Outcome::Trap
    };
    // `{:#}` would print a context per host frame; the root says what happened.
    let mut detail = error.root_cause().to_string();
    detail.truncate(detail.floor_char_boundary(DETAIL_MAX_BYTES));
    Verdict {
        outcome,
        detail: Some(detail),
    }
}

/// Longest text kept of an error: parts of it can come from the guest.
const DETAIL_MAX_BYTES: usize = 512;
