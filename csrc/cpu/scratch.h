// Working memory of one thread, kept between calls while it is small.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#include "poison.h"

namespace fmkernels {

class ThreadScratch {
 public:
  // At least `bytes`, aligned to a cache line, contents undefined. One user at a time per thread.
  explicit ThreadScratch(size_t bytes) {
    if (bytes <= kept_bytes) {
      Kept& kept = this_thread();
      if (kept.memory == nullptr) kept.memory = allocate(kept_bytes);
      memory_ = kept.memory.get();
    } else {
      own_ = allocate(bytes);
      memory_ = own_.get();
    }
    if (poisoning()) poison(memory_, bytes);
  }

  void* memory() const { return memory_; }

 private:
  static constexpr size_t kept_bytes = size_t{1} << 20;  // n = 49 on AVX-512 takes 0.3 MB

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<void, Free>;
  struct Kept {
    Memory memory;
  };

  static Kept& this_thread() {
    static thread_local Kept kept;
    return kept;
  }

  static Memory allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    return Memory(memory);
  }

  Memory own_;
  void* memory_ = nullptr;
};

}  // namespace fmkernels
