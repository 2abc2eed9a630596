// The seam between the Rust executor and libtorch: operators found by name and called boxed, a table of values, and
// a CPU allocator over the arena. Everything here is `extern "C"`, throws nothing and keeps no global state but the
// allocator's.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Why a call failed; `message` is malloc'ed, owned by the caller, and null while nothing failed.
struct ps_error {
  int32_t fault;
  char* message;
};

enum ps_fault : int32_t {
  PS_FAULT_NONE = 0,
  PS_FAULT_UNKNOWN_OPERATOR = 1,
  PS_FAULT_ARGUMENT = 2,
  PS_FAULT_INPUT = 3,
  PS_FAULT_OUT_OF_MEMORY = 4,
  PS_FAULT_MODEL = 5,
};

enum ps_kind : int32_t {
  PS_KIND_NONE = 0,
  PS_KIND_TENSOR = 1,
  PS_KIND_INT = 2,
  PS_KIND_FLOAT = 3,
  PS_KIND_BOOL = 4,
  PS_KIND_OTHER = 5,
};

struct ps_values;
struct ps_call;
struct ps_inference_guard;

// ---- values: what the nodes of a program pass to each other, by number -------------------------------------------

ps_values* ps_values_new(size_t count);
void ps_values_delete(ps_values* values);
// Drops entries, and outputs that were made dense.
void ps_values_clear(ps_values* values, const uint32_t* ids, size_t count);
int32_t ps_values_kind(const ps_values* values, uint32_t id);
// Makes the entry a tensor over memory that somebody else owns and keeps for as long as the entry lives. `dtype` is a
// c10::ScalarType; `strides`, in elements, may be null for a dense tensor in row-major order. `requires_grad` is what the
// tensor says of itself, and what some operators choose their kernel by, though nothing is recorded for gradients.
bool ps_values_set_view(ps_values* values, uint32_t id, void* data, int8_t dtype, const int64_t* sizes,
                        const int64_t* strides, size_t dimensions, const char* device, int32_t device_index,
                        bool requires_grad, ps_error* error);
// Makes the entry `to` the very tensor that `from` is.
void ps_values_share(ps_values* values, uint32_t from, uint32_t to);
// No call may write into these bytes from now on.
void ps_values_guard(ps_values* values, const void* begin, size_t bytes);
// Calls may write everywhere again.
void ps_values_unguard(ps_values* values);
void ps_values_set_int(ps_values* values, uint32_t id, int64_t value);
void ps_values_set_float(ps_values* values, uint32_t id, double value);
void ps_values_set_bool(ps_values* values, uint32_t id, bool value);
// Element type and sizes of a tensor entry (up to `capacity` of them): returns the number of dimensions.
size_t ps_values_shape(const ps_values* values, uint32_t id, int8_t* dtype, int64_t* sizes, size_t capacity);
// Copies a tensor entry to host memory, dense and in row-major order; `bytes` is exactly its size.
bool ps_values_copy_out(const ps_values* values, uint32_t id, void* to, ps_error* error);
int64_t ps_values_int(const ps_values* values, uint32_t id);
double ps_values_float(const ps_values* values, uint32_t id);
bool ps_values_bool(const ps_values* values, uint32_t id);

// ---- calls: one operator with its arguments prepared -------------------------------------------------------------

// Null and an error if the operator does not exist.
ps_call* ps_call_new(const char* name, const char* overload, ps_error* error);
void ps_call_delete(ps_call* call);
// Number of the argument with this name in the operator's schema, or -1.
int32_t ps_call_argument(const ps_call* call, const char* name);
void ps_call_set_none(ps_call* call, int32_t argument);
void ps_call_set_bool(ps_call* call, int32_t argument, bool value);
void ps_call_set_int(ps_call* call, int32_t argument, int64_t value);
void ps_call_set_float(ps_call* call, int32_t argument, double value);
void ps_call_set_complex(ps_call* call, int32_t argument, double re, double im);
void ps_call_set_string(ps_call* call, int32_t argument, const char* text, size_t bytes);
// `index` < 0: the device's current one.
void ps_call_set_device(ps_call* call, int32_t argument, const char* kind, int32_t index);
void ps_call_set_bools(ps_call* call, int32_t argument, const bool* values, size_t count);
void ps_call_set_floats(ps_call* call, int32_t argument, const double* values, size_t count);
void ps_call_set_strings(ps_call* call, int32_t argument, const char* const* texts, size_t count);
// One entry of the table, whatever it holds when the call runs.
void ps_call_set_value(ps_call* call, int32_t argument, uint32_t id);
// A list: entry i is values[ids[i]], or the integer ints[i] where ids[i] is -1.
void ps_call_set_ints(ps_call* call, int32_t argument, const int64_t* ints, const int64_t* ids, size_t count);
// A list of tensors; -1 is none.
void ps_call_set_tensors(ps_call* call, int32_t argument, const int64_t* ids, size_t count);
// One return: entry `id`, or dropped if -1.
void ps_call_add_output(ps_call* call, int64_t id);
// One return that is a list: its elements in order, -1 is dropped.
void ps_call_add_output_list(ps_call* call, const int64_t* ids, size_t count);
// True if the operator may write to the argument / if a return may share the argument's memory, by its schema. Some
// schemas do not say that a return may be the argument itself.
bool ps_call_writes(const ps_call* call, int32_t argument);
bool ps_call_aliases(const ps_call* call, int32_t argument);
// Fills defaults and fits constants to the schema's types; false and an error if an argument is missing or unfit.
bool ps_call_finish(ps_call* call, ps_error* error);
// Runs the call on the table. False and an error if libtorch raised, or if it would write into guarded memory; outputs are
// then as before.
bool ps_call_run(const ps_call* call, ps_values* values, ps_error* error);

// ---- surroundings ------------------------------------------------------------------------------------------------

ps_inference_guard* ps_inference_guard_new();
void ps_inference_guard_delete(ps_inference_guard* guard);

// Routes libtorch's CPU allocations. `allocate` returns null to have the stock allocator serve the request; it sets
// `*refused` if the request must fail instead. `release` returns false for memory that is not its own.
void ps_install_cpu_allocator(void* (*allocate)(size_t bytes, bool* refused), bool (*release)(void* pointer));
}
