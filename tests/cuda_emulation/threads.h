// A block as threads of the host, for ThreadSanitizer to judge: shared memory is plain memory, as
// under nvcc, and two accesses are ordered only by what orders them in CUDA. That is __syncthreads,
// the launch and its end; what the lanes of a warp exchange orders nothing.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

// Of ThreadSanitizer's runtime.
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreSyncBegin(const char* file, int line);
void AnnotateIgnoreSyncEnd(const char* file, int line);
}

namespace emulation {

constexpr int kMostThreads = 512;  // that run at once: so many blocks of a launch see each other

class Barrier {
 public:
  explicit Barrier(size_t threads) { pthread_barrier_init(&barrier_, nullptr, unsigned(threads)); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{kWarp};
  char slots[2][kWarp * kSlot];
};

struct Block {
  Index block_index, block_size;
  std::vector<char> memory;
  // By turns. To ThreadSanitizer a barrier joins every wait with all that came before: with one
  // barrier, a thread that wakes late would be joined with those that wait there for the next time.
  Barrier barriers[2];
  std::deque<Warp> warps;

  Block(int64_t index, int threads, int shared_bytes)
      : block_index{unsigned(index)}, block_size{unsigned(threads)},
        memory(size_t(shared_bytes), char(0xff)),
        barriers{Barrier(size_t(threads)), Barrier(size_t(threads))}, warps(threads / kWarp) {}
};

struct Thread {
  Block* block;
  unsigned index, barriers, gathers;
  alignas(16) char lanes[kWarp * kSlot];
};

inline thread_local Thread self;
inline std::string skipped;  // the barrier that is switched off

inline Block& block() { return *self.block; }
inline Index thread_index() { return {self.index}; }

// The other threads go on for a while: if a race led here, ThreadSanitizer sees it and ends all.
[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", block().block_index.x, self.index,
               what.c_str());
  std::this_thread::sleep_for(std::chrono::seconds(5));
  std::_Exit(1);
}

inline void barrier(const char* file, int line) {
  if (place(file, line) != skipped) block().barriers[self.barriers++ % 2].wait();
}

// Two sets of slots take turns, so that one wait per gather is enough.
template <class V>
const V* gather(const V& x, const char*) {
  static_assert(sizeof(V) <= kSlot && alignof(V) <= 16 && std::is_trivially_copyable_v<V>);
  Warp& warp = block().warps[self.index / kWarp];
  char* slots = warp.slots[self.gathers++ % 2];
  // Not for ThreadSanitizer's eyes: it would take the wait for an order of memory.
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  std::memcpy(slots + self.index % kWarp * sizeof(V), &x, sizeof(V));
  warp.barrier.wait();
  std::memcpy(self.lanes, slots, kWarp * sizeof(V));
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  return reinterpret_cast<const V*>(self.lanes);
}

// Threads that stay, because ThreadSanitizer takes milliseconds to make one.
class Pool {
 public:
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // job(i) on worker i, for every i < count.
  void run(size_t count, const std::function<void(size_t)>& job) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (workers_.size() < count)
      workers_.emplace_back([this, me = workers_.size()]() { work(me); });
    job_ = &job;
    count_ = left_ = count;
    ++round_;
    wake_.notify_all();
    done_.wait(lock, [this]() { return left_ == 0; });
  }

 private:
  void work(size_t me) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (unsigned seen = 0;;) {
      wake_.wait(lock, [&]() { return stop_ || (round_ != seen && me < count_); });
      if (stop_) return;
      seen = round_;
      lock.unlock();
      (*job_)(me);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(size_t)>* job_ = nullptr;
  size_t count_ = 0, left_ = 0;
  unsigned round_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), several blocks at once.
struct Launcher {
  Pool pool;

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                  A... arguments) {
    for (int64_t first = 0, last; first < blocks; first = last) {
      last = std::min(blocks, first + std::max(kMostThreads / threads, 1));
      std::deque<Block> resident;
      for (int64_t index = first; index < last; ++index)
        resident.emplace_back(index, threads, shared_bytes);
      const size_t count = resident.size() * size_t(threads);
      Barrier start(count);  // the pool's lock would join a thread with those that ended before it
      pool.run(count, [&](size_t i) {
        self.block = &resident[i / size_t(threads)];
        self.index = unsigned(i % size_t(threads));
        self.barriers = self.gathers = 0;
        start.wait();
        kernel(arguments...);
      });
    }
  }
};

template <class T>
using Shared = T*;

template <class T>
T* shared_array(int offset, int count) {
  if (offset < 0 || offset % 16 || offset + count * int(sizeof(T)) > int(block().memory.size()))
    fail("a shared array does not fit into the plan's shared memory");
  return reinterpret_cast<T*>(block().memory.data() + offset);
}

}  // namespace emulation
