//! What of an answer is shown to people, and under which title.

use crate::output::{Field, Kind};

pub(super) const TENANTS: &[Field] = &[
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("SHARES", &["/cpu/shares"], Kind::Plain),
    Field::new(
        "RESERVATION",
        &["/cpu/reservation_millicores"],
        Kind::Millicores,
    ),
    Field::new("LIMIT", &["/cpu/limit_millicores"], Kind::Millicores),
    Field::new("MEMORY", &["/memory/limit_bytes"], Kind::Bytes),
    Field::new("STORAGE", &["/storage/limit_bytes"], Kind::Bytes),
];

pub(super) const TENANT: &[Field] = &[
    Field::new("name", &["/name"], Kind::Plain),
    Field::new("cpu shares", &["/cpu/shares"], Kind::Plain),
    Field::new(
        "cpu reservation",
        &["/cpu/reservation_millicores"],
        Kind::Millicores,
    ),
    Field::new("cpu limit", &["/cpu/limit_millicores"], Kind::Millicores),
    Field::new("memory limit", &["/memory/limit_bytes"], Kind::Bytes),
    Field::new("storage limit", &["/storage/limit_bytes"], Kind::Bytes),
    Field::new("requests in flight", &["/requests/in_flight"], Kind::Plain),
    Field::new("requests queued", &["/requests/queued"], Kind::Plain),
    Field::new(
        "requests per second",
        &["/requests/per_second"],
        Kind::Plain,
    ),
    Field::new("created", &["/created_at"], Kind::Plain),
];

pub(super) const SERVICES: &[Field] = &[
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("ACTIVE", &["/active_version"], Kind::Plain),
    Field::new("MEMORY", &["/limits/memory_bytes"], Kind::Bytes),
    Field::new("FUEL", &["/limits/fuel"], Kind::Plain),
    Field::new("TIMEOUT", &["/limits/timeout_ms"], Kind::Millis),
    Field::new("URL", &["/url"], Kind::Plain),
];

pub(super) const SERVICE: &[Field] = &[
    Field::new("name", &["/name"], Kind::Plain),
    Field::new("tenant", &["/tenant"], Kind::Plain),
    Field::new("url", &["/url"], Kind::Plain),
    Field::new("active version", &["/active_version"], Kind::Plain),
    Field::new("previous version", &["/previous_version"], Kind::Plain),
    Field::new("traffic", &["/traffic"], Kind::Plain),
    Field::new("memory limit", &["/limits/memory_bytes"], Kind::Bytes),
    Field::new("fuel limit", &["/limits/fuel"], Kind::Plain),
    Field::new("timeout", &["/limits/timeout_ms"], Kind::Millis),
    Field::new(
        "request body limit",
        &["/limits/request_body_bytes"],
        Kind::Bytes,
    ),
    Field::new("env", &["/env"], Kind::Plain),
    Field::new("routes", &["/routes"], Kind::Plain),
    Field::new("volumes", &["/volumes"], Kind::Plain),
    Field::new("stores", &["/stores"], Kind::Plain),
    Field::new("outbound", &["/outbound"], Kind::Plain),
    Field::new("usage header", &["/usage_header"], Kind::Plain),
    Field::new("requests of an instance", &["/reuse/requests"], Kind::Plain),
    Field::new("created", &["/created_at"], Kind::Plain),
];

pub(super) const VOLUMES: &[Field] = &[
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("KIND", &["/kind"], Kind::Plain),
    Field::new("USED", &["/used_bytes"], Kind::Bytes),
    Field::new("SIZE", &["/size_bytes"], Kind::Bytes),
    Field::new("USED INODES", &["/used_inodes"], Kind::Plain),
    Field::new("INODES", &["/inodes"], Kind::Plain),
    Field::new("READ ONLY", &["/read_only"], Kind::Plain),
    Field::new("FROM", &["/origin"], Kind::Plain),
];

pub(super) const VOLUME: &[Field] = &[
    Field::new("name", &["/name"], Kind::Plain),
    Field::new("tenant", &["/tenant"], Kind::Plain),
    Field::new("kind", &["/kind"], Kind::Plain),
    Field::new("size", &["/size_bytes"], Kind::Bytes),
    Field::new("used", &["/used_bytes"], Kind::Bytes),
    Field::new("inodes", &["/inodes"], Kind::Plain),
    Field::new("used inodes", &["/used_inodes"], Kind::Plain),
    Field::new("read only", &["/read_only"], Kind::Plain),
    Field::new("from", &["/origin"], Kind::Plain),
    Field::new("created", &["/created_at"], Kind::Plain),
];

pub(super) const VERSIONS: &[Field] = &[
    Field::new("VERSION", &["/version"], Kind::Plain),
    Field::new("ACTIVE", &["/active"], Kind::Plain),
    Field::new("PERCENT", &["/percent"], Kind::Plain),
    Field::new("DIGEST", &["/digest"], Kind::Digest),
    Field::new("SIZE", &["/size_bytes"], Kind::Bytes),
    Field::new("COMPILED IN", &["/compile_ms"], Kind::Millis),
    Field::new("CREATED", &["/created_at"], Kind::Plain),
];

pub(super) const USAGE: &[Field] = &[
    Field::new("tenant", &["/tenant"], Kind::Plain),
    Field::new("requests", &["/requests/total"], Kind::Plain),
    Field::new("outcomes", &["/outcomes"], Kind::Plain),
    Field::new("fuel", &["/fuel"], Kind::Plain),
    Field::new("cpu", &["/cpu_seconds"], Kind::Seconds),
    Field::new(
        "memory byte-seconds",
        &["/memory_byte_seconds"],
        Kind::Plain,
    ),
    Field::new("bytes in", &["/ingress_bytes/in"], Kind::Bytes),
    Field::new("bytes out", &["/ingress_bytes/out"], Kind::Bytes),
    Field::new("since", &["/since"], Kind::Plain),
];

pub(super) const SERVICE_USAGE: &[Field] = &[
    Field::new("SERVICE", &["/name"], Kind::Plain),
    Field::new("REQUESTS", &["/requests/total"], Kind::Plain),
    Field::new("FUEL", &["/fuel"], Kind::Plain),
    Field::new("CPU", &["/cpu_seconds"], Kind::Seconds),
    Field::new("IN", &["/ingress_bytes/in"], Kind::Bytes),
    Field::new("OUT", &["/ingress_bytes/out"], Kind::Bytes),
    Field::new("OUTCOMES", &["/outcomes"], Kind::Plain),
];

pub(super) const TOKENS: &[Field] = &[
    Field::new("ID", &["/id"], Kind::Plain),
    Field::new("NAME", &["/name"], Kind::Plain),
    Field::new("SCOPE", &["/tenant", "/scope"], Kind::Plain),
    Field::new("ACCESS", &["/access"], Kind::Plain),
    Field::new("CREATED", &["/created_at"], Kind::Plain),
    Field::new("EXPIRES", &["/expires_at"], Kind::Plain),
];

pub(super) const NEW_TOKEN: &[Field] = &[
    Field::new("id", &["/id"], Kind::Plain),
    Field::new("scope", &["/tenant", "/scope"], Kind::Plain),
    Field::new("access", &["/access"], Kind::Plain),
    Field::new("secret", &["/secret"], Kind::Plain),
];
