//! TLS on a server's ports.
//!
//! Certificates expire, and whoever renews them writes new files: they are read again every [`REREAD`], and a connection
//! is met with what was there last. Files that cannot be used then are logged, and what was used before goes on.

use std::{fmt::Display, fs, io, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
    server::TlsStream,
};

use crate::config::{ConfigError, Key};

/// How often the files are read again. Whoever renews a certificate does so days before the old one ends.
const REREAD: Duration = Duration::from_secs(10);

/// gRPC needs HTTP/2; most other clients speak HTTP/1.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Settings of a server that may speak TLS.
pub const KEYS: &[Key] = &[
    Key {
        path: "tls.certificate_file",
        help: "PEM file with the certificate for all ports but that of metrics, those that sign it behind it; read again \
               when it changes. Default: none, which leaves connections unencrypted.",
    },
    Key { path: "tls.key_file", help: "PEM file with the certificate's private key, unencrypted. Default: none." },
];

/// Where a certificate is. Both files or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsSettings {
    /// PEM: the server's certificate, then those that sign it.
    pub certificate_file: Option<String>,
    /// PEM: its private key.
    pub key_file: Option<String>,
}

/// A certificate that cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read, or holds no such thing.
    #[error("`{key}` = {path}: {cause}")]
    File {
        /// The setting.
        key: &'static str,
        /// The file.
        path: String,
        /// Why.
        cause: String,
    },
    /// The two do not belong together, or the key is of a kind that is not supported.
    #[error("`tls.certificate_file` = {certificate} with `tls.key_file` = {key}: {cause}")]
    Pair {
        /// The certificate's file.
        certificate: String,
        /// The key's file.
        key: String,
        /// Why.
        cause: rustls::Error,
    },
}

/// How a server's ports speak TLS. Clones share the certificate.
#[derive(Debug, Clone)]
pub struct Tls {
    files: Arc<Files>,
    config: watch::Sender<Arc<ServerConfig>>,
}

/// Where things are.
#[derive(Debug)]
struct Files {
    certificate: String,
    key: String,
}

/// What they hold; never shown.
#[derive(PartialEq, Eq)]
struct Pem {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

// === impl TlsSettings ===

impl TlsSettings {
    /// Checks that there are both files or none.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match (&self.certificate_file, &self.key_file) {
            (Some(_), None) => Err(ConfigError::invalid("tls.key_file", "", "the certificate needs its key")),
            (None, Some(_)) => Err(ConfigError::invalid("tls.certificate_file", "", "the key needs its certificate")),
            (Some(_), Some(_)) | (None, None) => Ok(()),
        }
    }
}

// === impl Tls ===

impl Tls {
    /// Reads the files, if there are any.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn read(settings: &TlsSettings) -> Result<Option<Self>, TlsError> {
        let (Some(certificate), Some(key)) = (settings.certificate_file.clone(), settings.key_file.clone()) else {
            return Ok(None);
        };
        let files = Files { certificate, key };
        let config = files.config(&files.read()?)?;
        Ok(Some(Self { files: Arc::new(files), config: watch::Sender::new(Arc::new(config)) }))
    }

    /// Meets a client, which may take its time: a caller bounds it.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = Arc::clone(&self.config.borrow());
        TlsAcceptor::from(config).accept(stream).await
    }

    /// Reads the files again and again, for ever.
    pub(super) async fn follow(&self) {
        let (mut known, mut last_error) = (None, String::new());
        loop {
            let tls = self.clone();
            // The files may be on a volume that answers late.
            let reread = tokio::task::spawn_blocking(move || (tls.reread(&mut known), known)).await;
            // It ends early with the runtime alone.
            let Ok((result, now)) = reread else { return };
            known = now;
            let error = result.err().map(|error| error.to_string()).unwrap_or_default();
            if !error.is_empty() && error != last_error {
                tracing::warn!(error, "kept the certificate that was there before");
            }
            last_error = error;
            tokio::time::sleep(REREAD).await;
        }
    }

    /// Takes what the files hold, if that is not what is `known`.
    fn reread(&self, known: &mut Option<Pem>) -> Result<(), TlsError> {
        let pem = self.files.read()?;
        if known.as_ref() != Some(&pem) {
            self.config.send_replace(Arc::new(self.files.config(&pem)?));
            tracing::info!(file = self.files.certificate, "read the certificate");
            *known = Some(pem);
        }
        Ok(())
    }
}

// === impl Files ===

impl Files {
    fn read(&self) -> Result<Pem, TlsError> {
        let certificate = fs::read(&self.certificate).map_err(|error| self.bad_certificate(&error))?;
        Ok(Pem { certificate, key: fs::read(&self.key).map_err(|error| self.bad_key(&error))? })
    }

