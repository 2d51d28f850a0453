// A block as fibers of one thread: each runs until it waits (at a barrier or a gather), and
// which goes next is drawn from a seeded generator. Shared memory is reached through checked
// arrays; a kernel fails with the reason when it
//   - indexes outside of an array, or asks for more than the plan gave;
//   - reads what nobody wrote;
//   - races: two threads touch an element between the same two barriers, one of them writing;
//   - lets some threads of a block wait at a barrier that others never reach.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <functional>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

namespace emulation {

constexpr size_t kStack = size_t(64) << 10;

// Who touched an element of shared memory last, and after which barrier.
struct Shadow {
  int writer = -1, reader = -1;  // thread; reader kMany: several
  unsigned write_phase = 0, read_phase = 0;
};
constexpr int kMany = -2;

// A fiber starts by its context; later switches are jumps, which save no signal mask: far faster.
struct Fiber {
  enum State { kReady, kAtBarrier, kAtGather, kDone };
  ucontext_t context;
  jmp_buf at;
  bool started;
  State state;
  std::string where;
};

struct Block {
  Index block_index{}, block_size{};
  int current = 0;     // thread that runs
  unsigned phase = 0;  // barriers passed
  std::vector<Fiber> fibers;
  std::vector<char> stacks, memory;
  std::vector<Shadow> shadows;    // one per 4 bytes of memory
  std::vector<char> slots;        // two sets of kSlot bytes per thread
  std::vector<unsigned> gathers;  // per thread
  jmp_buf scheduler;
  std::function<void()> body;
  std::string error;
  std::string skipped;             // the barrier that is switched off
  std::set<std::string> barriers;  // all that were met
};

inline Block& block() {
  static Block state;
  return state;
}

inline Index thread_index() { return {unsigned(block().current)}; }

// Ends the kernel: a fiber's exception is kept, and no fiber runs any more.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& what) {
  const Block& b = block();
  throw Failure("block " + std::to_string(b.block_index.x) + ", thread " +
                std::to_string(b.current) + ": " + what);
}

inline void wait(Fiber::State state, const std::string& where) {
  Fiber& fiber = block().fibers[block().current];
  fiber.state = state;
  fiber.where = where;
  if (!_setjmp(fiber.at)) _longjmp(block().scheduler, 1);
}

inline void barrier(const char* file, int line) {
  const std::string where = place(file, line);
  block().barriers.insert(where);
  if (where != block().skipped) wait(Fiber::kAtBarrier, where);
}

// Two sets of slots take turns, so that one wait per gather is enough.
template <class V>
const V* gather(const V& x, const char* what) {
  static_assert(sizeof(V) <= kSlot && alignof(V) <= 16 && std::is_trivially_copyable_v<V>);
  Block& b = block();
  const int me = b.current, lane = me % kWarp, threads = int(b.block_size.x);
  const int set = int(b.gathers[me]++ % 2) * threads;
  char* lanes = b.slots.data() + size_t(set + me - lane) * kSlot;
  std::memcpy(lanes + size_t(lane) * sizeof(V), &x, sizeof(V));
  wait(Fiber::kAtGather, what);
  return reinterpret_cast<const V*>(lanes);
}

inline void run_fiber() {
  Block& b = block();
  try {
    b.body();
  } catch (const std::exception& e) {
    if (b.error.empty()) b.error = e.what();
  }
  b.fibers[b.current].state = Fiber::kDone;
  _longjmp(b.scheduler, 1);
}

