#include "error.h"
#include "shim.h"
#include "values.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <variant>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/InferenceMode.h>

struct ps_inference_guard {
  c10::InferenceMode mode;
};

namespace {

// Where an argument's value comes from when the call runs.
struct Entry {
  uint32_t id;
};
struct Integers {
  std::vector<int64_t> ints;
  std::vector<int64_t> ids;
};
struct Tensors {
  std::vector<int64_t> ids;
};
struct Missing {};
struct Argument {
  std::variant<Missing, c10::IValue, Entry, Integers, Tensors> source = Missing{};
  // Type that the schema asks for, optionality taken off.
  c10::TypePtr type;
  // Length of a fixed-size list such as `int[2]`, for which the schema takes one number too.
  int32_t broadcast = 0;
};
struct Output {
  bool list;
  std::vector<int64_t> ids;
};

c10::Device device_of(const char* kind, int32_t index) {
  const auto type = std::strcmp(kind, "cuda") == 0 ? c10::DeviceType::CUDA
      : std::strcmp(kind, "meta") == 0             ? c10::DeviceType::Meta
                                                   : c10::DeviceType::CPU;
  return {type, static_cast<c10::DeviceIndex>(index)};
}

bool is_integer_type(c10::TypeKind kind) {
  return kind == c10::TypeKind::IntType || kind == c10::TypeKind::SymIntType;
}

// Whether a return, or an element of one that is a list, may be in one of the argument's sets.
bool shares(const c10::AliasInfo& argument, const c10::AliasInfo& returned) {
  if (returned.isWildcardBefore() || returned.isWildcardAfter()) return true;
  for (const auto& set : argument.beforeSets()) {
    if (returned.beforeSets().count(set) != 0 || returned.afterSets().count(set) != 0) return true;
  }
  for (const auto& contained : returned.containedTypes()) {
    if (shares(argument, contained)) return true;
  }
  return false;
}

bool is_guarded(const ps_values& values, const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.has_storage() || tensor.numel() == 0) return false;
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.storage().data());
  for (const auto& [from, to] : values.guarded) {
    if (begin >= from && begin < to) return true;
  }
  return false;
}

// Refuses a call that writes into guarded memory, whatever its schema says of who shares it.
void check_writes(const ps_values& values, const c10::OperatorHandle& op, const std::vector<size_t>& written,
                  const torch::jit::Stack& stack) {
  for (const size_t index : written) {
    bool guarded = false;
    const auto& value = stack[index];
    if (value.isTensor()) {
      guarded = is_guarded(values, value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) guarded = guarded || is_guarded(values, tensor);
    }
    TORCH_CHECK(!guarded, op.schema().name(),
                " would write to the model's weights, which all executions share; export the model in eval mode");
  }
}

at::Scalar to_scalar(const c10::IValue& value) {
  return value.isBool() ? at::Scalar(value.toBool()) : value.toScalar();
}

// A list of integers as the list type that the schema asks for; an empty list serves for every element type.
c10::IValue fit_integers(std::vector<int64_t> ints, const Argument& argument) {
  if (argument.type->kind() != c10::TypeKind::ListType) {
    return c10::IValue(std::move(ints));
  }
  const auto element = argument.type->expectRef<c10::ListType>().getElementType();
  switch (element->kind()) {
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType: {
      std::vector<double> floats(ints.begin(), ints.end());
      return c10::IValue(std::move(floats));
    }
    case c10::TypeKind::BoolType: {
      c10::List<bool> bools;
      for (const int64_t value : ints) bools.push_back(value != 0);
      return c10::IValue(std::move(bools));
    }
    case c10::TypeKind::NumberType: {
      c10::impl::GenericList numbers(c10::NumberType::get());
      for (const int64_t value : ints) numbers.push_back(c10::IValue(value));
      return c10::IValue(std::move(numbers));
    }
    case c10::TypeKind::TensorType:
    case c10::TypeKind::OptionalType:
    case c10::TypeKind::StringType:
      TORCH_CHECK(ints.empty(), "a list of integers stands where the schema asks for ", argument.type->str());
      return c10::IValue(c10::impl::GenericList(element));
    default:
      return c10::IValue(std::move(ints));
  }
}

