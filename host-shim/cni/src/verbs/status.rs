//! STATUS: whether an ADD could be served now, said steadily.

use super::Verbs;
use super::address;
use super::node::{Health, Node};
use crate::config::Config;
use crate::env::Environment;
use crate::error::{CniError, Code};
use std::sync::PoisonError;

/// The answer changes when so many samples in a row say the same new thing (checklist 50).
const SAMPLES: u32 = 3;

/// What is said, and how often in a row something else was seen.
#[derive(Debug, Default)]
pub(super) struct Steady {
    said: Option<Health>,
    other: u32,
}

impl Steady {
    fn sample(&mut self, seen: Health) -> Health {
        match &mut self.said {
            Some(said) if std::mem::discriminant(said) != std::mem::discriminant(&seen) => {
                self.other += 1;
                if self.other >= SAMPLES {
                    *said = seen;
                    self.other = 0;
                }
                said.clone()
            }
            said => {
                self.other = 0;
                said.insert(seen).clone()
            }
        }
    }
}

impl<N: Node> Verbs<N> {
    /// Looks at the node's health. To be called a few times a second.
    pub fn sample_health(&self) -> Health {
        let seen = self.node.health();
        self.steady
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sample(seen)
    }

    pub(super) fn status(&self, env: &Environment, config: &Config) -> Result<(), CniError> {
        match self.sample_health() {
            Health::Ready => {}
            Health::Unavailable(why) => return Err(CniError::new(Code::Unavailable, why)),
            Health::Degraded(why) => return Err(CniError::new(Code::Degraded, why)),
        }
        let source = address::source(&self.pools, &self.node, config, None)?;
        let usage = source
            .status(env, config, &self.pools)
            .map_err(|mut error| {
                if error.code != Code::Degraded {
                    error.code = Code::Unavailable;
                }
                error
            })?;
        match usage {
            Some(usage) if usage.is_full() => {
                let msg = format!(
                    "no addresses available: {} of {} used",
                    usage.used, usage.total
                );
                Err(CniError::new(Code::Unavailable, msg))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cni50_health_is_said_at_once_and_changes_only_after_three_samples() {
        let mut steady = Steady::default();
        let down = || Health::Unavailable("gone".into());
        assert_eq!(steady.sample(down()), down());
        assert_eq!(steady.sample(Health::Ready), down());
        assert_eq!(steady.sample(Health::Ready), down());
        assert_eq!(steady.sample(Health::Ready), Health::Ready);
        assert_eq!(steady.sample(down()), Health::Ready);
        assert_eq!(steady.sample(Health::Ready), Health::Ready);
        assert_eq!(steady.sample(down()), Health::Ready);
        assert_eq!(steady.sample(down()), Health::Ready);
        assert_eq!(steady.sample(down()), down());
    }
}
