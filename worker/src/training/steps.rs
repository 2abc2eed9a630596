//! Safe handles over the training half of the shim.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;

use pswitch_device::DeviceAddress;
use pswitch_model::{ValueId, Weight};
use pswitch_train::{Optimizer, Role};

use super::Pace;
use super::ffi::{self, RawGradGuard, RawOptimizer, RawTrainer, RawWatch};
use crate::libtorch::{Raised, TorchDevice, Values, checked};

/// While it lives, the calls of this thread record what gradients need.
pub(crate) struct GradMode {
    raw: *mut RawGradGuard,
    records: bool,
    // The mode belongs to the thread that began it.
    _not_send: PhantomData<*mut ()>,
}

impl GradMode {
    pub(crate) fn begin() -> Self {
        // SAFETY: no preconditions; the guard is deleted in `drop` on the same thread, since the type is not `Send`.
        Self { raw: unsafe { ffi::ps_grad_guard_new() }, records: true, _not_send: PhantomData }
    }

    /// Lets the next calls record or not.
    pub(crate) fn set(&mut self, records: bool) {
        if self.records != records {
            self.records = records;
            // SAFETY: no preconditions; the guard puts back what was before it.
            unsafe { ffi::ps_grad_mode(records) }
        }
    }
}

impl Drop for GradMode {
    fn drop(&mut self) {
        // SAFETY: made by `ps_grad_guard_new`, deleted here alone.
        unsafe { ffi::ps_grad_guard_delete(self.raw) }
    }
}

/// How a backward pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackwardEnd {
    Done,
    Stopped,
}

/// The parameters of a program, what an optimizer keeps of them, and the buffers.
pub(super) struct Steps {
    raw: *mut RawTrainer,
    parameters: usize,
}

impl Steps {
    pub(super) fn new(optimizer: &Optimizer) -> Self {
        let settings = settings(optimizer);
        // SAFETY: the settings are copied.
        Self { raw: unsafe { ffi::ps_trainer_new(&raw const settings) }, parameters: 0 }
    }

    /// Adds a parameter; the optimizer's state for it stands for `steps` steps.
    ///
    /// # Safety
    /// The memory at the addresses must be as large as the parameter, mapped for as long as this lives, and nobody else's.
    pub(super) unsafe fn add_parameter(
        &mut self,
        values: &Values,
        id: ValueId,
        kept: [Option<DeviceAddress>; 2],
        steps: u64,
    ) -> Result<(), Raised> {
        let [first, second] = kept.map(|address| address.map_or(ptr::null_mut(), pointer));
        let steps = i64::try_from(steps).unwrap_or(i64::MAX);
        // SAFETY: both handles live, the number is inside of the table, and the caller promises the memory.
        checked(|error| unsafe {
            let id = values.index(id);
            ffi::ps_trainer_add_parameter(self.raw, values.raw(), id, first, second, steps, error)
        })?;
        self.parameters += 1;
        Ok(())
    }

    /// Adds a buffer that lies at `home` between steps.
    ///
    /// # Safety
    /// As [`add_parameter`](Self::add_parameter).
    pub(super) unsafe fn add_buffer(
        &mut self,
        values: &Values,
        id: ValueId,
        home: DeviceAddress,
    ) -> Result<(), Raised> {
        // SAFETY: as above.
        checked(|error| unsafe {
            ffi::ps_trainer_add_buffer(self.raw, values.raw(), values.index(id), pointer(home), error)
        })
    }

    /// Adds what never changes and no gradient flows to.
    ///
    /// # Safety
    /// As [`add_parameter`](Self::add_parameter).
    pub(super) unsafe fn add_frozen(
        &mut self,
        weight: &Weight,
        home: DeviceAddress,
        device: TorchDevice,
    ) -> Result<(), Raised> {
        let signed = |numbers: &[u64]| -> Vec<i64> { numbers.iter().map(|&n| n.cast_signed()).collect() };
        let (sizes, strides) = (signed(&weight.sizes), signed(&weight.strides));
        let (kind, index) = device.name();
        // SAFETY: the lists have the length that is told and outlive the call; the caller promises the memory.
        checked(|error| unsafe {
            ffi::ps_trainer_add_frozen(
                self.raw,
                pointer(home),
                weight.dtype.c10_code(),
                sizes.as_ptr(),
                strides.as_ptr(),
                sizes.len(),
                kind.as_ptr(),
                index,
                error,
            )
        })
    }

    /// Copies a tensor of the state, the `index`th in its role, to host memory.
    ///
    /// # Safety
    /// `to` must have the bytes of the tensor, dense.
    pub(super) unsafe fn read(&self, role: Role, index: usize, to: &mut [u8]) -> Result<(), Raised> {
        // SAFETY: the caller promises the room.
        checked(|error| unsafe {
            ffi::ps_trainer_read(self.raw, number(role), index, to.as_mut_ptr().cast(), error)
        })
    }

    /// Copies one from host memory.
    ///
    /// # Safety
    /// `from` must have the bytes of the tensor, dense.
    pub(super) unsafe fn write(&mut self, role: Role, index: usize, from: &[u8]) -> Result<(), Raised> {
        // SAFETY: the caller promises the bytes.
        checked(|error| unsafe {
            ffi::ps_trainer_write(self.raw, number(role), index, from.as_ptr().cast(), error)
        })
    }

