//! A document in, an object or the reasons why not out.
//!
//! Nothing invalid gets past this room, and one bad object harms no other. The rules are those of the API server, so that a
//! manifest which is good here is good there; what the API server sends is held to the same rules except that fields
//! unknown here are left alone, for a server may be newer.

mod cluster;
mod fields;
mod network;
mod node_policy;
mod service;
mod wire;

use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::{discovery, networking};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::document::Document;
use crate::finding::{Finding, Severity};
use crate::object::{Kind, Name, Object};

/// Where a document comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// A manifest: a misspelt field is an error.
    File(&'a Path),
    /// The API server.
    Api,
}

/// What became of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// What it is about, as far as that could be read: an object that was refused leaves its predecessor in force.
    pub key: Option<(Kind, Name)>,
    pub object: Option<Object>,
    pub findings: Vec<Finding>,
}

/// Reads a document as an object of the cluster.
pub fn admit(document: &Document, origin: Origin<'_>) -> Admission {
    let text = |field| document.value.get(field).and_then(Value::as_str);
    let (kind, version) = (text("kind"), text("apiVersion"));
    let mut check = Check {
        document,
        origin,
        object: kind.unwrap_or("Document").to_owned(),
        findings: Vec::new(),
        failed: false,
    };
    let known = Kind::ALL.into_iter().find(|it| Some(it.name()) == kind);
    let Some(kind) = known else {
        match kind {
            None => check.error("kind", "Missing, so this is no Kubernetes object"),
            Some(_) => check.warn("kind", "Not used here"),
        }
        return check.end(None, None);
    };
    if version != Some(kind.api_version()) {
        check.error("apiVersion", format!("Has to be {}", kind.api_version()));
        return check.end(None, None);
    }
    admit_kind(check, kind)
}

/// The same for a document whose kind is known from where it was found.
pub fn admit_as(kind: Kind, value: Value) -> Admission {
    let document = Document::without_lines(value);
    let check = Check {
        document: &document,
        origin: Origin::Api,
        object: kind.name().to_owned(),
        findings: Vec::new(),
        failed: false,
    };
    admit_kind(check, kind)
}

fn admit_kind(mut check: Check<'_>, kind: Kind) -> Admission {
    let Some(name) = check.name(kind) else {
        return check.end(None, None);
    };
    check.object = format!("{kind} {name}");
    let object = match kind {
        Kind::Namespace => check
            .read::<core::Namespace>()
            .map(|it| Object::Namespace(check.namespace(&name, &it.metadata))),
        Kind::Node => check
            .read::<core::Node>()
            .map(|it| Object::Node(check.node(&name, it))),
        Kind::Pod => check
            .read::<core::Pod>()
            .map(|it| Object::Pod(check.pod(&name, it))),
        Kind::Service => check
            .read::<core::Service>()
            .map(|it| Object::Service(check.service(&name, it))),
        Kind::EndpointSlice => check
            .read::<discovery::v1::EndpointSlice>()
            .and_then(|it| check.slice(&name, it))
            .map(Object::EndpointSlice),
        Kind::NetworkPolicy => check
            .read::<networking::v1::NetworkPolicy>()
            .map(|it| Object::NetworkPolicy(check.network_policy(&name, it))),
        Kind::ClusterNetworkPolicy => check
            .read::<wire::ClusterNetworkPolicy>()
            .map(|it| Object::ClusterPolicy(check.cluster_policy(&name, it))),
        Kind::NodePolicy => check
            .read::<node_policy::Manifest>()
            .map(|it| Object::NodePolicy(check.node_policy(&name, it))),
    };
    check.end(Some((kind, name)), object)
}

/// One document being read.
struct Check<'a> {
    document: &'a Document,
    origin: Origin<'a>,
    object: String,
    findings: Vec<Finding>,
    failed: bool,
}

impl Check<'_> {
    fn end(self, key: Option<(Kind, Name)>, object: Option<Object>) -> Admission {
        Admission {
            key,
            object: object.filter(|_| !self.failed),
            findings: self.findings,
        }
    }

    fn error(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.failed = true;
        self.find(Severity::Error, field.into(), reason.into());
    }

    fn warn(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.find(Severity::Warning, field.into(), reason.into());
    }

    fn find(&mut self, severity: Severity, field: String, reason: String) {
        let file = match self.origin {
            Origin::File(path) => Some(path.to_owned()),
            Origin::Api => None,
        };
        self.findings.push(Finding {
            file,
            line: self.document.line_of(&field),
            severity,
            object: self.object.clone(),
            field,
            reason,
        });
    }

    /// Namespace and name. A manifest without a namespace is in `default`, as with kubectl.
    fn name(&mut self, kind: Kind) -> Option<Name> {
        let metadata = self.document.value.get("metadata");
        let text = |field| {
            metadata
                .and_then(|it| it.get(field))
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty())
        };
        let Some(name) = text("name") else {
            self.error("metadata.name", "Missing");
            return None;
        };
        if let Err(reason) = fields::subdomain(name) {
            self.error("metadata.name", reason);
            return None;
        }
        let namespace = match (kind.is_namespaced(), text("namespace")) {
            (false, None) => "",
            (true, namespace) => namespace.unwrap_or("default"),
            (false, Some(_)) => {
                self.warn(
                    "metadata.namespace",
                    "Objects of this kind lie in no namespace",
                );
                ""
            }
        };
        if !namespace.is_empty()
            && let Err(reason) = fields::dns_label(namespace)
        {
            self.error("metadata.namespace", reason);
            return None;
        }
        Some(Name::new(namespace, name))
    }

    /// The document as the API's own type. Fields that the type does not know are findings in manifests.
    fn read<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut unknown = Vec::new();
        let mut note = |path: serde_ignored::Path<'_>| unknown.push(ignored_path(&path));
        let plain = serde_ignored::Deserializer::new(&self.document.value, &mut note);
        let read = serde_path_to_error::deserialize::<_, T>(plain);
        if self.origin != Origin::Api {
            for field in unknown {
                if cluster::is_open(&field) && self.object.starts_with("ClusterNetworkPolicy") {
                    self.warn(field, "Not understood, so the rule fails closed");
                } else {
                    self.error(field, "There is no such field");
                }
            }
        }
        match read {
            Ok(value) => Some(value),
            Err(error) => {
                let path = error.path().to_string();
                let field = if path == "." { String::new() } else { path };
                self.error(field, error.into_inner().to_string());
                None
            }
        }
    }

    fn labels(&mut self, metadata: &ObjectMeta) -> crate::object::Labels {
        let labels = metadata.labels.clone().unwrap_or_default();
        for (key, value) in &labels {
            if let Err(reason) = fields::label(key, value) {
                self.error(format!("metadata.labels[{key}]"), reason);
            }
        }
        labels.into_iter().collect()
    }
}

/// `a.b[0].c`, as the documents write it.
fn ignored_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", ignored_path(parent)),
        Path::Map { parent, key } => match ignored_path(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => ignored_path(parent),
    }
}
