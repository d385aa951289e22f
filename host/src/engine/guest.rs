//! What belongs to one instance.

use std::sync::Arc;
use std::time::Instant;

use http::HeaderName;
use http::uri::Scheme;
use tokio::sync::oneshot;
use wasmtime::component::{ComponentType, HasData, Linker, Lower, ResourceTable};
use wasmtime::{AsContext, Result, StoreContextMut};
use wasmtime_wasi::filesystem::Descriptor;
use wasmtime_wasi::p2::DynOutputStream;
use wasmtime_wasi::p2::bindings::io;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    DEFAULT_FORBIDDEN_HEADERS, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView,
    WasiHttpHooks, WasiHttpView,
};

use super::config::caps;
use super::files::{Files, FilesView, Mounted};
use super::guest_log::{GuestLog, LogSink};
use super::keyvalue::{Bucket, KeyValueView};
use super::memory::MemoryMeter;
use super::outgoing::{Errands, Patron};

/// The data of a store: never shared; reused where its service asks for it (`shelf`).
pub(super) struct Guest {
    table: ResourceTable,
    wasi: Lazy,
    files: Files,
    mounts: Arc<[Mounted]>,
    http: WasiHttpCtx,
    hooks: Hooks,
    pub(super) memory: MemoryMeter,
    /// The fuel that the request began with.
    fuel: u64,
}

/// What a guest gets of `wasi:cli`, `clocks`, `random`, `filesystem` and `sockets`. Most requests
/// touch none of it, and making it seeds three generators: it is made when it is first asked for.
struct Lazy {
    made: Option<Box<(WasiCtx, GuestLog)>>,
    env: Arc<[(String, String)]>,
    /// `None` between two requests.
    log: Option<Arc<dyn LogSink>>,
}

impl Lazy {
    fn get(&mut self) -> &mut WasiCtx {
        let (wasi, _) = &mut **self.made.get_or_insert_with(|| {
            let log = GuestLog::new(self.log.clone());
            let wasi = WasiCtx::builder()
                .envs(&self.env)
                .stdout(log.stdout())
                .stderr(log.stderr())
                .max_random_size(caps::RANDOM_BYTES)
                .allow_tcp(false)
                .allow_udp(false)
                .allow_ip_name_lookup(false)
                .build();
            Box::new((wasi, log))
        });
        wasi
    }
}

impl Guest {
    pub(super) fn new(
        memory: MemoryMeter,
        fuel: u64,
        env: Arc<[(String, String)]>,
        mounts: Arc<[Mounted]>,
        patron: Arc<dyn Patron>,
    ) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(caps::RESOURCES);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(caps::FIELD_BYTES);
        let (made, log): (_, Option<Arc<dyn LogSink>>) = (None, Some(patron.clone()));
        Self {
            table,
            wasi: Lazy { made, env, log },
            files: Files::new(Arc::clone(&mounts)),
            mounts,
            http,
            hooks: Hooks::new(patron),
            memory,
            fuel,
        }
    }

    /// Another request begins in this instance.
    pub(super) fn begin(&mut self, fuel: u64, patron: Arc<dyn Patron>) {
        let log: Arc<dyn LogSink> = patron.clone();
        self.fuel = fuel;
        self.memory.begin();
        if let Some(made) = &self.wasi.made {
            made.1.begin(log.clone());
        }
        self.wasi.log = Some(log);
        self.hooks = Hooks::new(patron);
    }

    /// The request is over, and its instance waits for another.
    pub(super) fn rest(&mut self) {
        if let Some(made) = &self.wasi.made {
            made.1.end();
        }
        self.wasi.log = None;
        self.hooks = Hooks::default();
    }

    /// What its requests to others are run by.
    pub(super) fn errands(&self) -> Arc<Errands> {
        Arc::clone(&self.hooks.errands)
    }

    /// Whether the guest holds nothing that could belong to a request: what a language's library
    /// keeps for good are its standard streams, the directories that it began with, and its buckets.
    pub(super) fn is_clean(&mut self) -> bool {
        let mut held = self.table.iter_mut();
        let kept = |entry: &(dyn std::any::Any + Send)| {
            entry.is::<DynOutputStream>() || entry.is::<Descriptor>() || entry.is::<Bucket>()
        };
        self.files.is_at_rest() && held.all(|entry| kept(&*entry))
    }

    /// Its files, for one call.
    pub(super) fn files(&mut self) -> FilesView<'_> {
        FilesView {
            table: &mut self.table,
            files: &mut self.files,
            patron: self.hooks.way.as_ref(),
        }
    }

    /// Its stores of keys and values, for one call.
    pub(super) fn key_values(&mut self) -> KeyValueView<'_> {
        KeyValueView {
            table: &mut self.table,
            mounts: &self.mounts,
            patron: self.hooks.way.as_ref(),
        }
    }

    /// The fuel that the request began with.
    pub(super) const fn fuel_granted(&self) -> u64 {
        self.fuel
    }

    /// Byte-milliseconds of memory until `now`.
    pub(super) fn memory_byte_ms(&mut self, now: Instant) -> u64 {
        self.memory.byte_ms(now)
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: self.wasi.get(),
            table: &mut self.table,
        }
    }
}

