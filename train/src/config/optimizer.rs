use serde::{Deserialize, Serialize};

use super::check::{self, Check, MOST_F32};
use super::section::Section;
use crate::TrainError;

/// What turns gradients into new parameters, with the settings, defaults and rules of `torch.optim`.
///
/// `{kind: adamw, lr: 1e-3}` in a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Optimizer {
    /// `torch.optim.SGD`
    Sgd {
        /// Learning rate.
        lr: f64,
        /// Share of the last step's direction that is kept.
        #[serde(default)]
        momentum: f64,
        /// Share of the gradient that does not go into the direction.
        #[serde(default)]
        dampening: f64,
        /// Nesterov's momentum. It needs a momentum and no dampening.
        #[serde(default)]
        nesterov: bool,
        /// L2 penalty, added to the gradient.
        #[serde(default)]
        weight_decay: f64,
    },
    /// `torch.optim.Adam`
    Adam {
        /// Learning rate.
        lr: f64,
        /// How slowly the means of the gradient and of its square change.
        #[serde(default = "betas")]
        betas: [f64; 2],
        /// Added to the root of the mean square.
        #[serde(default = "eps")]
        eps: f64,
        /// L2 penalty, added to the gradient.
        #[serde(default)]
        weight_decay: f64,
    },
    /// `torch.optim.AdamW`
    AdamW {
        /// Learning rate.
        lr: f64,
        /// How slowly the means of the gradient and of its square change.
        #[serde(default = "betas")]
        betas: [f64; 2],
        /// Added to the root of the mean square.
        #[serde(default = "eps")]
        eps: f64,
        /// Share of a parameter, times the learning rate, that is taken away at each step.
        #[serde(default = "decoupled_weight_decay")]
        weight_decay: f64,
    },
}

/// An optimizer without its settings: what a checkpoint says of the state in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OptimizerKind {
    /// `torch.optim.SGD`
    Sgd,
    /// `torch.optim.Adam`
    Adam,
    /// `torch.optim.AdamW`
    AdamW,
}

impl Section for Optimizer {
    const EXPECTED: &'static str = "a mapping with `kind` and `lr`";
}

fn betas() -> [f64; 2] {
    [0.9, 0.999]
}

fn eps() -> f64 {
    1e-8
}

fn decoupled_weight_decay() -> f64 {
    0.01
}

impl Optimizer {
    /// Which optimizer it is.
    pub fn kind(&self) -> OptimizerKind {
        match self {
            Optimizer::Sgd { .. } => OptimizerKind::Sgd,
            Optimizer::Adam { .. } => OptimizerKind::Adam,
            Optimizer::AdamW { .. } => OptimizerKind::AdamW,
        }
    }

    /// The learning rate that a [`Schedule`](crate::Schedule) starts from.
    pub fn learning_rate(&self) -> f64 {
        match *self {
            Optimizer::Sgd { lr, .. } | Optimizer::Adam { lr, .. } | Optimizer::AdamW { lr, .. } => lr,
        }
    }

    pub(super) fn validate(&self) -> Result<(), TrainError> {
        let lr = self.learning_rate();
        not_negative("optimizer.lr", lr)?;
        match *self {
            Optimizer::Sgd { momentum, dampening, nesterov, weight_decay, .. } => {
                not_negative("optimizer.momentum", momentum)?;
                Check::new("optimizer.dampening", dampening).finite()?;
                Check::new("optimizer.dampening", dampening).fits_f32()?;
                not_negative("optimizer.weight_decay", weight_decay)?;
                if nesterov && (momentum == 0.0 || dampening != 0.0) {
                    let found = format!("true with momentum {momentum} and dampening {dampening}");
                    let needed = "false, or the momentum more than 0 and the dampening 0";
                    return Err(check::refused("optimizer.nesterov", found, needed));
                }
                Ok(())
            }
            Optimizer::Adam { betas, eps, weight_decay, .. }
            | Optimizer::AdamW { betas, eps, weight_decay, .. } => {
                for beta in betas {
                    let needed = "two numbers from 0 to less than 1";
                    Check::new("optimizer.betas", beta).holds((0.0..1.0).contains(&beta), needed)?;
                }
                not_negative("optimizer.eps", eps)?;
                not_negative("optimizer.weight_decay", weight_decay)?;
                // What the first step goes by, and what a step of AdamW leaves of a parameter, are floats too.
                let needed = "at most 3.4028234e38 when divided by 1 less the first of `optimizer.betas`";
                Check::new("optimizer.lr", lr).holds(lr / (1.0 - betas[0]) <= MOST_F32, needed)?;
                let needed = "at most 3.4028234e38 when multiplied by `optimizer.lr`";
                let is_decoupled = self.kind() == OptimizerKind::AdamW;
                Check::new("optimizer.weight_decay", weight_decay)
                    .holds(!is_decoupled || lr * weight_decay <= MOST_F32, needed)
            }
        }
    }
}

fn not_negative(setting: &'static str, value: f64) -> Result<(), TrainError> {
    let check = Check::new(setting, value);
    check.not_negative()?;
    check.fits_f32()
}
