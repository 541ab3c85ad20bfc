//! Where the API server is and with whose credentials it is asked.

use std::path::PathBuf;

use http::{HeaderValue, header};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// The server's audit log and its metrics have this name of the node's requests.
const USER_AGENT: &str = concat!("sluice/", env!("CARGO_PKG_VERSION"));

/// Whose credentials are used.
#[derive(Debug)]
pub(crate) enum Access {
    /// In a pod: its service account. Else `KUBECONFIG` or `~/.kube/config`.
    Infer,
    File(PathBuf),
    Given(Box<Config>),
}

impl Access {
    /// A client with the credentials as they are now: files are read anew by each call.
    pub(super) async fn connect(&self) -> Result<Client, String> {
        let mut config = match self {
            Self::Infer => Config::infer().await.map_err(|it| it.to_string())?,
            Self::File(path) => {
                let file = Kubeconfig::read_from(path).map_err(|it| it.to_string())?;
                let options = KubeConfigOptions::default();
                let config = Config::from_custom_kubeconfig(file, &options).await;
                config.map_err(|it| it.to_string())?
            }
            Self::Given(config) => (**config).clone(),
        };
        // Failures are counted and waited out by the callers.
        config.default_retry = false;
        config.read_timeout = None;
        let agent = HeaderValue::from_static(USER_AGENT);
        config.headers.push((header::USER_AGENT, agent));
        Client::try_from(config).map_err(|it| it.to_string())
    }
}
