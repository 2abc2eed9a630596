#include "cuda.h"
#include "error.h"
#include "values.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

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

// One operator of each library that keeps a handle or a workspace for its stream.
void warm_up(const c10::Device& device) {
  const c10::InferenceMode mode;
  for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const auto options = at::TensorOptions().device(device).dtype(type);
    const auto square = at::ones({64, 64}, options);
    const auto bias = at::ones({64}, options);
    at::mm(square, square);
    at::addmm(bias, square, square);
    at::bmm(at::ones({2, 64, 64}, options), at::ones({2, 64, 64}, options));
    at::conv2d(at::ones({1, 4, 16, 16}, options), at::ones({4, 4, 3, 3}, options));
  }
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
