//! Safe handles over the shim: a table of values, prepared operator calls and the inference guard.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::ptr;

use pswitch_device::DeviceAddress;
use pswitch_model::{DType, Sym, ValueId};

use crate::cuda::CudaLibtorch;
use crate::ffi::{self, RawCall, RawError, RawInferenceGuard, RawValues};

/// Where tensors live, in libtorch's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TorchDevice {
    /// The CPU, that is the `host` device.
    Cpu,
    /// A CUDA GPU.
    Cuda(u32),
}

impl TorchDevice {
    pub(crate) fn name(self) -> (&'static CStr, i32) {
        match self {
            Self::Cpu => (c"cpu", -1),
            // Ordinals of GPUs are far below i32::MAX.
            Self::Cuda(index) => (c"cuda", i32::try_from(index).unwrap_or(i32::MAX)),
        }
    }
}

/// How a tensor sees memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) dtype: DType,
    /// Outermost first.
    pub(crate) sizes: &'a [u64],
    /// In elements; row-major and dense without.
    pub(crate) strides: Option<&'a [u64]>,
    /// Whether it says that gradients flow to it. Nothing is recorded for them, but `matmul` for one chooses its kernel by
    /// that, and eager PyTorch's parameters do say so.
    pub(crate) requires_grad: bool,
}

/// What libtorch raised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raised {
    pub(crate) fault: RaisedFault,
    /// First line of libtorch's message.
    pub(crate) message: String,
}

/// The kinds of what libtorch raises, as far as they matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RaisedFault {
    UnknownOperator,
    Argument,
    Input,
    OutOfMemory,
    Model,
}

impl RawError {
    const NONE: Self = Self { fault: 0, message: ptr::null_mut() };

    fn into_raised(self) -> Raised {
        let message = if self.message.is_null() {
            "out of memory while reporting an error".to_owned()
        } else {
            // SAFETY: the shim hands over a NUL-terminated string from malloc, owned by this side from now on.
            unsafe {
                let text = CStr::from_ptr(self.message).to_string_lossy().into_owned();
                libc::free(self.message.cast());
                text
            }
        };
        let fault = match self.fault {
            ffi::FAULT_UNKNOWN_OPERATOR => RaisedFault::UnknownOperator,
            ffi::FAULT_ARGUMENT => RaisedFault::Argument,
            ffi::FAULT_INPUT => RaisedFault::Input,
            ffi::FAULT_OUT_OF_MEMORY => RaisedFault::OutOfMemory,
            _ => RaisedFault::Model,
        };
        Raised { fault, message }
    }
}

pub(crate) fn checked(run: impl FnOnce(*mut RawError) -> bool) -> Result<(), Raised> {
    let mut error = RawError::NONE;
    if run(&raw mut error) { Ok(()) } else { Err(error.into_raised()) }
}

/// A number that is no tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Number {
    Int(i64),
    Float(f64),
    Bool(bool),
}

/// The table of values that the nodes of a program pass to each other, by [`ValueId`].
///
/// Dropping an entry drops the table's reference to the tensor; memory goes back with the last reference.
pub(crate) struct Values {
    raw: *mut RawValues,
    count: usize,
}

impl Values {
    pub(crate) fn new(count: usize) -> Self {
        // SAFETY: no preconditions; the handle is deleted in `drop` alone.
        Self { raw: unsafe { ffi::ps_values_new(count) }, count }
    }

    pub(crate) fn raw(&self) -> *mut RawValues {
        self.raw
    }

    /// The shim does not check numbers; every one passes here first.
    pub(crate) fn index(&self, id: ValueId) -> u32 {
        assert!(id.index() < self.count, "{id} is outside of a table of {} values", self.count);
        id.0
    }

    pub(crate) fn clear(&mut self, ids: &[ValueId]) {
        let numbers: Vec<u32> = ids.iter().map(|id| self.index(*id)).collect();
        // SAFETY: every number is inside of the table.
        unsafe { ffi::ps_values_clear(self.raw, numbers.as_ptr(), numbers.len()) }
    }

    /// Refuses calls that would write into these bytes from now on.
    pub(crate) fn protect(&mut self, at: DeviceAddress, bytes: u64) {
        // An address is as wide as a pointer; the bytes lie in a mapping.
        #[allow(clippy::cast_possible_truncation)]
        let (begin, bytes) = (at.0 as usize as *const std::ffi::c_void, bytes as usize);
        // SAFETY: the handle is live; the address is a number to compare with.
        unsafe { ffi::ps_values_guard(self.raw, begin, bytes) }
    }

    /// Refuses no call any more for where it would write.
    pub(crate) fn protect_nothing(&mut self) {
        // SAFETY: the handle is live.
        unsafe { ffi::ps_values_unguard(self.raw) }
    }

