//! TLS to destinations.
//!
//! The roots are the system's (where `SSL_CERT_FILE` and `SSL_CERT_DIR` say, if they do), asked for once
//! ([`super::Inquiries`]), before the first handshake. No session is resumed: a ticket of one tenant would be known again
//! when another one comes.

use std::sync::{Arc, OnceLock};

use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::engine::run::BodyError;

/// A connection over TLS.
pub(super) type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct ClientTls {
    config: OnceLock<Option<Arc<ClientConfig>>>,
}

impl ClientTls {
    /// Whether [`ClientTls::load`] has been here.
    pub(super) fn is_loaded(&self) -> bool {
        self.config.get().is_some()
    }

    /// Takes the roots, in DER.
    pub(super) fn load(&self, found: Vec<Vec<u8>>) {
        self.config.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let found = found.into_iter().map(CertificateDer::from);
            let (added, ignored) = roots.add_parsable_certificates(found);
            if added == 0 {
                tracing::warn!(ignored, "no root certificates: guests get no https");
                return None;
            }
            let provider = Arc::new(ring::default_provider());
            let builder =
                ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let mut config = match builder {
                Ok(builder) => builder.with_root_certificates(roots).with_no_client_auth(),
                Err(error) => {
                    tracing::error!(%error, "no TLS for guests");
                    return None;
                }
            };
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            config.resumption = Resumption::disabled();
            Some(Arc::new(config))
        });
    }

    /// Shakes hands over a connection that is there.
    pub(super) async fn connect(
        &self,
        name: &str,
        stream: TcpStream,
    ) -> Result<TlsStream, BodyError> {
        let config = self.config.get().and_then(Option::as_ref);
        let config = config.ok_or(BodyError::TlsCertificateError)?;
        let name = ServerName::try_from(name.to_owned());
        let name = name.map_err(|_| BodyError::HttpRequestUriInvalid)?;
        let connector = TlsConnector::from(Arc::clone(config));
        let connected = connector.connect(name, stream).await;
        connected.map_err(|error| said(&error))
    }
}

/// What went wrong, in the words of `wasi:http`.
fn said(error: &std::io::Error) -> BodyError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
            BodyError::TlsCertificateError
        }
        Some(rustls::Error::AlertReceived(alert)) => BodyError::TlsAlertReceived {
            alert_id: Some(u8::from(*alert)),
            alert_message: Some(format!("{alert:?}")),
        },
        Some(_) => BodyError::TlsProtocolError,
        None => BodyError::ConnectionTerminated,
    }
}
