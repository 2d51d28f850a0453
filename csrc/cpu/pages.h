// Memory of large results. A fresh one costs the system's zeroing of its pages and a fault for
// each, which at these sizes is more than computing what is written there; allocators that return
// large blocks at once, as glibc's does, pay that at every call. So blocks that are given back are
// kept for the next call, up to kKeep bytes in all.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace mmae {

class Pages {
 public:
  static constexpr size_t kLarge = size_t(1) << 20, kKeep = size_t(64) << 20;

  // Never destroyed: tensors may be freed after every static object.
  static Pages& of_this_process() {
    static Pages* pages = new Pages;
    return *pages;
  }

  // Uninitialised, aligned to a large page.
  void* take(size_t bytes) {
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // The block given back last is the likeliest to be in a cache still.
      for (auto block = kept_.begin(); block != kept_.end(); ++block)
        if (block->size == size) {
          void* data = block->data;
          kept_bytes_ -= size;
          kept_.erase(block);
          return data;
        }
    }
    void* data = std::aligned_alloc(kPage, size);
    if (!data) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[data] = size;
    return data;
  }

  void give_back(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_front({data, sizes_.at(data)});
    kept_bytes_ += kept_.front().size;
    while (kept_bytes_ > kKeep) {  // the oldest go
      kept_bytes_ -= kept_.back().size;
      sizes_.erase(kept_.back().data);
      std::free(kept_.back().data);
      kept_.pop_back();
    }
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr size_t kPage = size_t(2) << 20;
  std::mutex mutex_;
  std::list<Block> kept_;  // newest first
  size_t kept_bytes_ = 0;
  std::unordered_map<void*, size_t> sizes_;  // of all blocks
};

}  // namespace mmae
