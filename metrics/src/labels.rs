//! The label values that are fixed in advance.

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$variant),+];

            /// The label's text.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            pub(crate) const fn index(self) -> usize {
                self as usize
            }
        }
    };
}

label!(
    /// What kind of guest used it.
    Kind {
        /// Instances of components.
        Wasm = "wasm",
        /// Full guests under KVM.
        Vm = "vm",
    }
);
label!(
    /// Which way bytes went, as the client's side of the host sees it.
    Direction {
        /// From clients to the host.
        In = "in",
        /// From the host to clients.
        Out = "out",
    }
);
label!(
    /// Why a request was refused before any guest code ran. The first five are the tenant's own
    /// bounds (429), the others the host's (503).
    ShedReason {
        /// `requests.in_flight` of the tenant is reached, and nothing may queue.
        InFlight = "in_flight",
        /// `requests.queued` of the tenant is reached.
        QueueFull = "queue_full",
        /// `requests.per_second` of the tenant is reached.
        Rate = "rate",
        /// The tenant asks for more than it gets: its queue was never empty of late.
        Overload = "overload",
        /// The request would have waited past its own timeout, or has.
        Deadline = "deadline",
        /// The tenant's memory limit leaves no room for another instance.
        Memory = "memory",
        /// All instances of the host are in use.
        HostQueue = "host_queue",
        /// The host has no memory left to promise.
        HostMemory = "host_memory",
        /// A cap on connections, of the host or of one client address.
        Connections = "connections",
        /// The host is shutting down.
        Draining = "draining",
    }
);
label!(
    /// By whose limit memory was refused to a guest.
    MemoryRefusal {
        /// The instance's, or its tenant's.
        Limit = "limit",
        /// The host has no more for this tenant.
        Host = "host",
    }
);
label!(
    /// What became of a request that a guest sent.
    OutboundResult {
        /// The head of an answer came.
        Ok = "ok",
        /// Not on the service's list, or no request for the world.
        Denied = "denied",
        /// On the list, at an address that is closed.
        Prohibited = "prohibited",
        /// Too many are on their way.
        Limited = "limited",
        /// The name could not be resolved.
        Dns = "dns",
        /// No connection.
        Connect = "connect",
        /// No TLS.
        Tls = "tls",
        /// Nothing came in time.
        Timeout = "timeout",
        /// What came was no HTTP, or not all of it.
        Protocol = "protocol",
        /// The guest went away before the head came.
        Abandoned = "abandoned",
    }
);
label!(
    /// What an instance is doing.
    InstanceState {
        /// Being instantiated; the handler is not entered yet.
        Starting = "starting",
        /// Serving a request, on a core or waiting.
        Running = "running",
        /// Kept for the next request of its version.
        Idle = "idle",
    }
);
