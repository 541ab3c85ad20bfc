//! The shapes of names, labels, addresses and selectors, as the API server defines them.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use sluice_contract::Protocol;

use super::Check;
use crate::object::{Operator, Prefix, Requirement, Selector};

/// RFC 1123: lower case letters, digits and dashes, no dash at an end.
pub(super) fn dns_label(text: &str) -> Result<(), &'static str> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() || text.len() > 63 {
        return Err("Has to have 1 to 63 characters");
    }
    if !text.chars().all(inner) || text.starts_with('-') || text.ends_with('-') {
        return Err("Lower case letters, digits and '-' only, beginning and ending without '-'");
    }
    Ok(())
}

/// Labels with dots between them.
pub(super) fn subdomain(text: &str) -> Result<(), &'static str> {
    if text.len() > 253 {
        return Err("Longer than 253 characters");
    }
    text.split('.').try_for_each(dns_label)
}

/// One key and value.
pub(super) fn label(key: &str, value: &str) -> Result<(), &'static str> {
    label_key(key)?;
    if !value.is_empty() {
        qualified(value)?;
    }
    Ok(())
}

pub(super) fn label_key(key: &str) -> Result<(), &'static str> {
    match key.split_once('/') {
        Some((prefix, name)) => {
            subdomain(prefix)?;
            qualified(name)
        }
        None => qualified(key),
    }
}

fn qualified(text: &str) -> Result<(), &'static str> {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let end = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    if text.is_empty() || text.len() > 63 {
        return Err("Has to have 1 to 63 characters");
    }
    if !text.chars().all(inner) || !end(text.chars().next()) || !end(text.chars().last()) {
        return Err(
            "Letters, digits, '-', '_' and '.' only, beginning and ending with a letter or digit",
        );
    }
    Ok(())
}

/// The name of a port: RFC 6335, at most 15 characters.
pub(super) fn port_name(text: &str) -> Result<(), &'static str> {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() || text.len() > 15 {
        return Err("The name of a port has 1 to 15 characters");
    }
    let has_letter = text.chars().any(|c| c.is_ascii_lowercase());
    if !text.chars().all(inner)
        || !has_letter
        || text.starts_with('-')
        || text.ends_with('-')
        || text.contains("--")
    {
        return Err(
            "The name of a port has lower case letters, digits and single '-' inside, and one letter at least",
        );
    }
    Ok(())
}

impl Check<'_> {
    pub(super) fn port(&mut self, field: &str, number: i32) -> Option<u16> {
        match u16::try_from(number) {
            Ok(port) if port > 0 => Some(port),
            _ => {
                self.error(field, format!("{number} is no port: 1 to 65535"));
                None
            }
        }
    }

    /// TCP where nothing is said.
    pub(super) fn protocol(&mut self, field: &str, text: Option<&str>) -> Option<Protocol> {
        match text {
            None | Some("TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(other) => {
                self.error(field, format!("{other:?} is not one of TCP, UDP, SCTP"));
                None
            }
        }
    }

    pub(super) fn address(&mut self, field: &str, text: &str) -> Option<IpAddr> {
        match text.parse::<IpAddr>() {
            Ok(address) => Some(address.to_canonical()),
            Err(_) => {
                self.error(field, format!("{text:?} is no IP address"));
                None
            }
        }
    }

    pub(super) fn prefix(&mut self, field: &str, text: &str) -> Option<Prefix> {
        let parsed = text.split_once('/').and_then(|(address, length)| {
            let address = address.parse().ok()?;
            let length = length.parse().ok().filter(|_| !length.starts_with('+'))?;
            Some((address, Prefix::new(address, length)?))
        });
        let Some((address, prefix)) = parsed else {
            self.error(field, format!("{text:?} is no CIDR such as 10.0.0.0/8"));
            return None;
        };
        if prefix.address() != address {
            self.warn(
                field,
                format!("Bits beyond the prefix length are set; {prefix} is meant"),
            );
        }
        Some(prefix)
    }

    pub(super) fn selector(&mut self, field: &str, selector: LabelSelector) -> Selector {
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.unwrap_or_default() {
            if let Err(reason) = label(&key, &value) {
                self.error(format!("{field}.matchLabels[{key}]"), reason);
            }
            let operator = Operator::In(vec![value]);
            requirements.push(Requirement { key, operator });
        }
        for (index, it) in selector.match_expressions.into_iter().flatten().enumerate() {
            let field = format!("{field}.matchExpressions[{index}]");
            if let Err(reason) = label_key(&it.key) {
                self.error(format!("{field}.key"), reason);
            }
            let values = it.values.unwrap_or_default();
            for (index, value) in values.iter().enumerate() {
                if let Err(reason) = label("key", value) {
                    self.error(format!("{field}.values[{index}]"), reason);
                }
            }
            if let Some(operator) = self.operator(&field, &it.operator, values) {
                requirements.push(Requirement {
                    key: it.key,
                    operator,
                });
            }
        }
        Selector::new(requirements)
    }

    fn operator(&mut self, field: &str, name: &str, values: Vec<String>) -> Option<Operator> {
        let takes_values = matches!(name, "In" | "NotIn");
        if takes_values && values.is_empty() {
            self.error(
                format!("{field}.values"),
                format!("{name} needs at least one"),
            );
        } else if !takes_values && !values.is_empty() {
            self.error(format!("{field}.values"), format!("{name} takes none"));
        }
        match name {
            "In" => Some(Operator::In(values)),
            "NotIn" => Some(Operator::NotIn(values)),
            "Exists" => Some(Operator::Exists),
            "DoesNotExist" => Some(Operator::DoesNotExist),
            other => {
                let reason = format!("{other:?} is not one of In, NotIn, Exists, DoesNotExist");
                self.error(format!("{field}.operator"), reason);
                None
            }
        }
    }
}

/// Text that many objects share.
pub(super) fn shared(text: Option<String>) -> Option<Arc<str>> {
    text.filter(|text| !text.is_empty()).map(Into::into)
}
