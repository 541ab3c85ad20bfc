//! Tables as a person writes them: one JSON document with the rows of the contract, addresses as text, links by name.
//!
//! Unknown fields are refused, and every error names where it is: the path of a field that cannot be read, or the path of the
//! row that the dataplane refused and which of its fields was wrong. `docs/replay.md` describes the document.

mod links;
mod overlay;
mod policy;
mod services;
mod text;

pub use links::Links;

use serde::Deserialize;
use sluice_appliance::Capacity;
use sluice_contract::Row;

/// Longest document that is read.
pub const DOCUMENT_MAX: u64 = 64 << 20;

/// Why tables cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TablesError {
    /// Path, and what is wrong there.
    #[error("{path}: {what}")]
    Field { path: String, what: String },
}

impl TablesError {
    /// Of a text `path: what`.
    fn value(text: String) -> Self {
        match text.split_once(": ") {
            Some((path, what)) => Self::Field {
                path: path.to_owned(),
                what: what.to_owned(),
            },
            None => Self::Field {
                path: ".".to_owned(),
                what: text,
            },
        }
    }
}

/// The document.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Document {
    /// What it is about, for people.
    #[serde(rename = "description")]
    _description: String,
    seed: u64,
    capacity: Size,
    node: links::Node,
    links: Vec<links::Link>,
    routes: Vec<links::Route>,
    prefixes: Vec<services::Range>,
    addresses: Vec<services::Role>,
    nat: Option<services::Nat>,
    connections: Option<services::Connections>,
    services: services::Services,
    policy: policy::Policy,
    overlay: overlay::Overlay,
}

/// How much room the tables have.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Size {
    Tiny,
    #[default]
    Default,
    Large,
}

/// Rows in the order in which they may be put, each with its path in the document.
#[derive(Debug, Default)]
struct Rows(Vec<(String, Row)>);

impl Rows {
    fn put(&mut self, path: String, row: Row) {
        self.0.push((path, row));
    }
}

/// Tables that were read.
#[derive(Debug)]
pub struct Tables {
    /// What randomness is made from.
    pub seed: u64,
    pub capacity: Capacity,
    pub links: Links,
    /// In the order in which they may be put, each with its path.
    pub rows: Vec<(String, Row)>,
}

impl Tables {
    /// The tables of a JSON document.
    ///
    /// # Errors
    /// [`TablesError`], naming the field.
    pub fn read(json: &str) -> Result<Self, TablesError> {
        let mut reader = serde_json::Deserializer::from_str(json);
        let document: Document =
            serde_path_to_error::deserialize(&mut reader).map_err(|error| TablesError::Field {
                path: error.path().to_string(),
                what: error.into_inner().to_string(),
            })?;
        reader.end().map_err(|error| TablesError::Field {
            path: ".".to_owned(),
            what: error.to_string(),
        })?;
        document.tables()
    }
}

impl Document {
    fn tables(&self) -> Result<Tables, TablesError> {
        let links = Links::of(&self.links)?;
        let mut rows = Rows::default();
        rows.put("node".to_owned(), self.node.row());
        for (at, link) in self.links.iter().enumerate() {
            let row = link.row(&links);
            let row = row.map_err(|what| TablesError::value(format!("links[{at}].{what}")))?;
            rows.put(format!("links[{at}]"), row);
        }
        for (at, range) in self.prefixes.iter().enumerate() {
            rows.put(format!("prefixes[{at}]"), range.row());
        }
        for (at, role) in self.addresses.iter().enumerate() {
            rows.put(format!("addresses[{at}]"), role.row());
        }
        if let Some(nat) = &self.nat {
            rows.put("nat".to_owned(), nat.row());
        }
        if let Some(connections) = &self.connections {
            rows.put("connections".to_owned(), connections.row());
        }
        self.services.put(&mut rows)?;
        self.policy.put(&links, &mut rows)?;
        self.overlay.put(&mut rows);
        for (at, route) in self.routes.iter().enumerate() {
            route.put(at, &mut rows);
        }
        Ok(Tables {
            seed: self.seed,
            capacity: match self.capacity {
                Size::Tiny => Capacity::TINY,
                Size::Default => Capacity::default(),
                Size::Large => Capacity::LARGE,
            },
            links,
            rows: rows.0,
        })
    }
}
