//! A directory's manifests: what each file says, and what they say together.
//!
//! A file that cannot be read, or an object in it that is not valid, leaves in force what the file said of it before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::document::{self, Document};
use crate::finding::{Finding, Severity};
use crate::object::{Object, ObjectKey};
use crate::store::Event;
use crate::validate::{Origin, admit};

/// All files.
#[derive(Debug, Default)]
pub(super) struct Tree {
    files: BTreeMap<PathBuf, File>,
    said: BTreeMap<ObjectKey, Object>,
    said_findings: BTreeMap<String, Vec<Finding>>,
}

#[derive(Debug, Default)]
struct File {
    objects: BTreeMap<ObjectKey, Object>,
    /// Where each object stands.
    lines: BTreeMap<ObjectKey, u32>,
    findings: Vec<Finding>,
}

/// Whether a name is a manifest's. Hidden files and what editors leave beside the one they edit is not.
pub(super) fn is_manifest(name: &str) -> bool {
    let hidden = name.starts_with(['.', '#']) || name.ends_with('~');
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    !hidden && matches!(extension, Some("yaml" | "yml" | "json"))
}

impl Tree {
    /// A file has these contents now; `None`: it is gone. `Err`: it cannot be read.
    pub(super) fn update(&mut self, path: &Path, contents: Option<Result<&str, String>>) {
        match contents {
            None => {
                self.files.remove(path);
            }
            Some(Ok(text)) => {
                let former = self.files.remove(path).unwrap_or_default();
                self.files
                    .insert(path.to_owned(), File::read(path, text, former));
            }
            Some(Err(reason)) => {
                let file = self.files.entry(path.to_owned()).or_default();
                file.findings = vec![whole_file(path, 0, reason)];
            }
        }
    }

    /// The files it knows.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(PathBuf::as_path)
    }

    /// Where an object that is used stands.
    pub(super) fn place(&self, key: &ObjectKey) -> Option<(&Path, u32)> {
        let mut files = self.files.iter();
        files.find_map(|(path, file)| Some((path.as_path(), *file.lines.get(key)?)))
    }

    /// All that is wrong.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<_> = self.merge().1.into_values().flatten().collect();
        findings.sort();
        findings
    }

    /// What is to be said after the updates since the last call.
    pub(super) fn events(&mut self) -> Vec<Event> {
        let (objects, findings) = self.merge();
        let objects: BTreeMap<ObjectKey, Object> = objects
            .into_iter()
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect();
        let mut events = Vec::new();
        for (key, object) in &objects {
            if self.said.get(key) != Some(object) {
                events.push(Event::Put(object.clone()));
            }
        }
        let gone = self.said.keys().filter(|key| !objects.contains_key(key));
        events.extend(gone.cloned().map(Event::Removed));
        for (place, findings) in &findings {
            if self.said_findings.get(place) != Some(findings) {
                let (place, findings) = (place.clone(), findings.clone());
                events.push(Event::Findings { place, findings });
            }
        }
        for place in self.said_findings.keys() {
            if !findings.contains_key(place) {
                let (place, findings) = (place.clone(), Vec::new());
                events.push(Event::Findings { place, findings });
            }
        }
        self.said = objects;
        self.said_findings = findings;
        events
    }

    /// The objects of all files. Of two of one name the one in the first file counts.
    fn merge(
        &self,
    ) -> (
        BTreeMap<&ObjectKey, &Object>,
        BTreeMap<String, Vec<Finding>>,
    ) {
        let mut objects = BTreeMap::new();
        let mut owner: BTreeMap<&ObjectKey, &Path> = BTreeMap::new();
        let mut all_findings = BTreeMap::new();
        for (path, file) in &self.files {
            let mut findings = file.findings.clone();
            for (key, object) in &file.objects {
                if let Some(other) = owner.get(key) {
                    findings.push(Finding {
                        file: Some(path.clone()),
                        line: file.lines.get(key).copied().unwrap_or_default(),
                        severity: Severity::Error,
                        object: key.to_string(),
                        field: String::new(),
                        reason: format!("Is in {} already, which is used", other.display()),
                    });
                } else {
                    owner.insert(key, path);
                    objects.insert(key, object);
                }
            }
            if !findings.is_empty() {
                all_findings.insert(path.display().to_string(), findings);
            }
        }
        (objects, all_findings)
    }
}

impl File {
    fn read(path: &Path, text: &str, mut former: Self) -> Self {
        let mut file = Self::default();
        let (documents, unreadable) = document::read(text);
        let mut refused = BTreeSet::new();
        for document in documents.into_iter().flat_map(Document::flatten) {
            let admission = admit(&document, Origin::File(path));
            file.findings.extend(admission.findings);
            let key = admission.key.map(|(kind, name)| ObjectKey { kind, name });
            match (key, admission.object) {
                (Some(key), Some(object)) if !file.objects.contains_key(&key) => {
                    file.lines.insert(key.clone(), document.line);
                    file.objects.insert(key, object);
                }
                (Some(key), Some(_)) => file.findings.push(Finding {
                    object: key.to_string(),
                    reason: "Stands twice in this file; the first one is used".into(),
                    ..whole_file(path, document.line, String::new())
                }),
                (Some(key), None) => {
                    refused.insert(key);
                }
                (None, _) => {}
            }
        }
        if let Some(unreadable) = unreadable {
            // Whatever may have followed is as it was.
            refused.extend(former.objects.keys().cloned());
            file.findings
                .push(whole_file(path, unreadable.line, unreadable.reason));
        }
        for key in refused {
            if let Some(object) = former.objects.remove(&key) {
                file.objects.entry(key).or_insert(object);
            }
        }
        file
    }
}

fn whole_file(path: &Path, line: u32, reason: String) -> Finding {
    Finding {
        file: Some(path.to_owned()),
        line,
        severity: Severity::Error,
        object: String::new(),
        field: String::new(),
        reason,
    }
}
