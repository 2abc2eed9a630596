// The table of values, for both halves of the seam.
#pragma once

#include <vector>

#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>

struct ps_values {
  std::vector<c10::IValue> entries;
  torch::jit::Stack stack;
};
