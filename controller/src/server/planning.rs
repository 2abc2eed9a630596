//! Plans of models: made when a model is loaded, from layer times that are taken then or were kept, and made anew later.

use std::path::Path;
use std::sync::Arc;

use pswitch_device::DeviceId;
use pswitch_transfer::{Algorithm, Plan, Profile, TransferError, plan, plan_with_margin, predict};

use super::link::LinkFit;
use super::model::ServedModel;
use super::profile_file::ProfileFile;
use super::{LoadEvent, Server, chain, profiling};
use crate::driver::Mail;
use crate::scheduler::Homes;
use crate::service::ServiceError;

/// Groups of a model whose layers could not be timed.
const UNTIMED_GROUPS: usize = 16;

/// What a model's plans on one device are made from.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceProfile {
    /// The device.
    pub device: DeviceId,
    /// Its maker's name for it.
    pub device_name: String,
    /// Layers, and the costs of the link. Tables that are read from the host while weights move are no bytes of theirs.
    pub profile: Profile,
    /// How the costs of a copy were found, when the server started. Those of a wait, and of a copy beside the model's
    /// computation, come with the layers' times.
    pub link: LinkFit,
}

/// The plan that is served: the best one has to be good as well when layers take a little longer than measured. The search
/// knows nothing of `least_copy_bytes`, and what the plan predicts does.
fn plan_for(profile: &Profile, algorithm: Algorithm, least_copy_bytes: u64) -> Result<Plan, TransferError> {
    let mut plan = match algorithm {
        Algorithm::Optimal => plan_with_margin(profile),
        algorithm => plan(profile, algorithm),
    }?;
    plan.predicted_us = predicted_us(profile, &plan, least_copy_bytes)?;
    Ok(plan)
}

/// What a plan takes where no copy is shorter than `least_copy_bytes`.
fn predicted_us(profile: &Profile, by: &Plan, least_copy_bytes: u64) -> Result<f64, TransferError> {
    let mut moved = profile.clone();
    for group in by.groups.iter().filter(|group| (1..least_copy_bytes).contains(&group.bytes)) {
        let mut layers = moved.layers[group.first_layer..=group.last_layer].iter_mut();
        if let Some(layer) = layers.find(|layer| layer.bytes > 0) {
            layer.bytes += least_copy_bytes - group.bytes;
        }
    }
    match by.algorithm {
        Algorithm::Sequential => Ok(plan(&moved, Algorithm::Sequential)?.predicted_us),
        _ => Ok(predict(&moved, &by.cuts())?.predicted_us),
    }
}

/// Whether there is something to move.
fn has_bytes(profile: &Profile) -> bool {
    profile.layers.iter().any(|layer| layer.bytes > 0)
}

impl Server {
    /// Plans a model's transfers to a device. Returns the number of groups, and the profile if layers could be timed.
    pub(super) async fn plan_on(
        &self,
        model: &ServedModel,
        index: usize,
    ) -> Result<(usize, Option<Profile>), String> {
        let device = &self.devices[index];
        let (profile, algorithm) = match self.profile_on(model, index).await {
            Ok(profile) => (Ok(profile), self.config.plan),
            Err(untimed) => (Err(untimed), Algorithm::Equal { groups: UNTIMED_GROUPS }),
        };
        let (Ok(known) | Err(known)) = &profile;
        let mut groups = 0;
        if has_bytes(known) {
            let plan =
                plan_for(known, algorithm, self.least_copy_bytes_of(index)).map_err(|error| chain(&error))?;
            groups = plan.groups.len();
            let compute_us: f64 = known.layers.iter().map(|layer| layer.compute_us).sum();
            tracing::info!(
                model = model.spec.name,
                device = index,
                groups,
                predicted_us = plan.predicted_us,
                compute_us,
                per_copy_us = known.link.per_copy_us,
                per_wait_us = known.link.per_wait_us,
                "planned"
            );
            tracing::debug!(bytes = ?plan.groups.iter().map(|group| group.bytes).collect::<Vec<_>>(), "groups");
            device.driver.mailbox().put(Mail::Plan { model: model.spec.id, plan: Box::new(plan) });
        }
        Ok((groups, profile.ok()))
    }

