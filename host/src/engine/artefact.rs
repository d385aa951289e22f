//! Sealing of compiled code.
//!
//! wasmtime trusts the bytes of a compiled artefact completely, so only what this host compiled
//! may ever be loaded. A sealed artefact is
//!
//! ```text
//! "INSULA1\n"  compatibility (16)  digest of the component (32)  HMAC-SHA-256 (32)  artefact
//! ```
//!
//! and the MAC covers all the other fields, under a key that only this data directory holds.
//! A sealed artefact of another component, another engine or another host does not open.

use std::io::{self, Read};

use hmac::{Hmac, KeyInit, Mac};
use insula_types::Digest;
use sha2::Sha256;

const MAGIC: &[u8; 8] = b"INSULA1\n";
const COMPAT_BYTES: usize = 16;
const MAC_AT: usize = MAGIC.len() + COMPAT_BYTES + 32;
/// How long what belongs before an artefact is.
pub const BODY_AT: usize = MAC_AT + 32;

/// The key of the artefacts of one data directory.
#[derive(Clone)]
pub struct ArtefactKey([u8; 32]);

impl ArtefactKey {
    /// A key from 32 random bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl std::fmt::Debug for ArtefactKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ArtefactKey(..)")
    }
}

/// Why a sealed artefact does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Shorter than its header, or not one at all.
    #[error("not a sealed artefact")]
    Format,
    /// Compiled by another engine, or for another processor.
    #[error("compiled by another engine or for another processor")]
    Engine,
    /// The artefact of another component.
    #[error("the artefact of another component")]
    Component,
    /// The MAC does not match: changed, or sealed by another host.
    #[error("its seal is broken")]
    Mac,
}

/// The MAC of what begins so, and of what is still to come.
fn mac(key: &ArtefactKey, header: &[u8]) -> Hmac<Sha256> {
    // RFC 2104, 2: a key shorter than the hash's block of 64 bytes is padded with zeros.
    let mut block = [0; 64];
    block[..32].copy_from_slice(&key.0);
    let mut mac = <Hmac<Sha256> as KeyInit>::new(&block.into());
    mac.update(header);
    mac
}

/// Seals what the compiler of this engine made of the component with this digest: gives what belongs
/// before the artefact. The artefact may be large, and is read piece by piece.
///
/// # Errors
/// Those of reading it; [`io::ErrorKind::InvalidInput`] when the engine's name is not as long as those
/// of engines are.
pub fn seal(
    key: &ArtefactKey,
    engine: &str,
    digest: &Digest,
    artefact: &mut dyn Read,
) -> io::Result<[u8; BODY_AT]> {
    let mut head = [0; BODY_AT];
    head[..MAGIC.len()].copy_from_slice(MAGIC);
    let engine: &[u8; COMPAT_BYTES] = engine
        .as_bytes()
        .try_into()
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    head[MAGIC.len()..][..COMPAT_BYTES].copy_from_slice(engine);
    head[MAC_AT - 32..MAC_AT].copy_from_slice(digest.as_bytes());
    let mut mac = mac(key, &head[..MAC_AT]);
    let mut piece = [0; 16 << 10];
    loop {
        match artefact.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => mac.update(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head[MAC_AT..].copy_from_slice(&mac.finalize().into_bytes());
    Ok(head)
}

/// The artefact inside, if it was sealed with this key for this component and this engine.
///
/// # Errors
/// [`SealError`]; whatever it is, the bytes must not be loaded.
pub fn open<'a>(
    key: &ArtefactKey,
    digest: &Digest,
    compat: &str,
    sealed: &'a [u8],
) -> Result<&'a [u8], SealError> {
    if sealed.len() < BODY_AT || !sealed.starts_with(MAGIC) {
        return Err(SealError::Format);
    }
    let (header, rest) = sealed.split_at(MAC_AT);
    let (tag, body) = rest.split_at(32);
    let mut mac = mac(key, header);
    mac.update(body);
    mac.verify_slice(tag).map_err(|_| SealError::Mac)?;
    let (compat_is, digest_is) = header[MAGIC.len()..].split_at(COMPAT_BYTES);
    if compat_is != compat.as_bytes() {
        return Err(SealError::Engine);
    }
    if digest_is != digest.as_bytes() {
        return Err(SealError::Component);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_key_digest_and_bytes_open() {
        let key = ArtefactKey::from_bytes([7; 32]);
        let digest = Digest::new([1; 32]);
        let compat = "0123456789abcdef";
        assert!(seal(&key, "c0ffee", &digest, &mut &b""[..]).is_err());
        let head = seal(&key, compat, &digest, &mut &b"code"[..]).unwrap();
        let sealed = [&head[..], b"code"].concat();
        assert_eq!(open(&key, &digest, compat, &sealed), Ok(&b"code"[..]));
        let other = ArtefactKey::from_bytes([8; 32]);
        assert_eq!(open(&other, &digest, compat, &sealed), Err(SealError::Mac));
        let wrong = Digest::new([2; 32]);
        assert_eq!(
            open(&key, &wrong, compat, &sealed),
            Err(SealError::Component)
        );
        let engine = "0".repeat(COMPAT_BYTES);
        assert_eq!(
            open(&key, &digest, &engine, &sealed),
            Err(SealError::Engine)
        );
        for at in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[at] ^= 1;
            assert!(open(&key, &digest, compat, &bent).is_err(), "byte {at}");
            assert!(
                open(&key, &digest, compat, &sealed[..at]).is_err(),
                "cut at {at}"
            );
        }
    }
}
