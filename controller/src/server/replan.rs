//! Plans made anew for models that are served already.

use pswitch_transfer::{Algorithm, Plan, plan};

use super::{Server, chain};
use crate::driver::Mail;
use crate::service::{ModelState, ServiceError};

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
        let unknown = || ServiceError::UnknownModel { model: name.to_owned() };
        let status = self.status_of(name).ok_or_else(unknown)?;
        let served = self.read().get(name).and_then(|registered| registered.served.clone());
        let served = served.filter(|_| status.state == ModelState::Ready).ok_or_else(|| {
            let reason = if status.reason.is_empty() { status.state.name() } else { &status.reason };
            ServiceError::ModelUnavailable { model: name.to_owned(), reason: reason.to_owned() }
        })?;
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
                let plan = plan(profile, algorithm).map_err(|error| unsupported(&chain(&error)))?;
                if profile.layers.iter().any(|layer| layer.bytes > 0) {
                    let mail = Mail::Plan { model: served.spec.id, plan: Box::new(plan.clone()) };
                    self.devices[*device].driver.mailbox().put(mail);
                }
                Ok(plan)
            })
            .collect()
    }
}