    /// Says for every parameter how many steps its optimizer's state stands for.
    pub(super) fn set_counts(&mut self, counts: &[u64]) {
        for (parameter, &count) in counts.iter().enumerate().take(self.parameters) {
            // SAFETY: there are that many parameters.
            unsafe {
                ffi::ps_trainer_set_steps(self.raw, parameter, i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
    }

    /// For every parameter in how many steps it had a gradient.
    pub(super) fn counts(&self) -> Vec<u64> {
        let count = |parameter| {
            // SAFETY: there are that many parameters.
            u64::try_from(unsafe { ffi::ps_trainer_steps(self.raw, parameter) }).unwrap_or(0)
        };
        (0..self.parameters).map(count).collect()
    }

    pub(super) fn begin(&mut self, seed: u64) -> Result<(), Raised> {
        // SAFETY: the handle lives; so below.
        checked(|error| unsafe { ffi::ps_trainer_begin(self.raw, seed, error) })
    }

    pub(super) fn backward(
        &mut self,
        values: &mut Values,
        loss: ValueId,
        micro_batches: u32,
        pace: &dyn Pace,
    ) -> Result<BackwardEnd, Raised> {
        let mut stopped = false;
        let watch = watch(&pace);
        let done = checked(|error| {
            let (id, divisor) = (values.index(loss), f64::from(micro_batches));
            // SAFETY: the handles live and the number is inside of the table; the pointers outlive the call, after which
            // none of autograd's threads uses them.
            unsafe {
                let (values, watch) = (values.raw(), &raw const watch);
                ffi::ps_trainer_backward(self.raw, values, id, divisor, watch, &raw mut stopped, error)
            }
        });
        done.map(|()| if stopped { BackwardEnd::Stopped } else { BackwardEnd::Done })
    }

    /// Lets a GPU copy the loss of the step under way to the host.
    pub(super) fn fetch_loss(&mut self) -> Result<(), Raised> {
        // SAFETY: as above.
        checked(|error| unsafe { ffi::ps_trainer_fetch_loss(self.raw, error) })
    }

    /// Its mean, once it was [fetched](Self::fetch_loss) and all that was launched is done.
    pub(super) fn loss(&self) -> Result<f64, Raised> {
        let mut loss = 0.0;
        // SAFETY: the number is written during the call.
        checked(|error| unsafe { ffi::ps_trainer_loss(self.raw, &raw mut loss, error) })?;
        Ok(loss)
    }

    pub(super) fn apply(&mut self, rate: f64, clip_norm: Option<f64>, pace: &dyn Pace) -> Result<(), Raised> {
        let (clip_norm, watch) = (clip_norm.unwrap_or(0.0), watch(&pace));
        // SAFETY: as above; the watch outlives the call.
        checked(|error| unsafe { ffi::ps_trainer_apply(self.raw, rate, clip_norm, &raw const watch, error) })
    }

    pub(super) fn discard(&mut self) {
        // SAFETY: as above.
        unsafe { ffi::ps_trainer_discard(self.raw) }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        // SAFETY: made by `ps_trainer_new`, deleted here alone.
        unsafe { ffi::ps_trainer_delete(self.raw) }
    }
}

/// A pace as C++ asks it; it must not outlive the reference.
fn watch(pace: &&dyn Pace) -> RawWatch {
    RawWatch { stops, rests, user: (&raw const *pace).cast() }
}

/// Asks a pace, from whatever thread autograd computes on.
extern "C" fn stops(user: *const c_void) -> bool {
    // SAFETY: `backward` passes a reference that lives until it returns, of a type that threads may share.
    let pace: &dyn Pace = unsafe { *user.cast::<&dyn Pace>() };
    pace.stops()
}

/// Lets a pace hold the optimizer up.
extern "C" fn rests(user: *const c_void) {
    // SAFETY: as in `stops`, for `apply`.
    let pace: &dyn Pace = unsafe { *user.cast::<&dyn Pace>() };
    pace.rests();
}

fn number(role: Role) -> i32 {
    match role {
        Role::Parameter => ffi::ROLE_PARAMETER,
        Role::First => ffi::ROLE_FIRST,
        Role::Second => ffi::ROLE_SECOND,
        Role::Buffer => ffi::ROLE_BUFFER,
    }
}

/// Lets libtorch choose kernels that give the same bits every time, from now on.
pub(crate) fn choose_deterministic_kernels() {
    // SAFETY: no preconditions.
    unsafe { ffi::ps_deterministic() }
}

fn settings(optimizer: &Optimizer) -> RawOptimizer {
    match *optimizer {
        Optimizer::Sgd { lr: _, momentum, dampening, nesterov, weight_decay } => RawOptimizer {
            kind: ffi::OPTIMIZER_SGD,
            momentum,
            dampening,
            nesterov,
            weight_decay,
            ..RawOptimizer::default()
        },
        Optimizer::Adam { lr: _, betas: [beta1, beta2], eps, weight_decay } => {
            let kind = ffi::OPTIMIZER_ADAM;
            RawOptimizer { kind, beta1, beta2, eps, weight_decay, ..RawOptimizer::default() }
        }
        Optimizer::AdamW { lr: _, betas: [beta1, beta2], eps, weight_decay } => {
            let kind = ffi::OPTIMIZER_ADAMW;
            RawOptimizer { kind, beta1, beta2, eps, weight_decay, ..RawOptimizer::default() }
        }
    }
}

fn pointer(address: DeviceAddress) -> *mut c_void {
    // An address is as wide as a pointer, on the host and on CUDA.
    #[allow(clippy::cast_possible_truncation)]
    let pointer = address.0 as usize as *mut c_void;
    pointer
}