    /// Makes an entry a tensor over memory that stays somebody else's.
    ///
    /// # Safety
    /// The bytes from `at` that sizes and strides reach must be mapped and stay so for as long as the entry or a view of
    /// it lives, and nothing may write to them while a call reads them.
    pub(crate) unsafe fn set_view(
        &mut self,
        id: ValueId,
        at: DeviceAddress,
        view: &View<'_>,
        device: TorchDevice,
    ) -> Result<(), Raised> {
        let signed = |numbers: &[u64]| -> Vec<i64> { numbers.iter().map(|&n| n.cast_signed()).collect() };
        let sizes = signed(view.sizes);
        let strides = view.strides.map(signed);
        let strides = strides.as_ref().map_or(ptr::null(), |strides| strides.as_ptr());
        let (kind, index) = device.name();
        let id = self.index(id);
        // An address is as wide as a pointer, on the host and on CUDA.
        #[allow(clippy::cast_possible_truncation)]
        let data = at.0 as usize as *mut std::ffi::c_void;
        checked(|error| {
            // SAFETY: the pointers outlive the call; the memory behind `data` is the caller's promise.
            unsafe {
                ffi::ps_values_set_view(
                    self.raw,
                    id,
                    data,
                    view.dtype.c10_code(),
                    sizes.as_ptr(),
                    strides,
                    sizes.len(),
                    kind.as_ptr(),
                    index,
                    view.requires_grad,
                    error,
                )
            }
        })
    }

    /// Makes an entry the same tensor as another.
    pub(crate) fn share(&mut self, from: ValueId, to: ValueId) {
        let (from, to) = (self.index(from), self.index(to));
        // SAFETY: both numbers are inside of the table.
        unsafe { ffi::ps_values_share(self.raw, from, to) }
    }

    pub(crate) fn set_number(&mut self, id: ValueId, number: Number) {
        let id = self.index(id);
        // SAFETY: the number is inside of the table.
        unsafe {
            match number {
                Number::Int(value) => ffi::ps_values_set_int(self.raw, id, value),
                Number::Float(value) => ffi::ps_values_set_float(self.raw, id, value),
                Number::Bool(value) => ffi::ps_values_set_bool(self.raw, id, value),
            }
        }
    }

    /// The number in an entry, if it holds one.
    pub(crate) fn number(&self, id: ValueId) -> Option<Number> {
        let id = self.index(id);
        // SAFETY: the number is inside of the table, and each getter is called for its own kind only.
        unsafe {
            match ffi::ps_values_kind(self.raw, id) {
                ffi::KIND_INT => Some(Number::Int(ffi::ps_values_int(self.raw, id))),
                ffi::KIND_FLOAT => Some(Number::Float(ffi::ps_values_float(self.raw, id))),
                ffi::KIND_BOOL => Some(Number::Bool(ffi::ps_values_bool(self.raw, id))),
                _ => None,
            }
        }
    }

    /// Element type (a `c10::ScalarType`) and sizes of an entry, if it holds a tensor.
    pub(crate) fn shape(&self, id: ValueId) -> Option<(i8, Vec<u64>)> {
        const KIND_TENSOR: i32 = 1;
        let id = self.index(id);
        let (mut dtype, mut sizes) = (0_i8, vec![0_i64; 8]);
        // SAFETY: the number is inside of the table and holds a tensor when its shape is asked for; `sizes` has the
        // capacity that is told.
        unsafe {
            if ffi::ps_values_kind(self.raw, id) != KIND_TENSOR {
                return None;
            }
            let count = ffi::ps_values_shape(self.raw, id, &raw mut dtype, sizes.as_mut_ptr(), sizes.len());
            if count > sizes.len() {
                sizes.resize(count, 0);
                ffi::ps_values_shape(self.raw, id, &raw mut dtype, sizes.as_mut_ptr(), sizes.len());
            }
            sizes.truncate(count);
        }
        Some((dtype, sizes.into_iter().map(i64::cast_unsigned).collect()))
    }

    /// Says where a tensor entry lies on a GPU, made dense if it is not; it stays there until the next clear.
    pub(crate) fn on_gpu(&mut self, id: ValueId, libtorch: &CudaLibtorch) -> Result<DeviceAddress, Raised> {
        let id = self.index(id);
        // SAFETY: the number is inside of the table; what is no tensor libtorch refuses.
        unsafe { libtorch.output(self.raw, id) }
    }

