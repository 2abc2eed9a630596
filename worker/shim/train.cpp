// Steps of training. The arithmetic is that of `torch.optim` and `torch.nn.utils.clip_grad_norm_` in PyTorch 2.11 with
// `foreach`, in the same order, so that the same bits come out; on the CPU these equal the loops over single tensors.
#include "train.h"

#include "error.h"
#include "values.h"

#include <cmath>
#include <map>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>

struct ps_grad_guard {
  at::AutoGradMode mode{true};
};

namespace {

struct Parameter {
  at::Tensor tensor;
  // Momentum, or the averages of gradients and of their squares.
  at::Tensor first;
  at::Tensor second;
  int64_t steps;
};

// Those with a gradient in this step, in the order of the module's parameters; lists that operators take.
struct Group {
  std::vector<Parameter*> parameters;
  std::vector<at::Tensor> tensors;
  std::vector<at::Tensor> gradients;
  std::vector<at::Tensor> first;
  std::vector<at::Tensor> second;
};

// Lets a backward pass run empty once it is to stop: operations without gradients compute nothing and pass none on. To throw
// would end it as well, but leave gradients in the engine's queues until the next pass.
//
// Without a watch nobody is asked. So it is for what adds to a parameter's gradient, which is no operation of its own: a part of the
// gradient of a weight that is used twice waits there for the other, and would be added when that comes without anything in it.
struct StopHook : torch::autograd::FunctionPreHook {
  StopHook(const ps_watch* watch, bool* stopped) : watch(watch), stopped(stopped) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    // Set by one of autograd's threads, read by another after it.
    bool is_over = __atomic_load_n(stopped, __ATOMIC_ACQUIRE);
    if (!is_over && watch != nullptr && watch->stops(watch->user)) {
      is_over = true;
      __atomic_store_n(stopped, true, __ATOMIC_RELEASE);
    }
    return is_over ? torch::autograd::variable_list(gradients.size()) : gradients;
  }

  const ps_watch* watch;
  bool* stopped;
};

// The hooks of one backward pass. Nodes may live on: those that add to a parameter's gradient as long as the parameter, others in a
// buffer that the next micro-batch goes on from. All lose theirs here.
struct Hooks {
  Hooks(const std::shared_ptr<torch::autograd::Node>& root, const ps_watch& watch, bool* stopped) {
    std::unordered_set<torch::autograd::Node*> seen;
    std::vector<std::shared_ptr<torch::autograd::Node>> next{root};
    while (!next.empty()) {
      const auto node = std::move(next.back());
      next.pop_back();
      if (node == nullptr || !seen.insert(node.get()).second) continue;
      const bool is_accumulator = node->num_outputs() == 0;
      node->add_pre_hook(std::make_unique<StopHook>(is_accumulator ? nullptr : &watch, stopped));
      for (const auto& edge : node->next_edges()) next.push_back(edge.function);
      nodes.push_back(node);
    }
  }

  ~Hooks() {
    for (const auto& node : nodes) node->pre_hooks().pop_back();
  }

  Hooks(const Hooks&) = delete;
  Hooks& operator=(const Hooks&) = delete;

  std::vector<std::shared_ptr<torch::autograd::Node>> nodes;
};

// As PyTorch keeps an optimizer's state: strides like the parameter's if these leave no gaps, else row-major.
at::Tensor state_like(const at::Tensor& tensor, void* data) {
  if (data == nullptr) return {};
  const auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(tensor.device());
  return tensor.is_non_overlapping_and_dense() ? at::from_blob(data, tensor.sizes(), tensor.strides(), options)
                                               : at::from_blob(data, tensor.sizes(), options);
}

// Buffers of one type: what the program works on, and what lies in the state between steps.
struct Copies {
  std::vector<at::Tensor> seen;
  std::vector<at::Tensor> home;
};

