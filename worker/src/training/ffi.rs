//! The functions of `shim/train.h`; their contracts stand there.

use std::ffi::{c_char, c_void};

use crate::ffi::{RawError, RawValues};

/// `ps_trainer`
#[repr(C)]
pub(super) struct RawTrainer {
    _opaque: [u8; 0],
}

/// `ps_grad_guard`
#[repr(C)]
pub(super) struct RawGradGuard {
    _opaque: [u8; 0],
}

/// `ps_watch`
#[repr(C)]
pub(super) struct RawWatch {
    pub(super) stops: extern "C" fn(*const c_void) -> bool,
    pub(super) rests: extern "C" fn(*const c_void),
    pub(super) user: *const c_void,
}

/// `ps_optimizer`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RawOptimizer {
    pub(super) kind: i32,
    pub(super) nesterov: bool,
    pub(super) momentum: f64,
    pub(super) dampening: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) eps: f64,
    pub(super) weight_decay: f64,
}

pub(super) const ROLE_PARAMETER: i32 = 0;
pub(super) const ROLE_FIRST: i32 = 1;
pub(super) const ROLE_SECOND: i32 = 2;
pub(super) const ROLE_BUFFER: i32 = 3;

pub(super) const OPTIMIZER_SGD: i32 = 0;
pub(super) const OPTIMIZER_ADAM: i32 = 1;
pub(super) const OPTIMIZER_ADAMW: i32 = 2;

unsafe extern "C" {
    pub(super) fn ps_grad_guard_new() -> *mut RawGradGuard;
    pub(super) fn ps_grad_guard_delete(guard: *mut RawGradGuard);
    pub(super) fn ps_grad_mode(records: bool);

    pub(super) fn ps_deterministic();

    pub(super) fn ps_trainer_new(optimizer: *const RawOptimizer) -> *mut RawTrainer;
    pub(super) fn ps_trainer_delete(trainer: *mut RawTrainer);
    pub(super) fn ps_trainer_add_parameter(
        trainer: *mut RawTrainer,
        values: *const RawValues,
        id: u32,
        first: *mut c_void,
        second: *mut c_void,
        steps: i64,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_add_buffer(
        trainer: *mut RawTrainer,
        values: *const RawValues,
        id: u32,
        home: *mut c_void,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_add_frozen(
        trainer: *mut RawTrainer,
        home: *mut c_void,
        dtype: i8,
        sizes: *const i64,
        strides: *const i64,
        dimensions: usize,
        device: *const c_char,
        device_index: i32,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_set_steps(trainer: *mut RawTrainer, parameter: usize, steps: i64);
    pub(super) fn ps_trainer_read(
        trainer: *const RawTrainer,
        role: i32,
        index: usize,
        to: *mut c_void,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_write(
        trainer: *mut RawTrainer,
        role: i32,
        index: usize,
        from: *const c_void,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_steps(trainer: *const RawTrainer, parameter: usize) -> i64;
    pub(super) fn ps_trainer_begin(trainer: *mut RawTrainer, seed: u64, error: *mut RawError) -> bool;
    pub(super) fn ps_trainer_backward(
        trainer: *mut RawTrainer,
        values: *mut RawValues,
        loss: u32,
        divisor: f64,
        watch: *const RawWatch,
        stopped: *mut bool,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_fetch_loss(trainer: *mut RawTrainer, error: *mut RawError) -> bool;
    pub(super) fn ps_trainer_loss(trainer: *const RawTrainer, loss: *mut f64, error: *mut RawError) -> bool;
    pub(super) fn ps_trainer_apply(
        trainer: *mut RawTrainer,
        rate: f64,
        clip_norm: f64,
        watch: *const RawWatch,
        error: *mut RawError,
    ) -> bool;
    pub(super) fn ps_trainer_discard(trainer: *mut RawTrainer);
}