/// `wasi:io` needs the table and nothing else.
struct Table;

impl HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

impl WasiHttpView for Guest {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView {
            ctx: &mut self.http,
            table: &mut self.table,
            hooks: &mut self.hooks,
        }
    }
}

/// What `wasi:http` may do for a guest.
#[derive(Default)]
struct Hooks {
    /// `None` between two requests.
    way: Option<Arc<dyn Patron>>,
    errands: Arc<Errands>,
}

impl Hooks {
    fn new(patron: Arc<dyn Patron>) -> Self {
        Self {
            way: Some(patron),
            errands: Arc::default(),
        }
    }
}

/// The result of an outgoing request: the answer, and the transfer of its body.
type Sent = std::result::Result<
    (
        http::Response<WasiBody>,
        Box<dyn Future<Output = Transfer> + Send>,
    ),
    wasmtime_wasi_http::Error,
>;
type Transfer = std::result::Result<(), wasmtime_wasi_http::Error>;

impl WasiHttpHooks for Hooks {
    fn is_forbidden_header(&mut self, name: &HeaderName) -> bool {
        static FORBIDDEN: [HeaderName; 9] = DEFAULT_FORBIDDEN_HEADERS;
        FORBIDDEN.contains(name)
    }

    fn is_supported_scheme(&mut self, scheme: &Scheme) -> bool {
        *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS
    }

    /// wasi-http's own sender would reach any address, at the host's expense.
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _transfer: Box<dyn Future<Output = Transfer> + Send>,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        let (answer, wait) = oneshot::channel();
        let denied = Err(wasmtime_wasi_http::Error::HttpRequestDenied);
        let begun = self.way.clone().map_or(denied, |way| {
            let errand = || way.errand(request, options.into(), answer);
            self.errands.begin(errand)
        });
        Box::new(async move {
            begun?;
            let gone = |_| wasmtime_wasi_http::Error::ConnectionTerminated;
            let response = wait.await.map_err(gone)??;
            let rest: Box<dyn Future<Output = Transfer> + Send> = Box::new(async { Ok(()) });
            Ok((response, rest))
        })
    }

    /// A guest can be this far ahead of a slow client: 16 chunks of at most 64 KiB.
    fn p2_outgoing_body_buffer_chunks(&mut self) -> usize {
        16
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        64 << 10
    }
}

/// `insula:guest/usage.usage`: what this request has used so far.
#[derive(ComponentType, Lower)]
#[component(record)]
struct Usage {
    fuel: u64,
    #[component(name = "memory-bytes")]
    memory_bytes: u64,
}

/// Defines everything that a guest can import.
pub(super) fn link(linker: &mut Linker<Guest>) -> Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    // As the line above has it, but for the way to the table, which there leads through the context.
    linker.allow_shadowing(true);
    io::error::add_to_linker::<Guest, Table>(linker, |guest| &mut guest.table)?;
    io::poll::add_to_linker::<Guest, Table>(linker, |guest| &mut guest.table)?;
    io::streams::add_to_linker::<Guest, Table>(linker, |guest| &mut guest.table)?;
    super::files::link(linker)?;
    linker.allow_shadowing(false);
    super::keyvalue::link(linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)?;
    linker.instance("insula:guest/usage@0.1.0")?.func_wrap(
        "get",
        |store: StoreContextMut<'_, Guest>, (): ()| {
            let left = store.as_context().get_fuel()?;
            let guest = store.data();
            Ok((Usage {
                fuel: guest.fuel_granted().saturating_sub(left),
                memory_bytes: guest.memory.used_bytes(),
            },))
        },
    )?;
    Ok(())
}