// One group for each type, in the order in which the types first come.
std::vector<Group> groups_of(std::vector<Parameter>& parameters) {
  std::vector<std::pair<at::ScalarType, Group>> groups;
  for (auto& parameter : parameters) {
    const auto& gradient = parameter.tensor.grad();
    if (!gradient.defined()) continue;
    const auto type = parameter.tensor.scalar_type();
    auto found = groups.begin();
    while (found != groups.end() && found->first != type) ++found;
    if (found == groups.end()) found = groups.insert(groups.end(), {type, Group{}});
    auto& group = found->second;
    group.parameters.push_back(&parameter);
    group.tensors.push_back(parameter.tensor);
    group.gradients.push_back(gradient);
    group.first.push_back(parameter.first);
    group.second.push_back(parameter.second);
  }
  std::vector<Group> result;
  for (auto& [type, group] : groups) result.push_back(std::move(group));
  return result;
}

// Between two passes over all parameters, which are some hundred microseconds of a GPU each: nothing can end there any more,
// but others may come in between.
struct Rest {
  const ps_watch& watch;

  void operator()() const { watch.rests(watch.user); }
};

void clip(const std::vector<Group>& groups, double most, const Rest& rest) {
  std::vector<at::Tensor> norms;
  for (const auto& group : groups) {
    for (auto& norm : at::_foreach_norm(group.gradients, 2.0)) norms.push_back(std::move(norm));
  }
  if (norms.empty()) return;
  rest();
  const auto total = at::linalg_vector_norm(at::stack(norms), 2.0);
  const auto factor = at::clamp(at::reciprocal(total + 1e-6) * most, std::nullopt, 1.0);
  for (const auto& group : groups) at::_foreach_mul_(group.gradients, factor);
  rest();
}

void sgd(Group& group, const ps_optimizer& settings, double rate, const Rest& rest) {
  if (settings.weight_decay != 0) {
    // In place: gradients are thrown away, and to allocate as many again takes longer than to add.
    at::_foreach_add_(group.gradients, group.tensors, settings.weight_decay);
    rest();
  }
  if (settings.momentum != 0) {
    bool all_begun = true;
    for (const auto* parameter : group.parameters) all_begun = all_begun && parameter->steps > 0;
    if (all_begun) {
      at::_foreach_mul_(group.first, settings.momentum);
      rest();
      at::_foreach_add_(group.first, group.gradients, 1 - settings.dampening);
      rest();
    } else {
      for (size_t i = 0; i < group.first.size(); ++i) {
        if (group.parameters[i]->steps == 0) {
          group.first[i].copy_(group.gradients[i]);
        } else {
          group.first[i].mul_(settings.momentum).add_(group.gradients[i], 1 - settings.dampening);
        }
      }
    }
    if (settings.nesterov) {
      at::_foreach_add_(group.gradients, group.first, settings.momentum);
      rest();
    } else {
      group.gradients = group.first;
    }
  }
  at::_foreach_add_(group.tensors, group.gradients, -rate);
  rest();
}

void adam(Group& group, const ps_optimizer& settings, double rate, const Rest& rest) {
  if (settings.weight_decay != 0) {
    if (settings.kind == PS_OPTIMIZER_ADAMW) {
      at::_foreach_mul_(group.tensors, 1 - rate * settings.weight_decay);
      rest();
    } else {
      at::_foreach_add_(group.gradients, group.tensors, settings.weight_decay);
      rest();
    }
  }
  at::_foreach_lerp_(group.first, group.gradients, 1 - settings.beta1);
  rest();
  at::_foreach_mul_(group.second, settings.beta2);
  rest();
  at::_foreach_addcmul_(group.second, group.gradients, group.gradients, 1 - settings.beta2);
  rest();
  std::vector<at::Scalar> sizes;
  std::vector<at::Scalar> corrections;
  for (const auto* parameter : group.parameters) {
    const auto step = static_cast<double>(parameter->steps + 1);
    sizes.emplace_back(rate / (1 - std::pow(settings.beta1, step)) * -1);
    corrections.emplace_back(std::pow(1 - std::pow(settings.beta2, step), 0.5));
  }
  auto roots = at::_foreach_sqrt(group.second);
  rest();
  at::_foreach_div_(roots, corrections);
  rest();
  at::_foreach_add_(roots, settings.eps);
  rest();
  at::_foreach_addcdiv_(group.tensors, group.first, roots, sizes);
  rest();
}

} // namespace

