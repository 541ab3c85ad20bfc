//! Requests: a method, a path with its query, and a body.

use http::{Method, Request, header};
use kube::client::Body;

use crate::object::Kind;

/// The field manager of everything that the node writes.
const FIELD_MANAGER: &str = "sluice";
/// Not headless, and not served by another proxy.
const SERVED: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
/// Pods that have ended have given their addresses back.
const LIVING: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// A request that can be sent more than once.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    method: Method,
    uri: String,
    accept: &'static str,
    body: Vec<u8>,
}

impl Ask {
    pub(crate) fn get(uri: String) -> Self {
        Self {
            method: Method::GET,
            uri,
            accept: "application/json",
            body: Vec::new(),
        }
    }

    /// Only names and the like of the objects that are listed.
    pub(super) fn get_metadata(uri: String) -> Self {
        Self {
            accept: "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=1",
            ..Self::get(uri)
        }
    }

    /// Merges `patch` into an object (RFC 7386).
    pub(crate) fn merge(path: &str, patch: &serde_json::Value) -> Self {
        Self {
            method: Method::PATCH,
            uri: format!("{path}?fieldManager={FIELD_MANAGER}"),
            body: patch.to_string().into_bytes(),
            ..Self::get(String::new())
        }
    }

    pub(super) fn build(&self) -> http::Result<Request<Body>> {
        let mut request = Request::builder()
            .method(&self.method)
            .uri(&self.uri)
            .header(header::ACCEPT, self.accept);
        if self.method == Method::PATCH {
            request = request.header(header::CONTENT_TYPE, "application/merge-patch+json");
        }
        request.body(Body::from(self.body.clone()))
    }
}

/// Where a kind of an API group is: `v1` has another root than the others.
pub(super) fn collection(version: &str, plural: &str) -> String {
    let root = if version.contains('/') { "apis" } else { "api" };
    format!("/{root}/{version}/{plural}")
}

/// A list or watch of all objects of a kind that concern the node.
pub(super) fn objects_of(kind: Kind, parameters: &[(&str, &str)]) -> String {
    let mut uri = collection(kind.api_version(), kind.plural()) + "?";
    let selector = match kind {
        Kind::Pod => ("fieldSelector", LIVING),
        Kind::Service | Kind::EndpointSlice => ("labelSelector", SERVED),
        _ => ("", ""),
    };
    for (key, value) in parameters.iter().chain([&selector]) {
        if !value.is_empty() {
            uri += &format!("{key}={}&", escape(value));
        }
    }
    uri.pop();
    uri
}

/// A value in a path or query; everything but letters, digits and a few harmless signs by number.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                escaped.push(char::from(byte));
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}
