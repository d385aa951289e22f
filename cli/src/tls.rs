//! TLS to a host's admin API. Rustls is named only here.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Checks the certificate of one host.
#[derive(Clone)]
pub(crate) struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// For a host by its name or address, with an optional port. Only the certificates in
    /// `ca_cert` are believed where it is given, else those that this system believes.
    pub(crate) fn new(authority: &str, ca_cert: Option<&Path>) -> Result<Self> {
        let name = authority
            .rsplit_once(':')
            .map_or(authority, |(name, _)| name);
        let name = name.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(name).context("not the name of a host")?;
        let mut roots = RootCertStore::empty();
        match ca_cert {
            Some(path) => {
                let read = || -> Result<_> {
                    let certificates = CertificateDer::pem_file_iter(path)?;
                    Ok(certificates.collect::<Result<Vec<_>, _>>()?)
                };
                let certificates = read().with_context(|| path.display().to_string())?;
                if certificates.is_empty() {
                    bail!("{}: there is no certificate in it", path.display());
                }
                for certificate in certificates {
                    roots
                        .add(certificate)
                        .with_context(|| path.display().to_string())?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                // Some of a system's certificates may be of a kind that is not known here.
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    bail!(
                        "this system has no certificates to check the host's by; name one with --ca-cert"
                    );
                }
            }
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            connector: Arc::new(config).into(),
            name,
        })
    }

    /// Makes a connection secure.
    pub(crate) async fn connect(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        self.connector.connect(self.name.clone(), stream).await
    }
}
