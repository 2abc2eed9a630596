//! The functions of `shim/shim.h`; their contracts stand there.

use std::ffi::{c_char, c_void};

/// `ps_error`
#[repr(C)]
pub(crate) struct RawError {
    pub(crate) fault: i32,
    pub(crate) message: *mut c_char,
}

pub(crate) const FAULT_UNKNOWN_OPERATOR: i32 = 1;
pub(crate) const FAULT_ARGUMENT: i32 = 2;
pub(crate) const FAULT_INPUT: i32 = 3;
pub(crate) const FAULT_OUT_OF_MEMORY: i32 = 4;

pub(crate) const KIND_INT: i32 = 2;
pub(crate) const KIND_FLOAT: i32 = 3;
pub(crate) const KIND_BOOL: i32 = 4;

/// `ps_values`
#[repr(C)]
pub(crate) struct RawValues {
    _opaque: [u8; 0],
}

/// `ps_call`
#[repr(C)]
pub(crate) struct RawCall {
    _opaque: [u8; 0],
}

/// `ps_inference_guard`
#[repr(C)]
pub(crate) struct RawInferenceGuard {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub(crate) fn ps_values_new(count: usize) -> *mut RawValues;
    pub(crate) fn ps_values_delete(values: *mut RawValues);
    pub(crate) fn ps_values_clear(values: *mut RawValues, ids: *const u32, count: usize);
    pub(crate) fn ps_values_guard(values: *mut RawValues, begin: *const c_void, bytes: usize);
    pub(crate) fn ps_values_unguard(values: *mut RawValues);
    pub(crate) fn ps_values_kind(values: *const RawValues, id: u32) -> i32;
    pub(crate) fn ps_values_set_view(
        values: *mut RawValues,
        id: u32,
        data: *mut c_void,
        dtype: i8,
        sizes: *const i64,
        strides: *const i64,
        dimensions: usize,
        device: *const c_char,
        device_index: i32,
        requires_grad: bool,
        error: *mut RawError,
    ) -> bool;
    pub(crate) fn ps_values_share(values: *mut RawValues, from: u32, to: u32);
    pub(crate) fn ps_values_set_int(values: *mut RawValues, id: u32, value: i64);
    pub(crate) fn ps_values_set_float(values: *mut RawValues, id: u32, value: f64);
    pub(crate) fn ps_values_set_bool(values: *mut RawValues, id: u32, value: bool);
    pub(crate) fn ps_values_shape(
        values: *const RawValues,
        id: u32,
        dtype: *mut i8,
        sizes: *mut i64,
        capacity: usize,
    ) -> usize;
    pub(crate) fn ps_values_copy_out(
        values: *const RawValues,
        id: u32,
        to: *mut c_void,
        error: *mut RawError,
    ) -> bool;
    pub(crate) fn ps_values_int(values: *const RawValues, id: u32) -> i64;
    pub(crate) fn ps_values_float(values: *const RawValues, id: u32) -> f64;
    pub(crate) fn ps_values_bool(values: *const RawValues, id: u32) -> bool;

    pub(crate) fn ps_call_new(
        name: *const c_char,
        overload: *const c_char,
        error: *mut RawError,
    ) -> *mut RawCall;
    pub(crate) fn ps_call_delete(call: *mut RawCall);
    pub(crate) fn ps_call_argument(call: *const RawCall, name: *const c_char) -> i32;
    pub(crate) fn ps_call_set_none(call: *mut RawCall, argument: i32);
    pub(crate) fn ps_call_set_bool(call: *mut RawCall, argument: i32, value: bool);
    pub(crate) fn ps_call_set_int(call: *mut RawCall, argument: i32, value: i64);
    pub(crate) fn ps_call_set_float(call: *mut RawCall, argument: i32, value: f64);
    pub(crate) fn ps_call_set_complex(call: *mut RawCall, argument: i32, re: f64, im: f64);
    pub(crate) fn ps_call_set_string(call: *mut RawCall, argument: i32, text: *const c_char, bytes: usize);
    pub(crate) fn ps_call_set_device(call: *mut RawCall, argument: i32, kind: *const c_char, index: i32);
    pub(crate) fn ps_call_set_bools(call: *mut RawCall, argument: i32, values: *const bool, count: usize);
    pub(crate) fn ps_call_set_floats(call: *mut RawCall, argument: i32, values: *const f64, count: usize);
    pub(crate) fn ps_call_set_strings(
        call: *mut RawCall,
        argument: i32,
        texts: *const *const c_char,
        count: usize,
    );
    pub(crate) fn ps_call_set_value(call: *mut RawCall, argument: i32, id: u32);
    pub(crate) fn ps_call_set_ints(
        call: *mut RawCall,
        argument: i32,
        ints: *const i64,
        ids: *const i64,
        count: usize,
    );
    pub(crate) fn ps_call_set_tensors(call: *mut RawCall, argument: i32, ids: *const i64, count: usize);
    pub(crate) fn ps_call_add_output(call: *mut RawCall, id: i64);
    pub(crate) fn ps_call_add_output_list(call: *mut RawCall, ids: *const i64, count: usize);
    pub(crate) fn ps_call_writes(call: *const RawCall, argument: i32) -> bool;
    pub(crate) fn ps_call_aliases(call: *const RawCall, argument: i32) -> bool;
    pub(crate) fn ps_call_finish(call: *mut RawCall, error: *mut RawError) -> bool;
    pub(crate) fn ps_call_run(call: *const RawCall, values: *mut RawValues, error: *mut RawError) -> bool;

    pub(crate) fn ps_inference_guard_new() -> *mut RawInferenceGuard;
    pub(crate) fn ps_inference_guard_delete(guard: *mut RawInferenceGuard);

    pub(crate) fn ps_install_cpu_allocator(
        allocate: extern "C" fn(usize, *mut bool) -> *mut c_void,
        release: extern "C" fn(*mut c_void) -> bool,
    );
}