// A value as the type that the schema asks for. Follows what PyTorch's own Python bindings accept: numbers for
// tensors (as wrapped numbers), integers for floats, one number for a fixed-size list.
c10::IValue fit(c10::IValue value, const Argument& argument) {
  if (value.isNone()) {
    return value;
  }
  const auto kind = argument.type->kind();
  if (value.isInt() || value.isDouble() || value.isBool() || value.isComplexDouble()) {
    if (kind == c10::TypeKind::TensorType) {
      at::Tensor wrapped = at::scalar_to_tensor(to_scalar(value));
      wrapped.unsafeGetTensorImpl()->set_wrapped_number(true);
      return wrapped;
    }
    if ((kind == c10::TypeKind::FloatType || kind == c10::TypeKind::SymFloatType) && !value.isDouble()) {
      return to_scalar(value).toDouble();
    }
    if (is_integer_type(kind) && value.isBool()) {
      return static_cast<int64_t>(value.toBool());
    }
    if (kind == c10::TypeKind::BoolType && value.isInt()) {
      return value.toInt() != 0;
    }
    if (kind == c10::TypeKind::ListType && argument.broadcast > 0) {
      if (value.isInt()) {
        return fit_integers(std::vector<int64_t>(argument.broadcast, value.toInt()), argument);
      }
      if (value.isDouble()) {
        return c10::IValue(std::vector<double>(argument.broadcast, value.toDouble()));
      }
    }
  }
  return value;
}

c10::IValue take_tensors(const ps_values& values, const Tensors& source, const Argument& argument) {
  const bool optional = argument.type->kind() == c10::TypeKind::ListType &&
      argument.type->expectRef<c10::ListType>().getElementType()->kind() == c10::TypeKind::OptionalType;
  if (optional) {
    c10::List<std::optional<at::Tensor>> list;
    list.reserve(source.ids.size());
    for (const int64_t id : source.ids) {
      if (id < 0) {
        list.push_back(std::nullopt);
      } else {
        list.push_back(values.entries[id].toTensor());
      }
    }
    return list;
  }
  c10::List<at::Tensor> list;
  list.reserve(source.ids.size());
  for (const int64_t id : source.ids) {
    list.push_back(id < 0 ? at::Tensor() : values.entries[id].toTensor());
  }
  return list;
}

c10::IValue take(const ps_values& values, const Argument& argument) {
  if (const auto* constant = std::get_if<c10::IValue>(&argument.source)) {
    return *constant;
  }
  if (const auto* entry = std::get_if<Entry>(&argument.source)) {
    return fit(values.entries[entry->id], argument);
  }
  if (const auto* tensors = std::get_if<Tensors>(&argument.source)) {
    return take_tensors(values, *tensors, argument);
  }
  const auto& integers = std::get<Integers>(argument.source);
  std::vector<int64_t> ints = integers.ints;
  for (size_t i = 0; i < ints.size(); ++i) {
    if (integers.ids[i] >= 0) {
      ints[i] = values.entries[integers.ids[i]].toInt();
    }
  }
  return fit_integers(std::move(ints), argument);
}

} // namespace

struct ps_call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<Output> outputs;
  // Arguments that it may write to, for those operators that write data.
  std::vector<size_t> written;

  template <typename Source>
  void set(int32_t argument, Source&& source) {
    arguments[argument].source = std::forward<Source>(source);
  }
};

extern "C" {

ps_values* ps_values_new(size_t count) {
  auto* values = new ps_values;
  values->entries.resize(count);
  return values;
}

void ps_values_delete(ps_values* values) {
  delete values;
}

void ps_values_clear(ps_values* values, const uint32_t* ids, size_t count) {
  for (size_t i = 0; i < count; ++i) values->entries[ids[i]] = c10::IValue();
  values->dense.clear();
}

void ps_values_guard(ps_values* values, const void* begin, size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  auto& guarded = values->guarded;
  // Weights mostly follow each other.
  if (!guarded.empty() && first >= guarded.back().first && first <= guarded.back().second + 512) {
    guarded.back().second = std::max(guarded.back().second, first + bytes);
  } else {
    guarded.emplace_back(first, first + bytes);
  }
}

void ps_values_unguard(ps_values* values) {
  values->guarded.clear();
}

int32_t ps_values_kind(const ps_values* values, uint32_t id) {
  const auto& value = values->entries[id];
  if (value.isNone()) return PS_KIND_NONE;
  if (value.isTensor()) return PS_KIND_TENSOR;
  if (value.isInt()) return PS_KIND_INT;
  if (value.isDouble()) return PS_KIND_FLOAT;
  if (value.isBool()) return PS_KIND_BOOL;
  return PS_KIND_OTHER;
}

bool ps_values_set_view(ps_values* values, uint32_t id, void* data, int8_t dtype, const int64_t* sizes,
                        const int64_t* strides, size_t dimensions, const char* device, int32_t device_index,
                        bool requires_grad, ps_error* error) {
  return guarded(error, PS_FAULT_ARGUMENT, [&] {
    const auto options = at::TensorOptions()
                             .dtype(static_cast<at::ScalarType>(dtype))
                             .device(device_of(device, device_index));
    const at::IntArrayRef shape(sizes, dimensions);
    auto view = strides == nullptr
        ? at::from_blob(data, shape, options)
        : at::from_blob(data, shape, at::IntArrayRef(strides, dimensions), options);
    if (requires_grad) view.set_requires_grad(true);
    values->entries[id] = std::move(view);
  });
}

void ps_values_share(ps_values* values, uint32_t from, uint32_t to) {
  values->entries[to] = values->entries[from];
}

void ps_values_set_int(ps_values* values, uint32_t id, int64_t value) {
  values->entries[id] = value;
}

void ps_values_set_float(ps_values* values, uint32_t id, double value) {
  values->entries[id] = value;
}

void ps_values_set_bool(ps_values* values, uint32_t id, bool value) {
  values->entries[id] = value;
}

size_t ps_values_shape(const ps_values* values, uint32_t id, int8_t* dtype, int64_t* sizes, size_t capacity) {
  const auto& tensor = values->entries[id].toTensor();
  *dtype = static_cast<int8_t>(tensor.scalar_type());
  const auto shape = tensor.sizes();
  std::copy_n(shape.begin(), std::min(shape.size(), capacity), sizes);
  return shape.size();
}

bool ps_values_copy_out(const ps_values* values, uint32_t id, void* to, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto& tensor = values->entries[id].toTensor();
    at::from_blob(to, tensor.sizes(), at::TensorOptions().dtype(tensor.scalar_type())).copy_(tensor);
  });
}

