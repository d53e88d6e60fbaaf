#pragma once
#include <cstdint>
#include <memory>
#include <new>

// Memory of a thread, aligned to 64. It only grows, so that a step does not wait for fresh pages; what it held is lost
// then.
class Scratch {
 public:
  void* Get(int64_t bytes) {
    if (size_ < bytes) {
      size_ = 0;
      memory_.reset();
      memory_.reset(::operator new(size_t(bytes), kAlignment));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment = std::align_val_t(64);
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};
