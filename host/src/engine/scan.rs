//! What a component may contain, checked before the compiler sees it.
//!
//! A compiler that takes minutes or gigabytes over a crafted component is, upstream, not a bug;
//! these caps keep honest components (Rust, Go, Python's interpreter, JavaScript's engine) well
//! inside and crafted ones out. The rest is the child's address space and CPU limit.

use wasmparser::{Encoding, Parser, Payload};

/// Largest body of one function. Interpreters' main loops reach some hundred KiB.
const FUNCTION_BODY_MAX_BYTES: usize = 1 << 20;
/// Locals of one function.
const LOCALS_MAX: u64 = 5_000;
/// Functions of the whole component.
const FUNCTIONS_MAX: u32 = 60_000;
/// Types of one module or component.
const TYPES_MAX: u32 = 10_000;
/// Data segments, and also element segments, of one module.
const SEGMENTS_MAX: u32 = 10_000;
/// Imports, and also exports, of one module or component.
const NAMES_MAX: u32 = 10_000;
/// Core modules of the whole component.
const MODULES_MAX: u32 = 64;
/// Nested components of the whole component.
const COMPONENTS_MAX: u32 = 64;
/// Instances, aliases and canonical functions of the whole component.
const DEFINITIONS_MAX: u32 = 100_000;
/// Declared minimum of a memory, in pages of 64 KiB: 64 MiB, the default limit of a service.
const MEMORY_MIN_PAGES: u64 = 1024;
/// Declared minimum of a table.
const TABLE_MIN_ELEMENTS: u64 = 10_000;

/// Why a component was refused unseen by the compiler.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// No bytes at all.
    #[error("the upload is empty; send the bytes of a WebAssembly component")]
    Empty,
    /// Not a WebAssembly binary.
    #[error(
        "this is not a WebAssembly binary: it begins with {begins:?}, not with \"\\0asm\"{hint}"
    )]
    NotWasm {
        /// The first bytes, escaped.
        begins: String,
        /// What it may be instead.
        hint: &'static str,
    },
    /// A core module.
    #[error(
        "this is a core module, not a component; build for the target wasm32-wasip2, \
         or wrap it with `wasm-tools component new`"
    )]
    CoreModule,
    /// Malformed.
    #[error("malformed at offset {offset}: {message}")]
    Malformed {
        /// Where.
        offset: u64,
        /// What the parser said.
        message: String,
    },
    /// Over a cap.
    #[error("too complex: {is} {what}, at most {max} are accepted")]
    TooComplex {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        is: u64,
        /// The cap.
        max: u64,
    },
}

impl From<wasmparser::BinaryReaderError> for ScanError {
    fn from(error: wasmparser::BinaryReaderError) -> Self {
        Self::Malformed {
            offset: error.offset() as u64,
            message: error.message().to_owned(),
        }
    }
}

fn cap(what: &'static str, is: impl Into<u64>, max: impl Into<u64>) -> Result<(), ScanError> {
    let (is, max) = (is.into(), max.into());
    if is > max {
        return Err(ScanError::TooComplex { what, is, max });
    }
    Ok(())
}

/// Totals over the whole component.
#[derive(Default)]
struct Totals {
    modules: u32,
    components: u32,
    functions: u32,
    definitions: u32,
}

impl Totals {
    fn define(&mut self, count: u32) -> Result<(), ScanError> {
        self.definitions = self.definitions.saturating_add(count);
        cap("definitions", self.definitions, DEFINITIONS_MAX)
    }
}

/// Checks a component against the caps. Linear in its size, allocates little.
///
/// # Errors
/// [`ScanError`] says what was wrong and what would be accepted.
pub fn scan(bytes: &[u8]) -> Result<(), ScanError> {
    check_magic(bytes)?;
    let mut totals = Totals::default();
    for payload in Parser::new(0).parse_all(bytes) {
        check(&payload?, &mut totals)?;
    }
    Ok(())
}

fn check_magic(bytes: &[u8]) -> Result<(), ScanError> {
    if bytes.is_empty() {
        return Err(ScanError::Empty);
    }
    if !bytes.starts_with(&b"\0asm"[..bytes.len().min(4)]) {
        let begins: String = bytes[..bytes.len().min(8)].escape_ascii().to_string();
        let hint = match bytes {
            [b'(', ..] => "; text format is not accepted, convert it with `wasm-tools parse`",
            [0x1f, 0x8b, ..] => "; it looks gzip-compressed, send it plain",
            _ => "",
        };
        return Err(ScanError::NotWasm { begins, hint });
    }
    Ok(())
}