    fn config(&self, pem: &Pem) -> Result<ServerConfig, TlsError> {
        let certificates = CertificateDer::pem_slice_iter(&pem.certificate).collect::<Result<Vec<_>, _>>();
        let certificates = certificates.map_err(|error| self.bad_certificate(&error))?;
        if certificates.is_empty() {
            return Err(self.bad_certificate(&"it holds no certificate"));
        }
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|error| self.bad_key(&error))?;
        let failed = |cause| TlsError::Pair { certificate: self.certificate.clone(), key: self.key.clone(), cause };
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(failed)?;
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
        Ok(config)
    }

    fn bad_certificate(&self, cause: &dyn Display) -> TlsError {
        TlsError::File { key: "tls.certificate_file", path: self.certificate.clone(), cause: cause.to_string() }
    }

    fn bad_key(&self, cause: &dyn Display) -> TlsError {
        TlsError::File { key: "tls.key_file", path: self.key.clone(), cause: cause.to_string() }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tempfile::TempDir;
    use tokio::net::TcpListener;
    use tokio_rustls::{
        TlsConnector,
        rustls::{ClientConfig, RootCertStore, pki_types::ServerName},
    };

    use super::*;

    /// A certificate for `localhost` in files of a folder.
    pub(in super::super) struct Issued {
        pub(in super::super) settings: TlsSettings,
        pub(in super::super) certificate_pem: String,
        folder: TempDir,
    }

    impl Issued {
        pub(in super::super) fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = |name| Some(folder.path().join(name).display().to_string());
            let settings = TlsSettings { certificate_file: path("tls.crt"), key_file: path("tls.key") };
            let mut issued = Self { settings, certificate_pem: String::new(), folder };
            issued.renew();
            issued
        }

        fn renew(&mut self) {
            let issued = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            self.certificate_pem = issued.cert.pem();
            self.put("tls.crt", &self.certificate_pem);
            self.put("tls.key", &issued.signing_key.serialize_pem());
        }

        fn put(&self, name: &str, text: &str) {
            fs::write(self.folder.path().join(name), text).unwrap();
        }
    }

    /// What a client is shown that trusts nobody but the certificate's owner; and what the two then speak.
    async fn shown(tls: &Tls, trusted_pem: &str, protocol: &[u8]) -> io::Result<Vec<u8>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted_pem.as_bytes()).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let stream = TcpStream::connect(listener.local_addr()?).await?;
        let (accepted, _) = listener.accept().await?;
        let name = ServerName::try_from("localhost").unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let (served, asked) = tokio::join!(tls.accept(accepted), connector.connect(name, stream));
        let asked = asked?;
        served?;
        Ok(asked.get_ref().1.alpn_protocol().unwrap_or_default().to_vec())
    }

    #[tokio::test]
    async fn both_protocols_are_offered() {
        let issued = Issued::new();
        let tls = Tls::read(&issued.settings).unwrap().unwrap();
        for protocol in PROTOCOLS {
            assert_eq!(shown(&tls, &issued.certificate_pem, protocol).await.unwrap(), protocol);
        }
        assert!(shown(&tls, &issued.certificate_pem, b"other").await.is_err());
    }

    #[tokio::test]
    async fn a_renewed_certificate_is_shown_and_a_bad_one_is_not() {
        let mut issued = Issued::new();
        let (tls, first) = (Tls::read(&issued.settings).unwrap().unwrap(), issued.certificate_pem.clone());
        let mut known = None;
        issued.renew();
        let second = issued.certificate_pem.clone();
        assert!(shown(&tls, &second, b"h2").await.is_err(), "it is not read yet");
        tls.reread(&mut known).unwrap();
        shown(&tls, &second, b"h2").await.unwrap();
        assert!(shown(&tls, &first, b"h2").await.is_err(), "the old one is still shown");
        issued.put("tls.crt", &first);
        let error = tls.reread(&mut known).unwrap_err().to_string();
        assert!(error.contains("tls.crt") && error.contains("tls.key"), "{error}");
        shown(&tls, &second, b"h2").await.unwrap();
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        assert!(Tls::read(&TlsSettings::default()).unwrap().is_none());
        for (name, text, expected) in [
            ("tls.crt", "", "tls.crt: it holds no certificate"),
            ("tls.crt", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n", "tls.crt: "),
            ("tls.key", "", "tls.key: "),
            ("tls.key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "tls.key: "),
        ] {
            let issued = Issued::new();
            issued.put(name, text);
            let error = Tls::read(&issued.settings).unwrap_err().to_string();
            assert!(error.contains(expected) && error.lines().count() == 1, "{error}");
        }
        let gone = TlsSettings { certificate_file: Some("gone.crt".into()), key_file: Some("gone.key".into()) };
        let error = Tls::read(&gone).unwrap_err().to_string();
        assert!(error.starts_with("`tls.certificate_file` = gone.crt: "), "{error}");
    }

    #[test]
    fn one_file_wants_the_other() {
        let one = TlsSettings { certificate_file: Some("x".into()), key_file: None };
        assert!(one.validate().unwrap_err().to_string().contains("tls.key_file"));
        let other = TlsSettings { certificate_file: None, key_file: Some("x".into()) };
        assert!(other.validate().unwrap_err().to_string().contains("tls.certificate_file"));
        assert!(TlsSettings::default().validate().is_ok());
    }
}