    /// Copies a tensor entry to `to`, dense and in row-major order.
    ///
    /// # Safety
    /// `to` must be valid for writes of the tensor's size in bytes.
    pub(crate) unsafe fn copy_out(&self, id: ValueId, to: *mut u8) -> Result<(), Raised> {
        let id = self.index(id);
        // SAFETY: the caller promises room at `to`.
        checked(|error| unsafe { ffi::ps_values_copy_out(self.raw, id, to.cast(), error) })
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        // SAFETY: made by `ps_values_new`, deleted here alone.
        unsafe { ffi::ps_values_delete(self.raw) }
    }
}

/// An operator with its arguments prepared; running it is one call through the dispatcher.
pub(crate) struct Call {
    raw: *mut RawCall,
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: made by `ps_call_new`, deleted here alone.
        unsafe { ffi::ps_call_delete(self.raw) }
    }
}

impl Call {
    /// Runs the operator on the table's values and writes its outputs there.
    ///
    /// The call's numbers were checked against a table of `values_count` entries when it was prepared.
    pub(crate) fn run(&self, values: &mut Values) -> Result<(), Raised> {
        // SAFETY: both handles are live; see above for the numbers.
        checked(|error| unsafe { ffi::ps_call_run(self.raw, values.raw, error) })
    }
}

/// The number of an argument in an operator's schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArgumentIndex(i32);

/// A [`Call`] while its arguments are set.
pub(crate) struct CallBuilder {
    call: Call,
    values_count: usize,
}

impl CallBuilder {
    /// Finds an operator: `aten::conv2d`, overload without name "".
    pub(crate) fn new(name: &str, overload: &str, values_count: usize) -> Result<Self, Raised> {
        let unknown = |_| Raised {
            fault: RaisedFault::UnknownOperator,
            message: format!("an operator's name holds a zero byte: {name:?}"),
        };
        let name_c = CString::new(name).map_err(unknown)?;
        let overload = CString::new(overload).map_err(unknown)?;
        let mut error = RawError::NONE;
        // SAFETY: the strings outlive the call.
        let raw = unsafe { ffi::ps_call_new(name_c.as_ptr(), overload.as_ptr(), &raw mut error) };
        if raw.is_null() { Err(error.into_raised()) } else { Ok(Self { call: Call { raw }, values_count }) }
    }

