//! Components written by hand, for what no language's compiler lets a guest do: globals and
//! tables of its own, a memory that nothing but the test touches, code that is a few bytes.

/// All that a handler needs of `wasi:http/types`. An answer with an error is never given, but the
/// function's type names all errors there are.
const TYPES: &str = r#"
  (import "wasi:http/types@0.2.0" (instance $types
    (export "fields" (type $fields (sub resource)))
    (export "outgoing-response" (type $response (sub resource)))
    (export "incoming-request" (type $asking (sub resource)))
    (export "response-outparam" (type $outparam (sub resource)))
    (type $dns' (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns (eq $dns')))
    (type $tls' (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $tls (eq $tls')))
    (type $size' (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $size (eq $size')))
    (type $error' (variant
      (case "DNS-timeout")
      (case "DNS-error" $dns)
      (case "destination-not-found")
      (case "destination-unavailable")
      (case "destination-IP-prohibited")
      (case "destination-IP-unroutable")
      (case "connection-refused")
      (case "connection-terminated")
      (case "connection-timeout")
      (case "connection-read-timeout")
      (case "connection-write-timeout")
      (case "connection-limit-reached")
      (case "TLS-protocol-error")
      (case "TLS-certificate-error")
      (case "TLS-alert-received" $tls)
      (case "HTTP-request-denied")
      (case "HTTP-request-length-required")
      (case "HTTP-request-body-size" (option u64))
      (case "HTTP-request-method-invalid")
      (case "HTTP-request-URI-invalid")
      (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32))
      (case "HTTP-request-header-size" (option $size))
      (case "HTTP-request-trailer-section-size" (option u32))
      (case "HTTP-request-trailer-size" $size)
      (case "HTTP-response-incomplete")
      (case "HTTP-response-header-section-size" (option u32))
      (case "HTTP-response-header-size" $size)
      (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32))
      (case "HTTP-response-trailer-size" $size)
      (case "HTTP-response-transfer-coding" (option string))
      (case "HTTP-response-content-coding" (option string))
      (case "HTTP-response-timeout")
      (case "HTTP-upgrade-failed")
      (case "HTTP-protocol-error")
      (case "loop-detected")
      (case "configuration-error")
      (case "internal-error" (option string))))
    (export "error-code" (type $error (eq $error')))
    (export "[method]incoming-request.path-with-query"
      (func (param "self" (borrow $asking)) (result (option string))))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[constructor]outgoing-response"
      (func (param "headers" (own $fields)) (result (own $response))))
    (export "[method]outgoing-response.set-status-code"
      (func (param "self" (borrow $response)) (param "status-code" u16) (result (result))))
    (export "[static]response-outparam.set"
      (func (param "param" (own $outparam))
        (param "response" (result (own $response) (error $error)))))))
"#;

/// What a component that answers with a status is made of, beside what all of them are.
#[derive(Default)]
pub(crate) struct Parts<'a> {
    /// The inside of a core module, with a function `$status` of no parameters that gives the status;
    /// the module has a memory `$memory`.
    pub(crate) main: &'a str,
    /// Pages of that memory.
    pub(crate) pages: u32,
    /// The inside of the core module that holds the memory.
    pub(crate) room: &'a str,
    /// Definitions of the component, before that of the core module.
    pub(crate) before: &'a str,
    /// What the core module imports, beside what it needs to answer.
    pub(crate) imports: &'a str,
    /// What the core module is instantiated with, beside what it needs to answer.
    pub(crate) with: &'a str,
    /// Options of lifting the handler.
    pub(crate) lifted: &'a str,
}

/// A component whose answer to every request is a status without a body, made of `parts` and a memory
/// of so many pages.
pub(crate) fn answering(pages: u32, main: &str) -> Vec<u8> {
    component(&Parts {
        main,
        pages,
        ..Parts::default()
    })
}

/// A component whose answer to every request is a status without a body.
pub(crate) fn component(parts: &Parts<'_>) -> Vec<u8> {
    let Parts {
        main,
        pages,
        room,
        before,
        imports,
        with,
        lifted,
    } = parts;
    let text = format!(
        r#"(component {TYPES}
  (core module $room (memory (export "memory") {pages}) {room})
  (core instance $room (instantiate $room))
  (core func $fields (canon lower (func $types "[constructor]fields")))
  (core func $response (canon lower (func $types "[constructor]outgoing-response")))
  (core func $set-status
    (canon lower (func $types "[method]outgoing-response.set-status-code")))
  (core func $set
    (canon lower (func $types "[static]response-outparam.set") (memory $room "memory")))
  {before}
  (core module $main
    (import "room" "memory" (memory $memory {pages}))
    (import "http" "fields" (func $fields (result i32)))
    (import "http" "response" (func $response (param i32) (result i32)))
    (import "http" "set-status" (func $set-status (param i32 i32) (result i32)))
    (import "http" "set" (func $set (param i32 i32 i32 i32 i64 i32 i32 i32 i32)))
    {imports}
    {main}
    (func (export "handle") (param $request i32) (param $out i32)
      (local $answer i32)
      (global.set $asked (local.get $request))
      (local.set $answer (call $response (call $fields)))
      (drop (call $set-status (local.get $answer) (call $status)))
      (call $set (local.get $out) (i32.const 0) (local.get $answer)
        (i32.const 0) (i64.const 0)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))
    (global $asked (mut i32) (i32.const 0)))
  (core instance $main (instantiate $main
    (with "room" (instance $room))
    {with}
    (with "http" (instance
      (export "fields" (func $fields))
      (export "response" (func $response))
      (export "set-status" (func $set-status))
      (export "set" (func $set))))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $outparam))
  (type $handle (func (param "request" (own $request)) (param "response-out" (own $outparam))))
  (func $handle (type $handle) (canon lift (core func $main "handle") {lifted}))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"#
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
}

/// One that always answers with the same status.
pub(crate) fn constant(status: u16) -> Vec<u8> {
    answering(
        1,
        &format!("(func $status (result i32) i32.const {status})"),
    )
}

/// A component around a core module, and nothing else.
pub(crate) fn around(module: &[u8]) -> Vec<u8> {
    const EMPTY_COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
    const CORE_MODULE: u8 = 1;
    [EMPTY_COMPONENT, &section(CORE_MODULE, module)].concat()
}

/// A core module of these sections.
pub(crate) fn module(sections: &[Vec<u8>]) -> Vec<u8> {
    [b"\0asm\x01\0\0\0", &sections.concat()[..]].concat()
}

/// A section.
pub(crate) fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id], &leb(content.len())[..], content].concat()
}

/// A vector of the binary format: how many, and they.
pub(crate) fn vector(count: usize, each: &[u8]) -> Vec<u8> {
    [leb(count), each.repeat(count)].concat()
}

/// Unsigned LEB128.
pub(crate) fn leb(value: usize) -> Vec<u8> {
    let mut left = value;
    let mut bytes = Vec::new();
    loop {
        let low = u8::try_from(left & 0x7f).expect("seven bits");
        left >>= 7;
        if left == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}
