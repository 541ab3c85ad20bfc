//! Labels and selectors over them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The labels of one object, in order.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Labels(Vec<(String, String)>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(k, _)| k.as_str().cmp(key)).ok()?;
        Some(self.0.get(at)?.1.as_str())
    }

    /// The same with one more, unless it is there.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        if let Err(at) = self.0.binary_search_by(|(k, _)| k.as_str().cmp(key)) {
            self.0.insert(at, (key.to_owned(), value.to_owned()));
        }
        self
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

impl FromIterator<(String, String)> for Labels {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(pairs: I) -> Self {
        let mut pairs: Vec<_> = pairs.into_iter().collect();
        pairs.sort();
        pairs.dedup_by(|b, a| a.0 == b.0);
        Self(pairs)
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// What has to hold of labels, all of it. Empty: everything is selected. In order, so that equal selectors are equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Selector(Vec<Requirement>);

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
}

/// What has to hold of the value of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    In(Vec<String>),
    /// Also holds where the key is not there at all.
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let mut requirements: Vec<_> = requirements.into_iter().collect();
        for requirement in &mut requirements {
            if let Operator::In(values) | Operator::NotIn(values) = &mut requirement.operator {
                values.sort();
                values.dedup();
            }
        }
        requirements.sort();
        requirements.dedup();
        Self(requirements)
    }

    /// Objects with that label.
    pub fn labelled(key: &str, value: &str) -> Self {
        Self::new([Requirement {
            key: key.to_owned(),
            operator: Operator::In(vec![value.to_owned()]),
        }])
    }

    /// Whether everything is selected.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// The conditions.
    pub fn requirements(&self) -> impl Iterator<Item = &Requirement> {
        self.0.iter()
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            match &requirement.operator {
                Operator::In(values) => value.is_some_and(|v| values.iter().any(|it| it == v)),
                Operator::NotIn(values) => value.is_none_or(|v| values.iter().all(|it| it != v)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("everything");
        }
        for (index, requirement) in self.0.iter().enumerate() {
            let key = &requirement.key;
            if index > 0 {
                f.write_str(",")?;
            }
            match &requirement.operator {
                Operator::In(values) if values.len() == 1 => {
                    write!(f, "{key}={}", values.concat())?;
                }
                Operator::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Operator::Exists => write!(f, "{key}")?,
                Operator::DoesNotExist => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}