struct ps_trainer {
  ps_optimizer optimizer;
  std::vector<Parameter> parameters;
  // Where buffers lie between steps, frozen ones too.
  std::vector<at::Tensor> buffers;
  // Those that the program sees, by type: lists of one type are copied by few kernels on a GPU, where each by itself would
  // take as long as a layer.
  std::map<at::ScalarType, Copies> copies;
  // Of the step under way, where they are computed and on the host.
  std::vector<at::Tensor> losses;
  std::vector<at::Tensor> fetched;

  const at::Tensor& state(int32_t role, size_t index) const {
    switch (role) {
      case PS_ROLE_PARAMETER:
        return parameters.at(index).tensor;
      case PS_ROLE_FIRST:
        return parameters.at(index).first;
      case PS_ROLE_SECOND:
        return parameters.at(index).second;
      default:
        return buffers.at(index);
    }
  }

  void discard() {
    for (auto& parameter : parameters) parameter.tensor.mutable_grad().reset();
    // One that a program writes to while gradients are recorded would keep the graph.
    for (auto& [type, some] : copies) {
      for (auto& seen : some.seen) {
        if (seen.grad_fn() != nullptr) seen.detach_();
      }
    }
    losses.clear();
    fetched.clear();
  }
};

extern "C" {

ps_grad_guard* ps_grad_guard_new() {
  return new ps_grad_guard;
}

void ps_grad_guard_delete(ps_grad_guard* guard) {
  delete guard;
}

void ps_grad_mode(bool records) {
  at::GradMode::set_enabled(records);
}

void ps_deterministic() {
  auto& context = at::globalContext();
  context.setDeterministicCuDNN(true);
  context.setDeterministicAlgorithms(true, /*warn_only=*/false);
  context.setDeterministicFillUninitializedMemory(false);
}

ps_trainer* ps_trainer_new(const ps_optimizer* optimizer) {
  return new ps_trainer{*optimizer, {}, {}, {}, {}, {}};
}

void ps_trainer_delete(ps_trainer* trainer) {
  delete trainer;
}

bool ps_trainer_add_parameter(ps_trainer* trainer, const ps_values* values, uint32_t id, void* first, void* second,
                              int64_t steps, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto& tensor = values->entries[id].toTensor();
    TORCH_CHECK(tensor.is_leaf() && tensor.requires_grad(), "a parameter is no leaf that requires gradients");
    trainer->parameters.push_back({tensor, state_like(tensor, first), state_like(tensor, second), steps});
  });
}

bool ps_trainer_add_buffer(ps_trainer* trainer, const ps_values* values, uint32_t id, void* home, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto& seen = values->entries[id].toTensor();
    const auto options = at::TensorOptions().dtype(seen.scalar_type()).device(seen.device());
    trainer->buffers.push_back(at::from_blob(home, seen.sizes(), seen.strides(), options));
    auto& copies = trainer->copies[seen.scalar_type()];
    copies.seen.push_back(seen);
    copies.home.push_back(trainer->buffers.back());
  });
}

bool ps_trainer_add_frozen(ps_trainer* trainer, void* home, int8_t dtype, const int64_t* sizes, const int64_t* strides,
                           size_t dimensions, const char* device, int32_t device_index, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto place = c10::Device(device);
    const auto options = at::TensorOptions()
                             .dtype(static_cast<at::ScalarType>(dtype))
                             .device(device_index < 0 ? place : c10::Device(place.type(), device_index));
    const at::IntArrayRef shape(sizes, dimensions);
    trainer->buffers.push_back(at::from_blob(home, shape, at::IntArrayRef(strides, dimensions), options));
  });
}

