//! The certificate of a listener, read from a folder and read again when it has been renewed.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::Context;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio_rustls::TlsAcceptor;

/// Names of the files, as in a Secret of the type `kubernetes.io/tls`.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
/// Between two looks at the files.
const PERIOD: Duration = Duration::from_secs(60);

/// Protocols that a listener speaks, by the names of TLS' ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }
}

/// A certificate with its private key. Clones see the same one.
#[derive(Clone, Debug)]
pub struct Tls {
    folder: PathBuf,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads `tls.crt` (the certificate first, then those that sign it) and `tls.key` of a folder, both in PEM.
    ///
    /// # Errors
    /// A file cannot be read or holds none, or the key is not the certificate's.
    pub fn read(folder: PathBuf) -> anyhow::Result<Self> {
        let config = Arc::new(RwLock::new(Arc::new(read(&folder)?)));
        Ok(Self { folder, config })
    }

    /// Reads the files again every minute, for as long as the process lives. New connections get the new certificate.
    pub async fn follow(self) {
        loop {
            tokio::time::sleep(PERIOD).await;
            if let Err(error) = self.read_again() {
                tracing::warn!(error = format!("{error:#}"), "the certificate cannot be read; the last one stays");
            }
        }
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// As for [`Tls::read`]; the certificate of before stays.
    pub fn read_again(&self) -> anyhow::Result<()> {
        let config = Arc::new(read(&self.folder)?);
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// What takes the next connection.
    pub fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut config = ServerConfig::clone(&config);
        config.alpn_protocols = vec![protocol.name().to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

fn read(folder: &Path) -> anyhow::Result<ServerConfig> {
    let (certificate, key) = (folder.join(CERTIFICATE), folder.join(KEY));
    let named = |path: &Path| format!("reading {}", path.display());
    let chain = CertificateDer::pem_file_iter(&certificate).with_context(|| named(&certificate))?;
    let chain = chain.collect::<Result<Vec<_>, _>>().with_context(|| named(&certificate))?;
    anyhow::ensure!(!chain.is_empty(), "{} holds no certificate in PEM", certificate.display());
    let secret = PrivateKeyDer::from_pem_file(&key).with_context(|| named(&key))?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    builder
        .with_safe_default_protocol_versions()
        .context("choosing versions of TLS")?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .with_context(|| format!("{} and {} do not fit", certificate.display(), key.display()))
}
