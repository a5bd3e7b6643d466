//! A connection to a peer, plain or TLS.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::association::{AssociationError, Stream};

/// Where a peer is.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// TLS, where it is spoken; the peer's certificate must name `host`, unless the configuration knows it by itself.
    pub(crate) tls: Option<Arc<ClientConfig>>,
}

impl Connection {
    /// Connects, TLS included.
    ///
    /// # Errors
    /// No connection, or none within `deadline`.
    pub(crate) async fn open(
        &self,
        deadline: Duration,
    ) -> Result<Box<dyn Stream>, AssociationError> {
        match timeout(deadline, self.connect()).await {
            Ok(connected) => connected.map_err(AssociationError::Connection),
            Err(_) => Err(AssociationError::Deadline(deadline)),
        }
    }

    /// Connects, however long it takes.
    ///
    /// # Errors
    /// No connection.
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let Some(config) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let name = ServerName::try_from(self.host.clone()).map_err(io::Error::other)?;
        let connector = TlsConnector::from(Arc::clone(config));
        Ok(Box::new(connector.connect(name, stream).await?))
    }
}
