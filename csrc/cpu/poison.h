// Filling fresh memory with NaN, so that tests see an element that is read or left unwritten.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstring>

namespace fmkernels {

// Switched by fmkernels.testing.poisoned_allocation through fmkernels._C.poison_allocations.
extern std::atomic<bool> poison_allocations;

inline bool poisoning() { return poison_allocations.load(std::memory_order_relaxed); }

// All bits set is a NaN in every floating-point format.
inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

}  // namespace fmkernels