    /// A model's profile on a device, from layer times that were kept or else are taken, and kept, now. The error is a
    /// profile without times.
    async fn profile_on(&self, model: &ServedModel, index: usize) -> Result<Profile, Profile> {
        let (device, spec) = (&self.devices[index], &model.spec);
        let least_copy_bytes = self.least_copy_bytes_of(index);
        let made_of = |runs: &[_], link: &LinkFit| {
            profiling::profile(spec, &device.host_tables(spec), link, least_copy_bytes, runs)
        };
        let untimed = made_of(&[], &device.link);
        let file = self.config.profile_cache.then(|| {
            let (path, properties) = (Path::new(&spec.path), device.device.properties());
            ProfileFile::of(path, spec.digest, properties, device.threads, device.waits_by_kernels)
        });
        if let Some(file) = file.clone() {
            let expected = untimed.clone();
            let read = tokio::task::spawn_blocking(move || (file.read(&expected), file)).await;
            if let Ok((Some(profile), file)) = read {
                tracing::info!(model = spec.name, path = %file.path().display(), "layer times were kept");
                return Ok(profile);
            }
        }
        (self.observer)(LoadEvent::Profiling { model: spec.name.clone() });
        let turn = device.timing.lock().await;
        let timed = self.time_layers(model, index).await;
        drop(turn);
        let runs = match timed {
            Ok(runs) if !runs.is_empty() => runs,
            Ok(_) => return Err(untimed),
            Err(error) => {
                // Its example inputs may be none that it accepts; real ones will be.
                tracing::warn!(model = spec.name, %error, "cannot be timed and moves in equal groups");
                return Err(untimed);
            }
        };
        if let Some(file) = file {
            // What copies cost is measured at every start; what they cost more beside the layers is not.
            let kept = made_of(&runs, &LinkFit { per_copy_us: 0.0, ..device.link });
            // Whoever ends the runtime meanwhile needs no file.
            let _ = tokio::task::spawn_blocking(move || file.write(&kept)).await;
        }
        Ok(made_of(&runs, &device.link))
    }

    /// What a model's plans are made from, one for each device that serves it.
    ///
    /// # Errors
    /// Those of [`replan`](Self::replan).
    pub fn profiles(&self, name: &str) -> Result<Vec<DeviceProfile>, ServiceError> {
        let served = self.timed(name)?;
        let of = |(index, profile): &(usize, Profile)| {
            let device = &self.devices[*index];
            let properties = device.device.properties();
            DeviceProfile {
                device: properties.id,
                device_name: properties.name.clone(),
                profile: profile.clone(),
                link: device.link,
            }
        };
        Ok(served.profiles.iter().map(of).collect())
    }

    /// Divides a model's transfers anew, from the layer times that it was loaded with. Returns the plans with what they
    /// predict, one for each device that serves the model.
    ///
    /// A plan is in force as soon as nothing of the model is under way: for requests that are sent after those before
    /// have been answered, at the next transfer of its weights.
    ///
    /// # Errors
    /// [`ServiceError::UnknownModel`], [`ServiceError::ModelUnavailable`] for one that is not ready,
    /// [`ServiceError::Unsupported`] for one whose layers could not be timed, or that has no layers.
    pub fn replan(&self, name: &str, algorithm: Algorithm) -> Result<Vec<Plan>, ServiceError> {
        let served = self.timed(name)?;
        served
            .profiles
            .iter()
            .map(|(device, profile)| {
                let plan = plan_for(profile, algorithm, self.least_copy_bytes_of(*device))
                    .map_err(|error| unsupported(name, &chain(&error)))?;
                self.put_plan(&served, *device, profile, &plan);
                Ok(plan)
            })
            .collect()
    }

