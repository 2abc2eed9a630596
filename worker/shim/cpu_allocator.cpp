#include "shim.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

namespace {

void* (*arena_allocate)(size_t, bool*) = nullptr;
bool (*arena_release)(void*) = nullptr;

void release(void* pointer) {
  if (pointer != nullptr && !arena_release(pointer)) {
    c10::free_cpu(pointer);
  }
}

// The arena first, the stock allocator for what is allocated outside of an execution.
struct ArenaAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    }
    bool refused = false;
    void* pointer = arena_allocate(bytes, &refused);
    TORCH_CHECK_WITH(OutOfMemoryError, !refused, "the arena has no room for an allocation of ", bytes, " bytes");
    if (pointer == nullptr) {
      pointer = c10::alloc_cpu(bytes);
    }
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }

  void copy_data(void* dest, const void* src, std::size_t count) const final {
    default_copy_data(dest, src, count);
  }
};

ArenaAllocator allocator;

} // namespace

extern "C" void ps_install_cpu_allocator(void* (*allocate)(size_t, bool*), bool (*release_fn)(void*)) {
  arena_allocate = allocate;
  arena_release = release_fn;
  // Above the stock allocator's priority, so that it is not put back by a later registration.
  c10::SetCPUAllocator(&allocator, /*priority=*/200);
}