fn check(payload: &Payload<'_>, totals: &mut Totals) -> Result<(), ScanError> {
    match payload {
        Payload::Version {
            encoding: Encoding::Module,
            ..
        } if totals.modules == 0 => return Err(ScanError::CoreModule),
        Payload::ModuleSection { .. } => {
            totals.modules += 1;
            cap("core modules", totals.modules, MODULES_MAX)?;
        }
        Payload::ComponentSection { .. } => {
            totals.components += 1;
            cap("nested components", totals.components, COMPONENTS_MAX)?;
        }
        Payload::TypeSection(types) => cap("types", types.count(), TYPES_MAX)?,
        Payload::CoreTypeSection(types) => cap("types", types.count(), TYPES_MAX)?,
        Payload::ComponentTypeSection(types) => cap("types", types.count(), TYPES_MAX)?,
        Payload::ImportSection(imports) => cap("imports", imports.count(), NAMES_MAX)?,
        Payload::ExportSection(exports) => cap("exports", exports.count(), NAMES_MAX)?,
        Payload::ComponentImportSection(names) => cap("imports", names.count(), NAMES_MAX)?,
        Payload::ComponentExportSection(names) => cap("exports", names.count(), NAMES_MAX)?,
        Payload::FunctionSection(functions) => {
            totals.functions = totals.functions.saturating_add(functions.count());
            cap("functions", totals.functions, FUNCTIONS_MAX)?;
        }
        Payload::CodeSectionEntry(body) => {
            let bytes = body.range().end - body.range().start;
            cap(
                "bytes in one function",
                bytes as u64,
                FUNCTION_BODY_MAX_BYTES as u64,
            )?;
            let mut locals = 0u64;
            for group in body.get_locals_reader()? {
                locals += u64::from(group?.0);
                cap("locals in one function", locals, LOCALS_MAX)?;
            }
        }
        Payload::DataSection(data) => cap("data segments", data.count(), SEGMENTS_MAX)?,
        Payload::ElementSection(elements) => {
            cap("element segments", elements.count(), SEGMENTS_MAX)?;
        }
        Payload::MemorySection(memories) => {
            for memory in memories.clone() {
                cap("pages of initial memory", memory?.initial, MEMORY_MIN_PAGES)?;
            }
        }
        Payload::TableSection(tables) => {
            for table in tables.clone() {
                cap(
                    "elements of an initial table",
                    table?.ty.initial,
                    TABLE_MIN_ELEMENTS,
                )?;
            }
        }
        Payload::InstanceSection(section) => totals.define(section.count())?,
        Payload::ComponentInstanceSection(section) => totals.define(section.count())?,
        Payload::ComponentAliasSection(section) => totals.define(section.count())?,
        Payload::ComponentCanonicalSection(section) => totals.define(section.count())?,
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_component_is_told_what_it_is() {
        assert_eq!(scan(b""), Err(ScanError::Empty));
        let message = |bytes: &[u8]| scan(bytes).unwrap_err().to_string();
        assert!(message(b"(component)").contains("wasm-tools parse"));
        assert!(message(&[0; 100]).contains("not a WebAssembly binary"));
        assert!(message(&[0x1f, 0x8b, 8, 0]).contains("gzip"));
        assert!(message(b"\0as").contains("malformed"));
        assert_eq!(scan(b"\0asm\x01\0\0\0"), Err(ScanError::CoreModule));
        assert_eq!(
            scan(b"\0asm\x0d\0\x01\0"),
            Ok(()),
            "the empty component is well formed"
        );
    }

    /// A component around one core module whose sections follow.
    fn component(module_sections: &[u8]) -> Vec<u8> {
        let mut module = b"\0asm\x01\0\0\0".to_vec();
        module.extend_from_slice(module_sections);
        let mut bytes = b"\0asm\x0d\0\x01\0\x01".to_vec();
        bytes.extend(leb(module.len()));
        bytes.extend(module);
        bytes
    }

    fn leb(mut value: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let low = u8::try_from(value & 0x7f).unwrap();
            value >>= 7;
            if value == 0 {
                bytes.push(low);
                return bytes;
            }
            bytes.push(low | 0x80);
        }
    }

    fn section(id: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![id];
        bytes.extend(leb(content.len()));
        bytes.extend_from_slice(content);
        bytes
    }

    #[test]
    fn caps_hold() {
        let memory = |pages: usize| section(5, &[vec![1, 0], leb(pages)].concat());
        assert_eq!(scan(&component(&memory(1024))), Ok(()));
        let error = scan(&component(&memory(65_536))).unwrap_err();
        assert!(
            matches!(
                error,
                ScanError::TooComplex {
                    is: 65_536,
                    max: 1024,
                    ..
                }
            ),
            "{error}"
        );
        let table = section(4, &[vec![1, 0x70, 0], leb(10_000_000)].concat());
        assert!(matches!(
            scan(&component(&table)),
            Err(ScanError::TooComplex { .. })
        ));
        let types = section(1, &[leb(10_001), [0x60, 0, 0].repeat(10_001)].concat());
        assert!(matches!(
            scan(&component(&types)),
            Err(ScanError::TooComplex { .. })
        ));
    }

    #[test]
    fn many_locals_are_refused_before_they_are_expanded() {
        let locals = [vec![1], leb(50_000), vec![0x7b, 0x0b]].concat();
        let code = section(10, &[vec![1], leb(locals.len()), locals].concat());
        let module = [section(1, &[1, 0x60, 0, 0]), section(3, &[1, 0]), code].concat();
        let error = scan(&component(&module)).unwrap_err();
        assert!(error.to_string().contains("50000 locals"), "{error}");
    }
}
