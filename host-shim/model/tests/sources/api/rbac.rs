//! Who may do what: requests as the API server's authorizer sees them, and the rules of a role.

use std::fmt;

use serde_json::Value;

/// A verb and what it is for: `list pods`, `patch nodes/status`, `watch nodepolicies.sluice.dev`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Right {
    pub(crate) verb: String,
    pub(crate) group: String,
    /// With the subresource.
    pub(crate) resource: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verb,
            group,
            resource,
        } = self;
        let dot = if group.is_empty() { "" } else { "." };
        write!(f, "{verb} {resource}{dot}{group}")
    }
}

impl Right {
    /// What a request needs.
    pub(super) fn of(method: &str, path: &str, is_watch: bool) -> Self {
        let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => ("", [].as_slice()),
        };
        let (resource, is_one) = match rest {
            [resource, _, subresource] => (format!("{resource}/{subresource}"), true),
            [resource, _] => ((*resource).to_owned(), true),
            [resource] => ((*resource).to_owned(), false),
            _ => (path.to_owned(), false),
        };
        let verb = match method {
            "GET" if is_watch => "watch",
            "GET" if is_one => "get",
            "GET" => "list",
            "PATCH" => "patch",
            other => other,
        };
        let (verb, group) = (verb.to_owned(), group.to_owned());
        Self {
            verb,
            group,
            resource,
        }
    }

    /// Whether the `rules` of a role have it.
    pub(super) fn is_in(&self, rules: &Value) -> bool {
        Self::all(rules).contains(self)
    }

    /// All that the `rules` of a role allow, one by one.
    pub(crate) fn all(rules: &Value) -> Vec<Self> {
        let words = |rule: &Value, field: &str| -> Vec<String> {
            let words = rule[field].as_array().unwrap().iter();
            words.map(|it| it.as_str().unwrap().to_owned()).collect()
        };
        let mut all = Vec::new();
        for rule in rules.as_array().unwrap() {
            for group in words(rule, "apiGroups") {
                for resource in words(rule, "resources") {
                    for verb in words(rule, "verbs") {
                        let (group, resource) = (group.clone(), resource.clone());
                        all.push(Self {
                            verb,
                            group,
                            resource,
                        });
                    }
                }
            }
        }
        all
    }
}