int64_t ps_values_int(const ps_values* values, uint32_t id) {
  return values->entries[id].toInt();
}

double ps_values_float(const ps_values* values, uint32_t id) {
  return values->entries[id].toDouble();
}

bool ps_values_bool(const ps_values* values, uint32_t id) {
  return values->entries[id].toBool();
}

ps_call* ps_call_new(const char* name, const char* overload, ps_error* error) {
  ps_call* call = nullptr;
  guarded(error, PS_FAULT_UNKNOWN_OPERATOR, [&] {
    auto op = c10::Dispatcher::singleton().findSchema({name, overload});
    TORCH_CHECK(op.has_value(), "this libtorch has no operator ", name, overload[0] == '\0' ? "" : ".", overload);
    call = new ps_call{*op, {}, {}, {}};
    for (const auto& argument : op->schema().arguments()) {
      Argument prepared;
      prepared.type = argument.type();
      if (prepared.type->kind() == c10::TypeKind::OptionalType) {
        prepared.type = prepared.type->expectRef<c10::OptionalType>().getElementType();
      }
      prepared.broadcast = argument.N().value_or(0);
      const auto* alias = argument.alias_info();
      // These change nothing but how a tensor is seen by autograd.
      const std::string& operation = op->schema().name();
      const bool harmless = operation == "aten::detach_" || operation == "aten::requires_grad_";
      if (alias != nullptr && alias->isWrite() && !harmless) call->written.push_back(call->arguments.size());
      call->arguments.push_back(std::move(prepared));
    }
  });
  return call;
}

void ps_call_delete(ps_call* call) {
  delete call;
}

int32_t ps_call_argument(const ps_call* call, const char* name) {
  const auto index = call->op.schema().argumentIndexWithName(name);
  return index.has_value() ? *index : -1;
}

void ps_call_set_none(ps_call* call, int32_t argument) {
  call->set(argument, c10::IValue());
}

void ps_call_set_bool(ps_call* call, int32_t argument, bool value) {
  call->set(argument, c10::IValue(value));
}

void ps_call_set_int(ps_call* call, int32_t argument, int64_t value) {
  call->set(argument, c10::IValue(value));
}

void ps_call_set_float(ps_call* call, int32_t argument, double value) {
  call->set(argument, c10::IValue(value));
}

void ps_call_set_complex(ps_call* call, int32_t argument, double re, double im) {
  call->set(argument, c10::IValue(c10::complex<double>(re, im)));
}

void ps_call_set_string(ps_call* call, int32_t argument, const char* text, size_t bytes) {
  call->set(argument, c10::IValue(std::string(text, bytes)));
}

void ps_call_set_device(ps_call* call, int32_t argument, const char* kind, int32_t index) {
  call->set(argument, c10::IValue(device_of(kind, index)));
}

void ps_call_set_bools(ps_call* call, int32_t argument, const bool* values, size_t count) {
  c10::List<bool> list;
  for (size_t i = 0; i < count; ++i) list.push_back(values[i]);
  call->set(argument, c10::IValue(std::move(list)));
}

