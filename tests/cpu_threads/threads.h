// Threads, each with a share of the loop, as PyTorch's pool divides it; nested loops run in the
// caller.
#pragma once
#include <algorithm>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/api.h"

namespace {

int64_t thread_count = 1;
thread_local bool inside = false;

using Jobs = std::vector<std::function<void()>>;

#ifdef __SANITIZE_THREAD__
// New threads, which nothing orders but their creation: a pool's lock would order them, and hide
// races.
void run_jobs(const Jobs& jobs) {
  std::vector<std::thread> threads;
  for (const auto& job : jobs) threads.emplace_back(job);
  for (std::thread& t : threads) t.join();
}
#else
// A pool: the emulator of another processor never gives back all of a thread.
class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 0; i < count; ++i) workers_.emplace_back([this]() { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : workers_) t.join();
  }
  void run(const Jobs& jobs) {
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_ = &jobs;
    next_ = 0;
    left_ = jobs.size();
    wake_.notify_all();
    done_.wait(lock, [this]() { return left_ == 0; });
    jobs_ = nullptr;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this]() { return stop_ || (jobs_ && next_ < jobs_->size()); });
      if (stop_) return;
      const auto& job = (*jobs_)[next_++];
      lock.unlock();
      job();
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Jobs* jobs_ = nullptr;
  size_t next_ = 0, left_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

void run_jobs(const Jobs& jobs) {
  static Pool pool(4);
  pool.run(jobs);
}
#endif

void parallel_for(int64_t count, int64_t grain, mmae::Body body, void* context) {
  if (count <= 0) return;
  const int64_t most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = inside ? 1 : std::min(thread_count, most);
  if (threads == 1) return body(0, count, context);
  const int64_t share = (count + threads - 1) / threads;
  Jobs jobs;
  for (int64_t begin = 0; begin < count; begin += share) {
    int64_t end = std::min(count, begin + share);
#ifdef MMAE_PLANT_RACE
    end = std::min(count, end + 1);
#endif
    jobs.push_back([=]() {
      inside = true;
      body(begin, end, context);
    });
  }
  run_jobs(jobs);
}

mmae::Threads threads() { return {parallel_for, thread_count}; }

}  // namespace