int64_t ps_trainer_steps(const ps_trainer* trainer, size_t parameter) {
  return trainer->parameters[parameter].steps;
}

void ps_trainer_set_steps(ps_trainer* trainer, size_t parameter, int64_t steps) {
  trainer->parameters[parameter].steps = steps;
}

bool ps_trainer_read(const ps_trainer* trainer, int32_t role, size_t index, void* to, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const at::NoGradGuard no_grad;
    const auto& tensor = trainer->state(role, index);
    at::from_blob(to, tensor.sizes(), at::TensorOptions().dtype(tensor.scalar_type())).copy_(tensor);
  });
}

bool ps_trainer_write(ps_trainer* trainer, int32_t role, size_t index, const void* from, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const at::NoGradGuard no_grad;
    auto tensor = trainer->state(role, index);
    const auto options = at::TensorOptions().dtype(tensor.scalar_type());
    tensor.copy_(at::from_blob(const_cast<void*>(from), tensor.sizes(), options));
  });
}

bool ps_trainer_begin(ps_trainer* trainer, uint64_t seed, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    trainer->discard();
    at::manual_seed(seed);
    const at::NoGradGuard no_grad;
    for (auto& [type, copies] : trainer->copies) at::_foreach_copy_(copies.seen, copies.home);
  });
}

bool ps_trainer_backward(ps_trainer* trainer, ps_values* values, uint32_t loss, double divisor,
                         const ps_watch* watch, bool* stopped, ps_error* error) {
  *stopped = false;
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto& value = values->entries[loss].toTensor();
    TORCH_CHECK(value.dim() == 0 && value.is_floating_point(), "the loss is no scalar but of shape ", value.sizes());
    TORCH_CHECK(value.grad_fn() != nullptr, "the loss depends on no parameter");
    trainer->losses.push_back(value.detach().clone());
    const auto root = divisor == 1 ? value : value / divisor;
    const Hooks hooks(root.grad_fn(), *watch, stopped);
    torch::autograd::backward({root}, {});
  });
}

bool ps_trainer_fetch_loss(ps_trainer* trainer, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const at::NoGradGuard no_grad;
    trainer->fetched.clear();
    for (const auto& part : trainer->losses) {
      const auto options = at::TensorOptions().dtype(part.scalar_type()).pinned_memory(part.is_cuda());
      trainer->fetched.push_back(at::empty({}, options).copy_(part, /*non_blocking=*/true));
    }
  });
}

bool ps_trainer_loss(const ps_trainer* trainer, double* loss, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    double sum = 0;
    for (const auto& part : trainer->fetched) sum += part.item<double>();
    *loss = sum / static_cast<double>(std::max<size_t>(trainer->fetched.size(), 1));
  });
}

bool ps_trainer_apply(ps_trainer* trainer, double rate, double clip_norm, const ps_watch* watch, ps_error* error) {
  const bool applied = guarded(error, PS_FAULT_MODEL, [&] {
    const at::NoGradGuard no_grad;
    const Rest rest{*watch};
    auto groups = groups_of(trainer->parameters);
    if (clip_norm > 0) clip(groups, clip_norm, rest);
    for (auto& group : groups) {
      if (trainer->optimizer.kind == PS_OPTIMIZER_SGD) {
        sgd(group, trainer->optimizer, rate, rest);
      } else {
        adam(group, trainer->optimizer, rate, rest);
      }
      for (auto* parameter : group.parameters) ++parameter->steps;
    }
    for (auto& [type, copies] : trainer->copies) at::_foreach_copy_(copies.home, copies.seen);
  });
  trainer->discard();
  return applied;
}

void ps_trainer_discard(ps_trainer* trainer) {
  trainer->discard();
}
}