void ps_call_set_floats(ps_call* call, int32_t argument, const double* values, size_t count) {
  call->set(argument, c10::IValue(std::vector<double>(values, values + count)));
}

void ps_call_set_strings(ps_call* call, int32_t argument, const char* const* texts, size_t count) {
  c10::List<std::string> list;
  for (size_t i = 0; i < count; ++i) list.push_back(texts[i]);
  call->set(argument, c10::IValue(std::move(list)));
}

void ps_call_set_value(ps_call* call, int32_t argument, uint32_t id) {
  call->set(argument, Entry{id});
}

void ps_call_set_ints(ps_call* call, int32_t argument, const int64_t* ints, const int64_t* ids, size_t count) {
  call->set(argument, Integers{{ints, ints + count}, {ids, ids + count}});
}

void ps_call_set_tensors(ps_call* call, int32_t argument, const int64_t* ids, size_t count) {
  call->set(argument, Tensors{{ids, ids + count}});
}

void ps_call_add_output(ps_call* call, int64_t id) {
  call->outputs.push_back({false, {id}});
}

void ps_call_add_output_list(ps_call* call, const int64_t* ids, size_t count) {
  call->outputs.push_back({true, {ids, ids + count}});
}

bool ps_call_writes(const ps_call* call, int32_t argument) {
  const auto* alias = call->op.schema().arguments()[argument].alias_info();
  return alias != nullptr && alias->isWrite();
}

bool ps_call_aliases(const ps_call* call, int32_t argument) {
  const auto* alias = call->op.schema().arguments()[argument].alias_info();
  if (alias == nullptr) return false;
  // What goes into a wildcard, as a view of it in a list does, may come back anywhere.
  if (alias->isWildcardAfter()) return true;
  for (const auto& result : call->op.schema().returns()) {
    if (result.alias_info() != nullptr && shares(*alias, *result.alias_info())) return true;
  }
  return false;
}

bool ps_call_finish(ps_call* call, ps_error* error) {
  return guarded(error, PS_FAULT_ARGUMENT, [&] {
    const auto& schema = call->op.schema();
    for (size_t i = 0; i < call->arguments.size(); ++i) {
      auto& argument = call->arguments[i];
      const auto& declared = schema.arguments()[i];
      if (std::holds_alternative<Missing>(argument.source)) {
        if (declared.default_value().has_value()) {
          argument.source = *declared.default_value();
        } else {
          TORCH_CHECK(
              declared.type()->kind() == c10::TypeKind::OptionalType, "argument '", declared.name(), "' of type ",
              declared.type()->str(), " is missing");
          argument.source = c10::IValue();
        }
      } else if (auto* constant = std::get_if<c10::IValue>(&argument.source)) {
        *constant = fit(std::move(*constant), argument);
      } else if (const auto* integers = std::get_if<Integers>(&argument.source)) {
        const bool constant_list =
            std::all_of(integers->ids.begin(), integers->ids.end(), [](int64_t id) { return id < 0; });
        if (constant_list) {
          argument.source = fit_integers(integers->ints, argument);
        }
      }
    }
    TORCH_CHECK(
        call->outputs.size() <= schema.returns().size(), "the graph names ", call->outputs.size(),
        " outputs, the operator has ", schema.returns().size());
  });
}

bool ps_call_run(const ps_call* call, ps_values* values, ps_error* error) {
  auto& stack = values->stack;
  const bool ran = guarded(error, PS_FAULT_MODEL, [&] {
    for (const auto& argument : call->arguments) stack.push_back(take(*values, argument));
    if (!call->written.empty()) check_writes(*values, call->op, call->written, stack);
    call->op.callBoxed(stack);
    for (size_t i = 0; i < call->outputs.size(); ++i) {
      const auto& output = call->outputs[i];
      if (output.list) {
        const auto list = stack[i].toListRef();
        TORCH_CHECK(
            list.size() == output.ids.size(), "a list of ", list.size(), " tensors came back, the graph names ",
            output.ids.size());
        for (size_t k = 0; k < list.size(); ++k) {
          if (output.ids[k] >= 0) values->entries[output.ids[k]] = list[k];
        }
      } else if (output.ids[0] >= 0) {
        values->entries[output.ids[0]] = std::move(stack[i]);
      }
    }
  });
  // On every path: what the stack holds must not outlive the call.
  stack.clear();
  return ran;
}

ps_inference_guard* ps_inference_guard_new() {
  return new ps_inference_guard;
}

void ps_inference_guard_delete(ps_inference_guard* guard) {
  delete guard;
}
}
