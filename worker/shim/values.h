// The table of values, for both halves of the seam.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>

struct ps_values {
  std::vector<c10::IValue> entries;
  torch::jit::Stack stack;
  // Outputs made dense, beside their entries: an entry may be a weight. Gone with the next clear.
  std::vector<at::Tensor> dense;
  // Memory of weights, from the first byte to behind the last: no operator may write there.
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> guarded;
};
