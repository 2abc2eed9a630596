// The seam for training: gradients, optimizers and the state that they change, over the table of values.
#pragma once

#include "shim.h"

extern "C" {

struct ps_trainer;
struct ps_grad_guard;

enum ps_optimizer_kind : int32_t {
  PS_OPTIMIZER_SGD = 0,
  PS_OPTIMIZER_ADAM = 1,
  PS_OPTIMIZER_ADAMW = 2,
};

// What an optimizer is told beside the learning rate; those of the other kinds are not looked at.
struct ps_optimizer {
  int32_t kind;
  bool nesterov;
  double momentum;
  double dampening;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
};

// While it lives, the calls of this thread record what gradients need.
ps_grad_guard* ps_grad_guard_new();
void ps_grad_guard_delete(ps_grad_guard* guard);
// The same for single calls meanwhile: as inside of `torch.no_grad()` and `torch.enable_grad()`.
void ps_grad_mode(bool records);

// Lets libtorch choose kernels that give the same bits every time: `torch.use_deterministic_algorithms(True)`, without
// filling memory that nothing was written to.
void ps_deterministic();

ps_trainer* ps_trainer_new(const ps_optimizer* optimizer);
void ps_trainer_delete(ps_trainer* trainer);
// A parameter: a tensor entry that requires gradients. `first` and `second` are memory for the optimizer's state, as large as
// the parameter is dense, null where the optimizer keeps none; `steps` says how many steps it already stands for.
bool ps_trainer_add_parameter(ps_trainer* trainer, const ps_values* values, uint32_t id, void* first, void* second,
                              int64_t steps, ps_error* error);
// A buffer: the program works on the tensor entry, which is a copy of what lies at `home` between steps.
bool ps_trainer_add_buffer(ps_trainer* trainer, const ps_values* values, uint32_t id, void* home, ps_error* error);
// Something that never changes: it is only read and written as a whole.
bool ps_trainer_add_frozen(ps_trainer* trainer, void* home, int8_t dtype, const int64_t* sizes, const int64_t* strides,
                           size_t dimensions, const char* device, int32_t device_index, ps_error* error);
// Number of steps that the optimizer has made for a parameter: those in which it had a gradient.
int64_t ps_trainer_steps(const ps_trainer* trainer, size_t parameter);
void ps_trainer_set_steps(ps_trainer* trainer, size_t parameter, int64_t steps);

enum ps_role : int32_t {
  PS_ROLE_PARAMETER = 0,
  PS_ROLE_FIRST = 1,
  PS_ROLE_SECOND = 2,
  // Buffers and what is frozen, in the order in which they were added.
  PS_ROLE_BUFFER = 3,
};

// Copies a tensor of the state to host memory, dense and in row-major order, or from there.
bool ps_trainer_read(const ps_trainer* trainer, int32_t role, size_t index, void* to, ps_error* error);
bool ps_trainer_write(ps_trainer* trainer, int32_t role, size_t index, const void* from, ps_error* error);

// Begins a step: seeds libtorch's generators and lets the program see the buffers as the last step left them.
bool ps_trainer_begin(ps_trainer* trainer, uint64_t seed, ps_error* error);
// Asked ahead of every operation, by one thread at a time, which need not be the caller's: true to end the pass.
// `rests` is asked where nothing can end: it returns when things may go on.
struct ps_watch {
  bool (*stops)(const void* user);
  void (*rests)(const void* user);
  const void* user;
};

// Computes the gradients of `values[loss] / divisor`, added to those of this step so far. Once `watch` says so nothing more
// is computed, `*stopped` is set, and the gradients are of no use.
bool ps_trainer_backward(ps_trainer* trainer, ps_values* values, uint32_t loss, double divisor, const ps_watch* watch,
                         bool* stopped, ps_error* error);
// Lets a GPU copy the losses of this step so far to the host, behind all that was launched.
bool ps_trainer_fetch_loss(ps_trainer* trainer, ps_error* error);
// Their mean, once the copies are done.
bool ps_trainer_loss(const ps_trainer* trainer, double* loss, ps_error* error);
// Ends a step: clips the gradients to a total norm (0: as they are), lets the optimizer change the parameters, and keeps the
// buffers, with a rest between any two passes over all parameters. After an error the parameters may be changed in part.
bool ps_trainer_apply(ps_trainer* trainer, double rate, double clip_norm, const ps_watch* watch, ps_error* error);
// Forgets a step that was begun.
void ps_trainer_discard(ps_trainer* trainer);
}
