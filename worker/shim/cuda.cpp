#include "cuda.h"
#include "error.h"
#include "values.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include <vector>

namespace {

ps_cuda_memory memory;

void* allocate(size_t bytes, int, cudaStream_t) {
  bool refused = false;
  void* pointer = memory.allocate(bytes, &refused);
  // libtorch takes a null pointer for memory, so it must hear of it otherwise.
  TORCH_CHECK_WITH(OutOfMemoryError, !refused, "the arena has no room for an allocation of ", bytes, " bytes");
  if (pointer == nullptr && bytes > 0) {
    const cudaError_t result = cudaMalloc(&pointer, bytes);
    if (result != cudaSuccess) {
      cudaGetLastError();
      TORCH_CHECK_WITH(OutOfMemoryError, false, "the GPU has no room for an allocation of ", bytes,
                       " bytes outside of the pool: ", cudaGetErrorString(result));
    }
    memory.outside(static_cast<int64_t>(bytes));
  }
  return pointer;
}

void release(void* pointer, size_t bytes, int, cudaStream_t) {
  if (pointer != nullptr && !memory.release(pointer)) {
    cudaFree(pointer);
    memory.outside(-static_cast<int64_t>(bytes));
  }
}

// One operator of each library that keeps a handle or a workspace for its thread and stream, of one type.
std::vector<at::Tensor> one_of_each(const c10::Device& device, at::ScalarType type, bool with_gradients) {
  const auto ones = [&](at::IntArrayRef sizes) {
    auto tensor = at::ones(sizes, at::TensorOptions().device(device).dtype(type));
    if (with_gradients) tensor.set_requires_grad(true);
    return tensor;
  };
  const auto square = ones({64, 64});
  const auto pair = ones({2, 64, 64});
  return {
      at::mm(square, square),
      at::addmm(ones({64}), square, square),
      at::bmm(pair, pair),
      at::conv2d(ones({1, 4, 16, 16}), ones({4, 4, 3, 3})),
  };
}

const auto types = {at::kFloat, at::kHalf, at::kBFloat16};

void warm_up(const c10::Device& device) {
  const c10::InferenceMode mode;
  for (const auto type : types) one_of_each(device, type, false);
}

} // namespace

extern "C" {

bool ps_cuda_attach(int32_t device, void* stream, const ps_cuda_memory* served, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    memory = *served;
    const auto index = static_cast<c10::DeviceIndex>(device);
    using namespace torch::cuda::CUDAPluggableAllocator;
    changeCurrentAllocator(createCustomAllocator(&allocate, &release));
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::cuda::set_device(index);
    c10::cuda::setCurrentCUDAStream(
        c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(stream), index));
    warm_up({c10::DeviceType::CUDA, index});
    c10::cuda::getCurrentCUDAStream(index).synchronize();
  });
}

bool ps_cuda_prepare_training(int32_t device, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    // Of all attention, its backward pass alone cannot do with a gradient that is missing, as after a stop.
    at::globalContext().setSDPUseCuDNN(false);
    const auto index = static_cast<c10::DeviceIndex>(device);
    const at::AutoGradMode mode(true);
    for (const auto type : types) {
      std::vector<at::Tensor> sums;
      for (const auto& result : one_of_each({c10::DeviceType::CUDA, index}, type, true)) sums.push_back(result.sum());
      torch::autograd::backward({at::stack(sums).sum()}, {});
    }
    c10::cuda::getCurrentCUDAStream(index).synchronize();
  });
}

bool ps_cuda_output(ps_values* values, uint32_t id, void** data, ps_error* error) {
  return guarded(error, PS_FAULT_MODEL, [&] {
    const auto& output = values->entries[id].toTensor();
    TORCH_CHECK(output.is_cuda(), "an output is not on the GPU");
    // Views that are conjugated or negated by a flag alone become what they stand for.
    values->dense.push_back(output.resolve_conj().resolve_neg().contiguous());
    *data = values->dense.back().mutable_data_ptr();
  });
}

void ps_cuda_clear_error() {
  cudaGetLastError();
}
}