    /// Whether weights move ahead of the turn of their requests on every device, instead of what the configuration says: in
    /// force for requests that are sent from now on.
    pub fn set_prefetch(&self, prefetch: bool) {
        for device in &self.devices {
            device.driver.mailbox().put(Mail::Prefetch(prefetch));
        }
    }

    /// By what models get their places in the pool of every device, instead of what the configuration says: in force for models
    /// that move in from now on. Those that lie in another place than their own leave the pool when homes are fixed again, as
    /// soon as nobody uses them.
    pub fn set_homes(&self, homes: Homes) {
        for device in &self.devices {
            device.driver.mailbox().put(Mail::Homes(homes));
        }
    }

    /// Moves a model by a plan of the caller's, on every device that serves it; in force when [`replan`](Self::replan)
    /// says. Returns the plan with what it predicts on each.
    ///
    /// # Errors
    /// Those of [`replan`](Self::replan); [`ServiceError::Unsupported`] for a plan that is not one of the model's profile.
    pub fn follow(&self, name: &str, plan: &Plan) -> Result<Vec<Plan>, ServiceError> {
        let served = self.timed(name)?;
        let failed = |error: TransferError| unsupported(name, &chain(&error));
        let follow = |(device, profile): &(usize, Profile)| {
            let predicted = predict(profile, &plan.cuts()).map_err(failed)?;
            if !predicted.groups.iter().map(|times| &times.group).eq(&plan.groups) {
                return Err(unsupported(name, "the plan is another model's"));
            }
            self.put_plan(&served, *device, profile, plan);
            let predicted_us =
                predicted_us(profile, plan, self.least_copy_bytes_of(*device)).map_err(failed)?;
            Ok(Plan { predicted_us, ..plan.clone() })
        };
        served.profiles.iter().map(follow).collect()
    }

    /// A model that has a profile.
    fn timed(&self, name: &str) -> Result<Arc<ServedModel>, ServiceError> {
        let served = self.served(name, None)?;
        if served.profiles.is_empty() {
            return Err(unsupported(name, "its layers could not be timed"));
        }
        Ok(served)
    }

    fn least_copy_bytes_of(&self, device: usize) -> u64 {
        self.devices[device].device.properties().least_copy_bytes
    }

    fn put_plan(&self, served: &ServedModel, device: usize, profile: &Profile, plan: &Plan) {
        if has_bytes(profile) {
            let mail = Mail::Plan { model: served.spec.id, plan: Box::new(plan.clone()) };
            self.devices[device].driver.mailbox().put(mail);
        }
    }
}

fn unsupported(name: &str, reason: &str) -> ServiceError {
    ServiceError::Unsupported { what: format!("planning the transfers of model '{name}': {reason}") }
}

#[cfg(test)]
mod tests {
    use pswitch_transfer::{Layer, LinkCosts};

    use super::*;

    #[test]
    fn short_copies_are_predicted_to_take_as_long_as_they_are_made() {
        // A microsecond a byte.
        let link = LinkCosts { bandwidth_bytes_per_s: 1e6, per_copy_us: 2.0, per_wait_us: 1.0 };
        let layer = |bytes, compute_us| Layer { name: String::new(), bytes, compute_us, host_bytes: 0 };
        let layers = vec![layer(0, 1.0), layer(10, 3.0), layer(200, 5.0), layer(0, 2.0), layer(40, 7.0)];
        let profile = Profile { model: String::new(), link, layers };
        let us = |algorithm, least| plan_for(&profile, algorithm, least).unwrap().predicted_us;
        // The link is busy for 250 bytes and three copies, or for 100, 200 and 100 bytes; a wait and 7 us follow.
        assert_eq!([0, 100].map(|least| us(Algorithm::PerLayer, least)), [264.0, 414.0]);
        assert_eq!([0, 300].map(|least| us(Algorithm::Whole, least)), [270.0, 320.0]);
        // Three waits and all layers.
        assert_eq!([0, 100].map(|least| us(Algorithm::Sequential, least)), [276.0, 426.0]);
    }
}