    pub(crate) fn argument(&self, name: &str) -> Option<ArgumentIndex> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle is live and the string outlives the call.
        let index = unsafe { ffi::ps_call_argument(self.call.raw, name.as_ptr()) };
        (index >= 0).then_some(ArgumentIndex(index))
    }

    /// True if the operator may write to this argument, by its schema.
    pub(crate) fn writes(&self, argument: ArgumentIndex) -> bool {
        // SAFETY: `ArgumentIndex` comes from `argument`, so it is inside of the schema; so below.
        unsafe { ffi::ps_call_writes(self.call.raw, argument.0) }
    }

    /// True if a return may share this argument's memory, by the operator's schema.
    pub(crate) fn aliases(&self, argument: ArgumentIndex) -> bool {
        // SAFETY: see `writes`.
        unsafe { ffi::ps_call_aliases(self.call.raw, argument.0) }
    }

    pub(crate) fn set_none(&mut self, argument: ArgumentIndex) {
        // SAFETY: see `writes`.
        unsafe { ffi::ps_call_set_none(self.call.raw, argument.0) }
    }

    pub(crate) fn set_number(&mut self, argument: ArgumentIndex, number: Number) {
        // SAFETY: see `writes`.
        unsafe {
            match number {
                Number::Int(value) => ffi::ps_call_set_int(self.call.raw, argument.0, value),
                Number::Float(value) => ffi::ps_call_set_float(self.call.raw, argument.0, value),
                Number::Bool(value) => ffi::ps_call_set_bool(self.call.raw, argument.0, value),
            }
        }
    }

    pub(crate) fn set_complex(&mut self, argument: ArgumentIndex, re: f64, im: f64) {
        // SAFETY: see `writes`.
        unsafe { ffi::ps_call_set_complex(self.call.raw, argument.0, re, im) }
    }

    pub(crate) fn set_string(&mut self, argument: ArgumentIndex, text: &str) {
        // SAFETY: see `writes`; the text is copied.
        unsafe { ffi::ps_call_set_string(self.call.raw, argument.0, text.as_ptr().cast(), text.len()) }
    }

    pub(crate) fn set_device(&mut self, argument: ArgumentIndex, device: TorchDevice) {
        let (kind, index) = device.name();
        // SAFETY: see `writes`; the name is copied.
        unsafe { ffi::ps_call_set_device(self.call.raw, argument.0, kind.as_ptr(), index) }
    }

    /// The device without memory: shapes alone.
    pub(crate) fn set_meta_device(&mut self, argument: ArgumentIndex) {
        // SAFETY: see `writes`; the name is copied.
        unsafe { ffi::ps_call_set_device(self.call.raw, argument.0, c"meta".as_ptr(), -1) }
    }

    pub(crate) fn set_bools(&mut self, argument: ArgumentIndex, values: &[bool]) {
        // SAFETY: see `writes`; the values are copied.
        unsafe { ffi::ps_call_set_bools(self.call.raw, argument.0, values.as_ptr(), values.len()) }
    }

    pub(crate) fn set_floats(&mut self, argument: ArgumentIndex, values: &[f64]) {
        // SAFETY: see `writes`; the values are copied.
        unsafe { ffi::ps_call_set_floats(self.call.raw, argument.0, values.as_ptr(), values.len()) }
    }

    pub(crate) fn set_strings(&mut self, argument: ArgumentIndex, texts: &[String]) -> Result<(), Raised> {
        let texts: Vec<CString> =
            texts.iter().map(|text| CString::new(text.as_str())).collect::<Result<_, _>>().map_err(|_| {
                Raised {
                    fault: RaisedFault::Argument,
                    message: "a string in a list holds a zero byte".to_owned(),
                }
            })?;
        let pointers: Vec<_> = texts.iter().map(|text| text.as_ptr()).collect();
        // SAFETY: see `writes`; the texts are copied.
        unsafe { ffi::ps_call_set_strings(self.call.raw, argument.0, pointers.as_ptr(), pointers.len()) }
        Ok(())
    }

    pub(crate) fn set_value(&mut self, argument: ArgumentIndex, value: ValueId) {
        let value = self.checked_id(value);
        // SAFETY: see `writes`.
        unsafe { ffi::ps_call_set_value(self.call.raw, argument.0, value) }
    }

    pub(crate) fn set_ints(&mut self, argument: ArgumentIndex, ints: &[Sym<i64>]) {
        let (constants, ids): (Vec<i64>, Vec<i64>) = ints
            .iter()
            .map(|int| match *int {
                Sym::Constant(value) => (value, -1),
                Sym::Value(id) => (0, i64::from(self.checked_id(id))),
            })
            .unzip();
        // SAFETY: see `writes`; both lists have the length that is told, and are copied.
        unsafe {
            ffi::ps_call_set_ints(self.call.raw, argument.0, constants.as_ptr(), ids.as_ptr(), ids.len());
        }
    }

    pub(crate) fn set_tensors(&mut self, argument: ArgumentIndex, tensors: &[Option<ValueId>]) {
        let ids: Vec<i64> = tensors.iter().map(|id| self.id_or_none(*id)).collect();
        // SAFETY: see `writes`; the list is copied.
        unsafe { ffi::ps_call_set_tensors(self.call.raw, argument.0, ids.as_ptr(), ids.len()) }
    }

    pub(crate) fn add_output(&mut self, id: Option<ValueId>) {
        let id = self.id_or_none(id);
        // SAFETY: the handle is live.
        unsafe { ffi::ps_call_add_output(self.call.raw, id) }
    }

    pub(crate) fn add_output_list(&mut self, ids: &[Option<ValueId>]) {
        let ids: Vec<i64> = ids.iter().map(|id| self.id_or_none(*id)).collect();
        // SAFETY: the handle is live and the list is copied.
        unsafe { ffi::ps_call_add_output_list(self.call.raw, ids.as_ptr(), ids.len()) }
    }

    /// Fills in defaults and fits constants to the schema.
    pub(crate) fn finish(self) -> Result<Call, Raised> {
        // SAFETY: the handle is live.
        checked(|error| unsafe { ffi::ps_call_finish(self.call.raw, error) })?;
        Ok(self.call)
    }

    fn checked_id(&self, id: ValueId) -> u32 {
        assert!(id.index() < self.values_count, "{id} is outside of a table of {} values", self.values_count);
        id.0
    }

    fn id_or_none(&self, id: Option<ValueId>) -> i64 {
        id.map_or(-1, |id| i64::from(self.checked_id(id)))
    }
}

/// While it lives, the calls of this thread record nothing for gradients.
pub(crate) struct InferenceMode {
    raw: *mut RawInferenceGuard,
    // The mode belongs to the thread that began it.
    _not_send: PhantomData<*mut ()>,
}

impl InferenceMode {
    pub(crate) fn begin() -> Self {
        // SAFETY: no preconditions; the guard is deleted in `drop` on the same thread, since the type is not `Send`.
        Self { raw: unsafe { ffi::ps_inference_guard_new() }, _not_send: PhantomData }
    }
}

impl Drop for InferenceMode {
    fn drop(&mut self) {
        // SAFETY: made by `ps_inference_guard_new`, deleted here alone.
        unsafe { ffi::ps_inference_guard_delete(self.raw) }
    }
}
