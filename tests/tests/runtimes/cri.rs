//! As much of the container runtime interface (CRI v1) as a kubelet needs for a pod's sandbox: unary gRPC calls over a unix
//! socket. The messages carry the field numbers of `runtime/v1/api.proto`; fields that are not used here are left out.

use anyhow::{Context as _, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message;
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Metadata {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) uid: String,
    #[prost(string, tag = "3")]
    pub(crate) namespace: String,
    #[prost(uint32, tag = "4")]
    pub(crate) attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PortMapping {
    /// 0 TCP, 1 UDP, 2 SCTP.
    #[prost(int32, tag = "1")]
    pub(crate) protocol: i32,
    #[prost(int32, tag = "2")]
    pub(crate) container_port: i32,
    #[prost(int32, tag = "3")]
    pub(crate) host_port: i32,
    #[prost(string, tag = "4")]
    pub(crate) host_ip: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub(crate) metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    pub(crate) hostname: String,
    #[prost(string, tag = "3")]
    pub(crate) log_directory: String,
    #[prost(message, repeated, tag = "5")]
    pub(crate) port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    pub(crate) annotations: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct RunRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// The requests and the answer that carry nothing but a sandbox's id.
#[derive(Clone, PartialEq, Message)]
struct SandboxId {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(bool, tag = "2")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct SandboxStatus {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "5")]
    network: Option<NetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct NetworkStatus {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
struct PodIp {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

#[derive(Clone, PartialEq, Message)]
struct Condition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "4")]
    message: String,
}

/// What the runtime says of a sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    pub(crate) ips: Vec<String>,
    /// The verbose part: JSON with the namespace and the CNI result.
    pub(crate) info: serde_json::Value,
}

/// A client of one runtime.
#[derive(Clone, Debug)]
pub(crate) struct Cri {
    socket: PathBuf,
}

impl Cri {
    pub(crate) const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(crate) fn run(&self, config: SandboxConfig) -> Result<String> {
        let request = RunRequest {
            config: Some(config),
        };
        Ok(self.call::<_, SandboxId>("RunPodSandbox", &request)?.id)
    }

    pub(crate) fn stop(&self, id: &str) -> Result<()> {
        let request = SandboxId {
            id: id.into(),
            verbose: false,
        };
        self.call::<_, Empty>("StopPodSandbox", &request).map(drop)
    }

    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        let request = SandboxId {
            id: id.into(),
            verbose: false,
        };
        self.call::<_, Empty>("RemovePodSandbox", &request)
            .map(drop)
    }

    pub(crate) fn status(&self, id: &str) -> Result<Sandbox> {
        let request = SandboxId {
            id: id.into(),
            verbose: true,
        };
        let answer: StatusAnswer = self.call("PodSandboxStatus", &request)?;
        let network = answer
            .status
            .and_then(|status| status.network)
            .context("no network")?;
        let mut ips = vec![network.ip];
        ips.extend(network.additional.into_iter().map(|more| more.ip));
        let info = answer.info.get("info").context("no verbose part")?;
        Ok(Sandbox {
            ips,
            info: serde_json::from_str(info)?,
        })
    }

    /// Why pods cannot be run, if so: the runtime's conditions that do not hold.
    pub(crate) fn unready(&self) -> Result<Vec<String>> {
        let answer: RuntimeAnswer = self.call("Status", &Empty {})?;
        let conditions = answer.status.context("no status")?.conditions;
        let failed = conditions.into_iter().filter(|condition| !condition.status);
        Ok(failed
            .map(|c| format!("{}: {}", c.kind, c.message))
            .collect())
    }

    fn call<Q: Message, A: Message + Default>(&self, method: &str, request: &Q) -> Result<A> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let bytes = runtime.block_on(async {
            let call = self.unary(method, request.encode_to_vec());
            tokio::time::timeout(Duration::from_secs(60), call).await
        });
        let bytes = bytes
            .context("no answer in a minute")?
            .context(method.to_owned())?;
        Ok(A::decode(bytes)?)
    }

    async fn unary(&self, method: &str, message: Vec<u8>) -> Result<Bytes> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (client, connection) = h2::client::handshake(stream).await?;
        // It ends with the runtime that drives it; a broken connection shows in the call.
        let driven = tokio::spawn(async move { drop(connection.await) });
        let answer = Self::exchange(client, method, message).await;
        driven.abort();
        answer
    }

    async fn exchange(
        client: h2::client::SendRequest<Bytes>,
        method: &str,
        message: Vec<u8>,
    ) -> Result<Bytes> {
        let mut client = client.ready().await?;
        let request = http::Request::post(format!("http://cri/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut body) = client.send_request(request, false)?;
        let mut frame = BytesMut::with_capacity(message.len() + 5);
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len())?);
        frame.extend_from_slice(&message);
        body.send_data(frame.freeze(), true)?;
        let (head, mut answer) = response.await?.into_parts();
        let mut bytes = BytesMut::new();
        while let Some(chunk) = answer.data().await {
            let chunk = chunk?;
            answer.flow_control().release_capacity(chunk.len())?;
            bytes.extend_from_slice(&chunk);
        }
        let trailers = answer.trailers().await?.unwrap_or(head.headers);
        let text = |name: &str| {
            trailers
                .get(name)
                .and_then(|v| v.to_str().ok())
                .unwrap_or("")
        };
        if text("grpc-status") != "0" {
            bail!(
                "gRPC status {}: {}",
                text("grpc-status"),
                text("grpc-message")
            );
        }
        anyhow::ensure!(bytes.len() >= 5, "an answer without a message");
        Ok(bytes.freeze().slice(5..))
    }
}
