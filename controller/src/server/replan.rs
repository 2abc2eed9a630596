//! Plans made anew for models that are served already.

use pswitch_transfer::{Algorithm, Plan, Profile, TransferError, plan, plan_with_margin};

use super::{Server, chain};
use crate::driver::Mail;
use crate::service::ServiceError;

/// The plan that is served: the best one has to be good as well when layers take a little longer than measured.
pub(super) fn plan_for(profile: &Profile, algorithm: Algorithm) -> Result<Plan, TransferError> {
    match algorithm {
        Algorithm::Optimal => plan_with_margin(profile),
        algorithm => plan(profile, algorithm),
    }
}

impl Server {
    /// Divides a model's transfers anew, from the layer times that were taken when it was loaded. Returns the plans with
    /// what they predict, one for each device that serves the model.
    ///
    /// A plan is in force as soon as nothing of the model is under way: for requests that are sent after those before
    /// have been answered, at the next transfer of its weights.
    ///
    /// # Errors
    /// [`ServiceError::UnknownModel`], [`ServiceError::ModelUnavailable`] for one that is not ready,
    /// [`ServiceError::Unsupported`] for one whose layers could not be timed, or that has no layers.
    pub fn replan(&self, name: &str, algorithm: Algorithm) -> Result<Vec<Plan>, ServiceError> {
        let served = self.served(name, None)?;
        let unsupported = |reason: &str| ServiceError::Unsupported {
            what: format!("planning the transfers of model '{name}' anew: {reason}"),
        };
        if served.profiles.is_empty() {
            return Err(unsupported("its layers could not be timed"));
        }
        served
            .profiles
            .iter()
            .map(|(device, profile)| {
                let plan = plan_for(profile, algorithm).map_err(|error| unsupported(&chain(&error)))?;
                if profile.layers.iter().any(|layer| layer.bytes > 0) {
                    let mail = Mail::Plan { model: served.spec.id, plan: Box::new(plan.clone()) };
                    self.devices[*device].driver.mailbox().put(mail);
                }
                Ok(plan)
            })
            .collect()
    }
}
