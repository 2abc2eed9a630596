use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::TransferError;

/// A way to cut a model into groups.
///
/// ```
/// use pswitch_transfer::Algorithm;
///
/// assert_eq!("paper".parse::<Algorithm>()?, Algorithm::Paper { rule1: true, rule2: true });
/// assert_eq!(Algorithm::Equal { groups: 16 }.to_string(), "equal-16");
/// # Ok::<(), pswitch_transfer::TransferError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum Algorithm {
    /// A plan that none ends before, with the fewest groups of those: `optimal`.
    Optimal,
    /// The recursive search of the PipeSwitch paper. Either rule leaves an optimal plan standing, so that what is found
    /// is optimal; without them, and often with them, the time grows exponentially with the number of layers.
    Paper {
        /// Drop a branch whose lower bound is no better than the best plan found.
        rule1: bool,
        /// Make no group smaller than what is sent anyway while the group before it computes.
        rule2: bool,
    },
    /// A group for every layer with bytes: `per-layer`.
    PerLayer,
    /// One group for all: `whole`.
    Whole,
    /// A group for every layer with bytes, and no layer with bytes computes before all of them have come: `sequential`. What
    /// there is without any optimization.
    Sequential,
    /// Groups of about equally many bytes: `equal-8`. Never more groups than layers with bytes.
    Equal {
        /// How many, at least one.
        groups: usize,
    },
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Optimal => f.pad("optimal"),
            Self::Paper { rule1: true, rule2: true } => f.pad("paper"),
            Self::Paper { rule1: true, rule2: false } => f.pad("paper-rule-1"),
            Self::Paper { rule1: false, rule2: true } => f.pad("paper-rule-2"),
            Self::Paper { rule1: false, rule2: false } => f.pad("paper-exhaustive"),
            Self::PerLayer => f.pad("per-layer"),
            Self::Whole => f.pad("whole"),
            Self::Sequential => f.pad("sequential"),
            Self::Equal { groups } => f.pad(&format!("equal-{groups}")),
        }
    }
}

impl FromStr for Algorithm {
    type Err = TransferError;

    fn from_str(text: &str) -> Result<Self, TransferError> {
        Ok(match text {
            "optimal" => Self::Optimal,
            "paper" => Self::Paper { rule1: true, rule2: true },
            "paper-rule-1" => Self::Paper { rule1: true, rule2: false },
            "paper-rule-2" => Self::Paper { rule1: false, rule2: true },
            "paper-exhaustive" => Self::Paper { rule1: false, rule2: false },
            "per-layer" => Self::PerLayer,
            "whole" => Self::Whole,
            "sequential" => Self::Sequential,
            _ => match text.strip_prefix("equal-").map(str::parse) {
                Some(Ok(0)) => return Err(TransferError::NoGroups),
                Some(Ok(groups)) => Self::Equal { groups },
                _ => return Err(TransferError::UnknownAlgorithm { text: text.to_owned() }),
            },
        })
    }
}

impl From<Algorithm> for String {
    fn from(algorithm: Algorithm) -> Self {
        algorithm.to_string()
    }
}

impl TryFrom<String> for Algorithm {
    type Error = TransferError;

    fn try_from(text: String) -> Result<Self, TransferError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_displays() {
        let papers = [(true, true), (true, false), (false, true), (false, false)]
            .map(|(rule1, rule2)| Algorithm::Paper { rule1, rule2 });
        let others = [
            Algorithm::Optimal,
            Algorithm::PerLayer,
            Algorithm::Whole,
            Algorithm::Sequential,
            Algorithm::Equal { groups: 12 },
        ];
        for algorithm in papers.into_iter().chain(others) {
            assert_eq!(algorithm.to_string().parse::<Algorithm>().unwrap(), algorithm);
        }
    }

    #[test]
    fn refuses_what_names_no_algorithm() {
        for text in ["", "Optimal", "equal", "equal-", "equal--1", "paper-rule-3"] {
            let error = text.parse::<Algorithm>().unwrap_err();
            assert!(matches!(error, TransferError::UnknownAlgorithm { .. }), "{text}: {error}");
        }
        assert!(matches!("equal-0".parse::<Algorithm>(), Err(TransferError::NoGroups)));
    }
}
