// CUDA on the host, one block at a time, for tests: enough of the language for csrc/cuda/*.cuh, and
// stricter than a GPU. Every thread of a block is a fiber that runs until it waits (at a barrier or
// a shuffle); which fiber goes next is drawn from a seeded generator. Shared memory is reached
// through checked arrays; a kernel fails with the reason when it
//   - indexes outside of an array, or asks for more than the plan gave;
//   - reads what nobody wrote;
//   - races: two threads touch an element between the same two barriers, one of them writing;
//   - lets some threads of a block wait at a barrier that others never reach.
// A barrier (file:line) can be switched off, which must make a kernel fail that needs it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ inline
#define __launch_bounds__(...)
#define __syncthreads() emulation::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, x, lane) emulation::shuffle_xor(x, lane)
#define __reduce_max_sync(mask, x) emulation::reduce_max(x)
#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block().block_index)
#define blockDim (emulation::block().block_size)
#define MMAE_ASSERT(condition) \
  if (!(condition)) emulation::fail(#condition " does not hold", __FILE__, __LINE__)

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t(64) << 10;

struct Index {
  unsigned x;
};

// Who touched an element of shared memory last, and after which barrier.
struct Shadow {
  int writer = -1, reader = -1;  // thread; reader kMany: several
  unsigned write_phase = 0, read_phase = 0;
};
constexpr int kMany = -2;

// A fiber starts by its context; later switches are jumps, which save no signal mask: far faster.
struct Fiber {
  enum State { kReady, kAtBarrier, kAtShuffle, kDone };
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
  std::vector<Shadow> shadows;  // one per 4 bytes of memory
  std::vector<double> exchange;
  std::vector<unsigned> shuffles;  // per thread
  std::vector<std::array<uint32_t, 6>> operands;
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

inline std::string place(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

// Ends the kernel: a fiber's exception is kept, and no fiber runs any more.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& what) {
  const Block& b = block();
  throw Failure("block " + std::to_string(b.block_index.x) + ", thread " +
                std::to_string(b.current) + ": " + what);
}
[[noreturn]] inline void fail(const std::string& what, const char* file, int line) {
  fail(what + " at " + place(file, line));
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

// Two sets of slots take turns, so that one wait per shuffle is enough.
inline double shuffle_xor(double x, int lane) {
  Block& b = block();
  const int me = b.current, threads = int(b.block_size.x);
  const int set = int(b.shuffles[me]++ % 2) * threads;
  b.exchange[set + me] = x;
  wait(Fiber::kAtShuffle, "shuffle");
  return b.exchange[set + (me ^ lane)];
}

inline uint32_t reduce_max(uint32_t x) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = std::max(x, uint32_t(shuffle_xor(x, lane)));
  return x;
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
  b.exchange.assign(size_t(2 * threads), 0);
  b.shuffles.assign(threads, 0);
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
        released |= release(t, std::min(t + kWarp, threads), Fiber::kAtShuffle);
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

inline float from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

// cvt.rna.tf32.f32.
inline float to_tf32(float x) {
  return x - x == 0 ? from_bits((to_bits(x) + 0x1000) & ~0x1fffu) : x;
}

// mma.sync: every lane gives its operands, 4 words of the left and 2 of the right, and takes its
// part d of the product. Word w of an operand is at row or column lane / 4 (+ 8) and at word lane %
// 4
// (+ 4) of a row of 8; value(word, half) is the number in it, of `halves`. Sums are truncated to
// float32, as tensor cores do, after each half of the words.
template <class Value>
void mma(float (&d)[4], const std::array<uint32_t, 6>& own, int halves, const Value& value) {
  Block& state = block();
  const int me = state.current, threads = int(state.block_size.x), warp = me / kWarp * kWarp;
  const int set = int(state.shuffles[me]++ % 2) * threads;
  if (state.operands.size() < size_t(2 * threads)) state.operands.resize(size_t(2 * threads));
  state.operands[set + me] = own;
  wait(Fiber::kAtShuffle, "mma");
  for (int e = 0; e < 4; ++e) {
    const int row = me % kWarp / 4 + e / 2 * 8, column = me % 4 * 2 + e % 2;
    for (int p = 0; p < 8; p += 4) {
      double sum = d[e];
      for (int lane = 0; lane < 4; ++lane) {
        const uint32_t left = state.operands[set + warp + row % 8 * 4 + lane][row / 8 + p / 2];
        const uint32_t right = state.operands[set + warp + column * 4 + lane][4 + p / 4];
        for (int half = 0; half < halves; ++half) sum += value(left, half) * value(right, half);
      }
      d[e] = float(sum);
      if (std::fabs(d[e]) > std::fabs(sum)) d[e] = std::nextafter(d[e], 0.0f);
    }
  }
}

inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  std::array<uint32_t, 6> own;
  std::transform(a, a + 4, own.begin(), to_bits);
  std::transform(b, b + 2, own.begin() + 4, to_bits);
  for (const uint32_t word : own) {
    const float x = from_bits(word);
    if (x - x == 0 && to_tf32(x) != x) fail("an operand of mma is not a TF32 number");
  }
  mma(d, own, 1, [](uint32_t word, int) { return double(from_bits(word)); });
}

inline void load_vector(const void* p, uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector is not aligned");
  std::memcpy(words, p, 16);
}

}  // namespace emulation

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return emulation::from_bits(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = emulation::to_bits(x);
  return {uint16_t(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent ? std::ldexp(float(1024 + fraction), exponent - 25)
                         : std::ldexp(float(fraction), -24);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return x.bits >> 15 ? -value : value;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(emulation::to_bits(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -14) : -14;
  // In units of the last place, rounded to nearest even; a carry moves into the exponent by itself.
  const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + (exponent + 14) * 1024))};
}

namespace emulation {

inline float number(uint32_t word, int half, bool bfloat16) {
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  return bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

inline void mma_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      bool bfloat16) {
  mma(d, {a[0], a[1], a[2], a[3], b[0], b[1]}, 2,
      [=](uint32_t word, int half) { return double(number(word, half, bfloat16)); });
}

inline uint32_t multiply_pair(uint32_t pair, float factor) {
  const __nv_bfloat16 low = __float2bfloat16_rn(number(pair, 0, true) * factor);
  const __nv_bfloat16 high = __float2bfloat16_rn(number(pair, 1, true) * factor);
  return low.bits | uint32_t(high.bits) << 16;
}

}  // namespace emulation
