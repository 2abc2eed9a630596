// The CUDA half of the seam to libtorch, a library of its own: opened by workers of CUDA devices, after libtorch_cuda.
#pragma once

#include "shim.h"

extern "C" {

// How libtorch's CUDA allocations are served. May be called from any thread.
struct ps_cuda_memory {
  // Null to have the driver serve the request; sets `*refused` if it must fail instead.
  void* (*allocate)(size_t bytes, bool* refused);
  // False for memory that is not its own.
  bool (*release)(void* pointer);
  // Told about every allocation (positive) and release (negative) of the driver's.
  void (*outside)(int64_t bytes);
};

// Lets libtorch compute on GPU `device` of this process: by `stream` (a CUstream of the primary context) on the calling
// thread, with memory as above. Makes the handles and workspaces of cuBLAS and cuDNN, which stay, so that no execution
// does. To be called once, before anything of libtorch has touched a GPU.
bool ps_cuda_attach(int32_t device, void* stream, const ps_cuda_memory* memory, ps_error* error);

// Makes the handles and workspaces of the thread on which autograd computes backward passes on this GPU: no step does then.
// Called from the thread that was attached.
bool ps_cuda_prepare_training(int32_t device, ps_error* error);

// Says where a tensor entry lies, made dense in row-major order if it is not; the table keeps that until the next clear.
// False and an error if it is not on the GPU.
bool ps_cuda_output(ps_values* values, uint32_t id, void** data, ps_error* error);

// Forgets an error that a call left behind and that a later call would report as its own.
void ps_cuda_clear_error();
}