// Runs a fiber until it waits or ends.
inline void resume(Fiber& fiber) {
  if (_setjmp(block().scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Lets the fibers in [first, last) go on if all of them wait in this state at the same place.
inline bool release(int first, int last, Fiber::State state) {
  std::vector<Fiber>& fibers = block().fibers;
  for (int t = first; t < last; ++t)
    if (fibers[t].state != state || fibers[t].where != fibers[first].where) return false;
  for (int t = first; t < last; ++t) fibers[t].state = Fiber::kReady;
  return true;
}

inline void run_block(std::mt19937& order) {
  Block& b = block();
  const int threads = int(b.block_size.x);
  b.phase = 0;
  b.fibers.resize(threads);
  b.stacks.resize(size_t(threads) * kStack);
  b.slots.assign(size_t(2 * threads) * kSlot, 0);
  b.gathers.assign(threads, 0);
  b.shadows.assign(b.memory.size() / 4, Shadow{});
  std::memset(b.memory.data(), 0xff, b.memory.size());
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = b.fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = b.stacks.data() + t * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = Fiber::kReady;
    fiber.started = false;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    for (int t = 0; t < threads; ++t)
      if (b.fibers[t].state == Fiber::kReady) ready.push_back(t);
    if (ready.empty()) {
      bool released = false, done = true;
      for (int t = 0; t < threads; t += kWarp)
        released |= release(t, std::min(t + kWarp, threads), Fiber::kAtGather);
      if (released) continue;
      for (const Fiber& fiber : b.fibers) done &= fiber.state == Fiber::kDone;
      if (done) return;
      if (!release(0, threads, Fiber::kAtBarrier))
        throw Failure("threads of a block wait at different places, or some have left");
      ++b.phase;
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (const int t : ready) {
      b.current = t;
      resume(b.fibers[t]);
      if (!b.error.empty()) throw Failure(b.error);
    }
  }
}

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), blocks in a random order.
struct Launcher {
  unsigned seed = 0;
  std::vector<std::array<int64_t, 3>> launches;  // blocks, threads, shared bytes

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes,
                  A... arguments) {
    launches.push_back({blocks, threads, shared_bytes});
    Block& b = block();
    b.error.clear();
    b.block_size.x = unsigned(threads);
    b.memory.resize(size_t(shared_bytes));
    b.body = [=]() { kernel(arguments...); };
    std::mt19937 order(seed);
    std::vector<unsigned> indices(blocks);
    for (int64_t i = 0; i < blocks; ++i) indices[i] = unsigned(i);
    std::shuffle(indices.begin(), indices.end(), order);
    for (const unsigned index : indices) {
      b.block_index.x = index;
      run_block(order);
    }
  }
};

// An array in shared memory: what a pointer is to CUDA, with every access checked.
template <class T>
class Shared {
 public:
  Shared(int offset, int count) : offset_(offset), count_(count) {}

  class Element {
   public:
    Element(int offset) : offset_(offset) {}
    operator T() const {
      Block& b = block();
      Shadow& s = b.shadows[offset_ / 4];
      if (s.writer == -1) fail("reads shared memory that nobody wrote");
      if (s.writer != b.current && s.write_phase == b.phase) race("reads", s.writer, "wrote");
      if (s.read_phase != b.phase || s.reader == -1)
        s.reader = b.current;
      else if (s.reader != b.current)
        s.reader = kMany;
      s.read_phase = b.phase;
      T x;
      std::memcpy(&x, b.memory.data() + offset_, sizeof(T));
      return x;
    }
    const Element& operator=(T x) const {
      Block& b = block();
      Shadow& s = b.shadows[offset_ / 4];
      if (s.writer != -1 && s.writer != b.current && s.write_phase == b.phase)
        race("writes", s.writer, "wrote");
      if (s.reader != -1 && s.reader != b.current && s.read_phase == b.phase)
        race("writes", s.reader, "read");
      s.writer = b.current;
      s.write_phase = b.phase;
      std::memcpy(b.memory.data() + offset_, &x, sizeof(T));
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = T(other); }

   private:
    [[noreturn]] void race(const char* does, int other, const char* did) const {
      fail(std::string("race: ") + does + " byte " + std::to_string(offset_) +
           " of shared memory, which thread " + std::to_string(other) + " " + did +
           " since the last barrier");
    }
    int offset_;
  };

  Element operator[](int i) const {
    if (i < 0 || i >= count_)
      fail("index " + std::to_string(i) + " of a shared array of " + std::to_string(count_));
    return Element(offset_ + i * int(sizeof(T)));
  }

 private:
  int offset_, count_;
};

template <class T>
Shared<T> shared_array(int offset, int count) {
  if (offset < 0 || offset % 16 || offset + count * int(sizeof(T)) > int(block().memory.size()))
    fail("a shared array does not fit into the plan's shared memory");
  return {offset, count};
}

}  // namespace emulation
